from .auto import Auto as Auto
from .base import (
    AbstractMechanism as AbstractMechanism,
    Blocks as Blocks,
    Pairs as Pairs,
    Request as Request,
)
from .blockwise import Blockwise as Blockwise
from .cudnn import CuDNN as CuDNN
from .decode import Decode as Decode
from .flash import Flash as Flash
from .primitive import attention as attention
from .vanilla import Vanilla as Vanilla
