import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._device import compute_capability, wider_than_16_bits
from .._mask import AbstractMask, And, Causal, Full, Padding, SlidingWindow
from .._static import Static
from .base import AbstractMechanism, Blocks, Gradients, Request, stored_unsupported
from .blockwise import Blockwise
from .hidden import again_if_nan, without_nan


class CuDNN(AbstractMechanism):
    """NVIDIA's own kernels, for those calls that they compute correctly.

    That is: no mask, or [`eqx_attention.Causal`][], a [`eqx_attention.SlidingWindow`][] to
    the left, [`eqx_attention.Padding`][], and combinations of these by `&`; in bfloat16 or
    float16; no scores and no dropout.

    ??? cite

        [cuDNN: Efficient Primitives for Deep Learning](https://arxiv.org/abs/1410.0759)

        ```bibtex
        @article{chetlur2014cudnn,
            title={cu{DNN}: Efficient Primitives for Deep Learning},
            author={Chetlur, Sharan and Woolley, Cliff and Vandermersch, Philippe and
                    Cohen, Jonathan and Tran, John and Catanzaro, Bryan and
                    Shelhamer, Evan},
            journal={arXiv:1410.0759},
            year={2014}
        }
        ```
    """

    def unsupported(self, request: Request) -> tuple[str, ...]:
        reasons = [*stored_unsupported(request)]
        capability = compute_capability() if request.platform == "gpu" else (0, 0)
        if request.platform != "gpu":
            reasons.append(f"it runs on NVIDIA's GPUs, not on {request.platform}")
        elif capability < (8, 0):
            found = f"{capability[0]}.{capability[1]}"
            reasons.append(f"it needs compute capability 8.0 or more, not {found}")
        reasons += wider_than_16_bits(request.query, request.key_, request.value)
        head_dim, value_dim = request.query.shape[-1], request.value.shape[-1]
        largest = 256 if capability >= (9, 0) else 128
        if head_dim != value_dim:
            reasons.append(f"value_dim must be head_dim={head_dim}, and is {value_dim}")
        if head_dim % 8 or not 1 <= head_dim <= largest:
            reasons.append(
                f"head_dim must be a multiple of 8 up to {largest}, and is {head_dim}"
            )
        if request.query.size >= 2**31:
            reasons.append("its gradients are wrong from 2**31 elements of queries on")
        return tuple(reasons) + tuple(_pairs_unsupported(request))

    def forward(
        self, request: Request
    ) -> tuple[
        Float[Array, "batch q_len q_heads value_dim"], Float[Array, "batch q_len q_heads"]
    ]:
        out, lse = again_if_nan(_forward, request)
        return out.astype(request.result_dtype), lse

    def backward(
        self,
        request: Request,
        out: Float[Array, "batch q_len q_heads value_dim"],
        lse: Float[Array, "batch q_len q_heads"],
        dout: Float[Array, "batch q_len q_heads value_dim"],
        dlse: Float[Array, "batch q_len q_heads"] | None,
        wrt: tuple[int, ...],
    ) -> Gradients:
        request = without_nan(request, lse)
        grads = tuple(
            x.astype(request.result_dtype) for x in _backward(request, out, lse, dout)
        )
        if dlse is not None:
            more = _backward_of_lse(request, lse, dlse)
            grads = (grads[0] + more[0], grads[1] + more[1], grads[2])
        return (*grads, ())

    def blocks(self, request: Request) -> Blocks:
        return Blockwise().blocks(request)

    def explain(self, request: Request) -> str:
        return "cudnn: forward and backward in kernels of cuDNN"


def _parts(mask: AbstractMask) -> tuple[AbstractMask, ...]:
    return mask.masks if isinstance(mask, And) else (mask,)


def _pairs_unsupported(request: Request):
    pairs, (q_len, kv_len) = request.pairs, request.lengths
    if pairs.score:
        yield "it computes no scores"
    if pairs.dropout is not None:
        yield "its dropout has other bits than ours"
    if not isinstance(pairs.scale, Static) or pairs.scale.value <= 0:
        yield "its scale is a static number > 0"
    windows = 0
    positional = False
    for mask in _parts(pairs.mask):
        match mask:
            case Full():
                pass
            case Padding(q_lengths=None) if len(_parts(pairs.mask)) == 1:
                pass
            case Causal(offset=int(offset)) if offset == 0:
                positional = True
            case SlidingWindow(left=int(), right=(None | int()) as right) if not right:
                positional = True
                windows += 1
                if right is None and not _is_causal(request):
                    yield "its windows are causal"
                if q_len > kv_len:
                    yield "its windows leave no query without keys"
            case _:
                yield f"it computes no mask {mask}"
    if windows > 1:
        yield "it computes one window only"
    counted = pairs.q.counted and pairs.kv.counted
    if positional and (not counted or pairs.q.shift or pairs.kv.shift):
        yield "its masks go by index, not by other positions"
    elsewhere = pairs.q.index is not None or pairs.kv.index is not None
    if elsewhere and any(isinstance(m, Padding) for m in _parts(pairs.mask)):
        yield "its lengths are counted from the first token"


