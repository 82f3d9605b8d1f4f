"""Prints the table of what each mechanism supports, by asking it.

Run by `_hooks.py` when the documentation is built; nothing that it prints is committed.
"""

import dataclasses
import pathlib
import runpy
from collections.abc import Callable
from typing import Any

import eqx_attention as eqa
import jax
import jax.numpy as jnp


_q_len, _kv_len = 6, 8
_communicating = (eqa.AllGather, eqa.Ring, eqa.Ulysses)


def _arrays(
    dtype=jnp.float32, batch=(), q_len=_q_len, kv_len=_kv_len, kv_heads=4, value_dim=8
):
    """query, key_ and value, of whose shapes alone anything is made."""
    return (
        jax.ShapeDtypeStruct((*batch, q_len, 4, 8), dtype),
        jax.ShapeDtypeStruct((*batch, kv_len, kv_heads, 8), dtype),
        jax.ShapeDtypeStruct((*batch, kv_len, kv_heads, value_dim), dtype),
    )


def _over_devices(mechanism) -> dict[str, Any]:
    """Two devices, for those mechanisms that communicate."""
    if not isinstance(mechanism, _communicating):
        return {}
    mesh = jax.sharding.AbstractMesh((2,), ("devices",))
    return dict(sharding=eqa.Sharding(sequence="devices"), mesh=mesh)


def _forward(arrays, **options) -> Callable:
    def ask(mechanism):
        more = options | _over_devices(mechanism)

        def attend(q, k, v):
            return eqa.attend(q, k, v, mechanism=mechanism, **more)

        jax.eval_shape(attend, *arrays)

    return ask


def _sum(mechanism):
    options: dict[str, Any] = {"mechanism": mechanism} | _over_devices(mechanism)

    def total(q, k, v):
        out, lse = eqa.attend(q, k, v, return_lse=True, **options)
        return jnp.sum(out) + jnp.sum(lse)

    return total


def _reverse(mechanism):
    jax.eval_shape(jax.grad(_sum(mechanism), argnums=(0, 1, 2)), *_arrays())


def _forward_mode(mechanism):
    jax.eval_shape(lambda *qkv: jax.jvp(_sum(mechanism), qkv, qkv), *_arrays())


def _forward_over_reverse(mechanism):
    grad = jax.grad(_sum(mechanism), argnums=(0, 1, 2))
    jax.eval_shape(lambda *qkv: jax.jvp(grad, qkv, qkv), *_arrays())


def _vmapped(mechanism):
    jax.eval_shape(jax.vmap(_sum(mechanism)), *_arrays(batch=(3,)))


def _mask(mask) -> Callable:
    return _forward(_arrays(), mask=mask)


def _score(score) -> Callable:
    return _forward(_arrays(), score=score)


def _predicate(q_pos, kv_pos, head, q_feature, kv_feature, params):
    return (q_pos + kv_pos + head) % 2 == 0


