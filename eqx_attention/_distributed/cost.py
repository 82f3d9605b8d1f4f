"""What communication costs, by a small model: which strategy is the fastest.

Bytes are those that one device receives. The rates are those of GPUs of one host: the
share of the whole that each strategy takes is what counts.
"""

import math
from typing import NamedTuple

import numpy as np

from .._mask import span
from .._mechanism import num_splits, Request
from .exchange import of_exchanged, repeats


# Four NVIDIA H200 by NVLink: operations a second of attention in bfloat16, forward and
# backward; bytes a second that a device receives; seconds that a collective takes to start.
_OPERATIONS = 550e12
_LINK = 300e9
_START = 20e-6
# Hops of a ring are smaller problems, each with a merge; what is sent meanwhile takes
# multiprocessors from them, for this part of its time; and what is exchanged before and
# after is also selected and joined, so many times as long. Measured on two and on four of
# them, with 32,768 and 131,072 tokens.
_RING, _TAKEN, _JOINED = 1.1, 0.5, 4
# Forward and backward take so many times the operations of the forward pass.
_BOTH_PASSES = 3.5
# So many queries of each device are looked at, for the work that a mask leaves it.
_SAMPLES = 64


class Cost(NamedTuple):
    """What a strategy costs one device.

    - `forward`, `backward`: bytes that it receives.
    - `collectives`: how many there are in the forward pass.
    - `imbalance`: the work of the busiest device, relative to the mean.
    - `seconds`: of both passes.
    """

    forward: float
    backward: float
    collectives: int
    imbalance: float
    seconds: float

    def __str__(self) -> str:
        mib = [x / 2**20 for x in (self.forward, self.backward)]
        return (
            f"{mib[0]:.2f} MiB received a device forward, {mib[1]:.2f} MiB backward, "
            f"{self.collectives} collectives forward, the busiest device with "
            f"{self.imbalance:.2f} times the mean work"
        )


def all_gather_cost(request: Request) -> Cost:
    n = num_splits(request.split.key)
    kv, sums = _kv_bytes(request)
    imbalance, _ = work(request)
    forward, backward = (n - 1) * kv, (n - 1) * (kv + sums)
    seconds = _compute(request) * imbalance + _transfer(forward + backward, 3)
    return Cost(forward, backward, 1, imbalance, seconds)


def ring_cost(request: Request) -> Cost:
    n = num_splits(request.split.key)
    kv, sums = _kv_bytes(request)
    imbalance, hops = work(request)
    least, most = span(request.pairs.mask)
    if hops and not math.isinf(most - least):
        # A window needs so many of the keys beside a device's own.
        part = min(1.0, _beside(request, most - least) / (hops * request.lengths[1]))
        kv, sums = kv * part, sums * part
    exchanged = 0.0
    if math.isinf(least) and not math.isinf(most):
        # Half of each device's tokens change places, so that the work is balanced.
        q, out = _row_bytes(request)
        imbalance, exchanged = 1.0, (q + kv + out) / 2
    forward, backward = hops * kv + exchanged, hops * (kv + sums)
    backward = backward + 2 * exchanged if n > 1 else 0.0
    compute = _compute(request) * imbalance * _RING
    hidden = _transfer(forward + backward - 3 * exchanged, 3 * hops)
    exposed = _transfer(3 * exchanged * _JOINED, 3)
    seconds = max(compute + _TAKEN * hidden, hidden) + exposed
    return Cost(forward, backward, hops, imbalance, seconds)


def _beside(request: Request, width: float) -> float:
    """How many keys a device may need of others: none of its own are among them, if its
    queries are not where its keys are."""
    pairs, (q_len, kv_len) = request.pairs, request.lengths
    aligned = q_len == kv_len and pairs.q.shift == pairs.kv.shift
    return width if aligned else q_len + width


