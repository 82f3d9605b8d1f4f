r"""The model to beat: counts of what followed the last few bytes.

Witten-Bell interpolation. With $c$ the last $k$ bytes, $n(c)$ how often they occurred in
the training text before another byte, and $t(c)$ how many different bytes followed them,

$$p_k(b \mid c) = \frac{n(c\,b) + t(c)\, p_{k-1}(b \mid c)}{n(c) + t(c)}$$

where $p_{k-1}$ drops the oldest byte of $c$, and $p_{-1} = 1 / 256$. A context that never
occurred says nothing: $p_k = p_{k-1}$.

??? cite

    Witten and Bell, [The zero-frequency problem](https://doi.org/10.1109/18.87000), 1991.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt64


class _Counts(NamedTuple):
    """A map from numbers to counts: sorted keys, searched by bisection."""

    keys: UInt64[np.ndarray, " keys"]
    counts: Int[np.ndarray, " keys"]

    @classmethod
    def of(cls, values: UInt64[np.ndarray, " values"]) -> "_Counts":
        return cls(*np.unique(values, return_counts=True))

    def __call__(self, query: UInt64[np.ndarray, " query"]) -> Int[np.ndarray, " query"]:
        index = np.searchsorted(self.keys, query).clip(max=len(self.keys) - 1)
        return np.where(self.keys[index] == query, self.counts[index], 0)


class WittenBell:
    """An interpolated n-gram model of bytes."""

    def __init__(self, text: UInt8[np.ndarray, " text"], context: int = 4):
        """**Arguments:**

        - `text`: The training text, longer than `context`.
        - `context`: How many bytes it looks back, from 0 to 7.
        """
        if not 0 <= context <= 7:
            raise ValueError(f"context must be in [0, 7]; got {context}")
        if len(text) <= context:
            raise ValueError(f"the text must be longer than {context} bytes")
        self.context = context
        self._levels = []
        for k in range(context + 1):
            contexts, targets = _contexts(text, k)[:-1], text[k:]
            grams = _Counts.of(contexts << 8 | targets)
            self._levels.append((_Counts.of(contexts), _Counts.of(grams.keys >> 8), grams))

    def probabilities(
        self, text: UInt8[np.ndarray, " text"], targets: UInt8[np.ndarray, " targets"]
    ) -> Float[np.ndarray, " targets"]:
        """The probability of each of the last bytes of `text` being what `targets` says,
        given the bytes before it; of these, there must be at least `context`."""
        result = np.full(len(targets), 1 / 256)
        for k, (contexts, distinct, grams) in enumerate(self._levels):
            context = _contexts(text, k)[:-1][-len(targets) :]
            n, t = contexts(context), distinct(context)
            mixed = grams(context << 8 | targets) + t * result
            result = np.where(n > 0, mixed / np.maximum(n + t, 1), result)
        return result

    def loss(
        self, before: UInt8[np.ndarray, " before"], text: UInt8[np.ndarray, " text"]
    ) -> float:
        """Mean negative log-likelihood of `text`, in nats a byte, coming after `before`
        (of at least `context` bytes)."""
        whole = np.concatenate([before, text])
        return float(-np.log(self.probabilities(whole, text)).mean())


def _contexts(text: np.ndarray, k: int) -> UInt64[np.ndarray, " contexts"]:
    """All stretches of `k` bytes, each as a number: [0] of the first, [-1] of the last."""
    num = len(text) - k + 1
    result = np.zeros(num, np.uint64)
    for i in range(k):
        result = result << 8 | text[i : i + num]
    return result
