"""Few queries in the kernel for Hopper: heads become rows, and keys are split."""

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention import _device
from eqx_attention._mechanism.flash import kernels_unsupported
from eqx_attention._mechanism.packed import packed

from .helpers import assert_close, compiled, operands, Shape
from .kernel_cases import make_request, on_hopper


def _unpacked(request, out, lse):
    """The results of `packed(request)`, as those of `request`."""
    batch, q_len, heads, _ = request.query.shape
    shape = (batch, q_len, request.groups, heads // request.groups)
    out = out.reshape(*shape, -1).swapaxes(2, 3)
    lse = lse.reshape(shape).swapaxes(2, 3)
    return out.reshape(batch, q_len, heads, -1), lse.reshape(batch, q_len, heads)


def _parity(q, k, head, *_):
    return (q + k + head) % 3 > 0


def _tilt(logit, q, k, head, *_):
    return logit + (head + 1).astype(logit.dtype) * jnp.cos((q - k).astype(logit.dtype))


OPTIONS = {
    "nothing": lambda q: {},
    "one for each row": lambda q: {
        "mask": eqa.Causal() & eqa.Padding(jnp.asarray([7, 0])),
        "q_positions": jnp.arange(q)[None] + jnp.asarray([[3], [4]]),
        "scale": jnp.arange(1.0, 7.0) / 7,
    },
    "one for each head": lambda q: {
        "mask": eqa.Predicate(_parity),
        "score": (eqa.ALiBi.standard(6), eqa.ScoreFn(_tilt)),
    },
    "pairs": lambda q: {
        "mask": jnp.asarray(np.random.default_rng(0).random((2, 6, q, 11)) > 0.3),
        "score": eqa.Bias(jnp.asarray(np.random.default_rng(1).random((6, 1, 11)))),
        "q_positions": "end",
    },
    "dropout": lambda q: {"dropout": 0.4, "key": jax.random.key(1)},
}


@pytest.mark.parametrize("q_len", (1, 3))
@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_attention(name, q_len, x64):
    shape = Shape((2,), q_len, 11, 6, 2, 8, 4)
    q, k, v = operands(shape, jnp.float64)
    request = make_request(q, k, v, **OPTIONS[name](q_len))

    def both(request):
        rows = packed(request)
        assert rows.query.shape == (2, 3 * q_len, 2, 8)
        found = _unpacked(request, *eqa.Blockwise(2, 5).forward(rows))
        return found, eqa.Vanilla().forward(request)

    found, expected = compiled(both, request)
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("stored", (False, True))
def test_lowering(stored):
    query = jnp.zeros((2, 1, 8, 128), jnp.bfloat16)
    lengths = eqa.Padding(jnp.asarray([4000, 77]))
    if stored:
        pool = jnp.zeros((16, 128, 2, 128), jnp.bfloat16)
        table = jnp.full((2, 32), -1, jnp.int32)
        keys = eqa.Paged(pool, table)
    else:
        keys = jnp.zeros((2, 4096, 2, 128), jnp.bfloat16)
    score = eqa.SoftCap(20.0)
    if _device.version_of_jax() < (0, 11):
        request = on_hopper(make_request(query, keys, keys, mask=lengths, score=score))
        assert any("jax" in reason for reason in kernels_unsupported(request))
        return
    from eqx_attention._kernel.hopper_decode import blocks_of, decode, splits_of

    def attend(query, keys):
        request = make_request(query, keys, keys, mask=lengths, score=score)
        rows = packed(on_hopper(request))
        splits = splits_of(rows, blocks_of(rows))
        assert splits > 8 and rows.result_dtype == jnp.float32
        return decode(request, None)

    lowered = jax.jit(attend).trace(query, keys)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    out, lse = lowered.out_info
    assert (out.shape, lse.shape) == ((2, 1, 8, 128), (2, 1, 8))
