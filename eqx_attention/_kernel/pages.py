"""Keys and values that a kernel copies from pages."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

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
    is: see `start_of_keys`."""
    if not isinstance(x, Paged):
        return whole_rows(x), []
    return x.pool, [x.table.astype(jnp.int32)]


def page_of(pages: Sequence[Any], b: Any, first: Any, page_size: int) -> Any:
    """In the kernel: the number of the page that holds a token of a batch element; which
    that is, where there are no pages."""
    return pages[0][b, lax.div(first, page_size)] if pages else b


def start_of_keys(ref: Any, pages: Sequence[Any], page: Any, first: Any) -> tuple:
    """In the kernel: where the tokens from `first` on are, of what `page_of` gives: the
    batch element or the page, and the first token there."""
    if not pages:
        return page, first
    count, page_size = ref.shape[:2]
    # Numbers that are no page's are of tokens that nothing sees.
    return jnp.clip(page, 0, count - 1), lax.rem(first, page_size)
