"""How jax's splash attention, a kernel for TPUs, is called.

Its functions are private, and are called by the names of their parameters: those that are
not as they were in the versions that this was written for are not called at all.
"""

import contextlib
import functools as ft
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src import config
from jaxtyping import Array, Float

from .._mask import Full
from .._mechanism.base import Request
from .._mechanism.hidden import again_if_nan
from .._mechanism.splash_mask import q_positions, rule, token_ids
from .._static import unwrap
from .splash_tables import Tiles, tiles


_MODULE = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel"
_MASK_INFO = "data_next mask_next block_mask partial_mask_blocks q_sequence is_dynamic_mask"
_FORWARD = """fwd_mask_info q k v segment_ids sinks mask_value is_mqa block_sizes
    residual_checkpoint_name save_residuals mask_function attn_logits_soft_cap interpret"""
_BACKWARD = """q k v segment_ids sinks logsumexp do di bq bkv is_mqa mask_info mask_value
    attn_logits_soft_cap q_layout k_layout v_layout mask_function interpret"""
_PARAMETERS = {
    "SegmentIds": "q kv",
    "_splash_attention_forward": _FORWARD,
    "_splash_attention_bwd_dq": _BACKWARD,
    "_splash_attention_bwd_dkv": f"{_BACKWARD} bkv_compute use_fused_bwd_kernel",
}


class Sizes(NamedTuple):
    """How many queries and keys a tile has, and how many channels heads are given."""

    query: int
    key: int
    head_dim: int
    value_dim: int


@ft.cache
def not_as_known() -> tuple[str, ...]:
    """Those of jax's functions that are not there, or have other parameters."""
    try:
        kernels = importlib.import_module(_MODULE)
    except ImportError:
        return (_MODULE,)
    found = {name: getattr(kernels, name, None) for name in _PARAMETERS}
    found["MaskInfo"] = getattr(getattr(kernels, "mask_info_lib", None), "MaskInfo", None)
    found["_check_vma"] = getattr(config, "_check_vma", None)
    expected = _PARAMETERS | {"MaskInfo": _MASK_INFO, "_check_vma": None}
    return tuple(
        name for name, fn in found.items() if fn is None or not _takes(fn, expected[name])
    )


def _takes(fn: Callable, parameters: str | None) -> bool:
    if parameters is None:
        return True
    return set(inspect.signature(fn).parameters) == set(parameters.split())


def _jax() -> Any:
    return importlib.import_module(_MODULE)


@contextlib.contextmanager
def _as_expected() -> Iterator[None]:
    """Within a `jax.shard_map`, jax's kernels would have to say over which mesh axes their
    outputs vary, and do not: `untyped` says it for them. They also fail where Python's
    integers have 64 bits."""
    with config._check_vma(False), jax.enable_x64(False):
        yield


def forward(request: Request, sizes: Sizes) -> tuple[Array, Array]:
    """`(out, lse)`."""
    # Once, also if it is done again.
    found = tiles(request, sizes.query, sizes.key, by_key=False)
    return again_if_nan(ft.partial(_forward, sizes=sizes, found=found), request)


def _forward(request: Request, sizes: Sizes, found: Tiles | None) -> tuple[Array, Array]:
    kernels, inputs = _jax(), _Inputs(request, sizes)
    blocks = kernels.BlockSizes(block_q=sizes.query, block_kv=sizes.key)
    options = inputs.options() | {
        "sinks": None,
        "block_sizes": blocks,
        "residual_checkpoint_name": None,
        "save_residuals": True,
    }

    def one(qkv, ids, info):
        with _as_expected():
            forward = kernels._splash_attention_forward
            out, (lse,) = forward(fwd_mask_info=info, segment_ids=ids, **qkv, **options)
        return out, lse

    out, lse = inputs.over_batch(one, inputs.qkv, inputs.ids, inputs.info(found))
    if not isinstance(request.pairs.mask, Full):
        # Of rows that see nothing, no tile was computed, or only such as are masked.
        empty = lse <= 0.5 * kernels.DEFAULT_MASK_VALUE
        lse = jnp.where(empty, -jnp.inf, lse + (out * 0).sum(-1, dtype=lse.dtype))
        out = jnp.where(empty[..., None], jnp.zeros((), out.dtype), out)
    q_len, value_dim = request.lengths[0], request.value.shape[-1]
    out = out.swapaxes(1, 2)[:, :q_len, :, :value_dim]
    return out, lse.swapaxes(1, 2)[:, :q_len]


