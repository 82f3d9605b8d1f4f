"""The example: `examples/generate.py`, and what of `examples/lm` generates text."""

import dataclasses
import functools
import pathlib
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .helpers import fast_jit


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


# As Python does for the program, whose own modules lie beside it.
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import generate  # noqa: E402
import train_lm  # noqa: E402
from lm import checkpoint, sample  # noqa: E402
from lm.caches import CACHES, CHUNK, init_caches, num_bytes  # noqa: E402
from lm.config import RunConfig  # noqa: E402
from lm.model import LanguageModel  # noqa: E402
from lm.pick import keep_top_k, keep_top_p, pick, Sampling  # noqa: E402
from lm.train import init_state, State  # noqa: E402


_tiny = RunConfig(
    **dict(steps=3, batch=2, seq=8, width=16, depth=1),
    **dict(heads=4, kv_heads=2, ff_block=8, mask="window:5"),
)
_greedy = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    # Larger weights, so that the likeliest byte is not just the last one.
    return jax.tree.map(lambda x: 3 * x, LanguageModel(_tiny, key=jr.key(1)))


def _generate(model, prompts, num_bytes, sampling=_greedy, kind="static"):
    capacity = max(map(len, prompts)) + num_bytes
    caches = init_caches(_tiny, kind, len(prompts), capacity)
    steps = list(sample.generate(model, prompts, num_bytes, caches, sampling))
    return [list(sequence) for sequence in zip(*steps)]


_logits = st.lists(st.floats(-20, 20, width=32), min_size=9, max_size=9)


@hypothesis.given(_logits, st.integers(1, 9))
def test_top_k(logits, k):
    logits = np.array(logits, np.float32)
    kept = np.asarray(keep_top_k(jnp.asarray(logits), k))
    chosen = kept > -np.inf
    assert chosen.sum() == k
    assert (kept[chosen] == logits[chosen]).all()
    assert logits[chosen].min() >= logits[~chosen].max(initial=-np.inf)


@hypothesis.given(_logits, st.floats(0.01, 0.99))
def test_top_p(logits, p):
    """The fewest that reach `p`; and what is drawn from is their probabilities, made to add
    up to one again."""
    logits = np.array(logits, np.float32)
    kept = np.asarray(keep_top_p(jnp.asarray(logits), p))
    chosen = kept > -np.inf
    assert (kept[chosen] == logits[chosen]).all()
    assert logits[chosen].min() >= logits[~chosen].max(initial=-np.inf)
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum()
    assert exact[chosen].sum() >= p - 1e-5
    assert exact[chosen].sum() - exact[chosen].min() < p + 1e-5
    renormalised = np.where(chosen, exact, 0) / exact[chosen].sum()
    np.testing.assert_allclose(jax.nn.softmax(kept), renormalised, atol=1e-5)


def test_pick():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.3, 0.2]))
    keys = jr.split(jr.key(0), 4000)

    @fast_jit
    def draw(options):
        return [jax.vmap(lambda key: pick(logits, x, key))(keys) for x in options]

    options = (
        Sampling(temperature=1.0, top_k=4),
        Sampling(temperature=1.0, top_k=2),
        Sampling(temperature=1.0, top_k=4, top_p=0.6),
        # What is left of the three likeliest, and not of all, is to reach 0.7.
        Sampling(temperature=1.0, top_k=3, top_p=0.7),
        Sampling(temperature=0.5, top_k=2),
        Sampling(temperature=0.0, top_k=4),
    )
    expected = (
        [0.1, 0.4, 0.3, 0.2],
        [0, 4 / 7, 3 / 7, 0],
        [0, 4 / 7, 3 / 7, 0],
        [0, 4 / 7, 3 / 7, 0],
        [0, 16 / 25, 9 / 25, 0],
        [0, 1, 0, 0],
    )
    for drawn, frequencies in zip(draw(options), expected):
        counts = np.bincount(drawn, minlength=4)
        assert (counts[np.array(frequencies) == 0] == 0).all()
        np.testing.assert_allclose(counts / 4000, frequencies, atol=0.03)


def _read_anew(model, prompts, num_bytes, kind=None):
    """Greedily, reading everything at once, and anew for each byte."""
    texts = np.zeros((len(prompts), max(map(len, prompts)) + num_bytes), np.int32)
    lengths = np.array([len(prompt) for prompt in prompts])
    for text, prompt in zip(texts, prompts):
        text[: len(prompt)] = list(prompt)
    caches = () if kind is None else init_caches(_tiny, kind, *texts.shape)
    forward = fast_jit(jax.vmap(lambda tokens, caches: model(tokens, caches)[0]))
    for i in range(num_bytes):
        # What comes later is not seen.
        logits = np.asarray(forward(jnp.asarray(texts), caches))
        for text, n, row in zip(texts, lengths + i, logits):
            text[n] = row[n - 1].argmax()
    return [t[n : n + num_bytes].tolist() for t, n in zip(texts, lengths)]


