import jax.numpy as jnp
from jaxtyping import Array, Float

from .._axes import Block
from .._mask import Full
from .base import AbstractMechanism, Blocks, Gradients, Request, stored_unsupported
from .tile import heads_first, queries_by_keys, row_terms, TileOf, tokens_first


class Vanilla(AbstractMechanism):
    """Materialises the weights of all pairs. For short sequences, and for looking at.

    Memory is proportional to `q_len * kv_len`.

    ??? cite

        [Attention is All You Need](https://arxiv.org/abs/1706.03762)

        ```bibtex
        @inproceedings{vaswani2017attention,
            author={Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and
                    Uszkoreit, Jakob and Jones, Llion and Gomez, Aidan N and
                    Kaiser, {\\L}ukasz and Polosukhin, Illia},
            booktitle={Advances in Neural Information Processing Systems},
            title={Attention is All You Need},
            volume={30},
            year={2017}
        }
        ```
    """

    def unsupported(self, request: Request) -> tuple[str, ...]:
        return stored_unsupported(request)

    def forward(
        self, request: Request
    ) -> tuple[
        Float[Array, "batch q_len q_heads value_dim"], Float[Array, "batch q_len q_heads"]
    ]:
        tile, weights, lse = self._weights(request)
        out = tile.attended(tile.drop(weights), heads_first(request, request.value))
        return tokens_first(out), lse.swapaxes(1, 2)

    def backward(
        self,
        request: Request,
        out: Float[Array, "batch q_len q_heads value_dim"],
        lse: Float[Array, "batch q_len q_heads"],
        dout: Float[Array, "batch q_len q_heads value_dim"],
        dlse: Float[Array, "batch q_len q_heads"] | None,
        wrt: tuple[int, ...],
    ) -> Gradients:
        tile = _whole(request)
        q, rows = row_terms(request, out, lse, dout, dlse)
        k, v = heads_first(request, request.key_), heads_first(request, request.value)
        dq, dk, dv, dleaves = tile.gradient(q, k, v, rows, wrt)
        dleaves = tuple(d.astype(request.dtype) for d in dleaves)
        return tokens_first(dq), tokens_first(dk), tokens_first(dv), dleaves

    def weights(self, request: Request) -> Float[Array, "batch q_heads q_len kv_len"]:
        """The weights, after dropout."""
        tile, weights, _ = self._weights(request)
        return tile.drop(weights)

    def blocks(self, request: Request) -> Blocks:
        batch, q_len, _, _ = request.query.shape
        _, kv_len, heads, _ = request.key_.shape
        return Blocks(batch, heads, q_len, kv_len)

    def explain(self, request: Request) -> str:
        return f"vanilla: materialises weights of {weights_bytes(request) / 2**20:.1f} MiB"

    def _weights(self, request: Request):
        tile = _whole(request)
        q, k = heads_first(request, request.query), heads_first(request, request.key_)
        logits = tile.logits(queries_by_keys(request, q, k))
        top = logits.max(axis=-1, keepdims=True)
        top = jnp.where(jnp.isneginf(top), 0, top)
        weights = jnp.exp(logits - top)
        total = weights.sum(axis=-1, keepdims=True)
        lse = jnp.log(total) + top
        return tile, weights / jnp.where(total == 0, 1, total), lse[..., 0]


def weights_bytes(request: Request) -> int:
    """How large the weights of all pairs are, in the dtype of accumulation."""
    batch, q_len, heads, _ = request.query.shape
    return batch * heads * q_len * request.key_.shape[1] * request.dtype.itemsize


def _whole(request: Request) -> TileOf:
    batch, q_len, heads, _ = request.query.shape
    kv_len = request.key_.shape[1]
    block = Block((0, 0, 0, 0), (batch, heads, q_len, kv_len))
    return TileOf(request, block, masked=not isinstance(request.pairs.mask, Full))
