from .blockwise import blockwise as blockwise
from .feed_forward import FeedForward as FeedForward
from .multihead import MultiheadAttention as MultiheadAttention
from .rotary import (
    AbstractRotaryScaling as AbstractRotaryScaling,
    LinearScaling as LinearScaling,
    Llama3Scaling as Llama3Scaling,
    NTKScaling as NTKScaling,
    RotaryEmbedding as RotaryEmbedding,
    YaRNScaling as YaRNScaling,
)
