"""Named cases: one call of attention each, its arrays built on demand from a seed."""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import eqx_attention as eqa

from ._catalogue import MASKS, SCORES, Shape, SHAPES
from ._visible import visible_pairs


class Inputs(NamedTuple):
    """The arrays of a [`eqx_attention.testing.Case`][].

    **Fields:**

    - `query`, `key_`, `value`: as in [`eqx_attention.attend`][].
    - `options`: the keyword arguments of the call, only those that the case uses (and
        always `mask`).
    - `dout`: the cotangent of the output, `"*batch q_len q_heads value_dim"`.
    - `dlse`: the cotangent of the lse, `"*batch q_len q_heads"`, or `None` if the case
        does not ask for the lse.
    """

    query: Float[Array, "*batch q_len q_heads head_dim"]
    key_: Float[Array, "*batch kv_len kv_heads head_dim"]
    value: Float[Array, "*batch kv_len kv_heads value_dim"]
    options: dict[str, Any]
    dout: Float[Array, "*batch q_len q_heads value_dim"]
    dlse: Float[Array, "*batch q_len q_heads"] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One call of attention, described by names and a seed.

    **Fields:**

    - `name`: what reports call it.
    - `mask`: a name of [`eqx_attention.testing.MASKS`][]; or `("and", a, b, ...)`,
        `("or", a, b, ...)` or `("not", a)` of such; or a mask itself.
    - `score`: a tuple of names of [`eqx_attention.testing.SCORES`][] or of scores.
    - `shape`: a [`eqx_attention.testing.Shape`][], or the name of one of
        [`eqx_attention.testing.SHAPES`][].
    - `dtype`: `"float64"`, `"float32"`, `"bfloat16"` or `"float16"`. Scores, sinks and
        scales are at least float32.
    - `q_positions`, `kv_positions`: `"start"`, `"end"` (of queries only), or an array that
        is `"shifted"`, `"permuted"`, `"repeated"` or `"batched"` (another one for each
        element of the batch).
    - `sinks`: whether there are sinks.
    - `scale`: `None`, a number, `"scalar"` (a learnable number) or `"array"` (one a head).
    - `dropout`: its rate.
    - `return_lse`: whether the lse is asked for, and differentiated.
    - `poison`: whether keys that no query sees hold NaN.
    - `seed`: of every array.
    """

    name: str
    mask: Any = "full"
    score: tuple[Any, ...] = ()
    shape: Shape | str = "square"
    dtype: str = "float32"
    q_positions: str = "start"
    kv_positions: str = "start"
    sinks: bool = False
    scale: Any = None
    dropout: float = 0.0
    return_lse: bool = True
    poison: bool = False
    seed: int = 0

    def build(self) -> Inputs:
        """Makes the arrays: the same ones each time.

        **Returns:** an [`eqx_attention.testing.Inputs`][].

        **Raises:** a `ValueError` for a name that is not known.
        """
        with precision_for(self.dtype):
            return _build(self)


def precision_for(dtype: str) -> contextlib.AbstractContextManager:
    """Double precision where it is needed, else what there is."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def statistics_dtype(dtype: Any) -> str:
    """The dtype of the lse, and of what is learned besides the query, keys and values."""
    return "float64" if jnp.dtype(dtype) == jnp.float64 else "float32"


def _look_up(table: dict, name: Any, what: str) -> Any:
    if name not in table:
        raise ValueError(f"{what}: expected one of {', '.join(table)}; got {name!r}.")
    return table[name]


def _mask(spec: Any, rng: np.random.Generator, shape: Shape) -> Any:
    match spec:
        case str():
            return _look_up(MASKS, spec, "mask")(rng, shape)
        case ("not", inner):
            return ~_as_mask(_mask(inner, rng, shape))
        case ("and" | "or" as name, first, *others):
            out = _as_mask(_mask(first, rng, shape))
            for other in others:
                mask = _as_mask(_mask(other, rng, shape))
                out = out & mask if name == "and" else out | mask
            return out
        case _:
            return spec


def _as_mask(mask: Any) -> Any:
    return mask if isinstance(mask, eqa.AbstractMask) else eqa.Dense(mask)


def _positions(kind: str, rng, batch: tuple[int, ...], size: int) -> Any:
    index = np.arange(size)
    match kind:
        case "shifted":
            positions = index + rng.integers(-5, 9)
        case "permuted":
            positions = rng.permutation(index)
        case "repeated":
            positions = index // 2 - 1
        case "batched":
            positions = index + rng.integers(-3, 6, (*batch, 1))
        case _:
            raise ValueError(
                "positions: expected 'start', 'end', 'shifted', 'permuted', 'repeated' "
                f"or 'batched'; got {kind!r}."
            )
    return jnp.asarray(positions, jnp.int32)