def _score_fn(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return logit + jnp.asarray(q_pos - kv_pos, logit.dtype)


_table: dict[str, dict[str, Callable]] = {
    "Masks": {
        "`Full`": _mask(eqa.Full()),
        "`Causal`": _mask(eqa.Causal()),
        "`SlidingWindow`": _mask(eqa.SlidingWindow(2)),
        "`SlidingWindow`, traced": _mask(eqa.SlidingWindow(jnp.array(2))),
        "`Prefix`": _mask(eqa.Prefix(2)),
        "`PrefixLM`": _mask(eqa.PrefixLM(2)),
        "`Chunked`": _mask(eqa.Chunked(4)),
        "`Segments`": _mask(eqa.Segments(jnp.zeros(_q_len, int), jnp.zeros(_kv_len, int))),
        "`Padding`": _mask(eqa.Padding(jnp.array(3))),
        "`Keys`": _mask(eqa.Keys(jnp.ones(_kv_len, bool))),
        "`Dense`": _mask(eqa.Dense(jnp.ones((_q_len, _kv_len), bool))),
        "`Predicate`": _mask(eqa.Predicate(_predicate)),
        "`&`, `|`, `~`": _mask(eqa.Causal() & ~eqa.Prefix(2) | eqa.Chunked(2)),
    },
    "Scores": {
        "`ALiBi`": _score(eqa.ALiBi.standard(4)),
        "`SoftCap`": _score(eqa.SoftCap(20.0)),
        "`RelativeBias`": _score(eqa.RelativeBias(jnp.zeros((32, 4)))),
        "`Bias`": _score(eqa.Bias(jnp.zeros((4, _q_len, _kv_len)))),
        "`ScoreFn`": _score(eqa.ScoreFn(_score_fn)),
        "several": _score((eqa.SoftCap(20.0), eqa.ALiBi.standard(4))),
    },
    "Heads and sizes": {
        "grouped heads": _forward(_arrays(kv_heads=2)),
        "one key-value head": _forward(_arrays(kv_heads=1)),
        "`value_dim` ≠ `head_dim`": _forward(_arrays(value_dim=16)),
        "lengths that are prime": _forward(_arrays(q_len=7, kv_len=1009)),
        "one query": _forward(_arrays(q_len=1)),
    },
    "Options": {
        "sinks": _forward(_arrays(), sinks=jnp.zeros(4)),
        "scale, one number": _forward(_arrays(), scale=0.5),
        "scale, one a head": _forward(_arrays(), scale=jnp.ones(4)),
        "dropout": _forward(_arrays(), dropout=0.1, key=jax.random.key(0)),
        '`q_positions="end"`': _forward(_arrays(), q_positions="end"),
        "positions, any": _forward(
            _arrays(), q_positions=jnp.arange(_q_len), kv_positions=jnp.arange(_kv_len)
        ),
        "`precision`": _forward(_arrays(), precision="highest"),
        "`return_lse`": _forward(_arrays(), return_lse=True),
    },
    "Dtypes": {
        name: _forward(_arrays(dtype=jnp.dtype(name)))
        for name in ("float32", "bfloat16", "float16", "float64")
    },
    "Transformations": {
        "batch axes": _forward(_arrays(batch=(2, 3))),
        "`vmap`": _vmapped,
        "reverse mode": _reverse,
        "forward mode": _forward_mode,
        "forward over reverse": _forward_over_reverse,
    },
}


def _mechanisms() -> dict[str, eqa.AbstractMechanism]:
    """Those that do arithmetic anywhere: all that are public but `Auto`, which chooses, and
    those for GPUs and TPUs, which have tables of their own."""
    elsewhere = (eqa.AbstractMechanism, eqa.Auto, eqa.CuDNN, eqa.Flash, eqa.Splash)
    return {
        name: cls()
        for name, cls in sorted(vars(eqa).items())
        if isinstance(cls, type)
        and issubclass(cls, eqa.AbstractMechanism)
        and cls not in elsewhere
    }


class Splash(eqa.AbstractMechanism):
    """`eqa.Splash`, as it would be asked on a TPU."""

    def unsupported(self, request):
        return eqa.Splash().unsupported(_on_tpu(request))

    def forward(self, request):
        return eqa.Splash().forward(_on_tpu(request))

    def backward(self, request, *rows):
        return eqa.Splash().backward(_on_tpu(request), *rows)

    def blocks(self, request):
        return eqa.Splash().blocks(_on_tpu(request))

    def explain(self, request):
        return eqa.Splash().explain(_on_tpu(request))


def _on_tpu(request):
    return dataclasses.replace(request, platform="tpu")


def markdown() -> str:
    return _tables(_mechanisms(), "##")


def markdown_of_tpus() -> str:
    return _tables({"Splash": Splash()}, "###")


def _tables(mechanisms: dict[str, eqa.AbstractMechanism], heading: str) -> str:
    reasons: list[str] = []
    lines = []
    for group, options in _table.items():
        lines += ["", f"{heading} {group}", ""]
        lines += ["| | " + " | ".join(f"`{name}`" for name in mechanisms) + " |"]
        lines += ["| --- |" + " :-: |" * len(mechanisms)]
        for option, ask in options.items():
            cells = []
            for mechanism in mechanisms.values():
                try:
                    ask(mechanism)
                except eqa.UnsupportedError as error:
                    reason = str(error)
                    if reason not in reasons:
                        reasons.append(reason)
                    cells.append(f"— ({reasons.index(reason) + 1})")
                else:
                    cells.append("✓")
            lines.append(f"| {option} | " + " | ".join(cells) + " |")
    lines += ["", f"{heading} Refusals", ""]
    for number, reason in enumerate(reasons, 1):
        lines += [f"{number}. {' '.join(reason.split())}"]
    if not reasons:
        lines += ["None."]
    return "\n".join(lines)


def _support_on_gpus() -> dict[str, tuple[tuple[str, ...], tuple[int, ...], Callable]]:
    """The table that benchmarks/gpu_check.py holds the mechanisms to."""
    path = pathlib.Path(__file__).parent.parent / "benchmarks" / "gpu" / "cases.py"
    return runpy.run_path(str(path))["SUPPORT"]


def markdown_of_gpus() -> str:
    lines = ["| | `Flash` | `CuDNN` |", "| --- | :-: | :-: |"]
    for name, (able, *_) in _support_on_gpus().items():
        cells = ("✓" if mechanism in able else "—" for mechanism in ("flash", "cudnn"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with jax.enable_x64(True):
        print(markdown())
        print(f"\n## On TPUs\n{markdown_of_tpus()}")
    print(f"\n## On GPUs\n\n{markdown_of_gpus()}")
