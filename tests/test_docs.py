"""The snippets of the README and the docs run; every public name is documented."""

import inspect
import pathlib
import re
import types

import eqx_attention as eqa
import matplotlib.pyplot as plt
import pytest


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


_root = pathlib.Path(__file__).parent.parent
_pages = [_root / "README.md", *sorted((_root / "docs").rglob("*.md"))]
_fence = re.compile(r"^( *)```python\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def _snippets(text: str) -> list[tuple[int, str]]:
    """The line number and the code of each snippet."""
    return [
        (
            text[: match.start()].count("\n") + 1,
            inspect.cleandoc("\n" + match[2]),
        )
        for match in _fence.finditer(text)
    ]


def _public_names() -> list[str]:
    return [
        name
        for name, value in vars(eqa).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    ]


_with_snippets = [page for page in _pages if _snippets(page.read_text())]


@pytest.mark.parametrize(
    "page", _with_snippets, ids=lambda page: str(page.relative_to(_root))
)
def test_snippets(page, tmp_path, monkeypatch):
    """The snippets of a page run in order, each seeing the names of those before it."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "snippet"}
    for line, code in _snippets(page.read_text()):
        # Blank lines in front, so that a traceback gives the line in the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
    plt.close("all")


def test_readme_is_short_and_has_the_two_commands():
    lines = (_root / "README.md").read_text().splitlines()
    assert 80 <= len(lines) <= 120
    assert lines.count("pip install uv && uv run examples/train_lm.py") == 1
    assert lines.count("pip install uv && uv run pytest") == 1


def test_every_public_name_is_in_the_docs():
    documented = [
        name
        for page in (_root / "docs" / "api").glob("*.md")
        for name in re.findall(
            r"^ *::: eqx_attention\.(\S+)$", page.read_text(), re.MULTILINE
        )
    ]
    assert len(documented) == len(set(documented)), "documented twice"
    assert set(_public_names()) - set(documented) == set(), "not in docs/api"
    # Those that are imported when first used are no attributes until then.
    missing = [name for name in documented if not hasattr(eqa, name.split(".")[0])]
    assert missing == [], "in docs/api, but not public"


@pytest.mark.parametrize("name", _public_names())
def test_public_names_have_docstrings(name):
    value = getattr(eqa, name)
    assert inspect.isclass(value) or callable(value)
    # Not one that was inherited, nor what a dataclass makes up from its fields.
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc and not doc.startswith(f"{name}(")
