import equinox as eqx
import jax
from jaxtyping import Array, Float

from .._mechanism import AbstractMechanism, again, Blocks, Gradients, Request
from .cost import ulysses_cost
from .exchange import (
    exchanged,
    leaf_to_heads,
    of_exchanged,
    repeat_heads,
    repeats,
)
from .inner import as_inner, check_inner, not_split
from .peers import explained, peers_unsupported, to_heads, to_tokens


class Ulysses(AbstractMechanism):
    """Exchanges heads for tokens: each device attends with some heads, to all tokens.

    Of the axes that split the sequence it takes the last; the others, if there are any,
    are left to the mechanism within: `Ulysses` within a group of devices that are close
    to each other, another mechanism between groups.

    The number of query heads must be a multiple of the number of devices. Key heads, where
    there are too few, are repeated.

    ??? cite

        [DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long
        Sequence Transformer Models](https://arxiv.org/abs/2309.14509),
        [USP: A Unified Sequence Parallelism Approach for Long Context Generative
        AI](https://arxiv.org/abs/2405.07719)

        ```bibtex
        @article{jacobs2023ulysses,
            title={{D}eep{S}peed {U}lysses: System Optimizations for Enabling Training of
                   Extreme Long Sequence Transformer Models},
            author={Jacobs, Sam Ade and Tanaka, Masahiro and Zhang, Chengming and
                    Zhang, Minjia and Song, Shuaiwen Leon and Rajbhandari, Samyam and
                    He, Yuxiong},
            journal={arXiv:2309.14509},
            year={2023}
        }
        @article{fang2024usp,
            title={{USP}: A Unified Sequence Parallelism Approach for Long Context
                   Generative {AI}},
            author={Fang, Jiarui and Zhao, Shangchun},
            journal={arXiv:2405.07719},
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
        check_inner("Ulysses", self.inner)

    def unsupported(self, request: Request) -> tuple[str, ...]:
        reasons = not_split(request)
        if reasons:
            return reasons
        (name, n), heads = request.split.key[-1], request.query.shape[2]
        if heads % n:
            has = f"each of the {n} devices along {name!r} has {heads}"
            return (f"it needs a multiple of {n} query heads, and {has}",)
        return of_exchanged(request, n, as_inner(self.inner).unsupported)

    def forward(
        self, request: Request
    ) -> tuple[
        Float[Array, "batch q_len q_heads value_dim"], Float[Array, "batch q_len q_heads"]
    ]:
        (axis, n), kernel = request.split.key[-1], not peers_unsupported(request)
        inner, _ = exchanged(request, axis, n, kernel)
        out, lse = as_inner(self.inner).forward(inner)
        rows = [out.astype(request.result_dtype), lse[..., None]]
        out, lse = to_tokens(rows, axis, n, kernel)
        return out, lse[..., 0]

    def backward(
        self,
        request: Request,
        out: Float[Array, "batch q_len q_heads value_dim"],
        lse: Float[Array, "batch q_len q_heads"],
        dout: Float[Array, "batch q_len q_heads value_dim"],
        dlse: Float[Array, "batch q_len q_heads"] | None,
        wrt: tuple[int, ...],
    ) -> Gradients:
        (axis, n), kernel = request.split.key[-1], not peers_unsupported(request)
        leaves, count = jax.tree.leaves(request.pairs), repeats(request, n)

        def moved(q, k, v, leaves):
            k, v = (repeat_heads(x, count) for x in (k, v))
            qkv = tuple(to_heads((q, k, v), axis, n, kernel))
            return qkv, tuple(leaf_to_heads(x, axis, n) for x in leaves)

        rows = [out, dout, lse[..., None]]
        rows += [] if dlse is None else [dlse[..., None]]
        inner, rows = exchanged(again(request, dout), axis, n, kernel, rows)
        out, dout, lse, *more = rows
        dlse = more[0][..., 0] if more else None
        grads = as_inner(self.inner).backward(inner, out, lse[..., 0], dout, dlse, wrt)
        dqkv = tuple(x.astype(inner.result_dtype) for x in grads[:3])
        like = (request.query, request.key_, request.value)
        like = tuple(x.astype(d.dtype) for x, d in zip(like, dqkv, strict=True))
        of_leaves = tuple(leaves[i].astype(d.dtype) for i, d in zip(wrt, grads[3]))
        back = jax.linear_transpose(moved, *like, of_leaves)((dqkv, tuple(grads[3])))
        return back

    def blocks(self, request: Request) -> Blocks:
        return as_inner(self.inner).blocks(request)

    def explain(self, request: Request) -> str:
        _, n = request.split.key[-1]
        inner = of_exchanged(request, n, as_inner(self.inner).explain)
        count = repeats(request, n)
        more = f" (key heads repeated {count} times)" if count > 1 else ""
        return (
            f"ulysses: {request.query.shape[2] // n} of {request.query.shape[2]} heads and "
            f"{request.lengths[0] * n} queries a device{more}; {ulysses_cost(request)}; "
            f"{explained(request)}; {inner}"
        )
