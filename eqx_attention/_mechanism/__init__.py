from .base import (
    AbstractMechanism as AbstractMechanism,
    Blocks as Blocks,
    Gradients as Gradients,
    Pairs as Pairs,
    Request as Request,
    Split as Split,
)
from .blockwise import Blockwise as Blockwise
from .choose import choose as choose
from .cudnn import CuDNN as CuDNN
from .decode import Decode as Decode
from .flash import Flash as Flash
from .gather import (
    again as again,
    counted as counted,
    gather_keys as gather_keys,
    gather_leaf as gather_leaf,
    gather_pair as gather_pair,
    num_splits as num_splits,
    of_gathered as of_gathered,
    traced as traced,
)
from .primitive import attention as attention
from .splash import Splash as Splash
from .vanilla import Vanilla as Vanilla
from .varying import vary as vary, varying_axes as varying_axes
