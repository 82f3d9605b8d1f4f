"""What is to be measured: the arguments, checked."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._axes import canonical, Sizes
from .._distributed import check_name, MECHANISMS
from .._mask import AbstractMask
from .masks import MaskOf, masks_of
from .places import Place, STRATEGIES


PEERS = ("jax", "tokamax", "torch")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


class Defaults(NamedTuple):
    """What is measured where nothing is asked for."""

    lengths: tuple[int, ...]
    num_heads: int
    head_dim: int
    dtype: str


_ON_CPU = Defaults((256, 1024, 4096), 8, 64, "float32")
_ON_ACCELERATOR = Defaults((1024, 4096, 16384), 16, 128, "bfloat16")


class Settings(NamedTuple):
    places: tuple[Place, ...]
    lengths: tuple[int, ...]
    masks: dict[str, MaskOf]
    mechanisms: tuple[str, ...] | None
    peers: tuple[str, ...]
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    chunk_size: int | None
    rounds: int

    def names(self, place: Place) -> tuple[str, ...]:
        """The mechanisms to measure: all, of those that communicate where they have to,
        and of the others where not."""
        if self.mechanisms is not None:
            return self.mechanisms
        if place.splits_tokens:
            return ("auto", *STRATEGIES)
        return tuple(name for name in MECHANISMS if name not in STRATEGIES)

    def as_dict(self) -> dict[str, Any]:
        """As it is written down."""
        return {
            "sequence_length": list(self.lengths),
            "masks": list(self.masks),
            "meshes": [place.name for place in self.places],
            "batch": self.batch,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "chunk_size": self.chunk_size,
            "rounds": self.rounds,
        }


def settings_of(
    *,
    places: tuple[Place, ...],
    sequence_length: int | Sequence[int] | None,
    masks: str | Sequence[str] | Mapping[str, AbstractMask | MaskOf],
    mechanisms: str | Sequence[str] | None,
    compare: str | Sequence[str],
    batch: int | None,
    num_attention_heads: int | None,
    num_key_value_heads: int | None,
    head_dim: int | None,
    dtype: Any,
    chunk_size: int | None,
    rounds: int,
) -> Settings:
    cpu = places[0].devices[0].platform == "cpu"
    default = _ON_CPU if cpu else _ON_ACCELERATOR
    lengths = default.lengths if sequence_length is None else sequence_length
    lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
    several = masks if isinstance(masks, Mapping) else _several(masks)
    names = None if mechanisms is None else _several(mechanisms)
    peers = _several(compare)
    for name, size in (
        *(("sequence_length", length) for length in lengths),
        ("batch", 1 if batch is None else batch),
        ("num_attention_heads", 1 if num_attention_heads is None else num_attention_heads),
        ("num_key_value_heads", 1 if num_key_value_heads is None else num_key_value_heads),
        ("head_dim", 1 if head_dim is None else head_dim),
        ("chunk_size", 1 if chunk_size is None else chunk_size),
        ("rounds", rounds),
    ):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name}: expected an integer, got {size!r}.")
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}.")
    if not lengths:
        raise ValueError("sequence_length: expected at least one, got none.")
    heads = num_attention_heads or default.num_heads
    kv_heads = num_key_value_heads or heads
    if heads % kv_heads:
        raise ValueError(
            f"num_key_value_heads: expected a divisor of num_attention_heads, which is "
            f"{heads}; got {kv_heads}."
        )
    for mechanism in names or ():
        check_name("mechanisms", mechanism, otherwise="")
    unknown = [repr(x) for x in peers if x not in PEERS]
    if unknown:
        raise ValueError(
            f"compare: expected some of {', '.join(PEERS)}; got {', '.join(unknown)}."
        )
    each: dict[str, tuple[str | int, ...]] = {
        "sequence_length": lengths,
        "masks": tuple(several),
        "mechanisms": names or (),
        "compare": peers,
    }
    for name, given in each.items():
        twice = [repr(x) for x in dict.fromkeys(given) if given.count(x) > 1]
        if twice:
            raise ValueError(f"{name}: expected each once, got {', '.join(twice)} again.")
    if names is not None and not names and not peers:
        raise ValueError("mechanisms: expected at least one, or something to compare.")
    return Settings(
        places=places,
        lengths=lengths,
        masks=masks_of(several),
        mechanisms=names,
        peers=peers,
        batch=math.lcm(*(x.least_batch for x in places)) if batch is None else batch,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim or default.head_dim,
        dtype=_dtype(default.dtype if dtype is None else dtype),
        chunk_size=chunk_size,
        rounds=rounds,
    )


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    """A name alone is one of one."""
    return (names,) if isinstance(names, str) else tuple(names)


def _dtype(dtype: Any) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}; got {name}.")
    if name == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore
        raise ValueError(
            "dtype: expected one of float32, bfloat16 and float16, as jax_enable_x64 is "
            "off; got float64."
        )
    return name


@dataclasses.dataclass(frozen=True)
class Case:
    """What all mechanisms are measured on in turn."""

    settings: Settings
    place: Place
    length: int
    mask_name: str

    @functools.cached_property
    def mask(self) -> AbstractMask:
        """Made when it is asked for, as a mask of a user's own may fail, or not fit.

        **Raises:** one of `MASK_ERRORS`.
        """
        s = self.settings
        mask = s.masks[self.mask_name](self.length)
        canonical(mask, Sizes((s.batch,), s.num_heads, self.length, self.length), "mask")
        return mask

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the query, the keys, the values, and the cotangent of the output."""
        s = self.settings
        many = (s.batch, self.length, s.num_heads, s.head_dim)
        few = (s.batch, self.length, s.num_kv_heads, s.head_dim)
        return [many, few, few, many]

    def operands(self) -> list[np.ndarray]:
        """Random numbers of these shapes, in the dtype."""
        rng, dtype = np.random.default_rng(0), jnp.dtype(self.settings.dtype)
        return [rng.standard_normal(x, np.float32).astype(dtype) for x in self.shapes]


def cases(settings: Settings) -> list[Case]:
    return [
        Case(settings, place, length, name)
        for place in settings.places
        for name in settings.masks
        for length in sorted(settings.lengths)
    ]
