"""What every test runs under: eight CPU devices, and strict promotion."""

import gc
import os
import pathlib
import sys


# Before jax is imported, which is when it reads them. A process of pytest-xdist has not the
# command line of the one that started it, but it has its environment.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _flags = os.environ.get("XLA_FLAGS", "").split()
    _flags += ["--xla_force_host_platform_device_count=8"]
    if "--thorough" not in sys.argv:
        # Most of what is computed here is computed once, and most of the time goes to
        # compiling. Without optimisation it takes half of that, with the older of XLA's two
        # code generators (while it has both) and one module a program a third of the rest.
        _flags += [
            "--xla_backend_optimization_level=0",
            "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
    os.environ["XLA_FLAGS"] = " ".join(_flags)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.pop("EQX_ATTENTION_TABLE", None)  # What `Auto` chooses, on any machine.

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402


jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)

# No deadlines: the first example of a test compiles, the others do not.
# Not random, so that a failure in CI is one that can be had again.
hypothesis.settings.register_profile(
    "default",
    database=None,
    deadline=None,
    derandomize=True,
    max_examples=12,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "quick", hypothesis.settings.get_profile("default"), max_examples=5
)
hypothesis.settings.register_profile(
    "thorough",
    hypothesis.settings.get_profile("default"),
    derandomize=False,
    max_examples=500,
    print_blob=True,
)


def pytest_addoption(parser):
    parser.addoption(
        "--quick",
        action="store_true",
        help="leave out the tests marked slow, and fewer examples of each property",
    )
    parser.addoption(
        "--thorough",
        action="store_true",
        help="also the tests marked thorough, and many more examples of each property",
    )


def _profile(config) -> str:
    if config.getoption("--thorough"):
        return "thorough"
    return "quick" if config.getoption("--quick") else "default"


def pytest_configure(config):
    if config.getoption("--hypothesis-profile") is None:
        hypothesis.settings.load_profile(_profile(config))


def pytest_collection_modifyitems(config, items):
    left_out = {
        "default": ("thorough",),
        "quick": ("slow", "thorough"),
        "thorough": (),
    }[_profile(config)]

    def is_left_out(item):
        return any(item.get_closest_marker(name) for name in left_out)

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]


def _num_memory_maps() -> int:
    maps = pathlib.Path("/proc/self/maps")
    return len(maps.read_bytes().splitlines()) if maps.exists() else 0


@pytest.fixture(autouse=True)
def forget_compiled_programs():
    """Each compiled program holds several memory maps, of which Linux gives a process
    65,530: a long run of small compilations dies in LLVM with "Unable to allocate section
    memory" unless some are dropped."""
    yield
    if _num_memory_maps() > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """The test runs in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)
