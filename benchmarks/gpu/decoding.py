"""Few queries over many keys: what `Decode` is held to, of every form of keys.

Each case is compared with `Vanilla` in float32 on what the keys stand for, on fresh random
data each time; twice, so that a race shows; and on memory that held NaN before.
"""

import os
from typing import Any

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np

from .cases import C, operands
from .errors import errors_of


DECODE = "decode"
FORMS = ("arrays", "pages", "int8", "fp8", "int8 pages", "fp8 pages")
_PAGE, _SPARE = 64, 3


def _ragged(batch: int, length: int):
    return {"mask": eqa.Padding(jnp.arange(batch) * (length // batch))}


def _every_third(q_pos, kv_pos, head, q_feature, kv_feature, params):
    return (q_pos + kv_pos) % 3 == head % 3


def _height(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return logit * params["height"][head]


def _random(*shape):
    return jax.random.normal(jax.random.key(7), shape)


_HIDDEN = jnp.arange(512) % 7 == 3
# Name -> (forms, shape as in `SUPPORT`, options). `nan` are tokens that hold NaN: in keys
# and values, or in `values` alone.
CASES: dict[str, tuple[tuple[str, ...], tuple[int, ...], Any]] = {
    "full": (FORMS, (2, 1, 2048, 8, 2, 128, 128), dict),
    "lengths": (FORMS, (4, 1, 1024, 8, 2, 128, 128), lambda: _ragged(4, 1024)),
    "float16": (
        ("arrays", "pages"),
        (2, 1, 1024, 8, 2, 128, 128),
        lambda: {"mask": eqa.Padding(jnp.array([1000, 3])), "dtype": "float16"},
    ),
    "head_dim 64, odd lengths": (
        ("arrays", "int8", "fp8"),
        (2, 1, 1001, 8, 8, 64, 64),
        lambda: {"mask": eqa.Padding(jnp.array([1001, 77]))},
    ),
    "head_dim 256, soft-cap, sinks": (
        ("arrays", "int8 pages", "fp8"),
        (1, 1, 2048, 8, 2, 256, 256),
        lambda: {"score": eqa.SoftCap(5.0), "sinks": _random(8)},
    ),
    "head_dim 192, value_dim 128": (
        ("pages", "fp8 pages"),
        (2, 1, 1024, 16, 1, 192, 128),
        lambda: {"mask": eqa.Padding(jnp.array([1024, 300]))},
    ),
    "value_dim 256": (
        ("arrays", "int8", "fp8 pages"),
        (2, 2, 1024, 8, 2, 64, 256),
        lambda: {"mask": C(), "q_positions": "end"},
    ),
    "several queries, alibi": (
        ("arrays", "int8", "fp8 pages"),
        (2, 5, 1024, 8, 2, 64, 64),
        lambda: {
            "mask": C() & eqa.SlidingWindow(300),
            "q_positions": jnp.array([10, 11, 12, 13, 990]),
            "score": eqa.ALiBi.standard(8),
        },
    ),
    "many queries": (
        ("arrays", "int8"),
        (1, 40, 1024, 8, 2, 128, 128),
        lambda: {"mask": C(), "q_positions": "end"},
    ),
    "dense": (
        ("pages", "int8"),
        (2, 4, 512, 8, 4, 128, 128),
        lambda: {"mask": jax.random.bernoulli(jax.random.key(0), 0.3, (8, 4, 512))},
    ),
    "predicate, score function": (
        ("arrays", "int8 pages"),
        (2, 3, 512, 8, 2, 128, 128),
        lambda: {
            "mask": eqa.Predicate(_every_third),
            "score": eqa.ScoreFn(_height, params={"height": jnp.arange(1, 9.0) / 8}),
        },
    ),
    "dropout, scale of each head": (
        ("arrays", "int8", "fp8 pages"),
        (2, 2, 512, 8, 2, 128, 128),
        lambda: {
            "dropout": 0.3,
            "key": jax.random.key(0),
            "scale": jnp.arange(1, 9.0) / 32,
        },
    ),
    "nan behind the mask": (
        FORMS,
        (2, 2, 512, 8, 2, 128, 128),
        lambda: {"mask": eqa.Keys(~_HIDDEN), "nan": _HIDDEN},
    ),
    "nan behind a score": (
        ("arrays", "int8", "fp8"),
        (2, 1, 512, 4, 2, 64, 64),
        lambda: {
            "score": eqa.Bias(jnp.where(_HIDDEN, -jnp.inf, 0.5)[None]),
            "nan": _HIDDEN,
            "values": True,
        },
    ),
    "nan that is seen": (
        ("arrays", "int8", "fp8 pages"),
        (2, 1, 512, 8, 2, 128, 128),
        lambda: {
            "mask": eqa.Padding(jnp.array([100, 512])),
            "nan": jnp.arange(512) == 300,
        },
    ),
}
ALL = {f"{form}: {name}": (form, name) for name, case in CASES.items() for form in case[0]}


def options_of(name: str) -> dict[str, Any]:
    """Those of `attend`."""
    options = CASES[ALL[name][1]][2]()
    own = ("dtype", "nan", "values")
    return {key: x for key, x in options.items() if key not in own}


def tokens_of(name: str, seed: int) -> tuple[Any, list[Any], list[Any]]:
    """The query; keys and values in their form; and the same, not in pages."""
    form, case = ALL[name]
    _, shape, make = CASES[case]
    options = make()
    q, k, v, _ = operands(shape, jnp.dtype(options.get("dtype", "bfloat16")), seed)
    if (bad := options.get("nan")) is not None:
        hide = lambda x: jnp.where(bad[:, None, None], jnp.nan, x)  # noqa: E731
        k, v = k if "values" in options else hide(k), hide(v)
    eight = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}.get(form.split()[0])
    tokens: list[Any] = [k, v]
    if eight is not None:
        lengths = jnp.full(shape[0], shape[2], jnp.int32)
        cache = eqa.QuantizedCache(eqa.StaticCache(k, v, lengths), eight)
        tokens = [cache.key_, cache.value]
    stored = [_paged(x) for x in tokens] if "pages" in form else tokens
    return q, stored, tokens


def _paged(x: Any) -> eqa.Paged:
    """In pages in no order, of a pool that has more of them."""
    batch, length = x.shape[:2]
    blocks = length // _PAGE
    numbers = jax.random.permutation(jax.random.key(1), batch * blocks + _SPARE)
    table = numbers[: batch * blocks].reshape(batch, blocks).astype(jnp.int32)

    def pool(x):
        x = x.reshape(batch * blocks, _PAGE, *x.shape[2:])
        out = jnp.zeros((len(numbers), *x.shape[1:]), x.dtype)
        return out.at[table.reshape(-1)].set(x)

    return eqa.Paged(jax.tree.map(pool, x), table)


def _meant(x: Any) -> jax.Array:
    """What tokens stand for, in float32."""
    x = x.astype(jnp.float32)
    return x if isinstance(x, jax.Array) else x.block((0, 0, 0), x.shape[:3])


def in_a_kernel(q: Any, stored: list[Any], options: dict[str, Any]) -> bool:
    """Whether `Decode` says that a kernel computes this."""
    fields = {name: x for name, x in options.items() if name in ("mask", "score")}
    text = eqa.Attention(mechanism=DECODE, **fields).explain(q, *stored)
    return "in a kernel" in text.splitlines()[0]


def check(name: str) -> dict[str, Any]:
    """One case: errors relative to `Vanilla` in float32."""
    seed = int.from_bytes(os.urandom(4), "little") >> 1
    (q, stored, tokens), options = tokens_of(name, seed), options_of(name)

    def run(mechanism, *qkv):
        def attend(*qkv):
            return eqa.attend(*qkv, mechanism=mechanism, return_lse=True, **options)

        return jax.block_until_ready(jax.jit(attend)(*qkv))

    def fresh():
        jax.block_until_ready([jnp.full((2**22,), jnp.nan) for _ in range(4)])
        return run(DECODE, q, *stored)

    got, again = fresh(), fresh()
    wide = map(_meant, tokens)
    with jax.default_matmul_precision("highest"):
        want = run("vanilla", q.astype(jnp.float32), *wide)
    errors: dict[str, float] = {}
    good = in_a_kernel(q, stored, options)
    for part, a, b, w in zip(("out", "lse"), got, again, want, strict=True):
        a, b, w = (np.asarray(x, np.float32) for x in (a, b, w))
        if part == "out":  # What sees a token that holds NaN is NaN.
            good = good and bool((np.isnan(a) == np.isnan(w)).all())
        good = good and bool((np.isneginf(a) == np.isneginf(w)).all())
        errors |= errors_of(part, a, b, w, ~np.isfinite(w))
    good = good and all(errors[x] <= 8e-3 for x in ("out", "lse"))
    good = good and all(errors[f"{x} twice"] == 0 for x in ("out", "lse"))
    return {"case": name, "mechanism": DECODE, "good": good, **errors}