def ulysses_cost(request: Request) -> Cost:
    _, n = request.split.key[-1]
    q, out = _row_bytes(request)
    kv = _kv_bytes(request)[0] * repeats(request, n)
    away = (n - 1) / n
    forward, backward = away * (q + kv + out), away * (2 * q + 2 * kv + 2 * out)
    same = request.query.shape[-1] == request.value.shape[-1]
    moved = _transfer(forward + backward, 8)
    count = 3 if same else 4
    if len(request.split.key) > 1:
        more = of_exchanged(request, n, _cheapest)
        return Cost(
            forward + more.forward,
            backward + more.backward,
            count + more.collectives,
            more.imbalance,
            more.seconds + moved,
        )
    return Cost(forward, backward, count, 1.0, _compute(request) + moved)


def _cheapest(request: Request) -> Cost:
    costs = (all_gather_cost(request), ring_cost(request))
    return min(costs, key=lambda cost: cost.seconds)


COSTS = {"ulysses": ulysses_cost, "ring": ring_cost, "all_gather": all_gather_cost}


def work(request: Request) -> tuple[float, int]:
    """The busiest device's work relative to the mean, and how many hops of a ring have
    work for any device; as far as is known at trace time, of tokens in plain order."""
    pairs, n = request.pairs, num_splits(request.split.key)
    if pairs.q.position is not None or pairs.kv.position is not None:
        return 1.0, n - 1
    least, most = span(pairs.mask)
    q_len, kv_len = request.lengths
    # Of each device the first, the last, and some between.
    local = np.unique(np.linspace(0, q_len - 1, _SAMPLES).round())
    rows = np.add.outer(np.arange(n) * q_len, local).ravel()
    rows = rows + pairs.q.shift - pairs.kv.shift
    first = np.maximum(np.ceil(rows + least), 0)[:, None]
    last = np.minimum(np.floor(rows + most), n * kv_len - 1)[:, None]
    start = np.arange(n)[None] * kv_len
    seen = np.minimum(last, start + kv_len - 1) - np.maximum(first, start) + 1
    seen = np.maximum(seen, 0).reshape(n, len(local), n).sum(1)
    total = seen.sum(1)
    if total.max() == 0:
        return 1.0, 0
    hops = {int(n + i - j) % n for i, j in np.argwhere(seen > 0)} - {0}
    return float(total.max() / total.mean()), len(hops)


def _visible(request: Request) -> float:
    """Which part of all pairs is visible, as far as is known at trace time."""
    least, most = span(request.pairs.mask)
    n = num_splits(request.split.key)
    kv_len = n * request.lengths[1]
    if not math.isinf(most - least):
        return min(1.0, (most - least + 1) / kv_len)
    return 1.0 if math.isinf(least) and math.isinf(most) else 0.5


def _compute(request: Request) -> float:
    """Seconds of both passes, of a device with the mean work."""
    batch, q_len, heads, head_dim = request.query.shape
    n = num_splits(request.split.key)
    pairs = batch * heads * q_len * n * request.lengths[1] * _visible(request)
    operations = 2 * pairs * (head_dim + request.value.shape[-1])
    return operations * _BOTH_PASSES / _OPERATIONS


def _transfer(size: float, collectives: int) -> float:
    return size / _LINK + collectives * _START


def _kv_bytes(request: Request) -> tuple[float, float]:
    """Of the keys and values of one device; of their gradients, before they are summed."""
    k, v = request.key_, request.value
    size = math.prod(k.shape) + math.prod(v.shape)
    return float(size * k.dtype.itemsize), float(size * request.dtype.itemsize)


def _row_bytes(request: Request) -> tuple[float, float]:
    """Of the queries of one device, and of their output with its log-sum-exp."""
    q, item = request.query, request.query.dtype.itemsize
    rows = math.prod(q.shape[:-1])
    out = rows * request.value.shape[-1] * item + rows * request.dtype.itemsize
    return float(math.prod(q.shape) * item), float(out)
