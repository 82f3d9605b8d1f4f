"""The names of mechanisms."""

import difflib

from .._mechanism import (
    AbstractMechanism,
    Blockwise,
    CuDNN,
    Decode,
    Flash,
    Splash,
    Vanilla,
)
from .all_gather import AllGather
from .auto import Auto
from .ring import Ring
from .ulysses import Ulysses


MECHANISMS: dict[str, type[AbstractMechanism]] = {
    "auto": Auto,
    "flash": Flash,
    "cudnn": CuDNN,
    "splash": Splash,
    "decode": Decode,
    "blockwise": Blockwise,
    "vanilla": Vanilla,
    "all_gather": AllGather,
    "ulysses": Ulysses,
    "ring": Ring,
}

# What others call them: EasyDeL through its versions, jax.nn, PyTorch and transformers.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "auto": ("sdpa", "flex_attention"),
    "flash": (
        "flash_attn2",
        "flash_attn",
        "flash_attention",
        "flash_attention_2",
        "flash_attention_3",
        "cuda_flash_attn2",
        "pallas_flash",
    ),
    "cudnn": ("cudnn_flash_attn2", "cudnn_attention", "cudnn_flash_attention"),
    "splash": ("splash_attention", "blocksparse"),
    "decode": (
        "autoregressive_decodeattn",
        "page_attention",
        "paged_attention",
        "paged_flash_attention",
        "ragged_page_attention",
        "ragged_page_attention_v2",
        "ragged_page_attention_v3",
        "unified_attention",
    ),
    "blockwise": ("blockwise_attn", "blockwise_attention", "efficient_attention"),
    "vanilla": (
        "vanilla_attention",
        "sharded_vanilla",
        "legacy_sharded_vanilla",
        "xla",
        "eager",
        "math",
    ),
    "ring": ("ring_attention", "local_ring", "wise_ring"),
}


def check_name(where: str, name: str, otherwise: str = ", or a module") -> None:
    """Refuses what is no name of a mechanism, and says which one may be meant. `otherwise`
    is what else may be given."""
    if name in MECHANISMS:
        return
    names = ", ".join(map(repr, MECHANISMS))
    given = str.__repr__(name)  # also of a member of an enumeration
    message = f"{where}: expected one of {names}{otherwise}; got {given}"
    for ours, theirs in ELSEWHERE.items():
        if name.lower() in theirs and ours in MECHANISMS:
            raise ValueError(f"{message}, which is called {ours!r} here.")
    close = difflib.get_close_matches(name.lower(), MECHANISMS, 1)
    raise ValueError(f"{message}; did you mean {close[0]!r}?" if close else f"{message}.")
