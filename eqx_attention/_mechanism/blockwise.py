import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._axes import (
    add,
    add_at,
    Block,
    ceil_div,
    largest_divisor,
    slice_at,
    write_at,
)
from .._keys import is_stored, key_block, Keys
from .._mask import span
from .base import AbstractMechanism, Blocks, Gradients, Request
from .gather import keys_are_split
from .plan import always_masked, Band, band, Grid, grid, kinds, lists, never_masked
from .tile import heads_first, queries_by_keys, row_terms, TileOf, tokens_first


# How large a tile is by default: tokens a side, and pairs in all (batch elements times
# query heads times query tokens times key tokens). Measured: benchmarks/cpu.py.
_TOKENS = 512
_FEWEST_TOKENS = 128
_PAIRS = 2**19
# On accelerators, where starting a tile takes long, so many pairs if there are few heads.
_WIDE_PAIRS = 2**23
# How many keys a row of tiles has at most for them to be joined into one tile.
_JOINED_TOKENS = 3 * _TOKENS


class Blockwise(AbstractMechanism):
    """Attends tile by tile, in memory that is linear in the sequence length.

    A loop over blocks of queries, and within it a loop over those blocks of keys that the
    mask lets the queries see: tiles that are EMPTY are not computed, those that are FULL
    are not masked. The softmax is computed online; the one division comes after the loop.
    Where a narrow window is all that a block of queries may see, these keys are one tile.
    The gradient recomputes the weights of each tile from the log-sum-exp.

    ??? cite

        [Self-attention Does Not Need $O(n^2)$ Memory](https://arxiv.org/abs/2112.05682),
        [FlashAttention-2: Faster Attention with Better Parallelism and Work
        Partitioning](https://arxiv.org/abs/2307.08691)

        ```bibtex
        @article{rabe2021selfattention,
            title={Self-attention Does Not Need {$O(n^2)$} Memory},
            author={Rabe, Markus N. and Staats, Charles},
            journal={arXiv:2112.05682},
            year={2021}
        }
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

        - `block_q`, `block_k`: how many query (key) tokens a tile has. By default chosen
            from the shapes. Sequences need not be multiples of them.

        **Raises:** `ValueError` if they are not positive.
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
                raise TypeError(f"Blockwise({name}): expected an integer, got {size!r}.")
            if size < 1:
                raise ValueError(f"Blockwise({name}): expected at least 1, got {size}.")

    def unsupported(self, request: Request) -> tuple[str, ...]:
        return keys_are_split(request)

    def blocks(self, request: Request) -> Blocks:
        q_len, kv_len = request.lengths
        limit = _tokens(request)
        block_q, block_k = (
            _size(self.block_q, q_len, limit),
            _size(self.block_k, kv_len, limit),
        )
        return _fit(request, block_q, block_k)

    def forward(
        self, request: Request
    ) -> tuple[
        Float[Array, "batch q_len q_heads value_dim"], Float[Array, "batch q_len q_heads"]
    ]:
        sizes, joined = self._joined(request)
        tiles, overlaps = grid(request, sizes), (False, True)
        k, v = request.key_, request.value
        apart = joined is not None or is_stored(k, v)
        if not apart:
            k, v = heads_first(request, k), heads_first(request, v)
        table = lists(kinds(request, tiles, overlaps))
        heads, head_dim = sizes.heads * request.groups, request.query.shape[-1]
        q_shape = (sizes.batch, sizes.query, heads, head_dim)

        def row(carry, n):
            b, h, i = _place(tiles, n, tiles.counts.query)
            columns, full, some = table.row(b, h, i)
            start = (b * tiles.sizes.batch, tiles.starts(0, i), _head(tiles, h), 0)
            q_tile = heads_first(request, slice_at(request.query, start, q_shape))

            def tile(masked, t, state):
                j = columns[t]
                block = tile_block(tiles, b, h, i, j)
                at = TileOf(request, block, (None, tiles.fresh(1, j)), masked)
                take = ft.partial(_take_apart, request) if apart else _take
                k_tile, v_tile = (take(x, tiles, b, h, 1, j) for x in (k, v))
                return _absorb(at, q_tile, k_tile, v_tile, state)

            def whole_row(joined, _, state):
                block = joined.block(tile_block(tiles, b, h, i, 0))
                at = TileOf(request, block)
                first = (start[0], block.starts[3], h * sizes.heads)
                shape = (sizes.batch, joined.size, sizes.heads)
                k_tile, v_tile = (
                    heads_first(request, key_block(x, first, shape)) for x in (k, v)
                )
                return _absorb(at, q_tile, k_tile, v_tile, state)

            state = _nothing(request, q_tile, v.shape[-1])
            if joined is None:
                state = loop(tile, full, some, state, request, tiles, overlaps)
            else:
                body = ft.partial(whole_row, joined)
                state = lax.fori_loop(0, jnp.minimum(some, 1), body, state)
            out, lse = _normalised(state)
            return (
                write_at(carry[0], start, tokens_first(out)),
                write_at(carry[1], start[:3], lse.swapaxes(1, 2)),
            ), None

        batch, q_len, heads, _ = request.query.shape
        empty = (
            request.full((batch, q_len, heads, v.shape[-1])),
            request.full((batch, q_len, heads)),
        )
        rows = tiles.counts.batch * tiles.counts.heads * tiles.counts.query
        (out, lse), _ = lax.scan(row, empty, jnp.arange(rows, dtype=jnp.int32))
        return out, lse

    def backward(
        self,
        request: Request,
        out: Float[Array, "batch q_len q_heads value_dim"],
        lse: Float[Array, "batch q_len q_heads"],
        dout: Float[Array, "batch q_len q_heads value_dim"],
        dlse: Float[Array, "batch q_len q_heads"] | None,
        wrt: tuple[int, ...],
    ) -> Gradients:
        tiles, overlaps = grid(request, self.blocks(request)), (True, True)
        q, (lse, dout, delta) = row_terms(request, out, lse, dout, dlse)
        k, v = heads_first(request, request.key_), heads_first(request, request.value)
        by_query = kinds(request, tiles, overlaps)
        table = lists(type(by_query)(*(x.swapaxes(2, 3) for x in by_query)))

        def row(carry, n):
            dq, dk, dv, dleaves = carry
            b, h, j = _place(tiles, n, tiles.counts.key)
            columns, full, some = table.row(b, h, j)
            k_tile, v_tile = _take(k, tiles, b, h, 1, j), _take(v, tiles, b, h, 1, j)

            def tile(masked, t, state):
                dq, dk_tile, dv_tile, dleaves = state
                i = columns[t]
                block = tile_block(tiles, b, h, i, j)
                at = TileOf(request, block, (tiles.fresh(0, i), tiles.fresh(1, j)), masked)
                take = ft.partial(_take, tiles=tiles, b=b, h=h, axis=0, n=i)
                rows = (take(lse), take(dout), take(delta))
                more = at.gradient(take(q), k_tile, v_tile, rows, wrt)
                start = (block.starts[0], block.starts[1], block.starts[2], 0)
                dleaves = tuple(
                    add(old, block, new.astype(old.dtype))
                    for old, new in zip(dleaves, more[3], strict=True)
                )
                return (
                    add_at(dq, start, more[0]),
                    dk_tile + more[1],
                    dv_tile + more[2],
                    dleaves,
                )

            zeros = (request.full(x.shape) for x in (k_tile, v_tile))
            state = (dq, *zeros, dleaves)
            dq, dk_tile, dv_tile, dleaves = loop(
                tile, full, some, state, request, tiles, overlaps
            )
            start = (b * tiles.sizes.batch, h * tiles.sizes.heads, tiles.starts(1, j), 0)
            dk, dv = add_at(dk, start, dk_tile), add_at(dv, start, dv_tile)
            return (dq, dk, dv, dleaves), None

        leaves = jax.tree.leaves(request.pairs)
        dq, dk, dv, *dleaves = (
            request.full(x.shape) for x in (q, k, v, *(leaves[n] for n in wrt))
        )
        zeros = (dq, dk, dv, tuple(dleaves))
        rows = tiles.counts.batch * tiles.counts.heads * tiles.counts.key
        carry, _ = lax.scan(row, zeros, jnp.arange(rows, dtype=jnp.int32))
        dq, dk, dv, dleaves = carry
        return tokens_first(dq), tokens_first(dk), tokens_first(dv), dleaves

    def explain(self, request: Request) -> str:
        sizes, joined = self._joined(request)
        tiles = grid(request, sizes)
        columns, keys = tiles.counts.key, sizes.key
        if joined is not None:
            columns, keys = 1, joined.size
        return (
            f"blockwise: {tiles.counts.query} × {columns} tiles of {sizes.query} "
            f"queries × {keys} keys × {sizes.heads * request.groups} heads × "
            f"{sizes.batch} batch elements"
        )

    def _joined(self, request: Request) -> tuple[Blocks, Band | None]:
        """The sizes of the tiles of `forward`. With a band, a row is one tile of that, and
        blocks of keys only tell which rows see none."""
        sizes = self.blocks(request)
        joined = band(request, sizes.query) if self.block_k is None else None
        if joined is None or joined.size > _JOINED_TOKENS:
            return sizes, None
        return _fit(request, sizes.query, joined.size)._replace(key=sizes.key), joined


def of_arrays(
    request: Request,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array | None,
    wrt: tuple[int, ...],
) -> tuple[Array, ...]:
    """The gradients of the arrays of masks and scores, for mechanisms whose kernels compute
    none."""
    if not wrt:
        return ()
    return Blockwise().backward(request, out, lse, dout, dlse, wrt)[3]


def _tokens(request: Request) -> int:
    """How many tokens a block has at most: fewer where each query sees few keys."""
    least, most = span(request.pairs.mask)
    limit = _TOKENS
    if request.platform != "cpu":
        batch, _, heads, _ = request.query.shape
        side = math.isqrt(_WIDE_PAIRS // max(batch * heads, 1))
        limit = max(limit, 2 ** (side.bit_length() - 1))
    return int(min(max(_FEWEST_TOKENS, (most - least + 1) / 2), limit))


def _size(given: int | None, length: int, limit: int) -> int:
    if given is not None:
        return min(given, length)
    return ceil_div(length, ceil_div(length, limit))


def _fit(request: Request, block_q: int, block_k: int) -> Blocks:
    """A tile of so many tokens, with as many heads and batch elements as are good."""
    batch, heads = request.query.shape[0], request.key_.shape[2]
    if request.platform != "cpu":
        return Blocks(batch, heads, block_q, block_k)
    pairs = request.groups * block_q * block_k
    block_h = largest_divisor(heads, _PAIRS // pairs)
    pairs = pairs * block_h
    block_b = largest_divisor(batch, _PAIRS // pairs) if block_h == heads else 1
    return Blocks(block_b, block_h, block_q, block_k)


def _absorb(at: TileOf, q, k, v, state):
    """One step of the online softmax: `(out, top, total)` with the keys of a tile."""
    out, top, total = state
    logits = at.logits(queries_by_keys(at.request, q, k))
    new = jnp.maximum(top, logits.max(axis=-1))
    finite = jnp.where(jnp.isneginf(new), 0, new)
    weights = jnp.exp(logits - finite[..., None])
    decay = jnp.exp(top - finite)
    total = total * decay + weights.sum(axis=-1)
    more = at.attended(at.drop(weights), v)
    return out * decay[..., None] + more, new, total


def _nothing(request: Request, q: Array, value_dim: int):
    """What `_absorb` starts from."""
    shape = q.shape[:3]
    return (
        request.full((*shape, value_dim)),
        request.full(shape, -jnp.inf),
        request.full(shape),
    )


def _normalised(state) -> tuple[Array, Array]:
    """`(out, lse)`, after the last step."""
    out, top, total = state
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))
    return out / jnp.where(total == 0, 1, total)[..., None], lse


def softmax_of_tile(at: TileOf, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """`(out, lse)` over the keys of one tile."""
    start = _nothing(at.request, q, v.shape[-1])
    return _normalised(_absorb(at, q, k, v, start))


def _place(tiles: Grid, n, rows: int):
    """(batch, head, row) of the n-th row of tiles."""
    return n // (tiles.counts.heads * rows), n // rows % tiles.counts.heads, n % rows


def _head(tiles: Grid, h):
    """The first query head of a block of key heads."""
    return h * (tiles.sizes.heads * tiles.groups)


def tile_block(tiles: Grid, b, h, i, j) -> Block:
    sizes = tiles.sizes
    starts = (b * sizes.batch, _head(tiles, h), tiles.starts(0, i), tiles.starts(1, j))
    heads = sizes.heads * tiles.groups
    return Block(starts, (sizes.batch, heads, sizes.query, sizes.key))


def _take(x: Array, tiles: Grid, b, h, axis: int, n) -> Array:
    """One block of queries (`axis` 0) or keys (1), of an array with heads first."""
    sizes = tiles.sizes
    heads = sizes.heads * (tiles.groups if axis == 0 else 1)
    starts = [b * sizes.batch, h * heads, tiles.starts(axis, n)] + [0] * (x.ndim - 3)
    shape = (sizes.batch, heads, sizes[2 + axis], *x.shape[3:])
    return slice_at(x, starts, shape)


def _take_apart(request: Request, x: Keys, tiles: Grid, b, h, axis: int, n) -> Array:
    """The same of keys that are not there with heads first."""
    sizes = tiles.sizes
    starts = (b * sizes.batch, tiles.starts(axis, n), h * sizes.heads)
    return heads_first(request, key_block(x, starts, (sizes.batch, sizes.key, sizes.heads)))


def loop(tile, full, some, state, request: Request, tiles: Grid, overlaps):
    """Runs over a row's FULL tiles without masking, then over its PARTIAL ones."""
    if never_masked(request, tiles, overlaps):
        return lax.fori_loop(0, full, ft.partial(tile, False), state)
    if always_masked(tiles):
        return lax.fori_loop(0, some, ft.partial(tile, True), state)
    state = lax.fori_loop(0, full, ft.partial(tile, False), state)
    return lax.fori_loop(full, some, ft.partial(tile, True), state)
