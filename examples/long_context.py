"""Trains the language model of `train_lm.py` on sequences that are split over devices.

    uv run examples/long_context.py
    uv run examples/long_context.py --mechanism ulysses --context 8192 --devices 4
    uv run examples/long_context.py --coordinator HOST:PORT --num-processes 2 --process-id 0

Each device has a part of the tokens, and the whole model. Only attention moves anything
from device to device. Where there is no accelerator, the CPU acts as several devices. With
more than one process, start the same command in each, with its own `--process-id`.
"""

import argparse
import dataclasses
import functools as ft
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from lm.config import add_flags, given, RunConfig
from lm.data import read_text, split
from lm.model import num_parameters
from lm.sharded import MECHANISMS, Program


DEFAULTS = RunConfig(
    steps=6,
    batch=1,
    seq=2**15,
    width=64,
    depth=1,
    heads=8,
    kv_heads=2,
    ff_block=512,
    lr=1e-2,
)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run = result.add_argument_group("what is trained")
    run.add_argument(
        "--context",
        type=int,
        default=DEFAULTS.seq,
        help="bytes a sequence (default: %(default)s)",
    )
    add_flags(run, DEFAULTS, leave_out=("seq", "mechanism"))
    where = result.add_argument_group("where")
    where.add_argument(
        "--devices",
        type=int,
        help="over how many devices the tokens are split (default: all accelerators, or 8 "
        "devices that the CPU acts as)",
    )
    where.add_argument(
        "--mechanism",
        dest="strategy",
        choices=MECHANISMS,
        default="ring",
        help="how tokens of different devices meet (default: %(default)s)",
    )
    several = result.add_argument_group("several processes")
    for name, kind, text in (
        ("coordinator", str, "HOST:PORT where process 0 listens"),
        ("num-processes", int, "how many there are"),
        ("process-id", int, "which of them this is, from 0 on"),
    ):
        suffix = "COORDINATOR_ADDRESS" if kind is str else name.replace("-", "_").upper()
        several.add_argument(
            f"--{name}",
            type=kind,
            default=os.environ.get(f"JAX_{suffix}"),
            help=f"{text} (default: the environment variable JAX_{suffix}, if set)",
        )
    return result


def connect(args: argparse.Namespace) -> None:
    """Before the devices are first used: makes some of a CPU, and joins other processes.

    **Raises:** a `ValueError` for flags that contradict each other.
    """
    processes = (args.coordinator, args.num_processes, args.process_id)
    if None in processes and processes != (None, None, None):
        raise ValueError(
            "--coordinator, --num-processes and --process-id belong together; got "
            f"{', '.join(map(str, processes))}"
        )
    count = 1 if args.num_processes is None else args.num_processes
    devices = 8 if args.devices is None else args.devices
    if devices < 1 or count < 1 or devices % count != 0:
        raise ValueError(
            "--devices must be a positive multiple of --num-processes; got "
            f"{devices} and {count}"
        )
    if not 0 <= (args.process_id or 0) < count:
        raise ValueError(f"--process-id must be in [0, {count}); got {args.process_id}")
    # Only of the CPU: accelerators are as many as there are.
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices // count)
    if args.coordinator is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(*processes)


def config_of(args: argparse.Namespace) -> RunConfig:
    """**Raises:** a `ValueError` for what cannot be trained."""
    if args.context < 4:
        raise ValueError(f"--context must be at least 4; got {args.context}")
    return dataclasses.replace(DEFAULTS, seq=args.context, **given(args, RunConfig))


def devices_of(args: argparse.Namespace, config: RunConfig) -> Sequence[Any]:
    """The devices that were asked for.

    **Raises:** a `ValueError` if there are others, or if the run cannot be split so.
    """
    devices = jax.devices()
    n = len(devices) if args.devices is None else args.devices
    if n > len(devices) or (n < len(devices) and jax.process_count() > 1):
        raise ValueError(f"--devices is {n}, but the processes have {len(devices)}")
    if config.seq % (2 * n) != 0:
        raise ValueError(
            f"--context must be a multiple of {2 * n}, twice --devices; got {config.seq}"
        )
    if args.strategy == "ulysses" and config.heads % n != 0:
        raise ValueError(
            "--heads must be a multiple of --devices for --mechanism ulysses; got "
            f"{config.heads} and {n}"
        )
    return devices[:n]


def main(argv: list[str] | None = None) -> None:
    arguments = parser()
    args = arguments.parse_args(argv)
    try:
        config = config_of(args)
        connect(args)
        devices = devices_of(args, config)
        text = split(read_text(config.text), config.seq).train
    except (OSError, ValueError) as error:
        arguments.error(str(error))

    # All processes do the same, and the first one says so.
    first = jax.process_index() == 0
    say = ft.partial(print, flush=True) if first else lambda _: None
    n, each = len(devices), config.seq // len(devices)
    program = Program(config, args.strategy, text, devices)
    state = program.init()
    say(f"model       {num_parameters(state.model):,} parameters")
    say(f"devices     {n} ({devices[0].device_kind}), processes {jax.process_count()}")
    say(f"context     {config.seq:,} bytes, {each:,} a device, {program.layout}")
    say(f"attention   {program.explain()}")

    step = program.compiled(state)
    for number in range(config.steps):
        constants = program.constants(number)
        began = time.monotonic()
        state = step(constants, state)
        loss = float(np.asarray(state.train_loss)[number])
        speed = config.batch * config.seq / (time.monotonic() - began)
        say(f"step {number + 1:6} loss {loss:.6f} nats a byte, {speed:,.0f} tokens/s")

    if first:
        alone = Program(config, args.strategy, text, devices[:1])
        say(f"memory      {num_bytes(step)}, on each of {n} devices")
        say(f"            {num_bytes(alone.compiled(alone.init()))}, if it were one")


def num_bytes(step: Any) -> str:
    """What a compiled step takes on a device."""
    stats = step.compiled.memory_analysis()
    parts = (stats.argument_size_in_bytes, stats.temp_size_in_bytes)
    arguments, rest = (f"{part / 2**20:.2f} MiB" for part in parts)
    return f"{arguments} of arguments, {rest} of temporaries"


if __name__ == "__main__":
    main()
