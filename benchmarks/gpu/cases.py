"""What is checked and what is timed: two tables, which the tests and the docs read too."""

from typing import Any, NamedTuple

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np


FLASH, CUDNN = "flash", "cudnn"
BOTH = (FLASH, CUDNN)
REPRODUCIBLE = "flash, reproducible"
MECHANISMS: dict[str, Any] = {
    FLASH: FLASH,
    CUDNN: CUDNN,
    REPRODUCIBLE: eqa.Flash(reproducible=True),
}


def _ids(seed: int, batch: int, length: int):
    return jnp.sort(jax.random.randint(jax.random.key(seed), (batch, length), 0, 5))


def _score(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    distance = (q_pos - kv_pos).astype(logit.dtype)
    return logit + params["height"][head] * jnp.exp(-distance * distance / 100)


def _temperature(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return logit / q_feature


def _every_third(q_pos, kv_pos, head, q_feature, kv_feature, params):
    return (q_pos - kv_pos) % 3 == head % 3


def _looked_up(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return logit + params["t"][head, jnp.clip(q_pos - kv_pos, 0, 39)]


def _every_lookup(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    """Lookups of every kind, most of them beyond the table too."""
    far, t, either = q_pos - kv_pos, params["t"], jnp.maximum(q_feature, kv_feature)
    narrow = t.astype(jnp.bfloat16)[0].at[far].get(mode="clip").astype(logit.dtype)
    filled = jnp.take(t[0], far, mode="fill", fill_value=2.0)
    outside = jnp.isnan(jnp.take(t[1], far))
    added = (
        t[head, far],
        narrow,
        filled,
        jnp.where(outside, 1.0, 0.0),
        t.T[kv_pos % 7, q_pos % 3],
        jnp.take(t[2], far, mode="wrap"),
        t.reshape(4, 5, 2)[head, far % 5, 1],
        t[0, either],
        params["whole"][far % 7].astype(logit.dtype),
        t[head][..., 3],
    )
    seen = (t[1] > 0)[q_pos % 4 + kv_pos % 4]
    return jnp.where(seen, sum(added, logit), logit * t[2][far - 5])


def _sees(q_pos, kv_pos, head, q_feature, kv_feature, params):
    return params["t"][q_feature, kv_feature]


def _random(*shape, dtype=jnp.float32, seed=7):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _lookups(*lengths: int):
    params = {"t": _random(4, 10), "whole": jnp.arange(7, dtype=jnp.int16)}
    q_feature, kv_feature = (jnp.arange(n, dtype=jnp.int16) % 5 for n in lengths)
    return eqa.ScoreFn(_every_lookup, q_feature, kv_feature, params)


def _strange(length: int):
    return jnp.arange(length) % 7 == 3


def _unseen(q_len: int, kv_len: int) -> dict[str, Any]:
    strange = _strange(q_len)
    q_ids = jnp.where(strange, q_len, jnp.arange(q_len) // 64)
    mask = C() & eqa.Segments(q_ids, jnp.arange(kv_len) // 64)
    return {"mask": mask, "nan queries": strange[None]}


def _hides(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return jnp.where(kv_feature, -jnp.inf, logit)


def _hidden_by_score(kv_len: int) -> dict[str, Any]:
    strange = _strange(kv_len)
    score = eqa.ScoreFn(_hides, None, strange)
    return {"score": score, "nan": jnp.broadcast_to(strange, (2, kv_len))}


# What each mechanism is expected to support: name -> (mechanisms, shape, options). A shape
# is (batch, q_len, kv_len, q_heads, kv_heads, head_dim, value_dim).
_SHAPE = (2, 512, 512, 4, 2, 128, 128)
# More rows of tiles than there are multiprocessors.
_MANY = (1, 2048, 2048, 16, 4, 128, 128)
ALL = (*BOTH, REPRODUCIBLE)
# More rows of keys than there are multiprocessors, by far.
_ROWS = (2, 2048, 2048, 16, 16, 128, 128)
C = eqa.Causal
SUPPORT: dict[str, tuple[tuple[str, ...], tuple[int, ...], Any]] = {
    "full": (ALL, _SHAPE, dict),
    "causal": (ALL, _SHAPE, lambda: {"mask": C()}),
    "causal float16": (BOTH, _SHAPE, lambda: {"mask": C(), "dtype": "float16"}),
    "causal float32": ((), _SHAPE, lambda: {"mask": C(), "dtype": "float32"}),
    "causal lse": (BOTH, _SHAPE, lambda: {"mask": C(), "return_lse": True}),
    "causal ragged": (ALL, (2, 1000, 777, 4, 2, 128, 128), lambda: {"mask": C()}),
    "causal, many rows": (BOTH, _MANY, lambda: {"mask": C()}),
    "prime": (BOTH, (1, 509, 257, 3, 3, 128, 128), lambda: {"mask": C()}),
    "one query": (BOTH, (2, 1, 300, 4, 1, 128, 128), dict),
    "one key": (BOTH, (2, 300, 1, 4, 1, 128, 128), dict),
    "causal head_dim 64": (ALL, (2, 600, 600, 4, 2, 64, 64), lambda: {"mask": C()}),
    "causal head_dim 40": (BOTH, (2, 300, 300, 4, 2, 40, 40), lambda: {"mask": C()}),
    "causal head_dim 256": (ALL, (2, 512, 512, 4, 2, 256, 256), lambda: {"mask": C()}),
    "head_dim 256, ragged": (BOTH, (1, 333, 505, 4, 2, 256, 256), dict),
    "causal head_dim 192, value_dim 128": (
        (FLASH,),
        (2, 512, 512, 4, 4, 192, 128),
        lambda: {"mask": C()},
    ),
    "head_dim 160, value_dim 200": (
        (FLASH,),
        (2, 300, 300, 4, 2, 160, 200),
        lambda: {"mask": C() & eqa.Segments(_ids(3, 2, 300)), "score": eqa.SoftCap(3.0)},
    ),
    "head_dim 256, dropout": (
        (FLASH,),
        (2, 300, 300, 4, 2, 256, 256),
        lambda: {"mask": C(), "dropout": 0.3, "key": jax.random.key(0)},
    ),
    "value_dim 64": ((FLASH,), (2, 512, 512, 4, 2, 128, 64), lambda: {"mask": C()}),
    "head_dim 64, value_dim 128": ((FLASH,), (2, 512, 512, 4, 2, 64, 128), dict),
    "score of NaN beyond the end": (
        (FLASH,),
        (2, 100, 300, 4, 2, 128, 128),
        lambda: {
            "score": eqa.ScoreFn(_temperature, q_features=1 + jnp.arange(100.0) / 100)
        },
    ),
    "window": (BOTH, _SHAPE, lambda: {"mask": C() & eqa.SlidingWindow(100)}),
    "window to both sides": (
        (FLASH,),
        _SHAPE,
        lambda: {"mask": eqa.SlidingWindow(50, right=20)},
    ),
    "not": ((FLASH,), (2, 77, 1003, 4, 2, 128, 128), lambda: {"mask": ~C()}),
    "chunked or prefix": (
        (FLASH,),
        _SHAPE,
        lambda: {"mask": eqa.Chunked(64) | eqa.Prefix(3)},
    ),
    "segments": (
        (FLASH, REPRODUCIBLE),
        _SHAPE,
        lambda: {"mask": C() & eqa.Segments(_ids(3, 2, 512))},
    ),
    "padding": (BOTH, _SHAPE, lambda: {"mask": eqa.Padding(jnp.array([500, 3]))}),
    "padding of all": (ALL, _SHAPE, lambda: {"mask": eqa.Padding(jnp.array([0, 512]))}),
    "keys": (
        (FLASH,),
        _SHAPE,
        lambda: {"mask": eqa.Keys(jax.random.bernoulli(jax.random.key(0), 0.5, (2, 512)))},
    ),
    "dense": (
        (FLASH,),
        _SHAPE,
        lambda: {"mask": jax.random.bernoulli(jax.random.key(0), 0.3, (4, 512, 512))},
    ),
    "predicate": ((FLASH,), _SHAPE, lambda: {"mask": eqa.Predicate(_every_third)}),
    "alibi": ((FLASH,), _SHAPE, lambda: {"mask": C(), "score": eqa.ALiBi.standard(4)}),
    "alibi, far apart": (
        (FLASH, REPRODUCIBLE),
        _MANY,
        lambda: {"mask": C(), "score": eqa.ALiBi.standard(16)},
    ),
    "soft-cap": ((FLASH,), _SHAPE, lambda: {"mask": C(), "score": eqa.SoftCap(3.0)}),
    "score function": (
        (FLASH,),
        _SHAPE,
        lambda: {"score": eqa.ScoreFn(_score, params={"height": jnp.arange(4.0)})},
    ),
    "bias": ((FLASH,), _SHAPE, lambda: {"score": eqa.Bias(_random(4, 512, 512))}),
    "relative bias": (
        (FLASH,),
        _SHAPE,
        lambda: {"score": eqa.RelativeBias(_random(32, 4))},
    ),
    "relative bias, causal": (
        (FLASH,),
        (2, 1000, 777, 4, 2, 128, 128),
        lambda: {"mask": C(), "score": eqa.RelativeBias(_random(32, 4), False)},
    ),
    "relative bias, far": (
        (FLASH,),
        _SHAPE,
        lambda: {"score": eqa.RelativeBias(_random(32, 4), max_distance=10_000)},
    ),
    "lookup": (
        (FLASH,),
        _SHAPE,
        lambda: {"score": eqa.ScoreFn(_looked_up, params={"t": _random(4, 40)})},
    ),
    "lookup of every kind": (
        (FLASH,),
        (2, 1000, 777, 4, 2, 64, 64),
        lambda: {"mask": C(), "score": _lookups(1000, 777)},
    ),
    "lookup of two features": (
        (FLASH,),
        _SHAPE,
        lambda: {
            "mask": eqa.Predicate(
                _sees, _ids(3, 2, 512), _ids(4, 2, 512), {"t": _random(5, 5) > 0}
            )
        },
    ),
    "scale of each head": ((FLASH,), _SHAPE, lambda: {"scale": jnp.arange(1, 5.0) / 8}),
    "dropout": (
        (FLASH,),
        _SHAPE,
        lambda: {"mask": C(), "dropout": 0.3, "key": jax.random.key(0)},
    ),
    "sinks": (BOTH, _SHAPE, lambda: {"mask": C(), "sinks": _random(4)}),
    "end": (
        (FLASH,),
        (2, 100, 700, 4, 2, 128, 128),
        lambda: {"mask": C(), "q_positions": "end"},
    ),
    "positions": (
        (FLASH,),
        _SHAPE,
        lambda: {"mask": C(), "q_positions": jnp.arange(512)[::-1]},
    ),
    "nan in a document": (
        (FLASH,),
        _SHAPE,
        lambda: {"mask": C() & eqa.Segments(_ids(3, 2, 512)), "nan": _ids(3, 2, 512) == 2},
    ),
    "nan behind a score": (
        (FLASH,),
        (2, 300, 300, 4, 2, 64, 64),
        lambda: _hidden_by_score(300),
    ),
    "nan in queries that see nothing": (
        (FLASH, REPRODUCIBLE),
        (2, 300, 512, 4, 2, 128, 128),
        lambda: _unseen(300, 512),
    ),
    "nan in queries that see nothing, head_dim 64": (
        (FLASH, REPRODUCIBLE),
        (2, 300, 200, 4, 2, 64, 64),
        lambda: _unseen(300, 200),
    ),
    "nan in queries that see nothing, head_dim 256": (
        (FLASH,),
        (2, 300, 200, 4, 2, 256, 256),
        lambda: _unseen(300, 200),
    ),
    "many rows of keys": (BOTH, _ROWS, dict),
    "many rows of keys, causal": (
        ALL,
        _ROWS,
        lambda: {"mask": C()},
    ),
    "many rows of keys, causal head_dim 64": (
        BOTH,
        (2, 2048, 2048, 16, 16, 64, 64),
        lambda: {"mask": C()},
    ),
    "many rows of keys, segments": (
        (FLASH, REPRODUCIBLE),
        _ROWS,
        lambda: {"mask": C() & eqa.Segments(_ids(3, _ROWS[0], _ROWS[1]))},
    ),
    "many rows of keys, ragged, dropout": (
        (FLASH, REPRODUCIBLE),
        (8, 1000, 1100, 16, 8, 128, 128),
        lambda: {"mask": C(), "dropout": 0.3, "key": jax.random.key(0)},
    ),
    "many rows of keys, nan in queries that see nothing": (
        (FLASH, REPRODUCIBLE),
        (4, 1100, 1000, 16, 16, 128, 128),
        lambda: _unseen(1100, 1000),
    ),
    "many rows, nan in a document": (
        (FLASH,),
        _MANY,
        lambda: {
            "mask": C() & eqa.Segments(_ids(3, 1, 2048)),
            "nan": _ids(3, 1, 2048) == 2,
        },
    ),
    "many rows, nan behind a score": (
        (FLASH,),
        (2, 1024, 1024, 16, 16, 64, 64),
        lambda: {"mask": C(), **_hidden_by_score(1024)},
    ),
    "nan behind a score, and no mask": (
        (FLASH,),
        (2, 300, 256, 4, 2, 128, 128),
        lambda: _hidden_by_score(256),
    ),
    "nan behind a score, and no mask, head_dim 256": (
        (FLASH,),
        (2, 300, 256, 4, 2, 256, 256),
        lambda: _hidden_by_score(256),
    ),
    "nan behind the mask": (
        BOTH,
        (2, 300, 512, 4, 2, 128, 128),
        lambda: {"mask": C(), "nan": jnp.arange(512)[None] >= 300},
    ),
}


def operands(shape, dtype, seed):
    """`query, key_, value, dout`, of a shape as in `SUPPORT`."""
    batch, q_len, kv_len, heads, kv_heads, head_dim, value_dim = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    return (
        jax.random.normal(keys[0], (batch, q_len, heads, head_dim), dtype),
        jax.random.normal(keys[1], (batch, kv_len, kv_heads, head_dim), dtype),
        jax.random.normal(keys[2], (batch, kv_len, kv_heads, value_dim), dtype),
        jax.random.normal(keys[3], (batch, q_len, heads, value_dim), dtype),
    )


class Timed(NamedTuple):
    """A call to time, of every name in `by`: mechanisms of ours, and peers.

    `kind` is what is computed, which each peer says in its own words.
    """

    shape: tuple[int, int, int, int, int, int]
    kind: str
    by: tuple[str, ...]

    def sizes(self, shrink: int = 1) -> tuple[int, ...]:
        """The shape as in `SUPPORT`, with lengths divided."""
        batch, length, heads, kv_heads, head_dim, value_dim = self.shape
        length = length // shrink
        return batch, length, length, heads, kv_heads, head_dim, value_dim

    def flops(self, both: bool, shrink: int = 1) -> float | None:
        """Of the two products forward, and of the five backward; half of them where
        causal. None where the mask leaves fewer pairs than that."""
        if self.kind in ("window", "documents"):
            return None
        batch, length, _, heads, _, head_dim, value_dim = self.sizes(shrink)
        channels = 4 * head_dim + 3 * value_dim if both else head_dim + value_dim
        pairs = length**2 * (1 if self.kind == "full" else 0.5)
        return 2 * batch * heads * channels * pairs


WINDOW, DOCUMENTS, CAP = 1024, 8, 20.0  # The window counts the query itself.


def document_ids(length: int) -> np.ndarray:
    """Of documents of random lengths, one after the other."""
    ids = np.random.default_rng(5).integers(0, DOCUMENTS, length)
    return np.sort(ids).astype(np.int32)


def options(kind: str, length: int, heads: int) -> dict[str, Any]:
    """What `eqa.attend` is given."""
    match kind:
        case "full":
            return {}
        case "causal":
            return {"mask": C()}
        case "window":
            return {"mask": C() & eqa.SlidingWindow(WINDOW - 1)}
        case "documents":
            return {"mask": C() & eqa.Segments(jnp.asarray(document_ids(length)))}
        case "alibi":
            return {"mask": C(), "score": eqa.ALiBi.standard(heads)}
        case "soft-cap":
            return {"mask": C(), "score": eqa.SoftCap(CAP)}
        case "relative bias":
            return {"mask": C(), "score": eqa.RelativeBias(_random(32, heads), False)}
    raise ValueError(f"no such kind: {kind!r}")


_LONG = (2, 8192, 16, 16, 128)
_WIDE = (2, 4096, 8, 8, 256)
# (batch, length, heads, key heads, head_dim)
_SHAPES = (
    _LONG,
    (8, 2048, 16, 16, 128),
    (4, 4096, 32, 32, 64),
    (4, 4096, 32, 8, 128),
    (1, 32768, 16, 16, 128),
    _WIDE,
)
_JAX = ("jax.nn cudnn", "tokamax")


def _plain(shape: tuple[int, ...], causal: bool) -> Timed:
    ours = (FLASH, CUDNN) if shape == _WIDE else (FLASH,)
    ours += (REPRODUCIBLE,) if causal else ()
    flex = ("flex",) if shape == _LONG and causal else ()
    kind = "causal" if causal else "full"
    return Timed((*shape, shape[-1]), kind, ours + _JAX + flex)  # pyright: ignore


_WITH_FLEX = (*_LONG, _LONG[-1])
TIMED: dict[str, Timed] = {
    **{
        f"{shape} causal={causal}": _plain(shape, causal)
        for shape in _SHAPES
        for causal in (True, False)
    },
    # What multi-head latent attention computes in training.
    "head_dim 192, value_dim 128": Timed(
        (1, 8192, 16, 16, 192, 128), "causal", (FLASH, *_JAX)
    ),
    "window 1024": Timed(_WITH_FLEX, "window", (*BOTH, *_JAX, "flex")),
    "8 documents": Timed(_WITH_FLEX, "documents", (FLASH, "flex")),
    "ALiBi": Timed(_WITH_FLEX, "alibi", (FLASH, "flex")),
    "soft-cap": Timed(_WITH_FLEX, "soft-cap", (FLASH, "tokamax", "flex")),
    "relative bias": Timed(_WITH_FLEX, "relative bias", (FLASH,)),
    "131072 causal": Timed(
        (1, 131072, 16, 16, 128, 128), "causal", (FLASH, "jax.nn cudnn")
    ),
}
