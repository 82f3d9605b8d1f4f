from jaxtyping import Array, Float

from .._mechanism import AbstractMechanism, Blocks, choose, Gradients, num_splits, Request
from .cost import Cost, COSTS


class Auto(AbstractMechanism):
    """Chooses among the mechanisms that support a request; `explain` says which and why.

    On a GPU, [`eqx_attention.Flash`][] or [`eqx_attention.CuDNN`][], where they support
    it; and where both do, the one that was faster, forward and backward, at what is most
    like the request among all that was measured; but CuDNN for a few queries. On a TPU,
    [`eqx_attention.Splash`][] where it supports it, but not for a few queries. Otherwise
    [`eqx_attention.Decode`][] for few queries over many keys, or over keys in stored form;
    else [`eqx_attention.Vanilla`][] where its weights are small, as for short sequences,
    and [`eqx_attention.Blockwise`][] where not.

    If the environment variable `EQX_ATTENTION_TABLE` names a table that
    `python -m eqx_attention.benchmark --save-table` wrote on such a device, then what was
    the fastest there, of many queries over keys that are arrays. It is read when a call is
    traced, and a `ValueError` is raised if that is missing or odd.

    Where a sharding splits the queries and the keys, the strategy that takes the least
    time by a model of the bytes that are moved, of the operations, and of the work of the
    busiest device; on each device, the mechanism is chosen as above.
    """

    def choose(self, request: Request) -> tuple[AbstractMechanism, str]:
        """The mechanism chosen, and why."""
        if num_splits(request.split.key) == 1:
            return choose(request)
        costs = _costs(request)
        best = min(costs, key=lambda name: costs[name].seconds)
        times = (f"{name} {cost.seconds * 1e3:.3f} ms" for name, cost in costs.items())
        why = f"forward and backward by the model: {', '.join(times)}"
        return _strategies()[best], why

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
        name = type(chosen).__name__
        if num_splits(request.split.key) == 1:
            return f"{chosen.explain(request)}\n  chosen by auto: {why}"
        lines = [chosen.explain(request), f"  {name} chosen by auto: {why}"]
        lines += [f"  {name}: {cost}" for name, cost in _costs(request).items()]
        return "\n".join(lines)


def _strategies() -> dict[str, AbstractMechanism]:
    from .table import MECHANISMS  # which has this one too

    return {name: MECHANISMS[name]() for name in COSTS if name in MECHANISMS}


def _costs(request: Request) -> dict[str, Cost]:
    """What those strategies cost that support a request."""
    able = [n for n, m in _strategies().items() if not m.unsupported(request)]
    return {name: COSTS[name](request) for name in able}
