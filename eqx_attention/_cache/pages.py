"""Which page holds which tokens: allocation, and copies of pages that are shared."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from .._axes import ceil_div
from .._keys import Keys
from .write import along


class Plan(NamedTuple):
    """What an append does with pages: the new table and references, how many free pages it
    needs and there are, and the pages to copy first, of which there may be one a row."""

    table: Int32[Array, "rows blocks"]
    references: Int32[Array, " pages"]
    num_needed: Int32[Array, ""]
    num_free: Int32[Array, ""]
    num_copies: Int32[Array, ""]
    sources: Int32[Array, " rows"]
    targets: Int32[Array, " rows"]


@dataclasses.dataclass(frozen=True)
class OutOfPages(Sequence):
    """The error message for each number of free pages."""

    num_pages: int

    def __len__(self) -> int:
        return self.num_pages + 1

    def __getitem__(self, free):
        return (
            f"PagedCache: out of pages: {free} of {self.num_pages} are free, and more are "
            "needed to append."
        )


def flat_rows(table: Array) -> Int32[Array, "rows blocks"]:
    return table.reshape(-1, table.shape[-1])


def count_references(table: Array, num_pages: int) -> Int32[Array, " pages"]:
    pages = jnp.where(table < 0, num_pages, table).reshape(-1)
    return jnp.zeros(num_pages, jnp.int32).at[pages].add(1, mode="drop")


def allocate(
    table: Int32[Array, "rows blocks"],
    start: Int32[Array, " rows"],
    added: Int32[Array, " rows"],
    references: Int32[Array, " pages"],
    page_size: int,
    n: int,
) -> Plan:
    """Pages for `added` (at most `n`) more tokens of each row, which has `start`."""
    rows, blocks = table.shape
    num_pages = references.shape[0]
    touched = ceil_div(n - 1, page_size) + 1
    block = along(start // page_size, touched)
    stop = (start + added)[:, None]
    active = (block * page_size < stop) & (block < blocks) & (added[:, None] > 0)
    page = jnp.take_along_axis(table, jnp.minimum(block, blocks - 1), axis=1)
    shared = active & (page >= 0) & (jnp.take(references, page, mode="clip") > 1)
    # Only the first of the blocks can have tokens already.
    begun = start % page_size > 0
    kept = _keeps(page[:, 0], shared[:, 0] & begun, references)
    needed = (active & (page < 0)) | shared
    needed = needed.at[:, 0].set(needed[:, 0] & ~kept)
    copied = needed[:, 0] & begun

    free = references == 0
    num_free = free.sum(dtype=jnp.int32)
    rank = jnp.cumsum(needed.reshape(-1), dtype=jnp.int32).reshape(needed.shape) - 1
    size = min(num_pages, rows * touched)
    (order,) = jnp.nonzero(free, size=size, fill_value=num_pages)
    new = jnp.take(order.astype(jnp.int32), rank, mode="fill", fill_value=num_pages)
    new = jnp.where(needed, new, num_pages)

    row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], new.shape)
    # A place that there is not, where nothing changes.
    where = jnp.where(needed, block, blocks)
    table = table.at[row, where].set(new, mode="drop")
    left = jnp.where(needed & (page >= 0), page, num_pages)
    references = references.at[left.reshape(-1)].add(-1, mode="drop")
    references = references.at[new.reshape(-1)].add(1, mode="drop")
    first = jnp.argsort(~copied, stable=True)  # Those that copy come first.
    target = jnp.where(copied, new[:, 0], num_pages)
    counts = (needed.sum(dtype=jnp.int32), num_free, copied.sum(dtype=jnp.int32))
    return Plan(table, references, *counts, page[first, 0], target[first])


def _keeps(page: Array, shared: Array, references: Array) -> Array:
    """Which rows keep a shared page: the first one, if all that hold it now append."""
    same = (page[:, None] == page[None, :]) & shared[:, None] & shared[None, :]
    every = same.sum(axis=1) == jnp.take(references, page, mode="clip")
    index = jnp.arange(page.shape[0], dtype=jnp.int32)
    return shared & every & (jnp.argmax(same, axis=1) == index)


def copy_pages(pool: Keys, plan: Plan) -> Keys:
    """Copies pages one by one: none, nearly always, and then the pool is not touched."""

    def copy(i, pool):
        def leaf(x):
            page = jnp.take(x, plan.sources[i], axis=0, mode="clip")
            return x.at[plan.targets[i]].set(page, mode="drop")

        return jax.tree.map(leaf, pool)

    # As many for each element that is mapped over: those beyond its own are dropped.
    return lax.fori_loop(0, eqxi.unvmap_max(plan.num_copies), copy, pool)


def write_tokens(
    pool: Keys,
    new: Keys,
    table: Int32[Array, "rows blocks"],
    start: Int32[Array, " rows"],
    added: Int32[Array, " rows"],
) -> Keys:
    """Writes the first `added` of the tokens of each row to the pages of the table."""
    num_pages, page_size = pool.shape[:2]
    n = new.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)[None]
    token = along(start, n)
    page = jnp.take_along_axis(
        table, jnp.minimum(token // page_size, table.shape[1] - 1), axis=1
    )
    # Padding goes past the end, where it is dropped.
    page = jnp.where((index < added[:, None]) & (page >= 0), page, num_pages)

    def leaf(x, tokens):
        return x.at[page, token % page_size].set(tokens, mode="drop")

    return jax.tree.map(leaf, pool, new)
