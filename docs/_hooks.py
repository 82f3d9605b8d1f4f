"""What mkdocs runs while it builds the documentation."""

import functools as ft
import os
import pathlib
import runpy
import subprocess
import sys
import typing


# So that jaxtyping shows `Float[Array, "q_len"]`, and not where that is defined. It has
# to be set before jaxtyping is imported, and only documentation can be made after that.
typing.GENERATING_DOCUMENTATION = "eqx_attention"  # pyright: ignore


def _features() -> str:
    script = pathlib.Path(__file__).with_name("_features.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return done.stdout


def _of_benchmarks(name: str) -> str:
    script = pathlib.Path(__file__).with_name("_benchmarks.py")
    return runpy.run_path(str(script))[name]()


_GENERATED = {
    "features.md": {"<!-- features -->": _features},
    "benchmarks.md": {"<!-- gpu -->": ft.partial(_of_benchmarks, "markdown_of_results")},
    "which-cache.md": {
        "<!-- decode -->": ft.partial(_of_benchmarks, "markdown_of_decoding")
    },
}


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    """Puts tables in place of what stands for them."""
    for mark, generate in _GENERATED.get(page.file.src_uri, {}).items():
        if mark in markdown:
            markdown = markdown.replace(mark, generate())
    return markdown
