"""The example `examples/long_context.py`: on devices of one process, and of two."""

import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest


_root = pathlib.Path(__file__).parent.parent
_examples = _root / "examples"
# As Python does for the program, whose own modules lie beside it.
sys.path.insert(0, str(_examples))

import long_context  # noqa: E402
from lm.config import RunConfig  # noqa: E402
from lm.sharded import Program  # noqa: E402
from lm.train import init_state, train_step  # noqa: E402


_tiny = RunConfig(
    **dict(steps=2, batch=1, seq=96, width=16, depth=1),
    **dict(heads=4, kv_heads=2, ff_block=8, lr=3e-2),
)
_text = "".join(f"{i} times {i} makes {i * i}.\n" for i in range(60)).encode()
_train = long_context.split(np.frombuffer(_text, np.uint8), _tiny.seq).train


@pytest.fixture(scope="module")
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def expected(optax_promotes):
    """The losses of two steps of `train_lm.py`, which is on one device."""
    state = init_state(_tiny)
    for _ in range(_tiny.steps):
        state = train_step((_tiny, jnp.asarray(_train)), state)
    return np.asarray(state.train_loss)


@pytest.mark.parametrize(
    "mechanism, n, moved",
    (
        ("ring", 3, "collective-permute"),
        ("ulysses", 4, "all-to-all"),
        pytest.param("all_gather", 2, "all-gather", marks=pytest.mark.thorough),
    ),
)
def test_losses_are_those_of_one_device(expected, mechanism, n, moved):
    program = Program(_tiny, mechanism, _train, jax.devices()[:n])
    assert program.explain().startswith(mechanism)
    state = program.init()
    step = program.compiled(state)
    for number in range(_tiny.steps):
        state = step(program.constants(number), state)
    assert np.abs(np.asarray(state.train_loss) - expected).max() < 1e-5

    # But for the sum of the gradients, only attention moves anything.
    names = {"all-gather", "all-to-all", "collective-permute"}
    hlo = step.compiled.as_text()
    assert {name for name in names if f" {name}(" in hlo} == {moved}


def test_layout_is_that_of_the_mask():
    window = dataclasses.replace(_tiny, mask="window:8")
    program = Program(window, "ring", _train, jax.devices())
    assert program.layout == "contiguous"
    assert program.explain().startswith("ring: 1 of 7 hops")
    assert Program(_tiny, "ring", _train, jax.devices()).layout == "zigzag"
    assert Program(_tiny, "ulysses", _train, jax.devices()).layout == "contiguous"


@pytest.mark.parametrize(
    "flags, message",
    (
        ("--context=2", "--context must be at least 4; got 2"),
        ("--context=100", "--context must be a multiple of 16, twice --devices; got 100"),
        ("--context=1000000", "the text is too short"),
        ("--devices=0", "--devices must be a positive multiple of --num-processes; got 0"),
        ("--devices=9", "--devices is 9, but the processes have 8"),
        ("--mechanism=pigeons", "invalid choice: 'pigeons'"),
        ("--mechanism=ulysses --heads=4", "--heads must be a multiple of --devices"),
        ("--width=12 --heads=8", "--heads must divide --width; got 8 and 12"),
        ("--seq=64", "unrecognized arguments: --seq=64"),
        ("--process-id=1", "--coordinator, --num-processes and --process-id belong"),
        (
            "--coordinator=localhost:1 --num-processes=3 --process-id=0",
            "multiple of --num-processes; got 8 and 3",
        ),
        (
            "--coordinator=localhost:1 --num-processes=0 --process-id=0",
            "multiple of --num-processes; got 8 and 0",
        ),
        (
            "--coordinator=localhost:1 --num-processes=2 --process-id=2",
            "--process-id must be in [0, 2); got 2",
        ),
    ),
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as info:
        long_context.main(flags.split())
    assert info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _outputs(flags, num_processes: int, folder, timeout: float) -> list[str]:
    """What each of several processes has printed. None outlives this call."""
    environment = dict(os.environ)
    path = [str(_root), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    # The program makes its own devices; but compiles as quickly as this process.
    compiling = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    environment["XLA_FLAGS"] = " ".join(compiling)
    common = [*flags, f"--coordinator=localhost:{_free_port()}"]
    logs = [folder / f"process{i}" for i in range(num_processes)]
    processes = []
    try:
        for i, log in enumerate(logs):
            numbers = (f"--num-processes={num_processes}", f"--process-id={i}")
            command = [sys.executable, "-W", "error", str(_examples / "long_context.py")]
            with open(log, "w") as file:
                started = subprocess.Popen(
                    [*command, *common, *numbers],
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            processes.append(started)
        codes, end = [None], time.monotonic() + timeout
        # If one fails, then the others would wait for it.
        while None in codes and not any(codes) and time.monotonic() < end:
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    outputs = [log.read_text() for log in logs]
    printed = "\n".join(f"process {i}:\n{text}" for i, text in enumerate(outputs))
    assert codes == [0] * num_processes, f"exit codes {codes}\n{printed}"
    return outputs


def test_two_processes(expected, tmp_path):
    """Keys go round a ring of eight devices, of which each process has four."""
    (tmp_path / "text").write_bytes(_text)
    options = dataclasses.asdict(_tiny) | {"text": tmp_path / "text"}
    options["context"] = options.pop("seq")
    del options["mechanism"]
    flags = [f"--{name.replace('_', '-')}={x}" for name, x in options.items()]
    first, second = _outputs(flags, 2, tmp_path, timeout=240)

    losses = [
        float(loss) for loss in re.findall(r"^step .* loss (\S+)", first, re.MULTILINE)
    ]
    assert len(losses) == _tiny.steps
    assert np.abs(np.array(losses) - expected).max() < 1e-5
    assert "devices     8 (cpu), processes 2" in first
    assert "ring: 7 of 7 hops over 8 devices" in first and "zigzag" in first
    # Of what is linear in the tokens, each device has an eighth.
    each, alone = map(float, re.findall(r"([\d.]+) MiB of temporaries", first))
    assert each < alone / 3, (each, alone)
    # The first one speaks for both.
    assert "step" not in second and "memory" not in second
