"""What the tests are parametrised by."""

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
from eqx_attention.testing import MASKS as MASKS, SCORES as SCORES, Shape, SHAPES as SHAPES


MECHANISMS = {
    "vanilla": eqa.Vanilla(),
    "blockwise": eqa.Blockwise(),
    "blockwise_small": eqa.Blockwise(block_q=8, block_k=5),
    "auto": eqa.Auto(),
}


def operands(shape: Shape, dtype=jnp.float32, seed: int = 0):
    """Random `(query, key_, value)`."""
    rng = np.random.default_rng(seed)
    sizes = (
        (shape.q_len, shape.q_heads, shape.head_dim),
        (shape.kv_len, shape.kv_heads, shape.head_dim),
        (shape.kv_len, shape.kv_heads, shape.value_dim),
    )
    arrays = (rng.standard_normal((*shape.batch, *size)) for size in sizes)
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def square(length: int, heads: int = 2, dim: int = 8, batch=(), dtype=jnp.float32):
    shape = Shape(batch, length, length, heads, heads, dim, dim)
    return operands(shape, dtype)


def compiled(fn, *args):
    """`fn(*args)`, compiled as a whole: a test that calls `vmap` or `grad` eagerly spends
    its time on compiling one operation after another. With few of XLA's optimisations,
    which would take longer than what they save."""
    return fast_jit(fn)(*args)


def fast_jit(fn):
    return eqx.filter_jit(  # pyright: ignore[reportCallIssue]
        fn, compiler_options={"xla_backend_optimization_level": 0}
    )


def assert_close(x, y, tolerance: float):
    """Equal to a tolerance that is relative to the largest magnitude, with infinities in
    the same places."""
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        finite = np.isfinite(b)
        assert (a[~finite] == b[~finite]).all()
        if finite.any():
            bound = tolerance * max(1.0, float(np.abs(b[finite]).max()))
            assert float(np.abs(a[finite] - b[finite]).max()) <= bound


def temporaries(fn, *args) -> int:
    """The bytes of temporary memory of a compiled function."""
    stats = jax.jit(fn).lower(*args).compile().memory_analysis()
    assert stats is not None
    return stats.temp_size_in_bytes
