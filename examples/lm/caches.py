"""Where the keys and values of past bytes are kept: a table of kinds of caches."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import eqx_attention as eqa
import jax

from .config import RunConfig
from .model import Caches


# How many bytes of a prompt are read at once.
CHUNK = 64


class Sizes(NamedTuple):
    """What a cache of one sequence is to hold."""

    capacity: int  # bytes of text, at most
    window: int  # the farthest that a byte was trained to see back
    heads: tuple[int, int]  # how many key heads, and of how many channels


CACHES: dict[str, Callable[[Sizes], eqa.AbstractCache]] = {
    "static": lambda s: eqa.StaticCache.init(s.capacity, *s.heads),
    # Of a text of any length, it keeps what a window of the last bytes sees.
    "rolling": lambda s: eqa.RollingCache.init(s.window, *s.heads, chunk=CHUNK),
    "paged": lambda s: eqa.PagedCache.init(s.capacity, *s.heads, page_size=64),
    "int8": lambda s: eqa.QuantizedCache.init(s.capacity, *s.heads),
}


def init_caches(config: RunConfig, kind: str, batch: int, capacity: int) -> Caches:
    """Empty caches, one a block, for a batch of sequences of up to `capacity` bytes."""
    sizes = Sizes(capacity, config.seq - 1, (config.kv_heads, config.head_dim))

    def of_one_sequence() -> Caches:
        return tuple(CACHES[kind](sizes) for _ in range(config.depth))

    return eqx.filter_vmap(of_one_sequence, axis_size=batch)()


def num_bytes(caches: Caches) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(caches))
