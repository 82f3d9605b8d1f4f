"""What is timed in jax: our mechanisms, cuDNN through `jax.nn`, and tokamax."""

import functools as ft
import logging
import math
from collections.abc import Callable
from typing import Any

import eqx_attention as eqa
import jax
import jax.numpy as jnp

from .cases import CAP, MECHANISMS, operands, options, Timed, WINDOW
from .clock import Calls
from .profile import profiled


# Each in the words of `jax.nn`, which are tokamax's, too.
_KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "local_window_size": (WINDOW - 1, 0)},
    "soft-cap": {"is_causal": True, "logits_soft_cap": CAP},
}


def _jax_nn(timed: Timed, shrink: int) -> Callable:
    *_, head_dim, value_dim = timed.shape
    if head_dim == value_dim:
        nn = jax.nn.dot_product_attention
        return ft.partial(nn, implementation="cudnn", **_KINDS[timed.kind])
    # Which jax.nn refuses, and what it calls does not.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    kinds = {"causal": cudnn.MaskType.CAUSAL, "full": cudnn.MaskType.NO_MASK}
    return ft.partial(
        cudnn.dot_product_attention,
        scale=1 / math.sqrt(head_dim),
        mask_type=kinds[timed.kind],
    )


def _tokamax(timed: Timed, shrink: int) -> Callable:
    import tokamax  # pyright: ignore[reportMissingImports]

    # It warns, at length, of each shape that its authors did not tune it for.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return ft.partial(
        tokamax.dot_product_attention, implementation="mosaic", **_KINDS[timed.kind]
    )


def _ours(mechanism: str, timed: Timed, shrink: int) -> Callable:
    _, length, _, heads, *_ = timed.sizes(shrink)
    made = options(timed.kind, length, heads)
    return ft.partial(eqa.attend, mechanism=MECHANISMS[mechanism], **made)


_PEERS = {"jax.nn cudnn": _jax_nn, "tokamax": _tokamax}


def calls(name: str, timed: Timed, shrink: int) -> Calls:
    """`name` is a peer's, or a mechanism's of ours."""
    attend = _PEERS.get(name, ft.partial(_ours, name))(timed, shrink)
    q, k, v, dout = operands(timed.sizes(shrink), jnp.bfloat16, 0)

    @jax.jit
    def both(q, k, v, dout):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    return Calls(
        ft.partial(jax.jit(attend), q, k, v),
        ft.partial(both, q, k, v, dout),
        jax.block_until_ready,
        {},
    )


def kernels(call: Callable[[], Any]) -> list[str]:
    """The kernels that a call runs, the longest first."""
    total: dict[str, float] = {}
    for event in (event for found in profiled(call).values() for event in found):
        total[event.name] = total.get(event.name, 0) + event.end - event.start
    longest = sorted(total, key=lambda name: -total[name])[:4]
    return [f"{name[:60]} {total[name] / 1e6:.3f} ms" for name in longest]
