"""The example: `examples/train_lm.py`, run as a program and looked at in parts."""

import collections
import dataclasses
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest


_root = pathlib.Path(__file__).parent.parent
_examples = _root / "examples"
# As Python does for the program, whose own modules lie beside it.
sys.path.insert(0, str(_examples))

import eqx_attention as eqa  # noqa: E402
import train_lm  # noqa: E402
from lm import checkpoint, data, ngram  # noqa: E402
from lm.config import parse_mask, RunConfig  # noqa: E402
from lm.model import LanguageModel, losses  # noqa: E402
from lm.train import evaluate, init_state, train_step  # noqa: E402


_steps = 16
_tiny = RunConfig(
    **dict(steps=_steps, batch=4, seq=16, width=16, depth=1),
    **dict(heads=4, kv_heads=2, ff_block=8, lr=3e-2, mask="window:9"),
)
_flags = [
    f"--{field.name.replace('_', '-')}={getattr(_tiny, field.name)}"
    for field in dataclasses.fields(_tiny)
    if field.name != "text"
]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("".join(f"{i} times {i} makes {i * i}.\n" for i in range(60)))
    return path


def _environment():
    # One device; but compiled as quickly as conftest.py asks of this process.
    flags = os.environ["XLA_FLAGS"].split()
    flags = [flag for flag in flags if "device_count" not in flag]
    path = [str(_root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": os.pathsep.join(path),
    }


def _run(*arguments, program=(_examples / "train_lm.py",)):
    return subprocess.run(
        [sys.executable, "-W", "error", *map(str, (*program, *arguments))],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )


def _train(text_file, out, *arguments, program=(_examples / "train_lm.py",)):
    return _run(
        *("--text", text_file, "--out", out, "--checkpoint-every", 3),
        *("--prompt", "7 times", "--sample-bytes", 12),
        *arguments,
        program=program,
    )


@pytest.fixture(scope="module")
def uninterrupted(text_file, tmp_path_factory):
    """A whole run: its output directory, and what it printed."""
    out = tmp_path_factory.mktemp("uninterrupted") / "not" / "yet" / "there"
    result = _train(text_file, out, *_flags)
    assert result.returncode == 0, result.stderr
    return out, result


def _state(out):
    saved = checkpoint.read(out / "checkpoint")
    return saved.header, saved.restore(init_state(RunConfig(**saved.header["config"])))


def test_output(uninterrupted):
    out, result = uninterrupted
    _, state = _state(out)
    train_loss, validation_loss = map(np.asarray, (state.train_loss, state.validation_loss))
    assert int(state.step) == _steps
    assert np.isfinite(train_loss).all()
    assert train_loss[-3:].mean() < 0.8 * train_loss[:3].mean()
    known = validation_loss[~np.isnan(validation_loss)]
    assert len(known) == 8 and known[-1] == validation_loss[-1] < known[0]

    # The progress bar: the time that is left, the speed, the loss.
    assert re.search(r"<\d\d:\d\d, .*token/s, loss=\d", result.stderr)
    assert f"model       {validation_loss[-1]:.4f} nats" in result.stdout
    assert "n-gram" in result.stdout
    text = (out / "sample.txt").read_text(encoding="utf-8")
    assert text.startswith("7 times") and len(text) > len("7 times")
    assert text in result.stdout
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint",
        "loss.png",
        "sample.txt",
    ]


_killed = """
    import os, signal, sys
    import train_lm

    when, kill_step, *arguments = sys.argv[1:]
    step, replace, done = train_lm.train_step, os.replace, 0

    def die(moment):
        if moment == when and done >= int(kill_step):
            os.kill(os.getpid(), signal.SIGKILL)

    def killing_step(constants, state):
        global done
        done = int(state.step)
        die("between steps")
        state = step(constants, state)
        done += 1
        return state

    def killing_replace(*args):
        die("in a checkpoint")
        replace(*args)

    train_lm.train_step, os.replace = killing_step, killing_replace
    train_lm.main(arguments)
"""


