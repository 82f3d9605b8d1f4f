"""The names of mechanisms."""

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
