"""Layers check themselves also where no constructor runs: when they are loaded."""

import equinox as eqx
import eqx_attention as eqa
import jax.random as jr
import pytest
from eqx_attention._describe import describe, Parts, rebuild


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


def _feed_forward(activation="gelu"):
    return eqa.FeedForward(4, 6, activation, dropout_p=0.1, key=jr.key(0))


def _multihead(qk_norm=None):
    return eqa.MultiheadAttention(
        4,
        8,
        num_kv_heads=2,
        qk_norm=qk_norm,
        rotary=eqa.RotaryEmbedding(2),
        key=jr.key(0),
    )


def _latent(q_rank=6):
    return eqa.MultiheadLatentAttention(4, 8, 5, q_rank=q_rank, rope_size=2, key=jr.key(0))


def _rotary():
    return eqa.RotaryEmbedding(8, scaling=eqa.YaRNScaling(4.0, 32))


_LEAF = {"leaf": 0}
_CASES = (
    (_feed_forward, "size", 0, "size must be positive"),
    (_feed_forward, "size", 5, "up_proj.*in_features=5.*got 4"),
    (_feed_forward, "hidden_size", -1, "hidden_size must be positive"),
    (_feed_forward, "hidden_size", 10**400, "up_proj.*got 4 and 6"),
    (_feed_forward, "hidden_size", _LEAF, "hidden_size must be positive"),
    (_feed_forward, "block_size", 0, "block_size must be positive"),
    (_feed_forward, "activation", "tanhh", "activation must be one of"),
    (_feed_forward, "activation", "glu", "gate_proj.*in_features=4"),
    (lambda: _feed_forward("glu"), "activation", "relu", "relu.*gate_proj"),
    (_feed_forward, "dropout.p", 1.0, "dropout_p"),
    (_feed_forward, "dropout", _LEAF, "dropout_p"),
    (_feed_forward, "up_proj", _LEAF, "up_proj"),
    (_multihead, "num_heads", 0, "num_heads must be positive"),
    (_multihead, "num_heads", 8, "query_proj.*out_features=16.*got 8"),
    (_multihead, "num_kv_heads", 3, "num_kv_heads must divide"),
    (_multihead, "num_kv_heads", 4, "key_proj.*out_features=8"),
    (_multihead, "vo_size", 3, "value_proj.*out_features=6"),
    (_multihead, "output_size", 3, "output_proj.*out_features=3"),
    (_multihead, "qk_size", 4, "rotary must have a head_dim of qk_size=4"),
    (_multihead, "rotary", _LEAF, "rotary must have a head_dim"),
    (_multihead, "rotary.head_dim", 4, "rotary must have a head_dim"),
    (_multihead, "dropout.p", -0.5, "dropout_p"),
    (_multihead, "config.dropout", 0.5, "config.*dropout"),
    (_multihead, "qk_norm", "rms", "query_norm"),
    (lambda: _multihead("rms"), "qk_norm", "l2", "query_norm"),
    (lambda: _multihead("rms"), "key_norm", None, "key_norm"),
    (_latent, "num_heads", 2, "query_proj.*out_features=8.*got 6 and 16"),
    (_latent, "kv_rank", 4, "latent_proj.*out_features=6"),
    (_latent, "q_rank", None, "query_proj.*in_features=8"),
    (_latent, "q_rank", 0, "q_rank must be positive"),
    (_latent, "query_norm", None, r"query_norm must have the shape \(6,\); got None"),
    (_latent, "latent_norm.shape", [4], r"latent_norm must have the shape \(5,\)"),
    (lambda: _latent(8), "q_rank", None, "query_down must be None"),
    (_latent, "rope_size", 3, "rotary must have a head_dim of rope_size=3"),
    (_latent, "config.scale", None, "scale"),
    (_latent, "config.dropout", 0.5, "dropout"),
    (_rotary, "head_dim", 7, "head_dim"),
    (_rotary, "head_dim", -8, "head_dim"),
    (_rotary, "theta", 1.0, "theta"),
    (_rotary, "theta", {"float": "inf"}, "theta"),
    (_rotary, "fraction", {"float": "nan"}, "fraction"),
    (_rotary, "fraction", 0.3, "fraction"),
    (_rotary, "scaling.factor", -1, "factor"),
)


@pytest.mark.parametrize("make, path, value, match", _CASES)
def test_tampered(make, path, value, match):
    module, parts = make(), Parts()
    data = describe(module, parts)
    assert eqx.tree_equal(rebuild(data, parts), module)
    *parents, name = path.split(".")
    parent = data
    for p in parents:
        parent = parent[p]
    assert name in parent
    parent[name] = value
    with pytest.raises(eqa.SerialisationError, match=match):
        rebuild(data, parts)
