from jaxtyping import Array, Float

from .._keys import is_stored
from .base import AbstractMechanism, Blocks, Gradients, Request
from .blockwise import Blockwise
from .cudnn import CuDNN
from .decode import Decode
from .flash import Flash
from .measured import faster
from .vanilla import Vanilla, weights_bytes


# Up to this many bytes of weights, one tile is as fast as many: benchmarks/cpu.py.
_SMALL = 2**21
# With at most so many queries, and more than so many bytes of keys and values in the dtype
# of accumulation, splitting the keys was faster than either. With so few queries, cuDNN
# reads keys nearly as fast as memory gives them: benchmarks/decode.py.
_FEW = 8
_MANY = 2**24


class Auto(AbstractMechanism):
    """Chooses among the mechanisms that support a request; `explain` says which and why.

    On a GPU, [`eqx_attention.Flash`][] or [`eqx_attention.CuDNN`][], where they support
    it; and where both do, the one that was faster, forward and backward, at what is most
    like the request among all that was measured; but CuDNN for a few queries. Otherwise
    [`eqx_attention.Decode`][] for few queries over many keys, or over keys in stored form;
    else [`eqx_attention.Vanilla`][] where its weights are small, as for short sequences,
    and [`eqx_attention.Blockwise`][] where not.
    """

    def choose(self, request: Request) -> tuple[AbstractMechanism, str]:
        """The mechanism chosen, and why."""
        both = {"flash": Flash(), "cudnn": CuDNN()}
        able = {name: x for name, x in both.items() if not x.unsupported(request)}
        few = request.lengths[0] <= _FEW
        if few and "cudnn" in able:
            return able["cudnn"], f"there are at most {_FEW} queries"
        if len(able) == 2:
            name, why = faster(request)
            return able[name], why
        for kernels in able.values():
            return kernels, "its kernels support this call"
        if is_stored(request.key_, request.value):
            chosen = Decode() if few else Blockwise()
            return chosen, "it computes from keys and values as they are stored"
        size = key_bytes(request)
        if few and size > _MANY:
            return Decode(), f"few queries, over {size / 2**20:.0f} MiB of keys and values"
        size = weights_bytes(request)
        mib, limit = size / 2**20, _SMALL / 2**20
        if size <= _SMALL:
            return Vanilla(), f"its weights are {mib:.2f} MiB, at most {limit:.0f} MiB"
        return Blockwise(), f"all weights would be {mib:.1f} MiB, more than {limit:.0f} MiB"

    def unsupported(self, request: Request) -> tuple[str, ...]:
        return self.choose(request)[0].unsupported(request)

    def forward(
        self, request: Request
    ) -> tuple[
        Float[Array, "batch q_len q_heads value_dim"], Float[Array, "batch q_len q_heads"]
    ]:
        return self.choose(request)[0].forward(request)

    def backward(
        self,
        request: Request,
        out: Float[Array, "batch q_len q_heads value_dim"],
        lse: Float[Array, "batch q_len q_heads"],
        dout: Float[Array, "batch q_len q_heads value_dim"],
        dlse: Float[Array, "batch q_len q_heads"] | None,
        wrt: tuple[int, ...],
    ) -> Gradients:
        return self.choose(request)[0].backward(request, out, lse, dout, dlse, wrt)

    def blocks(self, request: Request) -> Blocks:
        return self.choose(request)[0].blocks(request)

    def explain(self, request: Request) -> str:
        chosen, why = self.choose(request)
        return f"{chosen.explain(request)}\n  chosen by auto: {why}"


def key_bytes(request: Request) -> int:
    """How large all keys and values are, in the dtype of accumulation."""
    batch, kv_len, heads, head_dim = request.key_.shape
    channels = head_dim + request.value.shape[-1]
    return batch * kv_len * heads * channels * request.dtype.itemsize