@pytest.mark.slow
def test_resume_after_kill(uninterrupted, text_file, tmp_path):
    """`kill -9` at a random step, and again while a checkpoint is being written. Then all
    that remains is the same to the last bit."""
    expected_out, _ = uninterrupted
    out = tmp_path / "out"
    program = tmp_path / "killed.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(_examples)!r})\n" + textwrap.dedent(_killed)
    )
    # Not from a fixed seed: every run of the tests kills elsewhere.
    first = random.randrange(1, _steps - 1)
    second = random.randrange(first, _steps)
    where = f"killed at steps {first} and {second}"

    killed = _train(text_file, out, *_flags, program=(program, "between steps", first))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert int(_state(out)[1].step) == first // 3 * 3, where

    # No flag of the run need be repeated, but one may be, with the same value.
    killed = _train(
        text_file, out, "--resume", "--seed=0", program=(program, "in a checkpoint", second)
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert first // 3 * 3 <= int(_state(out)[1].step) <= second, where

    result = _train(text_file, out, "--resume")
    assert result.returncode == 0, result.stderr
    header, state = _state(out)
    expected_header, expected = _state(expected_out)
    assert header == expected_header
    leaves, expected_leaves = map(jax.tree.leaves, (state, expected))
    assert len(leaves) == len(expected_leaves) > 30
    for a, b in zip(map(np.asarray, leaves), map(np.asarray, expected_leaves)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.tobytes() == b.tobytes(), where
    for path in expected_out.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), (path.name, where)


def _error(capsys, *arguments):
    """The one line by which the program refuses."""
    with pytest.raises(SystemExit) as info:
        train_lm.main([str(argument) for argument in arguments])
    assert info.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error
    return error


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--steps=0"], "--steps must be positive; got 0"),
        (["--steps=many"], "--steps"),
        (["--batch=-1"], "--batch must be positive; got -1"),
        (["--seq=3"], "--seq must be at least 4; got 3"),
        (["--lr=nan"], "--lr must be positive; got nan"),
        (["--weight-decay=-0.1"], "--weight-decay must be >= 0; got -0.1"),
        (["--seed=-1"], "--seed must be in [0, 2**32); got -1"),
        (["--width=100", "--heads=8"], "--heads must divide --width; got 8 and 100"),
        (["--width=12", "--heads=4"], "--width / --heads must be even"),
        (["--heads=4", "--kv-heads=3"], "--kv-heads must divide --heads; got 3 and 4"),
        (["--mechanism=flash"], "--mechanism must be one of auto, vanilla, blockwise"),
        (["--mask=windows:3"], "--mask must be causal, window:N or chunked:N"),
        (["--mask=window:0"], "got 'window:0'"),
        (["--mask=window:"], "got 'window:'"),
        (["--mask=causal:3"], "got 'causal:3'"),
        (["--mask="], "got ''"),
        (["--checkpoint-every=0"], "--checkpoint-every must be positive; got 0"),
        (["--prompt="], "--prompt must not be empty"),
        (["--sample-bytes=-1"], "--sample-bytes must be >= 0; got -1"),
        (["--temperature=-1"], "--temperature must be >= 0; got -1.0"),
        (["--top-k=257"], "--top-k must be in [1, 256]; got 257"),
        (["--sample-seed=-1"], "--sample-seed must be in [0, 2**32); got -1"),
        (["--unheard-of"], "unrecognized arguments: --unheard-of"),
    ),
)
def test_bad_flags(capsys, tmp_path, arguments, message):
    assert message in _error(capsys, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_bad_flag_of_the_program(tmp_path):
    result = _run("--steps=0", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.endswith("error: --steps must be positive; got 0\n")


def test_bad_text(capsys, tmp_path):
    file = tmp_path / "text"
    assert str(file) in _error(capsys, "--text", file)
    file.write_bytes(b"")
    assert "the text is empty" in _error(capsys, "--text", file)
    file.write_bytes(bytes(18))
    error = _error(capsys, "--text", file, "--seq=17")
    assert "too short: nine tenths of its 18 bytes" in error
    assert data.split(data.read_text(str(file)), 16).train.shape == (17,)


def test_bad_resume(capsys, tmp_path, uninterrupted, text_file):
    resume = ["--out", tmp_path, "--resume"]
    path = tmp_path / "checkpoint"
    assert f"there is no checkpoint at {path}" in _error(capsys, *resume)

    good = (uninterrupted[0] / "checkpoint").read_bytes()
    path.write_bytes(good)
    message = "--width is 32, but the run to resume has 16"
    assert message in _error(capsys, *resume, "--width=32")
    message = "--mask is causal, but the run to resume has window:9"
    assert message in _error(capsys, *resume, "--mask=causal")

    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for bad in (good[:-1], good[: len(good) // 2], bytes(flipped), good + b"\0"):
        path.write_bytes(bad)
        assert "is truncated or corrupted" in _error(capsys, *resume)
    for bad in (b"", b"\n", b"something else"):
        path.write_bytes(bad)
        assert "is not a checkpoint of this program" in _error(capsys, *resume)

    path.write_bytes(good)
    before = text_file.read_bytes()
    try:
        text_file.write_bytes(before + b"!")
        assert "is not the one that the run" in _error(capsys, *resume)
    finally:
        text_file.write_bytes(before)


def test_no_good_end(text_file, tmp_path, monkeypatch):
    """A run that diverges or is interrupted says so, and keeps its checkpoint."""
    arguments = ["--text", str(text_file), "--out", str(tmp_path), *_flags]

    def interrupted(constants, state):
        raise KeyboardInterrupt

    for step, message in (
        # No loss is written: it stays NaN.
        (lambda constants, state: state, "the loss of step 1 is nan"),
        (interrupted, "interrupted; --resume continues"),
    ):
        monkeypatch.setattr(train_lm, "train_step", step)
        with pytest.raises(SystemExit, match=message):
            train_lm.main(arguments)
        assert int(_state(tmp_path)[1].step) == 0


def test_a_failed_checkpoint_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    checkpoint.save(path, {"number": 1}, jnp.arange(3))

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"number": 2}, jnp.arange(3))
    assert list(tmp_path.iterdir()) == [path]
    saved = checkpoint.read(path)
    assert saved.header == {"number": 1}
    assert eqx.tree_equal(saved.restore(jnp.zeros(3, jnp.int32)), jnp.arange(3))


def test_parse_mask():
    causal = eqa.Causal()
    for spec, expected in (
        ("causal", causal),
        ("window:4", causal & eqa.SlidingWindow(3)),
        ("chunked:5", causal & eqa.Chunked(5)),
        ("window:4,chunked:5", causal & eqa.SlidingWindow(3) & eqa.Chunked(5)),
    ):
        assert eqx.tree_equal(parse_mask(spec), expected)


def test_order_of_data():
    """A function of the seed and the step: traced or not, of whatever came before."""
    starts = [np.asarray(data.batch_starts(3, step, 64, 1000)) for step in range(20)]
    jitted = jax.jit(lambda step: data.batch_starts(3, step, 64, 1000))
    assert np.array_equal(jitted(jnp.array(7)), starts[7])
    assert not np.array_equal(data.batch_starts(4, 7, 64, 1000), starts[7])
    assert len({tuple(start) for start in starts}) == len(starts)
    assert 0 <= np.min(starts) and np.max(starts) < 1000
    text = jnp.arange(30, dtype=jnp.uint8)
    cut = data.cut(text, jnp.array([3, 20]), 4)
    assert cut.tolist() == [[3, 4, 5, 6], [20, 21, 22, 23]]


@pytest.mark.parametrize("num_train, num_held_out, seq", ((33, 7, 16), (50, 23, 5)))
def test_held_out_windows(num_train, num_held_out, seq):
    """Each held-out byte is scored once, and from no less than half a window."""
    starts, scored = data.held_out_windows(num_train, num_held_out, seq)
    targets = [
        start + 1 + i for start, row in zip(starts, scored) for i in np.flatnonzero(row)
    ]
    assert targets == list(range(num_train, num_train + num_held_out))
    assert starts.min() >= 0 and starts.max() + seq < num_train + num_held_out
    for row in scored[:-1]:
        assert not row[: seq // 2].any()


def test_evaluate():
    config = dataclasses.replace(_tiny, mask="causal", seq=8)
    model = LanguageModel(config, key=jr.key(0))
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog", np.uint8)
    parts = data.Split(text[:30], text[30:])
    total = 0.0
    for start, scored in zip(*data.held_out_windows(30, 13, 8)):
        tokens = jnp.asarray(text[start : start + 9].astype(np.int32))
        total += float(np.asarray(losses(model, tokens[None]))[0][scored].sum())
    assert evaluate(model, parts, 8, batch=3) == pytest.approx(total / 13, rel=1e-5)


def _slow_witten_bell(text, context, byte):
    """Straight from the formula."""
    if context is None:
        return 1 / 256
    k = len(context)
    followers = collections.Counter(
        text[i + k] for i in range(len(text) - k) if text[i : i + k] == context
    )
    shorter = context[1:] if k > 0 else None
    p = _slow_witten_bell(text, shorter, byte)
    n, t = sum(followers.values()), len(followers)
    return p if n == 0 else (followers[byte] + t * p) / (n + t)


@pytest.mark.parametrize("context", (0, 1, 4))
def test_ngram(context):
    train, held_out = b"abracadabra, abracadabro\xff!", b"cadabra\x00abra\xff"
    model = ngram.WittenBell(np.frombuffer(train, np.uint8), context)
    total = 0.0
    for i, byte in enumerate(held_out):
        before = (train + held_out[:i])[-context:] if context else b""
        total -= np.log(_slow_witten_bell(train, before, byte))
    loss = model.loss(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8))
    assert loss == pytest.approx(total / len(held_out), rel=1e-12)


def test_ngram_is_a_distribution():
    train = np.frombuffer(b"abracadabra, abracadabro!", np.uint8)
    model = ngram.WittenBell(train)
    for before in (b"abra", b"cada", b"o!zz", b"\0\0\0\0"):
        probabilities = [
            model.probabilities(
                np.frombuffer(before + bytes([byte]), np.uint8),
                np.array([byte], np.uint8),
            )[0]
            for byte in range(256)
        ]
        assert min(probabilities) > 0
        assert sum(probabilities) == pytest.approx(1, rel=1e-12)


def test_mechanisms_agree(text_file):
    """To rounding, the losses of training do not depend on the mechanism."""
    text = jnp.asarray(data.read_text(str(text_file)))

    def train(mechanism):
        config = dataclasses.replace(_tiny, mechanism=mechanism)
        # optax's schedules promote dtypes, and its clipping ranks.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            state = init_state(config)
            for _ in range(6):
                state = train_step((config, text), state)
        return np.asarray(state.train_loss[:6])

    vanilla = train("vanilla")
    assert vanilla[-1] < vanilla[0]
    assert np.allclose(train("blockwise"), vanilla, rtol=1e-4)
