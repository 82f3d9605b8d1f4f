"""What mkdocs runs while it builds the documentation."""

import os
import pathlib
import subprocess
import sys
import typing


# So that jaxtyping shows `Float[Array, "q_len"]`, and not where that is defined. It has
# to be set before jaxtyping is imported, and only documentation can be made after that.
typing.GENERATING_DOCUMENTATION = "eqx_attention"  # pyright: ignore


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    if page.file.src_uri != "features.md":
        return markdown
    script = pathlib.Path(__file__).with_name("_features.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return markdown.replace("<!-- features -->", done.stdout)
