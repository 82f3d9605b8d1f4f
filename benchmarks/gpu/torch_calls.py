"""What is timed in PyTorch: FlexAttention, compiled, with the tiles of each mask known
beforehand (`create_block_mask`), as its documentation advises."""

import functools as ft
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
    create_block_mask,
    flex_attention,
)

from .cases import CAP, document_ids, Timed, WINDOW
from .clock import Calls


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _mask(kind: str, length: int):
    def causal(b, h, i, j):
        return i >= j

    def window(b, h, i, j):
        return (i >= j) & (i - j < WINDOW)

    ids = torch.from_numpy(document_ids(length)).to(_device())

    def documents(b, h, i, j):
        return (i >= j) & (ids[i] == ids[j])

    return {"window": window, "documents": documents}.get(kind, causal)


def _score(kind: str, heads: int):
    def alibi(score, b, h, i, j):
        return score - (i - j) * torch.exp2(-(h + 1) * (8.0 / heads))

    def soft_cap(score, b, h, i, j):
        return CAP * torch.tanh(score / CAP)

    return {"alibi": alibi, "soft-cap": soft_cap}.get(kind)


def arguments(timed: Timed, shrink: int) -> tuple[dict[str, Any], float]:
    """What `flex_attention` is given, and how many percent of its tiles are empty."""
    _, length, _, heads, *_ = timed.sizes(shrink)
    sizes = (None, None, length, length)
    block_mask = create_block_mask(_mask(timed.kind, length), *sizes, device=_device())
    made = {"block_mask": block_mask, "score_mod": _score(timed.kind, heads)}
    return made, float(block_mask.sparsity())


def tensors(timed: Timed, shrink: int) -> list[Any]:
    """`query, key, value, dout`, with heads first."""
    batch, length, _, heads, kv_heads, head_dim, value_dim = timed.sizes(shrink)
    generator = torch.Generator(_device()).manual_seed(0)
    shapes = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim)]
    return [
        torch.randn(
            (batch, h, length, dim),
            generator=generator,
            device=_device(),
            dtype=torch.bfloat16,
        ).requires_grad_()
        for h, dim in (*shapes, (heads, value_dim))
    ]


def calls(name: str, timed: Timed, shrink: int) -> Calls:
    made, sparsity = arguments(timed, shrink)
    q, k, v, dout = tensors(timed, shrink)
    dout = dout.detach()
    forward: Any = ft.partial(torch.compile(flex_attention), q, k, v, **made)

    def both():
        return torch.autograd.grad(forward(), (q, k, v), dout)

    return Calls(forward, both, lambda _: torch.cuda.synchronize(), {"sparsity": sparsity})
