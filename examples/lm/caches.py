"""Where the keys and values of past bytes are kept: a table of kinds of caches."""

from collections.abc import Callable

import equinox as eqx
import eqx_attention as eqa
import jax

from .model import Caches, LanguageModel


# What each makes is for one sequence: of a number of key heads and of channels, of up to
# `capacity` bytes.
CACHES: dict[str, Callable[[int, int, int], eqa.AbstractCache]] = {
    "static": lambda heads, size, capacity: eqa.StaticCache.init(capacity, heads, size),
}


def init_caches(model: LanguageModel, kind: str, batch: int, capacity: int) -> Caches:
    """Empty caches, one a block, for a batch of sequences of up to `capacity` bytes."""

    def of_one_sequence() -> Caches:
        sizes = [(b.attention.num_kv_heads, b.attention.qk_size) for b in model.blocks]
        return tuple(CACHES[kind](*size, capacity) for size in sizes)

    return eqx.filter_vmap(of_one_sequence, axis_size=batch)()


def num_bytes(caches: Caches) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(caches))