def backward(
    request: Request,
    lse: Float[Array, "batch q_len q_heads"],
    delta: Float[Array, "batch q_len q_heads"],
    dout: Float[Array, "batch q_len q_heads value_dim"],
    sizes: Sizes,
) -> tuple[Array, Array, Array]:
    """`(dq, dk, dv)`; the lse of rows that see nothing is inf, all else of them 0."""
    kernels, inputs = _jax(), _Inputs(request, sizes)
    rows = [x.swapaxes(1, 2) for x in (lse, delta)]
    widths = [(0, 0), (0, 0), (0, -request.lengths[0] % sizes.query)]
    lse = jnp.pad(rows[0], widths, constant_values=jnp.inf)
    delta = jnp.pad(rows[1], widths)
    dout = _padded(dout, sizes.query, sizes.value_dim)
    layout = kernels.QKVLayout.HEAD_DIM_MINOR
    options = inputs.options() | {
        "sinks": None,
        "bq": sizes.query,
        "bkv": sizes.key,
        "q_layout": layout,
        "k_layout": layout,
        "v_layout": layout,
    }
    fused = {"bkv_compute": sizes.key, "use_fused_bwd_kernel": False}

    def one(qkv, ids, by_query, by_key, rows):
        lse, delta, dout = rows
        own = {"segment_ids": ids, "logsumexp": lse, "do": dout, "di": delta}
        own |= qkv | options
        with _as_expected():
            dq = kernels._splash_attention_bwd_dq(mask_info=by_query, **own)
            _, dk, dv = kernels._splash_attention_bwd_dkv(mask_info=by_key, **own, **fused)
        return dq, dk, dv

    tables = [tiles(request, sizes.query, sizes.key, by_key) for by_key in (False, True)]
    infos = inputs.info(tables[0]), inputs.info(tables[1], by_key=True)
    found = inputs.over_batch(one, inputs.qkv, inputs.ids, *infos, (lse, delta, dout))
    scale = inputs.scale.astype(jnp.float32)
    dq, dk, dv = (x.swapaxes(1, 2) for x in found)
    dq = dq.astype(jnp.float32) * scale
    shapes = (x.shape for x in (request.query, request.key_, request.value))
    dq, dk, dv = (x[:, : shape[1], :, : shape[3]] for x, shape in zip((dq, dk, dv), shapes))
    return dq, dk, dv


class _Inputs:
    """A request in jax's terms."""

    def __init__(self, request: Request, sizes: Sizes):
        self.request, self.sizes = request, sizes
        scale = jnp.asarray(unwrap(request.pairs.scale), jnp.float32)
        self.scale = scale.reshape(1, 1, -1, 1)  # One, or one a head.
        query = (request.query.astype(jnp.float32) * self.scale).astype(request.query.dtype)
        self.qkv = {
            "q": _padded(query, sizes.query, sizes.head_dim),
            "k": _padded(request.key_, sizes.key, sizes.head_dim),
            "v": _padded(request.value, sizes.key, sizes.value_dim),
        }
        self.rule = rule(request, self.qkv["k"].shape[2])
        ids = token_ids(request)
        if ids is not None:
            ids = _jax().SegmentIds(*map(_lengthened, ids, (sizes.query, sizes.key)))
        self.ids = ids

    def options(self) -> dict[str, Any]:
        score = self.request.pairs.score
        return {
            "mask_value": _jax().DEFAULT_MASK_VALUE,
            "is_mqa": False,
            "mask_function": self.rule,
            "attn_logits_soft_cap": score[0].cap if score else None,  # pyright: ignore
            "interpret": False,
        }

    def info(self, found: Tiles | None, by_key: bool = False) -> Any:
        positions = None
        if self.rule is not None:
            positions = _lengthened(q_positions(self.request), self.sizes.query)
        tables = (None, None, None)
        if found is not None:
            tables = (found.number, found.kind, found.place)
            if by_key:
                tables = (x if x is None else x.swapaxes(1, 2) for x in tables)
            tables = (x if x is None else x[None] for x in tables)
        number, kind, place = tables
        return _jax().mask_info_lib.MaskInfo(
            data_next=number,
            mask_next=place,
            block_mask=kind,
            partial_mask_blocks=None if found is None else found.written,
            q_sequence=positions,
        )

    def over_batch(self, fn: Callable, *trees: Any) -> Any:
        """`fn` of each batch element; arrays that all of them share are not repeated."""
        batch = self.request.query.shape[0]
        leaves, treedef = jax.tree.flatten(trees)
        run = lambda leaves: fn(*jax.tree.unflatten(treedef, leaves))  # noqa: E731
        if batch == 1:
            return jax.tree.map(lambda x: x[None], run([x[0] for x in leaves]))
        axes = [None if x.shape[0] == 1 else 0 for x in leaves]
        leaves = [x[0] if a is None else x for x, a in zip(leaves, axes)]
        return jax.vmap(run, in_axes=(axes,))(leaves)


def _padded(x: Float[Array, "batch len heads channels"], tile: int, channels: int) -> Array:
    """Heads first, with zeros up to a multiple of `tile` tokens, and `channels`."""
    widths = [(0, 0), (0, -x.shape[1] % tile), (0, 0), (0, channels - x.shape[3])]
    return jnp.pad(x, widths).swapaxes(1, 2)


def _lengthened(x: Array, tile: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % tile)], mode="edge")