# One is read in two chunks.
_prompts, _num_bytes = (b"what is " * 9, b"a", b"is it"), 12


@pytest.fixture(scope="module")
def expected(model):
    return _read_anew(model, _prompts, _num_bytes)


@pytest.mark.parametrize("kind", CACHES)
def test_through_the_cache(kind, model, expected):
    """A batch of prompts of different lengths, in chunks, and then byte by byte."""
    got = _generate(model, _prompts, _num_bytes, kind=kind)
    assert len(set(got[0])) > 3
    if kind == "int8":
        # Not what it is without a cache, but the same in whatever parts it is read.
        expected = _read_anew(model, _prompts, _num_bytes, kind)
    assert got == expected


def test_num_bytes():
    """That of a rolling cache does not depend on how long the text gets."""
    for capacity in (50, 20_000):
        rolling = init_caches(_tiny, "rolling", 2, capacity)
        assert num_bytes(rolling) == 2 * ((7 + CHUNK) * 2 * 2 * 4 * 4 + 4)
    # A byte for each number, and a scale for each head.
    assert num_bytes(init_caches(_tiny, "int8", 1, 20)) == 20 * 2 * 2 * (4 + 4) + 4


def test_seeds(model):
    options = Sampling(temperature=1.0, top_k=256)
    draw = functools.partial(_generate, model, num_bytes=6, sampling=options)
    first = draw((b"ab", b"c"))
    assert draw((b"ab", b"c")) == first
    assert draw((b"ab", b"de"))[0] == first[0]
    same = draw((b"ab", b"ab"))
    assert same[0] == first[0] and same[1] != first[0]
    other = dataclasses.replace(options, sample_seed=1)
    first_bytes = _generate(model, (b"ab", b"c"), 1, other)
    assert [x[0] for x in first_bytes] != [x[0] for x in first]


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """The directory of a run that is only a checkpoint."""
    out = tmp_path_factory.mktemp("run")
    state = dataclasses.replace(init_state(_tiny), model=model)
    header = {"config": dataclasses.asdict(_tiny), "text_sha256": ""}
    checkpoint.save(out / "checkpoint", header, state)
    return out


def test_program(run, expected, capsys):
    arguments = [f"--checkpoint={run}", f"--tokens={_num_bytes}", "--greedy"]
    arguments += [f"--prompt={prompt.decode()}" for prompt in _prompts]
    generate.main(arguments)
    text = capsys.readouterr().out
    for prompt, sequence in zip(_prompts, expected):
        assert (prompt + bytes(sequence)).decode(errors="replace") in text
    # Two heads of four channels, of keys and of values; and how many there are.
    assert f"static, {3 * (84 * 2 * 2 * 4 * 4 + 4):,} bytes for 3 x 84 tokens" in text
    assert "parameters" in text and "tokens/s" in text
    generate.main(arguments)
    again = capsys.readouterr().out
    assert again.split("speed")[0] == text.split("speed")[0]


def test_program_that_trains(monkeypatch, tmp_path, capsys):
    def train(run, out, checkpoint_every) -> State:
        assert (run.config.steps, checkpoint_every) == (2, 2)
        assert (out / "checkpoint").exists()
        return run.state

    (tmp_path / "text").write_text("What is it? " * 9)
    config = functools.partial(dataclasses.replace, _tiny, text=str(tmp_path / "text"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "RunConfig", config)
    monkeypatch.setattr(train_lm, "train", train)
    generate.main(["--steps=2", "--tokens=1"])
    assert "training    2 steps" in capsys.readouterr().out
    generate.main(["--checkpoint=runs/generate", "--tokens=1"])


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--prompt="], "--prompt must not be empty"),
        (["--prompt=a", "--prompt="], "--prompt must not be empty"),
        (["--tokens=0"], "--tokens must be positive; got 0"),
        (["--tokens=many"], "--tokens"),
        (["--steps=0"], "--steps must be positive; got 0"),
        (["--steps=3", "--checkpoint=x"], "--steps is for training"),
        (["--temperature=nan"], "--temperature must be >= 0; got nan"),
        (["--top-k=0"], "--top-k must be in [1, 256]; got 0"),
        (["--top-p=0"], "--top-p must be in (0, 1]; got 0.0"),
        (["--top-p=1.5"], "--top-p must be in (0, 1]; got 1.5"),
        (["--sample-seed=-1"], "--sample-seed must be in [0, 2**32); got -1"),
        (["--greedy", "--temperature=0.5"], "--greedy is --temperature 0; got"),
        (["--cache=ring"], "--cache: invalid choice: 'ring'"),
        (["--checkpoint=nowhere"], "there is no checkpoint at nowhere"),
        (["--unheard-of"], "unrecognized arguments: --unheard-of"),
    ),
)
def test_bad_flags(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as info:
        generate.main(arguments)
    assert info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
