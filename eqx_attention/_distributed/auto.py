from jaxtyping import Array, Float

from .._mechanism import AbstractMechanism, Blocks, choose, Gradients, Request
from .all_gather import AllGather


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
        if request.split.key:
            return AllGather(), "the only one"
        return choose(request)

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