def _build(case: Case) -> Inputs:
    rng = np.random.default_rng(case.seed)
    shape = case.shape
    s = _look_up(SHAPES, shape, "shape") if isinstance(shape, str) else shape
    dtype = jnp.dtype(case.dtype)
    real = jnp.dtype(statistics_dtype(dtype))

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape).astype(dtype))

    def uniform(low, high, shape):
        return jnp.asarray(np.asarray(rng.uniform(low, high, shape)).astype(real))

    query = normal(*s.batch, s.q_len, s.q_heads, s.head_dim)
    key_ = normal(*s.batch, s.kv_len, s.kv_heads, s.head_dim)
    value = normal(*s.batch, s.kv_len, s.kv_heads, s.value_dim)
    dout = normal(*s.batch, s.q_len, s.q_heads, s.value_dim)
    dlse = jnp.asarray(rng.standard_normal(dout.shape[:-1]).astype(real))

    options: dict[str, Any] = {"mask": _mask(case.mask, rng, s)}
    if case.score:
        score = tuple(
            _look_up(SCORES, x, "score")(rng, s, real) if isinstance(x, str) else x
            for x in case.score
        )
        options["score"] = score[0] if len(score) == 1 else score
    if case.sinks:
        options["sinks"] = uniform(-1, 1, (s.q_heads,))
    if case.scale is not None:
        shapes = {"scalar": (), "array": (s.q_heads,)}
        by_name = isinstance(case.scale, str)
        options["scale"] = (
            uniform(0.2, 0.8, _look_up(shapes, case.scale, "scale"))
            if by_name
            else case.scale
        )
    if case.dropout:
        make_key = jax.random.key if case.seed % 2 else jax.random.PRNGKey
        options |= dict(dropout=case.dropout, key=make_key(case.seed))
    if case.q_positions == "end":
        options["q_positions"] = "end"
    elif case.q_positions != "start":
        options["q_positions"] = _positions(case.q_positions, rng, s.batch, s.q_len)
    if case.kv_positions != "start":
        options["kv_positions"] = _positions(case.kv_positions, rng, s.batch, s.kv_len)
    if case.return_lse:
        options["return_lse"] = True
    if case.poison:
        names = ("q_positions", "kv_positions")
        seen = visible_pairs(
            options["mask"],
            s.batch,
            s.q_heads,
            s.q_len,
            s.kv_len,
            **{n: options[n] for n in names if n in options},
        )
        # (*batch, q_heads, q_len, kv_len) -> (*batch, kv_len, kv_heads, 1)
        groups = (*s.batch, s.kv_heads, -1, s.kv_len)
        hidden = ~np.any(seen.reshape(groups), axis=-2)
        hidden = np.swapaxes(hidden, -1, -2)[..., None]
        nan = np.asarray(np.nan, dtype)
        key_ = jnp.asarray(np.where(hidden, nan, np.asarray(key_)))
        value = jnp.asarray(np.where(hidden, nan, np.asarray(value)))
    return Inputs(query, key_, value, options, dout, dlse if case.return_lse else None)


def cases(n: int, seed: int = 0, dtype: Any = "float32") -> tuple[Case, ...]:
    """`n` random combinations of everything that a call of attention may ask for.

    Each mask and score of the library occurs once before any occurs twice. The first `m`
    of `n` cases are those of `cases(m)`.

    **Arguments:**

    - `n`: how many.
    - `seed`: which.
    - `dtype`: of the query, the keys and the values.

    **Returns:** a tuple of [`eqx_attention.testing.Case`][].
    """
    dtype = jnp.dtype(dtype).name
    return tuple(_random_case(i, seed, dtype) for i in range(n))


# So that those who remember what came of a case know it again.
@functools.lru_cache(maxsize=4096)
def _random_case(i: int, seed: int, dtype: str) -> Case:
    order = np.random.default_rng(seed)
    first_mask = order.permutation(list(MASKS))[i % len(MASKS)]
    first_score = order.permutation(list(SCORES))[i // 2 % len(SCORES)]
    shape = order.permutation(list(SHAPES))[i % len(SHAPES)]
    rng = np.random.default_rng((seed, i))

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    def another_mask():
        name = pick(*MASKS)
        return ("not", name) if rng.random() < 0.3 else name

    mask = str(first_mask)
    if rng.random() < 0.5:
        mask = pick(
            ("not", mask),
            ("and", mask, another_mask()),
            ("or", mask, another_mask()),
            ("not", ("or", mask, another_mask())),
            ("and", ("or", mask, another_mask()), another_mask()),
        )
    score = ()
    if i % 2:
        names = list(SCORES)
        more = [pick(*names) for _ in range(pick(0, 0, 1, 2))]
        score = sorted({str(first_score), *more}, key=names.index)
        # One that emits minus infinity has to be the last.
        score = tuple(s for s in score[:-1] if "holes" not in s) + (score[-1],)
    q_positions = pick(
        "start", "start", "end", "end", "shifted", "permuted", "repeated", "batched"
    )
    kv_positions = pick("start", "start", "shifted", "permuted", "repeated", "batched")
    features = dict(
        sinks=bool(rng.random() < 0.3),
        scale=pick(None, None, 0.3, "scalar", "array"),
        dropout=pick(0.0, 0.0, 0.0, 0.1, 0.5),
        return_lse=bool(rng.random() < 0.7),
        poison=bool(rng.random() < 0.15),
    )
    words = [f"{i:03d}", _spell(mask), *score, str(shape)]
    words += [f"q_{q_positions}"] if q_positions != "start" else []
    words += [f"kv_{kv_positions}"] if kv_positions != "start" else []
    words += [n if x is True else f"{n}={x}" for n, x in features.items() if x]
    return Case(
        name=" ".join(words),
        mask=mask,
        score=score,
        shape=str(shape),
        dtype=dtype,
        q_positions=q_positions,
        kv_positions=kv_positions,
        seed=1000 * seed + i,
        **features,
    )


def _spell(mask: Any) -> str:
    match mask:
        case ("not", inner):
            return f"~{_spell(inner)}"
        case ("and", *parts):
            return f"({'&'.join(map(_spell, parts))})"
        case ("or", *parts):
            return f"({'|'.join(map(_spell, parts))})"
        case _:
            return str(mask)
