"""The snippets of the README and the docs run; every public name is documented."""

import importlib
import inspect
import pathlib
import re
import types
import xml.etree.ElementTree as ElementTree

import eqx_attention as eqa
import jax
import matplotlib.pyplot as plt
import pytest
from eqx_attention import _device


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


def _public_names(module=eqa) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
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
    # Optax relies on the promotion that readers have.
    with jax.numpy_dtype_promotion("standard"):
        for line, code in _snippets(page.read_text()):
            # Blank lines in front, so that a traceback gives the line in the page.
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
    plt.close("all")


def test_getting_started_shows_what_explain_says(capsys):
    page = (_root / "docs" / "getting-started.md").read_text()
    above, call, below = page.partition("print(attention.explain(query, key_, value))\n```")
    namespace = {}
    for _, code in _snippets(above + call):
        exec(code, namespace)
    (shown,) = re.findall(r"^```text\n(.*?)^```$", below, re.DOTALL | re.MULTILINE)
    # Newer versions of jax have the kernels.
    both = (capsys.readouterr().out, shown)
    said, shown = (re.sub("it needs jax .*?; ", "", text) for text in both)
    assert said.endswith(shown) and shown.startswith("vanilla: ")


def test_readme_is_short_and_has_the_two_commands():
    lines = (_root / "README.md").read_text().splitlines()
    assert 80 <= len(lines) <= 120
    assert lines.count("pip install uv && uv run examples/train_lm.py") == 1
    assert lines.count("pip install uv && uv run pytest") == 1


def test_pages_say_what_the_kernels_need():
    """The oldest Python that the package takes gets a jax that has no kernels."""
    oldest = ".".join(map(str, _device._OLDEST_JAX))
    names = ("index", "getting-started", "how-to-choose", "kernels")
    for page in (_root / "README.md", *(_root / f"docs/{name}.md" for name in names)):
        assert re.search(rf"JAX {oldest}\b.*Python 3\.12", page.read_text()), page


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
    of_extend = {f"extend.{name}" for name in _public_names(eqa.extend)}
    assert of_extend <= set(documented)


def test_every_public_name_is_reached():
    """Each is also where it is of use: on a page that is not the reference."""
    guides = [page for page in _pages if page.parent.name != "api"]
    words = {word for page in guides for word in re.findall(r"\w+", page.read_text())}
    assert set(_public_names()) - words == set()


def test_every_page_is_in_the_navigation():
    _, _, nav = (_root / "mkdocs.yml").read_text().partition("\nnav:\n")
    listed = re.findall(r"(\S+\.md)$", nav, re.MULTILINE)
    docs = _root / "docs"
    assert sorted(listed) == sorted(str(p.relative_to(docs)) for p in docs.rglob("*.md"))


def test_every_mask_and_score_has_a_picture():
    text = (_root / "docs" / "masks-and-scores.md").read_text()
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        title, _, body = section.partition("\n")
        found |= {name: body for name in title.split(", ")}
    abstract = (eqa.AbstractMask, eqa.AbstractScore)
    expected = {
        name
        for name in _public_names()
        if inspect.isclass(getattr(eqa, name)) and issubclass(getattr(eqa, name), abstract)
    } - {"AbstractMask", "AbstractScore"}
    assert set(found) == expected | {"PrefixLM"}
    for name in set(found) - {"And", "Or", "Not", "BlockMask"}:
        assert re.search(rf"^(mask|score) = .*eqa\.{name}\b", found[name], re.MULTILINE)


def _docs_module(name, monkeypatch):
    monkeypatch.syspath_prepend(str(_root / "docs"))
    return importlib.import_module(name)


def _shapes(drawing: str, tag: str):
    """The elements of a drawing that is put into a page; it is one block of Markdown."""
    assert "\n\n" not in drawing and "nan" not in drawing
    return ElementTree.fromstring(drawing).iter(tag)


def test_pictures_show_what_a_mask_sees(monkeypatch):
    pictures = _docs_module("_pictures", monkeypatch)
    snippets = (
        "import eqx_attention as eqa\nimport numpy as np",
        "query = key_ = np.zeros((6, 1, 1))",
        "mask = eqa.Causal() & eqa.SlidingWindow(2)",
    )
    page = "".join(f"```python\n{code}\n```\n" for code in snippets)
    *others, drawn = pictures.pictures(page)
    assert others == [None, None]
    (path,) = _shapes(drawn, "path")
    cell = 160 / 6
    seen = sum(float(x) for x in re.findall(r"h(\d[\d.]*)v", path.get("d"))) / cell
    assert abs(seen - 15) < 0.1  # 1, 2 and then 3 keys a query
    curve = pictures.of_score(eqa.SoftCap(20.0), 1, 4, 4)
    (line,) = _shapes(curve, "polyline")
    x, y = line.get("points").split()[-1].split(",")  # 20 tanh(60 / 20), upwards
    assert float(x) == 160 and abs(float(y) - (80 - 80 * 19.9 / 60)) < 0.1


def test_charts_show_what_was_measured(monkeypatch):
    plots = _docs_module("_plots", monkeypatch)
    text = "".join(page.read_text() for page in _pages)
    for name, draw in plots.PLOTS.items():
        assert f"<!-- plot {name} -->" in text
        assert list(_shapes(draw(), "svg"))
    charts = importlib.import_module("_charts")
    bars = charts.bars("A", {"of": {"one": 3.0, "two": 6.0}}, ("one", "two"), "ms")
    one, two = (float(x.get("width")) for x in _shapes(bars, "rect"))
    assert one == pytest.approx(two / 2, abs=0.1)
    lines = charts.lines("B", {"one": [(1024, 10.0), (2048, 1000.0)]}, "tokens", log=True)
    low, high = (float(x.get("cy")) for x in _shapes(lines, "circle"))
    assert (low, high) == (250, 34)  # on the lowest tick and on the highest


@pytest.mark.parametrize("name", _public_names())
def test_public_names_have_docstrings(name):
    value = getattr(eqa, name)
    assert inspect.isclass(value) or callable(value)
    # Not one that was inherited, nor what a dataclass makes up from its fields.
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc and not doc.startswith(f"{name}(")
