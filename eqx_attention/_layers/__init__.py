from .blockwise import blockwise as blockwise
from .feed_forward import FeedForward as FeedForward
from .from_equinox import from_equinox as from_equinox
from .latent import MultiheadLatentAttention as MultiheadLatentAttention
from .multihead import MultiheadAttention as MultiheadAttention
from .rotary import RotaryEmbedding as RotaryEmbedding
from .rotary_scaling import (
    AbstractRotaryScaling as AbstractRotaryScaling,
    LinearScaling as LinearScaling,
    Llama3Scaling as Llama3Scaling,
    NTKScaling as NTKScaling,
    YaRNScaling as YaRNScaling,
)
