"""Logits in the backward pass: how a kernel gets them from products of queries and keys,
and the gradient of the products from that of the logits.

Both at once, so that nothing but the weights, times the slope of the logit, is kept until
the gradient of the weights is there.
"""

import math
from typing import NamedTuple

from .._mechanism.base import Request
from .factors import Argument, factored, spread
from .hopper import LOG2E
from .terms import folded_scale, pulled_logit_fn, Term


class Logit(NamedTuple):
    """The logit of a product.

    - `scale`: the gradient of the product is multiplied with this, at the very end.
    - `added`: whether the logit is `scale` times the product and what is added to that.
        Then that is what the term gives, if there is one. Otherwise it gives logits, times
        `LOG2E`.
    - `sloped`: whether its second output is what weights are multiplied with.
    - `pulled`: whether it is the gradient of the product instead, from that of the logit:
        if somebody has written that so that it is not linear.
    """

    scale: float
    added: bool = False
    sloped: bool = False
    pulled: bool = False
    term: Term | None = None


def logit_of(request: Request, block_q: int, block_k: int) -> Logit:
    """**Raises:** `NotElementwise` if scores do more than a kernel can."""
    scale = folded_scale(request.pairs)
    if scale is not None:
        return Logit(scale, added=True)
    term = Term(request, pulled_logit_fn, block_q, block_k)
    graph = term.graph
    logit, pulled = graph.outputs
    slope = Argument(graph, term.arrays + 4).slope(pulled)
    scale, rest = (1.0, None) if slope is None else factored(slope)
    if scale > 0 and rest is None:
        affine = Argument(graph, term.arrays + 3).affine(logit)
        # Gradients may be other ones than the logit has, where somebody has written them.
        if affine is not None and math.isclose(scale, affine[0], rel_tol=1e-5):
            graph.give([spread(graph, 1 / scale, affine[1])])
            return Logit(scale, added=True, term=term)
    logit = spread(graph, LOG2E, logit)
    if slope is None:
        graph.give([logit, pulled])
        return Logit(1.0, pulled=True, term=term)
    if scale == 0:
        scale, rest = 1.0, slope
    graph.give([logit] if rest is None else [logit, rest])
    return Logit(scale, sloped=rest is not None, term=term)
