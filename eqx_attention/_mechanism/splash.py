import equinox as eqx
import jax
from jaxtyping import Array, Float

from .._axes import ceil_div, largest_divisor
from .._score import SoftCap
from .._static import is_array
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
from .hidden import seen_rows, without_nan
from .splash_mask import mask_unsupported
from .varying import untyped


# What a vector of a TPU holds: tiles, and channels of heads, are multiples of this.
_LANES = 128
_LARGEST = 256
# The largest tiles that jax's own tests have, of the forward pass and of the backward.
_FORWARD_TOKENS = 512
_BACKWARD_TOKENS = 256


class Splash(AbstractMechanism):
    """JAX's own kernels for TPUs, splash attention, for those calls that they compute
    correctly.

    That is: in bfloat16 or float32, heads of up to 256 channels and any lengths (both are
    padded), and at most one score, a [`eqx_attention.SoftCap`][] of a static number. Masks
    are any that are made of [`eqx_attention.Causal`][], [`eqx_attention.SlidingWindow`][],
    [`eqx_attention.Chunked`][] and [`eqx_attention.Prefix`][] of static numbers by `&`, `|`
    and `~`; joined to these by `&`, [`eqx_attention.Segments`][],
    [`eqx_attention.Padding`][] and [`eqx_attention.Keys`][]; and what has a
    [`eqx_attention.Dense`][] in it, which is written out, and read tile by tile. Tiles that
    are EMPTY are neither loaded nor computed.

    The query is multiplied by the scale before it is given to the kernels, in its own
    dtype, and the output comes in that dtype. A scale that is an array has to come with
    operands in float32; its gradient is computed by [`eqx_attention.Blockwise`][].

    The kernels are checked in JAX's interpreter for TPUs, and that they lower for one.
    Nothing was run on a TPU, and no speed was measured.

    ??? cite

        [FlashAttention-2: Faster Attention with Better Parallelism and Work
        Partitioning](https://arxiv.org/abs/2307.08691)

        ```bibtex
        @inproceedings{dao2024flashattention2,
            title={Flash{A}ttention-2: Faster Attention with Better Parallelism and Work
                   Partitioning},
            author={Dao, Tri},
            booktitle={International Conference on Learning Representations},
            year={2024}
        }
        ```
    """

    block_q: int | None = eqx.field(static=True)
    block_k: int | None = eqx.field(static=True)

    def __init__(self, block_q: int | None = None, block_k: int | None = None):
        """**Arguments:**

        - `block_q`, `block_k`: how many query (key) tokens a tile has, a multiple of 128,
            in both passes. Default: up to 512 in the forward pass and 256 in the backward,
            the largest that jax's own tests have. Sequences are padded to whole tiles.

        **Raises:** `TypeError` if they are no integers, `ValueError` if they are not
            positive multiples of 128.
        """
        self.block_q = block_q
        self.block_k = block_k
        self.__check_init__()

    def __check_init__(self):
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if size is None:
                continue
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"Splash({name}): expected an integer, got {size!r}.")
            if size < 1 or size % _LANES:
                raise ValueError(
                    f"Splash({name}): expected a positive multiple of {_LANES}, got {size}."
                )

    def unsupported(self, request: Request) -> tuple[str, ...]:
        reasons = [*keys_are_split(request), *stored_unsupported(request)]
        if request.platform != "tpu":
            reasons.append(f"it runs on TPUs, not on {request.platform}")
        elif names := _other_functions():
            reasons.append(
                f"jax {jax.__version__} has not the functions that it calls: "
                f"{', '.join(names)} differ from those of jax 0.10.2 to 0.12.0"
            )
        inputs = (request.query, request.key_, request.value)
        dtypes = {x.dtype.name for x in inputs}
        if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
            found = " and ".join(sorted(dtypes))
            reasons.append(f"it computes in bfloat16 or float32, not in {found}")
        reasons += heads_unsupported(request, _LARGEST)
        if request.precision is not None:
            reasons.append(
                f"its products take no precision, and precision={request.precision!r} was "
                "asked for"
            )
        pairs = request.pairs
        if is_array(pairs.scale) and dtypes != {"float32"}:
            reasons.append(
                "its output is rounded to bfloat16, too far for the gradient of a scale "
                "that is an array"
            )
        if pairs.dropout is not None:
            reasons.append("it computes no dropout")
        match pairs.score:
            case () | (SoftCap(cap=int() | float()),):
                pass
            case _:
                reasons.append("it computes no score but one SoftCap of a static number")
        return tuple(reasons) + tuple(mask_unsupported(request))

    def forward(
        self, request: Request
    ) -> tuple[
        Float[Array, "batch q_len q_heads value_dim"], Float[Array, "batch q_len q_heads"]
    ]:
        from .._kernel.splash import forward

        out, lse = untyped(forward, request, self._sizes(request, _FORWARD_TOKENS))
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
        from .._kernel.splash import backward

        low, dout_, delta = seen_rows(request, out, lse, dout, dlse)
        dout_ = dout_.astype(request.query.dtype)
        sizes = self._sizes(request, _BACKWARD_TOKENS)
        grads = untyped(backward, without_nan(request, lse), low, delta, dout_, sizes)
        dq, dk, dv = (x.astype(request.result_dtype) for x in grads)
        return dq, dk, dv, of_arrays(request, out, lse, dout, dlse, wrt)

    def blocks(self, request: Request) -> Blocks:
        return Blockwise().blocks(request)

    def explain(self, request: Request) -> str:
        sizes = self._sizes(request, _FORWARD_TOKENS)
        return (
            f"splash: tiles of {sizes.query} queries × {sizes.key} keys; forward and "
            "backward in jax's kernels for TPUs"
        )

    def _sizes(self, request: Request, limit: int):
        from .._kernel.splash import Sizes

        q_len, kv_len = request.lengths
        dims = (request.query.shape[-1], request.value.shape[-1])
        return Sizes(
            _block(self.block_q, q_len, limit),
            _block(self.block_k, kv_len, limit),
            *(ceil_div(dim, _LANES) * _LANES for dim in dims),
        )


def _other_functions() -> tuple[str, ...]:
    from .._kernel.splash import not_as_known

    return not_as_known()


def _block(size: int | None, length: int, limit: int) -> int:
    """So many tokens that few are added to fill the last tile."""
    if size is not None:
        return size
    return _LANES * largest_divisor(ceil_div(length, _LANES), limit // _LANES)
