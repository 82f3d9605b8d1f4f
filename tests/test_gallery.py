"""The short examples: each does what it says, and fails without its mask or score. And
the pages of all that are quoted."""

import importlib
import pathlib
import re
import sys
import textwrap

import jax
import pytest


_root = pathlib.Path(__file__).parent.parent
# As Python does for a program, whose own modules lie beside it.
sys.path.insert(0, str(_root / "examples"))

# Flags by which each takes a second or two.
SCRIPTS = {
    "vit": ["--side=5", "--steps=120", "--batch=16"],
    "encoder_decoder": ["--steps=120"],
    "packed_documents": ["--seq=32", "--documents=10"],
    "streaming": ["--context=96", "--chunk=8", "--window=15"],
    "alibi": ["--steps=60", "--times=4"],
    "t5": ["--steps=120"],
}
# Those that test_gallery_training.py runs.
TRAINING = (
    "soft_cap",
    "learned_mask",
    "fine_tune",
    "logsumexp",
    "hessian_vector",
    "sentence_encoder",
)

# What is taken out, and what the example then says.
WITHOUT = [
    ("vit", "bias", "of the variance is unexplained"),
    ("encoder_decoder", "padding", "are sorted"),
    # Compiles a step of its own, as no other does.
    pytest.param("encoder_decoder", "causal", "are sorted", marks=pytest.mark.thorough),
    ("packed_documents", "segments", "are not what they are alone"),
    ("packed_documents", "positions", "are not what they are alone"),
    ("packed_documents", "borders", "are not what they are alone"),
    ("streaming", "window", "the cache is not of the size"),
    ("streaming", "first", "streamed, it differs"),
    ("streaming", "sinks", "streamed, it differs"),
    ("alibi", "alibi", "does not reach beyond"),
    ("t5", "bias", "an accuracy of"),
]


def _main(name: str, *arguments: str):
    # As users run it: optax promotes dtypes.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return importlib.import_module(name).main([*SCRIPTS[name], *arguments])


def _words(text: str) -> list[str]:
    """What is printed, but for numbers and layout."""
    return re.findall(r"[A-Za-z]+", re.sub(r"\d[\d.,]*(e[-+]\d+)?", "", text))


def _page(name: str) -> str:
    return (_root / "docs" / "examples" / f"{name}.md").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, capsys):
    outcome = _main(name)
    printed = capsys.readouterr().out
    assert isinstance(outcome, float)
    # Its page shows what it prints.
    (shown,) = re.findall(r"^```text\n(.*?)^```$", _page(name), re.DOTALL | re.MULTILINE)
    assert _words(shown) == _words(printed) != []


@pytest.mark.slow
@pytest.mark.parametrize("name, part, message", WITHOUT)
def test_fails_without(name, part, message, capsys):
    with pytest.raises(AssertionError, match=message):
        _main(name, "--without", part)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SCRIPTS, *TRAINING])
def test_page(name):
    """What the page quotes is in the script that it names, and its own script is short."""
    own = f"examples/{name}.py"
    assert len((_root / own).read_text().splitlines()) <= 120
    fence = r'^```python title="(.*?)"\n(.*?)^```$'
    quoted = re.findall(fence, _page(name), re.DOTALL | re.MULTILINE)
    assert own in dict(quoted)
    for path, code in quoted:
        script = (_root / path).read_text()
        assert any(textwrap.indent(code, " " * n) in script for n in (0, 4, 8, 12)), code


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_all_parts(name):
    """All that can be left out is left out by a test."""
    script = (_root / "examples" / f"{name}.py").read_text()
    parts = re.findall(r'"(\w+)"', re.findall(r"parts=\((.*?)\)", script)[0])
    cases = (getattr(case, "values", case) for case in WITHOUT)
    assert parts == [part for other, part, _ in cases if other == name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, arguments, message",
    (
        ("streaming", ["--chunk=7"], "--chunk must divide --context; got 7 and 96"),
        ("t5", ["--seq=3"], "argument --seq: expected an integer of at least 4; got 3"),
        ("t5", ["--steps=0"], "expected an integer of at least 1; got 0"),
        ("vit", ["--seed=one"], "expected an integer of at least 0; got one"),
        ("alibi", ["--without=causal"], "--without: invalid choice: 'causal'"),
    ),
)
def test_bad_flags(name, arguments, message, capsys):
    with pytest.raises(SystemExit):
        _main(name, *arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]
