import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._device import hopper_unsupported, wider_than_16_bits
from .base import (
    AbstractMechanism,
    Blocks,
    Gradients,
    heads_unsupported,
    Request,
    stored_unsupported,
)
from .blockwise import Blockwise, of_arrays
from .gather import keys_are_split
from .hidden import rows_of
from .varying import untyped


_LARGEST = 256


class Flash(AbstractMechanism):
    """Our own kernels for Hopper GPUs, which compute any mask and any score.

    What masks and scores say of a pair is traced into the kernels; what they say of a
    query, a key or a head alone is computed beforehand. Pairs may look into a table
    (`params["table"][head, distance]`), but not into one of each query or key. Tiles that
    are EMPTY are neither loaded nor computed, those that are FULL are not masked.

    In the backward pass, gradients of queries are added up in an order that may differ from
    run to run, and so by rounding (of float32) may they, unless `reproducible`; all others
    are the same each time. The gradients of scores' own arrays (the slopes of
    [`eqx_attention.ALiBi`][], say) are computed by [`eqx_attention.Blockwise`][].

    ??? cite

        [FlashAttention-3: Fast and Accurate Attention with Asynchrony and
        Low-precision](https://arxiv.org/abs/2407.08608)

        ```bibtex
        @inproceedings{shah2024flashattention3,
            title={Flash{A}ttention-3: Fast and Accurate Attention with Asynchrony and
                   Low-precision},
            author={Shah, Jay and Bikshandi, Ganesh and Zhang, Ying and
                    Thakkar, Vijay and Ramani, Pradeep and Dao, Tri},
            booktitle={Advances in Neural Information Processing Systems},
            year={2024}
        }
        ```
    """

    reproducible: bool = eqx.field(static=True)

    def __init__(self, reproducible: bool = False):
        """**Arguments:**

        - `reproducible`: whether gradients are to be the same, bit by bit, each time they
            are computed. Default `False`: as is faster.
        """
        self.reproducible = reproducible

    def unsupported(self, request: Request) -> tuple[str, ...]:
        reasons = keys_are_split(request) + stored_unsupported(request)
        return reasons + kernels_unsupported(request)

    def forward(
        self, request: Request
    ) -> tuple[
        Float[Array, "batch q_len q_heads value_dim"], Float[Array, "batch q_len q_heads"]
    ]:
        from .._kernel.hopper_forward import forward
        from .._kernel.tuning import forward_blocks, sizes_of

        wide = padded_heads(request)
        out, lse = untyped(forward, wide, forward_blocks(sizes_of(request)))
        return out[..., : request.value.shape[-1]], lse

    def backward(
        self,
        request: Request,
        out: Float[Array, "batch q_len q_heads value_dim"],
        lse: Float[Array, "batch q_len q_heads"],
        dout: Float[Array, "batch q_len q_heads value_dim"],
        dlse: Float[Array, "batch q_len q_heads"] | None,
        wrt: tuple[int, ...],
    ) -> Gradients:
        from .._kernel.tuning import (
            backward_blocks,
            backward_kernels,
            faster_in_order,
            sizes_of,
        )

        wide = padded_heads(request)
        sizes = sizes_of(request)
        low, delta = rows_of(out, lse, dout, dlse)
        dout_ = _wider(dout.astype(request.query.dtype), wide.value.shape[-1])
        in_order = self.reproducible or faster_in_order(request)
        blocks = backward_blocks(sizes, in_order)
        backward = backward_kernels(sizes).backward
        grads = untyped(backward, wide, low, delta, dout_, blocks)
        inputs = (request.query, request.key_, request.value)
        dq, dk, dv = (
            x[..., : y.shape[-1]].astype(request.result_dtype)
            for x, y in zip(grads, inputs, strict=True)
        )
        return dq, dk, dv, of_arrays(request, out, lse, dout, dlse, wrt)

    def blocks(self, request: Request) -> Blocks:
        return Blockwise().blocks(request)

    def explain(self, request: Request) -> str:
        from .._kernel.tuning import forward_blocks, sizes_of

        blocks = forward_blocks(sizes_of(request))
        return (
            f"flash: tiles of {blocks.query} queries × {blocks.key} keys, "
            f"{blocks.warpgroups} a block of threads; forward and backward in kernels for "
            "Hopper"
        )


def kernels_unsupported(request: Request) -> tuple[str, ...]:
    """Why kernels refuse a request, wherever its keys are."""
    reasons = hopper_unsupported(request.platform)
    if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        reasons.append("it counts in 32 bits, and jax_enable_x64 is set")
    reasons += wider_than_16_bits(request.query, request.key_, request.value)
    reasons += heads_unsupported(request, _LARGEST)
    if not reasons:
        from .._kernel.terms import not_elementwise

        reasons += not_elementwise(request)
    return tuple(reasons)


def _wider(x: Array, size: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[-1])))


def padded_heads(request: Request) -> Request:
    """The same, with channels of zeros, so that heads have a size that kernels know."""
    from .._kernel.tuning import sizes_of

    sizes = sizes_of(request)
    return dataclasses.replace(
        request,
        query=_wider(request.query, sizes.head_dim),
        key_=_wider(request.key_, sizes.head_dim),
        value=_wider(request.value, sizes.value_dim),
    )
