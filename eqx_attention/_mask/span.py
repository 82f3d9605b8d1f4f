from .base import AbstractMask, And, Or
from .positional import Causal, Chunked, SlidingWindow


_EVERYWHERE = (float("-inf"), float("inf"))


def span(mask: AbstractMask) -> tuple[float, float]:
    """The least and the greatest `kv - q` of positions that may be visible, as far as it is
    known at trace time: infinite where it is not."""
    least, most = _EVERYWHERE
    match mask:
        case Causal(offset=int(offset)):
            most = offset
        case SlidingWindow(left=left, right=right):
            least = -left if isinstance(left, int) else least
            most = right if isinstance(right, int) else most
        case Chunked(size=int(size)):
            least, most = 1 - size, size - 1
        case And(masks=masks):
            spans = [span(m) for m in masks]
            least, most = max(s[0] for s in spans), min(s[1] for s in spans)
        case Or(masks=masks):
            spans = [span(m) for m in masks]
            least, most = min(s[0] for s in spans), max(s[1] for s in spans)
    return float(least), float(most)
