"""The conformance kit: is this attention?

[`eqx_attention.testing.check`][] runs named cases through a mechanism, or through anyone's
function, and compares values and gradients with an independent float64 reference.
"""

from ._cases import Case as Case, cases as cases, Inputs as Inputs
from ._catalogue import (
    MASKS as MASKS,
    SCORES as SCORES,
    Shape as Shape,
    SHAPES as SHAPES,
)
from ._check import (
    check as check,
    Comparison as Comparison,
    Outcome as Outcome,
    Report as Report,
)
from ._difference import value_and_grad_difference as value_and_grad_difference
from ._reference import (
    Gradients as Gradients,
    reference as reference,
    reference_gradients as reference_gradients,
)
from ._visible import visible_pairs as visible_pairs
