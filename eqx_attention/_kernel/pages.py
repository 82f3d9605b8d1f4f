"""Keys and values that a kernel copies from pages."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .._keys import Paged, Quantized
from .hopper import whole_rows


def unfit(name: str, x: Any, tokens: int = 64, channels: int = 64) -> tuple[str, ...]:
    """Why the copy engine does not read these pages, if it does not: tiles of so many
    tokens must lie in one page each."""
    if not isinstance(x, Paged):
        return (f"{name} would have to be in pages too",)
    reasons, pool = [], x.pool
    if isinstance(pool, Quantized):
        return (f"{name} would have to be in 16 bits too",)
    if x.page_size % tokens:
        reasons.append(f"{name} has pages of {x.page_size} tokens, no multiple of {tokens}")
    if x.shape[-1] % channels:
        reasons.append(f"{name} has {x.shape[-1]} channels, no multiple of {channels}")
    if x.dtype != pool.dtype:
        reasons.append(f"{name} stands for {x.dtype}, and its pages are {pool.dtype}")
    return tuple(reasons)


def pages_of(x: Any) -> tuple[Any, list[jax.Array]]:
    """The array that holds keys or values, and the table of pages, if there is one, as it
    is: see `Stored`."""
    if not isinstance(x, Paged):
        return whole_rows(x), []
    return x.pool, [x.table.astype(jnp.int32)]


class Stored(NamedTuple):
    """In the kernel: keys, values or scales, `(batch, tokens, heads, ...)`, or in pages
    `(pages, tokens, heads, ...)` with their table."""

    ref: Any
    pages: Sequence[Any]

    def page(self, b: Any, first: Any) -> Any:
        """The number of the page that holds a token of a batch element; which that is,
        where there are no pages."""
        return self.pages[0][b, lax.div(first, self.ref.shape[1])] if self.pages else b

    def start(self, page: Any, first: Any) -> tuple[Any, Any]:
        """Where the tokens from `first` on are: the batch element or the page, as `page`
        gives it, and the first token there."""
        if not self.pages:
            return page, first
        count, page_size = self.ref.shape[:2]
        # Numbers that are no page's are of tokens that nothing sees.
        return jnp.clip(page, 0, count - 1), lax.rem(first, page_size)

    def tile(self, page: Any, first: Any, size: int, head: Any) -> Any:
        """So many tokens of a head."""
        where, start = self.start(page, first)
        return self.ref.at[where, pl.ds(start, size), head]
