"""The sharpest direction of a loss: Hessian-vector products through attention.

    uv run examples/hessian_vector.py
    uv run examples/hessian_vector.py --without mask    # of another loss, and fails

The derivative of a gradient along a vector, forward over reverse, is the Hessian times that
vector, at a few times the cost of the gradient. Such products alone lead to the eigenvalue
of greatest magnitude. Here the model is so small that the whole Hessian can be compared. At
any length, memory grows as the length does, for the weights of attention are never kept.
"""

import functools as ft

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
from gallery.flags import flags
from jaxtyping import Array, Float


HEADS = 2


def by_blocks(q, k, v, mask: eqa.AbstractMask = eqa.Causal(), block: int = 64):
    mechanism = eqa.Blockwise(block_q=block, block_k=block)
    return eqa.attend(q, k, v, mask=mask, mechanism=mechanism)


def by_formula(q, k, v):
    logits = jnp.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    logits = jnp.where(jnp.tri(len(q), dtype=bool), logits, -jnp.inf)
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits), v)


def loss_of(
    params: Float[Array, " size"], x: Float[Array, "seq width"], attention=by_blocks
) -> Float[Array, ""]:
    """How well each token tells the next one, by the four matrices of attention."""
    seq, width = x[1:].shape
    *projections, out = params.reshape(4, width, width)
    q, k, v = ((x[:-1] @ w).reshape(seq, HEADS, -1) for w in projections)
    return jnp.mean((attention(q, k, v).reshape(seq, width) @ out - x[1:]) ** 2)


@ft.partial(jax.jit, static_argnames="attention")
def hessian_vector_product(
    params: Float[Array, " size"], vector: Float[Array, " size"], x, attention=by_blocks
) -> Float[Array, " size"]:
    gradient = jax.grad(lambda params: loss_of(params, x, attention))
    return jax.jvp(gradient, (params,), (vector,))[1]


@jax.jit
def whole_hessian(params: Float[Array, " size"], x) -> Float[Array, "size size"]:
    return jax.hessian(loss_of)(params, x, by_formula)


def sharpest(product, vector: np.ndarray, steps: int) -> float:
    """The eigenvalue of greatest magnitude, by power iteration."""
    value = 0.0
    for _ in range(steps):
        vector = vector / np.linalg.norm(vector)
        new = np.asarray(product(vector))
        value, vector = float(vector @ new), new
    return value


def temporaries(seq: int, width: int) -> int:
    """What XLA plans for a Hessian-vector product, in bytes."""
    params = jax.ShapeDtypeStruct((4 * width**2,), jnp.float32)
    x = jax.ShapeDtypeStruct((seq + 1, width), jnp.float32)
    lowered = hessian_vector_product.lower(params, params, x)
    stats = lowered.compile().memory_analysis()
    assert stats is not None
    return stats.temp_size_in_bytes


def main(argv: list[str] | None = None) -> None:
    sizes = dict(seq=12, width=4, long=4096)
    multiples = dict(width=HEADS, long=4)
    args = flags(argv, __doc__, "mask", multiples=multiples, steps=500, **sizes)
    attention = by_blocks
    if args.without:
        attention = ft.partial(by_blocks, mask=eqa.Full())
    rng = np.random.default_rng(0)
    params, vector = rng.standard_normal((2, 4 * args.width**2))
    # Each token is much like the one before it.
    x = rng.standard_normal((args.seq + 1, args.width)).cumsum(axis=0) / args.seq**0.5

    with jax.enable_x64(True):
        hessian = np.asarray(whole_hessian(params, x))
        product = lambda v: hessian_vector_product(params, v, x, attention=attention)  # noqa: E731
        expected = hessian @ vector
        error = np.abs(product(vector) - expected).max() / np.abs(expected).max()
        print(f"product     differs by {error:.1e} from that with the whole Hessian")
        assert error < 1e-10, "this is not the Hessian of the formula"
        value = sharpest(product, vector, args.steps)

    eigenvalues = np.linalg.eigvalsh(hessian)
    expected = eigenvalues[np.abs(eigenvalues).argmax()]
    print(f"eigenvalue  {value:.6f} by products, {expected:.6f} by the whole Hessian")
    assert abs(value - expected) < 1e-6 * abs(expected), "the iteration has not converged"

    lengths = (args.long // 4, args.long)
    few, many = (temporaries(seq, 64) for seq in lengths)
    weights = 4 * HEADS * args.long**2
    print(f"memory      {few / 2**20:.1f} MiB for {lengths[0]} tokens")
    print(f"            {many / 2**20:.1f} MiB for {lengths[1]}")
    print(f"            {weights / 2**20:.1f} MiB would be their weights alone")
    assert many < 4.1 * few, "memory is not linear in the length"


if __name__ == "__main__":
    main()
