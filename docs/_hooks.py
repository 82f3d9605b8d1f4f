"""What mkdocs runs while it builds the documentation, and after."""

import functools as ft
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import types
import typing


# So that jaxtyping shows `Float[Array, "q_len"]`, and not where that is defined. It has
# to be set before jaxtyping is imported, and only documentation can be made after that.
typing.GENERATING_DOCUMENTATION = "eqx_attention"  # pyright: ignore

_HERE = pathlib.Path(__file__).parent
_FENCE = re.compile(r"^```python\n.*?^```\n", re.DOTALL | re.MULTILINE)


def _run(script: str, *arguments: str) -> str:
    """What a script of this folder prints."""
    done = subprocess.run(
        [sys.executable, str(_HERE / script), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return done.stdout


def _of_benchmarks(name: str) -> str:
    return runpy.run_path(str(_HERE / "_benchmarks.py"))[name]()


_GENERATED = {
    "features": ft.partial(_run, "_features.py"),
    "gpu": ft.partial(_of_benchmarks, "markdown_of_results"),
    "gpus": ft.partial(_of_benchmarks, "markdown_of_gpus"),
    "decode": ft.partial(_of_benchmarks, "markdown_of_decoding"),
    "nsight": ft.partial(_of_benchmarks, "markdown_of_nsight"),
}


def _generated(mark: re.Match[str]) -> str:
    """What stands for `<!-- name -->`, `<!-- plot name -->` or `<!-- drawing name -->`."""
    kind, _, name = mark[1].rpartition(" ")
    if kind == "plot":
        return _run("_plots.py", name)
    if kind == "drawing":
        drawing = (_HERE / "_static" / f"{name}.svg").read_text()
        return f'<figure class="chart drawing">\n{drawing}</figure>\n'
    return _GENERATED[name]()


def _with_pictures(markdown: str, path: str) -> str:
    """Beside each snippet that gives `mask` or `score` a value, what that looks like."""
    pictures = iter(json.loads(_run("_pictures.py", path)))

    def beside(fence: re.Match[str]) -> str:
        picture = next(pictures)
        if picture is None:
            return fence[0]
        return f'<div class="pictured" markdown>\n\n{fence[0]}\n{picture}\n</div>\n'

    return _FENCE.sub(beside, markdown)


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    """Puts tables, charts and pictures in place of what stands for them."""
    markdown = re.sub(r"^<!-- (\w[\w -]*) -->$", _generated, markdown, flags=re.MULTILINE)
    if "<!-- pictures: " in markdown:
        markdown = _with_pictures(markdown, page.file.abs_src_path)
    return markdown


def on_post_build(config, **kwargs) -> None:
    """**Raises:** `ValueError` if a public name cannot be linked to in what was built."""
    import eqx_attention as eqa

    pages = [p.read_text() for p in pathlib.Path(config["site_dir"]).rglob("*.html")]
    anchors = {
        x for page in pages for x in re.findall(r'id="(eqx_attention\.[^"]+)"', page)
    }
    modules = {"eqx_attention": eqa}
    modules |= {f"eqx_attention.{x}": getattr(eqa, x) for x in ("testing", "extend")}
    missing = {
        f"{path}.{name}"
        for path, module in modules.items()
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    } - anchors
    if missing:
        raise ValueError(f"Without an anchor on any page: {sorted(missing)}.")
