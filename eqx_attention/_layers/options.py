"""How what is given to a layer combines with its `attention` and with its cache."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from .._attention import Attention, AttentionConfig
from .._cache import AbstractCache, of_last_token
from .._mask import AbstractMask, Dense, Full
from .._options import both_masks


def config_of(attention: AttentionConfig | Attention, **changed: Any) -> AttentionConfig:
    """The options of a config or of a module, with some of them changed."""
    names = [field.name for field in dataclasses.fields(AttentionConfig)]
    return AttentionConfig(**({n: getattr(attention, n) for n in names} | changed))


def attention_of(module: Any) -> Attention:
    """What attends between the projections of a layer."""
    config = dataclasses.replace(module.config, dropout=module.dropout.p)
    attention = Attention.from_config(config, mesh=module.mesh)
    if module.dropout.inference:
        attention = eqx.nn.inference_mode(attention)
    return attention


def dropout_of(
    module: Any,
    attention: AttentionConfig | Attention,
    dropout_p: float,
    inference: bool,
) -> eqx.nn.Dropout:
    """The dropout that is given in one of two places, or in both alike; off if it is in
    one of them."""
    if dropout_p != 0 and attention.dropout not in (0, dropout_p):
        raise ValueError(
            f"{type(module).__name__}: dropout_p must be that of attention, if both are "
            f"given; got {dropout_p}, and attention.dropout={attention.dropout}."
        )
    rate = float(dropout_p if attention.dropout == 0 else attention.dropout)
    return eqx.nn.Dropout(rate, inference or getattr(attention, "inference", False))


def mask_of(module: Any, mask: Any, valid: AbstractMask | None, q_seq: int) -> AbstractMask:
    """The mask of a call, `&`-ed with that of a cache."""
    num_heads = module.num_heads
    if mask is None:
        mask = Full()
    elif not isinstance(mask, AbstractMask):
        if mask.shape[:-1] not in ((q_seq,), (num_heads, q_seq)):
            raise TypeError(
                f"{type(module).__name__}: mask must have shape (q_seq, kv_seq) or "
                f"(num_heads, q_seq, kv_seq), where q_seq={q_seq} and "
                f"num_heads={num_heads}; got {mask.shape}."
            )
        mask = Dense(jnp.asarray(mask))
    return mask if valid is None else both_masks(mask, valid)


def of_cache(
    attention: Attention, cache: AbstractCache | None, q_seq: int, kv_seq: int
) -> Attention:
    """What attends to a cache: where the one query is the last token, without `Causal()`,
    which hides nothing then."""
    if cache is None or q_seq != 1 or kv_seq > 1:
        return attention
    mask = of_last_token(attention.mask)
    return eqx.tree_at(lambda a: a.mask, attention, mask)
