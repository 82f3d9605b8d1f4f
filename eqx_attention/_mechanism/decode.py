import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._axes import ceil_div, largest_divisor
from .._keys import is_stored, key_block
from .._mask import BlockMask
from .._partial import merge_stacked
from .base import AbstractMechanism, Blocks, Gradients, Request
from .blockwise import Blockwise, loop, softmax_of_tile, tile_block
from .flash import Flash, kernels_unsupported, padded_heads
from .gather import keys_are_split
from .packed import packed
from .plan import grid, kinds, lists
from .tile import heads_first, TileOf, tokens_first
from .varying import untyped


# The most query tokens.
_QUERIES = 128
# On CPUs, the keys and values of a split (of as many batch elements as fit) fill so many
# bytes in the dtype of accumulation. Measured: benchmarks/decode.py.
_BYTES = 2**22
# On accelerators, which need much to do at once, so many splits, of at least so many keys.
_SPLITS = 8
_FEWEST_KEYS = 2048


class Decode(AbstractMechanism):
    """For few queries over many keys, as when a model generates text: flash-decoding.

    The keys are split into runs. Attention to each run, of all heads at once, gives a
    partial, and one [`eqx_attention.merge`][] joins these. Runs that the mask hides, such
    as those beyond the length of a sequence, are not computed. Of keys in stored form
    ([`eqx_attention.Paged`][], [`eqx_attention.Quantized`][]) only one run at a time is
    made an array.

    There may be several queries, as when tokens are guessed and then checked, with any
    mask between them and the keys (a [`eqx_attention.Dense`][] one, for a tree of
    guesses). Gradients are those of [`eqx_attention.Blockwise`][]. On Hopper GPUs, a kernel
    computes all splits at once, and gradients are those of [`eqx_attention.Flash`][],
    where that supports the call. Of keys in stored form, it reads pages of a multiple of 64
    tokens, and 8 bits that stand for bfloat16 with scales in float32, both of a multiple of
    64 channels.

    ??? cite

        [Flash-Decoding for long-context inference](https://pytorch.org/blog/flash-decoding)

        ```bibtex
        @misc{dao2023flashdecoding,
            title={Flash-Decoding for long-context inference},
            author={Dao, Tri and Haziza, Daniel and Massa, Francisco and Sizov, Grigory},
            year={2023},
            url={https://pytorch.org/blog/flash-decoding}
        }
        ```
    """

    num_splits: int | None = eqx.field(static=True)

    def __init__(self, num_splits: int | None = None):
        """**Arguments:**

        - `num_splits`: into how many runs the keys are split. By default chosen from the
            shapes. More than there are keys is as many as there are keys.

        **Raises:** `ValueError` if it is not positive.
        """
        self.num_splits = num_splits
        self.__check_init__()

    def __check_init__(self):
        n = self.num_splits
        if n is None:
            return
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"Decode(num_splits): expected an integer, got {n!r}.")
        if n < 1:
            raise ValueError(f"Decode(num_splits): expected at least 1, got {n}.")

    def unsupported(self, request: Request) -> tuple[str, ...]:
        if reasons := keys_are_split(request):
            return reasons
        q_len = request.lengths[0]
        if q_len > _QUERIES:
            return (f"it is for few queries: at most {_QUERIES}, and there are {q_len}",)
        return ()

    def forward(
        self, request: Request
    ) -> tuple[
        Float[Array, "batch q_len q_heads value_dim"], Float[Array, "batch q_len q_heads"]
    ]:
        if not _without_kernel(request):
            from .._kernel.hopper_decode import decode

            stored = is_stored(request.key_, request.value)
            whole = request if stored else padded_heads(request)
            out, lse = untyped(decode, whole, self.num_splits)
            return out[..., : request.value.shape[-1]], lse
        sizes = self._splits(request)
        tiles, overlaps = grid(request, sizes), (False, True)
        table = lists(kinds(request, tiles, overlaps))
        query = heads_first(request, request.query)
        q = query.reshape(tiles.counts.batch, sizes.batch, *query.shape[1:])
        value_dim = request.value.shape[-1]

        def of_batch(_, xs):
            b, q = xs
            columns, full, some = table.row(b, 0, 0)

            def split(masked, t, state):
                outs, lses = state
                j = columns[t]
                block = tile_block(tiles, b, 0, 0, j)
                at = TileOf(request, block, (None, tiles.fresh(1, j)), masked)
                starts = (block.starts[0], block.starts[3], 0)
                shape = (sizes.batch, sizes.key, sizes.heads)
                k, v = (
                    heads_first(request, key_block(x, starts, shape))
                    for x in (request.key_, request.value)
                )
                out, lse = softmax_of_tile(at, q, k, v)
                return outs.at[j].set(out), lses.at[j].set(lse)

            rows = (tiles.counts.key, *q.shape[:3])
            state = (request.full((*rows, value_dim)), request.full(rows, -jnp.inf))
            state = loop(split, full, some, state, request, tiles, overlaps)
            return None, merge_stacked(*state)

        numbers = jnp.arange(tiles.counts.batch, dtype=jnp.int32)
        _, (out, lse) = lax.scan(of_batch, None, (numbers, q))
        out, lse = (x.reshape(-1, *x.shape[2:]) for x in (out, lse))
        return tokens_first(out), lse.swapaxes(1, 2)

    def backward(
        self,
        request: Request,
        out: Float[Array, "batch q_len q_heads value_dim"],
        lse: Float[Array, "batch q_len q_heads"],
        dout: Float[Array, "batch q_len q_heads value_dim"],
        dlse: Float[Array, "batch q_len q_heads"] | None,
        wrt: tuple[int, ...],
    ) -> Gradients:
        mechanism = Blockwise() if Flash().unsupported(request) else Flash()
        return mechanism.backward(request, out, lse, dout, dlse, wrt)

    def blocks(self, request: Request) -> Blocks:
        return Blockwise().blocks(request)

    def explain(self, request: Request) -> str:
        reasons = _without_kernel(request)
        if not reasons:
            return "decode: the keys of each head in splits, in a kernel for Hopper"
        sizes = self._splits(request)
        splits = grid(request, sizes).counts.key
        text = f"decode: {splits} splits of {sizes.key} keys × {sizes.batch} batch elements"
        return f"{text}; in no kernel: {', '.join(reasons)}"

    def _splits(self, request: Request) -> Blocks:
        batch, kv_len, heads, head_dim = request.key_.shape
        token = heads * (head_dim + request.value.shape[-1]) * request.dtype.itemsize
        q_len = request.lengths[0]
        if self.num_splits is not None:
            run = ceil_div(kv_len, min(self.num_splits, kv_len))
        elif request.platform == "cpu":
            run = _even(kv_len, max(1, _BYTES // token))
        else:
            run = _even(kv_len, max(_FEWEST_KEYS, ceil_div(kv_len, _SPLITS)))
        if request.platform == "cpu":
            batch = largest_divisor(batch, max(1, _BYTES // (token * run)))
        return Blocks(batch, heads, q_len, run)


def _without_kernel(request: Request) -> tuple[str, ...]:
    """Why no kernel computes this, with heads for rows; nothing if one does."""
    if _has_table_of_heads(request):
        return ("the tiles of its mask were counted for each head",)
    # There, what belongs to a head belongs to a row, and not every lookup can follow.
    if reasons := kernels_unsupported(eqx.filter_eval_shape(packed, request)):
        return reasons
    if not is_stored(request.key_, request.value):
        return ()
    from .._kernel import eight_bits, pages

    both = {"key_": request.key_, "value": request.value}
    narrow = any(map(eight_bits.in_8_bits, both.values()))
    unfit = eight_bits.unfit if narrow else pages.unfit
    return sum((unfit(name, x) for name, x in both.items()), ())


def _has_table_of_heads(request: Request) -> bool:
    """Whether tiles were counted for each head, and heads are to share tiles."""
    bound = lambda x: isinstance(x, BlockMask)  # noqa: E731
    masks = filter(bound, jax.tree.leaves(request.pairs.mask, is_leaf=bound))
    return request.groups > 1 and any(x.num_some.shape[1] > 1 for x in masks)


def _even(length: int, limit: int) -> int:
    """The size of as few runs as there can be, all about as long, of at most `limit`."""
    return ceil_div(length, ceil_div(length, limit))
