"""Which mechanism is the fastest of those that compute on one device."""

from .._keys import is_stored
from .base import AbstractMechanism, Request
from .blockwise import Blockwise
from .cudnn import CuDNN
from .decode import Decode
from .flash import Flash
from .measured import faster
from .splash import Splash
from .vanilla import Vanilla, weights_bytes


# Up to this many bytes of weights, one tile is as fast as many: benchmarks/cpu.py.
_SMALL = 2**21
# With at most so many queries, and more than so many bytes of keys and values in the dtype
# of accumulation, splitting the keys was faster than either. With so few queries, cuDNN
# reads keys nearly as fast as memory gives them: benchmarks/decode.py.
_FEW = 8
_MANY = 2**24


def choose(request: Request) -> tuple[AbstractMechanism, str]:
    """The mechanism chosen, and why."""
    both = {"flash": Flash(), "cudnn": CuDNN()}
    able = {name: x for name, x in both.items() if not x.unsupported(request)}
    few = request.lengths[0] <= _FEW
    if few and "cudnn" in able:
        return able["cudnn"], f"there are at most {_FEW} queries"
    if few and able:
        return Decode(), f"there are at most {_FEW} queries"
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


def _key_bytes(request: Request) -> int:
    """How large all keys and values are, in the dtype of accumulation."""
    batch, kv_len, heads, head_dim = request.key_.shape
    channels = head_dim + request.value.shape[-1]
    return batch * kv_len * heads * channels * request.dtype.itemsize
