"""What `import eqx_attention` brings in, and what is in the wheel."""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import eqx_attention
import pytest


_root = pathlib.Path(__file__).parent.parent


def _run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=_root,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    """Neither what is only for examples and tests, nor kernels, nor a backend."""
    code = """
import sys
import equinox, jax
before = set(sys.modules)
import eqx_attention
print(*sorted(set(sys.modules) - before))
import jax._src.xla_bridge
assert not jax._src.xla_bridge._backends, "the import started a backend"
"""
    modules = _run(code).split()
    assert "eqx_attention._attention" in modules
    heavy = re.compile(
        r"matplotlib|optax|hypothesis|pytest|scipy|tqdm|torch|typer|rich|click"
        r"|jax\.experimental\.pallas|jax\._src\.pallas"
        r"|eqx_attention\.(testing|benchmark)"
    )
    assert [name for name in modules if heavy.match(name)] == []


def test_import_is_quick(tmp_path):
    """The package adds little to the time that jax and equinox take to import."""
    code = """
import time
import equinox, jax
start = time.process_time()
import eqx_attention
print(time.process_time() - start)
"""
    # The first import compiles to bytecode, as installing does.
    bytecode = dict(PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(tmp_path))
    seconds = [float(_run(code, **bytecode)) for _ in range(3)]
    # 0.2 to 0.3 where it was measured.
    assert min(seconds) < 0.6, seconds


def test_lazy_submodules():
    code = """
import sys
import eqx_attention as eqa
print(eqa.testing.__name__, eqa.benchmark.__name__)
print(*(name for name in ("matplotlib", "rich", "typer") if name in sys.modules))
"""
    assert _run(code).split() == ["eqx_attention.testing", "eqx_attention.benchmark"]


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no_such_name"):
        eqx_attention.no_such_name  # pyright: ignore


def test_metadata():
    project = tomllib.loads((_root / "pyproject.toml").read_text())["project"]
    metadata = importlib.metadata.metadata("eqx_attention")
    assert metadata["Name"] == "eqx_attention"
    assert metadata["Version"] == project["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    required = metadata.get_all("Requires-Dist") or []
    always = {re.split(r"[^\w-]", name)[0] for name in required if "extra" not in name}
    assert always == {"beartype", "equinox", "jax", "jaxtyping"}
    extras = {"benchmark", "cuda12", "cuda13", "examples", "pretrained"}
    assert set(metadata.get_all("Provides-Extra") or []) == extras


def test_lock_names_only_the_standard_registry():
    lock = tomllib.loads((_root / "uv.lock").read_text())
    for package in lock["package"]:
        if package["name"] == "eqx-attention":
            assert package["source"] == {"editable": "."}
        else:
            assert package["source"] == {"registry": "https://pypi.org/simple"}
            files = package.get("wheels", []) + [package.get("sdist", {})]
            hosts = {file["url"].split("/")[2] for file in files if "url" in file}
            assert hosts == {"files.pythonhosted.org"}
