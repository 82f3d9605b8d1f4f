"""Which mechanism is the fastest of those that compute on one device."""

from .._keys import is_stored
from .base import AbstractMechanism, Request
from .blockwise import Blockwise
from .cudnn import CuDNN
from .decode import Decode
from .flash import Flash
from .measured import faster
from .saved_table import most_like
from .splash import Splash
from .vanilla import Vanilla, weights_bytes


# Up to this many bytes of weights, one tile is as fast as many: benchmarks/cpu.py.
_SMALL = 2**21
# With at most so many queries, and more than so many bytes of keys and values in the dtype
# of accumulation, splitting the keys was faster than either. With so few queries, what does
# so on Hopper reads keys nearly as fast as memory gives them. So does cuDNN, which has more
# to do besides: benchmarks/decode.py.
_FEW = 8
_MANY = 2**24
# Those that a table of this machine may speak of.
_MEASURED = {"flash": Flash, "cudnn": CuDNN, "blockwise": Blockwise, "vanilla": Vanilla}


def choose(request: Request) -> tuple[AbstractMechanism, str]:
    """The mechanism chosen, and why."""
    both = {"flash": Flash(), "cudnn": CuDNN()}
    able = {name: x for name, x in both.items() if not x.unsupported(request)}
    few = request.lengths[0] <= _FEW
    if few and "flash" in able:
        return Decode(), f"there are at most {_FEW} queries"
    if few and able:
        return able["cudnn"], f"there are at most {_FEW} queries"
    if not few and (found := _by_saved_table(request)) is not None:
        return found
    if len(able) == 2:
        name, why = faster(request)
        return able[name], why
    for kernels in able.values():
        return kernels, "its kernels support this call"
    if is_stored(request.key_, request.value):
        chosen = Decode() if few else Blockwise()
        return chosen, "it computes from keys and values as they are stored"
    size = _key_bytes(request)
    if few and size > _MANY:
        return Decode(), f"few queries, over {size / 2**20:.0f} MiB of keys and values"
    refused = ""
    if request.platform == "tpu" and not few:
        reasons = Splash().unsupported(request)
        if not reasons:
            return Splash(), "its kernels support this call (none was timed on a TPU)"
        refused = f"; not splash: {'; '.join(reasons)}"
    size = weights_bytes(request)
    mib, limit = size / 2**20, _SMALL / 2**20
    if size <= _SMALL:
        why = f"its weights are {mib:.2f} MiB, at most {limit:.0f} MiB"
        return Vanilla(), why + refused
    why = f"all weights would be {mib:.1f} MiB, more than {limit:.0f} MiB"
    return Blockwise(), why + refused


def _by_saved_table(request: Request) -> tuple[AbstractMechanism, str] | None:
    """What was the fastest on this machine, if its user has a table that says so."""
    found = None if is_stored(request.key_, request.value) else most_like(request)
    if found is None:
        return None
    row, tried = found.row, {name: x() for name, x in _MEASURED.items()}
    able = [n for n, x in tried.items() if n in row.ms and not x.unsupported(request)]
    if weights_bytes(request) > row.weights * request.dtype.itemsize:
        # Its memory grows with their number, and so may its time.
        able = [name for name in able if name != "vanilla"]
    if not able:
        return None
    best = min(able, key=lambda name: row.ms[name])
    others = ", ".join(f"{n} {ms:.3f}" for n, ms in row.ms.items() if n != best)
    why = (
        f"{row.ms[best]:.3f} ms (against {others or 'no other'}), forward and backward, at "
        f"(batch, length, heads, key heads, head_dim) = {row.shape}, "
        f"{'causal' if row.masked else 'without a mask'}, {row.dtype}, by {found.path}"
    )
    return tried[best], why


def _key_bytes(request: Request) -> int:
    """How large all keys and values are, in the dtype of accumulation."""
    batch, kv_len, heads, head_dim = request.key_.shape
    channels = head_dim + request.value.shape[-1]
    return batch * kv_len * heads * channels * request.dtype.itemsize
