from .base import (
    AbstractBoundedScore as AbstractBoundedScore,
    AbstractScore as AbstractScore,
)
from .bias import Bias as Bias
from .function import ScoreFn as ScoreFn, SoftCap as SoftCap
from .positional import ALiBi as ALiBi, RelativeBias as RelativeBias
