from jaxtyping import Array, Float

from .base import AbstractMechanism, Blocks, Gradients, Request
from .blockwise import Blockwise
from .cudnn import CuDNN
from .flash import Flash
from .measured import faster
from .vanilla import Vanilla, weights_bytes


# Up to this many bytes of weights, one tile is as fast as many: benchmarks/cpu.py.
_SMALL = 2**21


class Auto(AbstractMechanism):
    """Chooses among the mechanisms that support a request; `explain` says which and why.

    On a GPU, [`eqx_attention.Flash`][] or [`eqx_attention.CuDNN`][], where they support
    it; and where both do, the one that was faster, forward and backward, at what is most
    like the request among all that was measured. Otherwise [`eqx_attention.Vanilla`][]
    where its weights are small, as for short sequences and for few queries, and
    [`eqx_attention.Blockwise`][] where not.
    """

    def choose(self, request: Request) -> tuple[AbstractMechanism, str]:
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
