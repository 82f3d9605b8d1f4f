import importlib as _importlib
from importlib.metadata import version as _version
from typing import Any as _Any

from ._attention import (
    attend as attend,
    Attention as Attention,
    attention_weights as attention_weights,
)
from ._block_mask import block_mask as block_mask
from ._cache import (
    AbstractCache as AbstractCache,
    PagedCache as PagedCache,
    QuantizedCache as QuantizedCache,
    RollingCache as RollingCache,
    StaticCache as StaticCache,
)
from ._config import AttentionConfig as AttentionConfig
from ._distributed import (
    AllGather as AllGather,
    Auto as Auto,
    from_layout as from_layout,
    Ring as Ring,
    Sharding as Sharding,
    to_layout as to_layout,
    Ulysses as Ulysses,
)
from ._dropout import dropout_mask as dropout_mask
from ._errors import (
    SerialisationError as SerialisationError,
    UnsupportedError as UnsupportedError,
)
from ._keys import AbstractKeys as AbstractKeys, Paged as Paged, Quantized as Quantized
from ._layers import (
    AbstractRotaryScaling as AbstractRotaryScaling,
    blockwise as blockwise,
    FeedForward as FeedForward,
    from_equinox as from_equinox,
    LinearScaling as LinearScaling,
    Llama3Scaling as Llama3Scaling,
    MultiheadAttention as MultiheadAttention,
    MultiheadLatentAttention as MultiheadLatentAttention,
    NTKScaling as NTKScaling,
    RotaryEmbedding as RotaryEmbedding,
    YaRNScaling as YaRNScaling,
)
from ._mask import (
    AbstractMask as AbstractMask,
    And as And,
    BlockMask as BlockMask,
    Causal as Causal,
    Chunked as Chunked,
    Dense as Dense,
    Full as Full,
    Keys as Keys,
    Not as Not,
    Or as Or,
    Padding as Padding,
    Predicate as Predicate,
    Prefix as Prefix,
    PrefixLM as PrefixLM,
    Segments as Segments,
    SlidingWindow as SlidingWindow,
)
from ._mechanism import (
    AbstractMechanism as AbstractMechanism,
    Blockwise as Blockwise,
    CuDNN as CuDNN,
    Decode as Decode,
    Flash as Flash,
    Splash as Splash,
    Vanilla as Vanilla,
)
from ._partial import merge as merge
from ._score import (
    AbstractScore as AbstractScore,
    ALiBi as ALiBi,
    Bias as Bias,
    RelativeBias as RelativeBias,
    ScoreFn as ScoreFn,
    SoftCap as SoftCap,
)
from ._serialise import load as load, save as save
from ._visualise import visualise as visualise


__version__ = _version("eqx_attention")


def __getattr__(name: str) -> _Any:
    # Not needed to attend, and so imported when they are first used.
    if name in ("benchmark", "extend", "testing"):
        return _importlib.import_module(f"eqx_attention.{name}")
    if name == "value_and_grad_difference":
        return __getattr__("testing").value_and_grad_difference
    raise AttributeError(f"module 'eqx_attention' has no attribute {name!r}")