def _is_causal(request: Request) -> bool:
    def causal(mask):
        if isinstance(mask, SlidingWindow):
            return isinstance(mask.right, int) and mask.right == 0
        return isinstance(mask, Causal)

    return any(map(causal, _parts(request.pairs.mask)))


def _window(request: Request) -> int | None:
    """How many keys a query sees, itself included, which is how cuDNN counts."""
    for mask in _parts(request.pairs.mask):
        if isinstance(mask, SlidingWindow) and isinstance(mask.left, int):
            return mask.left + 1
    return None


def _lengths(request: Request) -> tuple[Array, Array] | None:
    """`(queries, keys)` that are no padding, of each batch element."""
    batch, (q_len, kv_len) = request.query.shape[0], request.lengths
    found = None
    for mask in _parts(request.pairs.mask):
        if isinstance(mask, Padding):
            q = q_len if mask.q_lengths is None else mask.q_lengths
            new = [
                jnp.broadcast_to(jnp.asarray(n, jnp.int32).reshape(-1), (batch,))
                for n in (q, mask.kv_lengths)
            ]
            new = [jnp.clip(n, 0, size) for n, size in zip(new, (q_len, kv_len))]
            if found is not None:
                new = [jnp.minimum(a, b) for a, b in zip(found, new)]
            found = new
    return None if found is None else (found[0], found[1])


def _arguments(request: Request):
    """jax's module, and its arguments: arrays that say what is padding, and options."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    unused = jnp.zeros(0, request.query.dtype)
    lengths = _lengths(request)
    q_lengths, kv_lengths = (unused, unused) if lengths is None else lengths
    causal = _is_causal(request)
    kinds = cudnn.MaskType
    if lengths is not None:
        kind = kinds.PADDING_CAUSAL if causal else kinds.PADDING
    else:
        kind = kinds.CAUSAL if causal else kinds.NO_MASK
    arrays = (unused, q_lengths, kv_lengths, unused, unused, unused, unused)
    options = {
        "scale": float(request.pairs.scale.value),  # pyright: ignore
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": kind,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": _window(request),
    }
    return cudnn, arrays, options


def _unseen(request: Request) -> Array | None:
    """Rows that are padding, or that see nothing but padding: (batch, q_len, 1)."""
    lengths = _lengths(request)
    if lengths is None:
        return None
    q_lengths, kv_lengths = (n[:, None] for n in lengths)
    index = jnp.arange(request.lengths[0], dtype=jnp.int32)
    unseen = (index >= q_lengths) | (kv_lengths == 0)
    window = _window(request)
    if window is not None:
        unseen = unseen | (index - window + 1 >= kv_lengths)
    return unseen[..., None]


def _forward(request: Request) -> tuple[Array, Array]:
    cudnn, arrays, options = _arguments(request)
    inputs = (request.query, request.key_, request.value)
    # Not jax's public function: that partitions by itself, and gives no lse in float32.
    forward = cudnn._dot_product_attention_fwd_impl
    out, lse = forward(*inputs, *arrays, **options, is_training=True)
    lse = lse.swapaxes(1, 2)
    if not isinstance(request.pairs.mask, Full):
        lse = lse + (out * 0).sum(-1, dtype=lse.dtype)
    unseen = _unseen(request)
    if unseen is None:
        return out, lse
    out = jnp.where(unseen[..., None], jnp.zeros((), out.dtype), out)
    return out, jnp.where(unseen, -jnp.inf, lse)


def _backward(request: Request, out: Array, lse: Array, dout: Array):
    """`(dq, dk, dv)`; cuDNN itself subtracts `(dout * out).sum(-1)`."""
    cudnn, arrays, options = _arguments(request)
    dtype = request.query.dtype
    empty = jnp.isneginf(lse)
    dout = jnp.where(empty[..., None], 0, dout).astype(dtype)
    stats = jnp.where(empty, jnp.inf, lse).swapaxes(1, 2)
    inputs = (request.query, request.key_, request.value)
    backward = cudnn._dot_product_attention_bwd_impl
    return backward(*inputs, *arrays, stats, out.astype(dtype), dout, **options)[:3]


def _backward_of_lse(request: Request, lse: Array, dlse: Array) -> tuple[Array, Array]:
    r"""The part of `(dq, dk)` of the cotangent of lse.

    With $w = \text{dlse}$, it is $dq_i = w_i \sum_j p_{ij} k_j$ and $dk_j = \sum_i p_{ij}
    w_i q_i$, times the scale: attention to the keys as values, and the gradient of its
    values.
    """
    scale = request.pairs.scale.value  # pyright: ignore
    dlse = (jnp.where(jnp.isneginf(lse), 0, dlse) * scale)[..., None]
    keys = dataclasses.replace(request, value=request.key_)
    seen, own = _forward(keys)
    moved = dlse * request.query.astype(dlse.dtype)
    _, _, dk = _backward(keys, seen, lse, moved)
    # `lse` may be over more keys than these.
    part = jnp.where(jnp.isneginf(own), 0, jnp.exp(own - lse))[..., None]
    dq = dlse * part * seen.astype(dlse.dtype)
    return dq.astype(request.result_dtype), dk.astype(request.result_dtype)
