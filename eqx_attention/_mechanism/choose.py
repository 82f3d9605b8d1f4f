"""Which mechanism is the fastest of those that compute on one device."""

from .base import AbstractMechanism, Request
from .blockwise import Blockwise
from .cudnn import CuDNN
from .flash import Flash
from .measured import faster
from .vanilla import Vanilla, weights_bytes


# Up to this many bytes of weights, one tile is as fast as many: benchmarks/cpu.py.
_SMALL = 2**21


def choose(request: Request) -> tuple[AbstractMechanism, str]:
    """The mechanism chosen, and why."""
    both = {"flash": Flash(), "cudnn": CuDNN()}
    able = {name: x for name, x in both.items() if not x.unsupported(request)}
    if len(able) == 2:
        name, why = faster(request)
        return able[name], why
    for kernels in able.values():
        return kernels, "its kernels support this call"
    size = weights_bytes(request)
    mib, limit = size / 2**20, _SMALL / 2**20
    if size <= _SMALL:
        return Vanilla(), f"its weights are {mib:.2f} MiB, at most {limit:.0f} MiB"
    return Blockwise(), f"all weights would be {mib:.1f} MiB, more than {limit:.0f} MiB"
