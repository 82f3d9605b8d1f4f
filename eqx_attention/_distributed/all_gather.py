import dataclasses

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .._mechanism import (
    AbstractMechanism,
    again,
    Blocks,
    gather_keys,
    gather_leaf,
    gather_pair,
    Gradients,
    num_splits,
    of_gathered,
    Request,
)
from .cost import all_gather_cost
from .inner import as_inner, check_inner, not_split


class AllGather(AbstractMechanism):
    """Gathers all keys and values on each device of the axes that split the sequence.

    Then another mechanism attends to them with this device's queries. In the backward
    pass they are gathered again, and their gradients summed and scattered, in float32.

    Simple and, where there are few key heads, little is moved; but each device holds the
    keys of all, and of a causal mask the last device has almost twice the mean work.

    ??? cite

        [The Llama 3 Herd of Models](https://arxiv.org/abs/2407.21783)

        ```bibtex
        @article{llama2024herd,
            title={The {L}lama 3 Herd of Models},
            author={{Llama Team}},
            journal={arXiv:2407.21783},
            year={2024}
        }
        ```
    """

    inner: str | AbstractMechanism = eqx.field(static=True)

    def __init__(self, inner: str | AbstractMechanism = "auto"):
        """**Arguments:**

        - `inner`: what attends on each device: the name of a mechanism, or a mechanism.
            Default `"auto"`.

        **Raises:** `ValueError` if it is the name of none.
        """
        self.inner = inner
        self.__check_init__()

    def __check_init__(self):
        check_inner("AllGather", self.inner)

    def unsupported(self, request: Request) -> tuple[str, ...]:
        reasons = not_split(request)
        return reasons or of_gathered(request, as_inner(self.inner).unsupported)

    def forward(
        self, request: Request
    ) -> tuple[
        Float[Array, "batch q_len q_heads value_dim"], Float[Array, "batch q_len q_heads"]
    ]:
        return as_inner(self.inner).forward(gather_keys(request, in_order=True)[0])

    def backward(
        self,
        request: Request,
        out: Float[Array, "batch q_len q_heads value_dim"],
        lse: Float[Array, "batch q_len q_heads"],
        dout: Float[Array, "batch q_len q_heads value_dim"],
        dlse: Float[Array, "batch q_len q_heads"] | None,
        wrt: tuple[int, ...],
    ) -> Gradients:
        axes = tuple(name for name, _ in request.split.key)

        def gathered(kv, leaves):
            return gather_pair(kv, axes), tuple(gather_leaf(x, axes) for x in leaves)

        # Each device has a part of the gradients of all keys: these are added in float32.
        whole, _ = gather_keys(again(request, dout), in_order=True)
        whole = dataclasses.replace(whole, result_dtype=request.dtype)
        grads = as_inner(self.inner).backward(whole, out, lse, dout, dlse, wrt)
        leaves = jax.tree.leaves(request.pairs)
        like = ((request.key_, request.value), tuple(leaves[n] for n in wrt))
        like, parts = jax.tree.map(
            lambda x: x.astype(request.dtype), (like, (grads[1:3], grads[3]))
        )
        (dk, dv), dleaves = jax.linear_transpose(gathered, *like)(parts)
        return grads[0], dk, dv, dleaves

    def blocks(self, request: Request) -> Blocks:
        return of_gathered(request, as_inner(self.inner).blocks)

    def explain(self, request: Request) -> str:
        keys = request.lengths[1] * num_splits(request.split.key)
        inner = of_gathered(request, as_inner(self.inner).explain)
        return (
            f"all_gather: {keys} keys of all devices on each; "
            f"{all_gather_cost(request)}; {inner}"
        )
