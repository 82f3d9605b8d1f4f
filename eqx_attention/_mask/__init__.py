from .base import (
    AbstractMask as AbstractMask,
    And as And,
    Full as Full,
    Not as Not,
    Or as Or,
    Summary as Summary,
)
from .dense import BlockMask as BlockMask, Dense as Dense
from .positional import (
    Causal as Causal,
    Chunked as Chunked,
    Prefix as Prefix,
    PrefixLM as PrefixLM,
    SlidingWindow as SlidingWindow,
)
from .predicate import Predicate as Predicate
from .span import span as span
from .tokens import Keys as Keys, Padding as Padding, Segments as Segments
