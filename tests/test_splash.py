"""Splash attention, as far as a machine without a TPU goes: what it computes in JAX's
interpreter, that it lowers for a TPU, and what it refuses."""

import dataclasses
import functools as ft

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention import _call, testing
from eqx_attention._kernel import splash as kernels
from eqx_attention._kernel.splash_tables import tiles
from jax.experimental.pallas import tpu as pltpu

from .helpers import assert_close, compiled, square
from .kernel_cases import make_request


@pytest.fixture
def on_tpu(monkeypatch):
    """As if what is traced were for a TPU."""
    monkeypatch.setattr(_call, "platform_of", lambda *_: "tpu")


@pytest.fixture
def interpreted(on_tpu):
    """And as if there were one: kernels are interpreted, grid step by grid step."""
    with pltpu.force_tpu_interpret_mode(True):  # pyright: ignore[reportArgumentType]
        yield


def _on_tpu(request):
    return dataclasses.replace(request, platform="tpu")


Case = ft.partial(testing.Case, q_positions="start")
_far = eqa.Causal() & eqa.SlidingWindow(70)
CASES = {
    # Grouped heads of other sizes, and lengths that are padded; some rows see nothing.
    "rule": Case(
        "rule",
        mask=(~eqa.Causal(200) | eqa.Chunked(30) & eqa.Causal()) & ~eqa.Prefix(9),
        shape=testing.Shape((), 150, 270, 2, 1, 8, 24),
        q_positions="shifted",
        poison=True,
        scale="array",
    ),
    "tokens": Case(
        "tokens",
        mask=("and", "segments", "keys", "padding", eqa.Causal()),
        shape=testing.Shape((2,), 256, 256, 1, 1, 8, 8),
        score=(eqa.SoftCap(2.0),),
        poison=True,
        sinks=True,
    ),
    "dense": Case(
        "dense",
        mask=("and", "dense", _far),
        shape=testing.Shape((1,), 140, 256, 2, 2, 8, 8),
        q_positions="end",
        poison=True,
    ),
    "full": Case(
        "full", shape=testing.Shape((2,), 128, 256, 2, 1, 64, 64), dtype="bfloat16"
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_against_the_reference(name, interpreted):
    mechanism = eqa.Splash(block_q=128, block_k=128)
    testing.check(mechanism, cases=[CASES[name]]).raise_on_failure()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_many(dtype, interpreted):
    """Of generated cases, those that it supports."""
    report = testing.check("splash", cases=testing.cases(100, seed=7, dtype=dtype))
    report.raise_on_failure()
    assert len(report.passed) >= 8


def test_gradients_of_a_part_given_the_whole(interpreted):
    """With the log-sum-exp over all keys and its cotangent, as a ring has them; of keys
    whose positions start elsewhere."""
    request = make_request(*square(256, heads=1, batch=(1,)), mask=eqa.Causal())

    def part(request, start, end):
        kv = dataclasses.replace(request.pairs.kv, length=end - start, shift=start)
        return dataclasses.replace(
            request,
            key_=request.key_[:, start:end],
            value=request.value[:, start:end],
            pairs=dataclasses.replace(request.pairs, kv=kv),
        )

    def of_whole_and_parts(request):
        out, lse = eqa.Vanilla().forward(request)
        rows = (out, lse, jnp.cos(out), jnp.sin(lse), ())
        first, last = part(request, 0, 100), part(request, 100, 256)
        others = eqa.Vanilla().backward(first, *rows)
        dq, dk, dv, _ = eqa.Splash().backward(last, *rows)
        expected = eqa.Vanilla().backward(request, *rows)
        return (others[0] + dq, dk, dv), expected[:3]

    got, (dq, dk, dv) = compiled(of_whole_and_parts, request)
    assert_close(got, (dq, dk[:, 100:], dv[:, 100:]), 1e-5)


@pytest.mark.thorough
def test_in_the_interpreter_of_memory(on_tpu):
    """Where nothing is zero that was not written; it knows no primitives of ours."""
    q, k, v = square(256, heads=2, batch=(1,))
    mask = eqa.Causal() & eqa.SlidingWindow(50) & eqa.Segments(jnp.arange(256) // 100)
    request = _on_tpu(make_request(q, k[:, :, :1], v[:, :, :1], mask=mask))

    def passes(mechanism, request):
        out, lse = mechanism.forward(request)
        rows = (jnp.cos(out), jnp.sin(lse), ())
        return out, lse, mechanism.backward(request, out, lse, *rows)[:3]

    expected = passes(eqa.Vanilla(), request)
    with pltpu.force_tpu_interpret_mode():
        got = compiled(passes, eqa.Splash(block_q=128, block_k=128), request)
    assert_close(got, expected, 1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("mask", (eqa.Causal(), eqa.Causal() & eqa.SlidingWindow(70)))
def test_ring(mask, interpreted):
    arrays = square(512, heads=1, batch=(1,))

    def gradients(*arrays, **options):
        def loss(*arrays):
            out, lse = eqa.attend(*arrays, mask=mask, return_lse=True, **options)
            return (out * jnp.cos(out)).sum() + jnp.sin(lse).sum(), (out, lse)

        return jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)

    ring = dict(mechanism=eqa.Ring(inner="splash"), **_over(2))
    got = compiled(ft.partial(gradients, **ring), *arrays)
    assert_close(got, compiled(ft.partial(gradients, mechanism="vanilla"), *arrays), 1e-5)


def _over(n):
    mesh = jax.make_mesh((n,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return dict(sharding=eqa.Sharding(sequence="x"), mesh=mesh)


def _lowered(fn, *args) -> int:
    """How many kernels there are, of what lowers for a TPU."""
    lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",))
    return lowered.as_text().count("tpu_custom_call")


def _gradient(attend):
    def loss(*arrays):
        out, lse = attend(*arrays, return_lse=True)
        return out.astype(jnp.float32).sum() + lse.sum()

    return jax.grad(loss, (0, 1, 2))


OPTIONS = {
    "full": {},
    "rule": dict(mask=(eqa.Chunked(30) & ~eqa.Causal(-9)) | eqa.Prefix(9)),
    "tokens": dict(
        mask=eqa.Causal() & eqa.Segments(jnp.zeros(300, int)) & eqa.Padding(200),
        score=eqa.SoftCap(9.0),
    ),
    "dense": dict(mask=jnp.ones((4, 300, 300), bool)),
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_lowering(name, on_tpu):
    """Forward and backward: of a mask, also what is done again where there is a NaN."""
    dtype = jnp.float32 if name == "rule" else jnp.bfloat16
    q, k, v = square(300, heads=4, dim=64, batch=(2,), dtype=dtype)
    attend = eqa.Attention(mechanism="splash", **OPTIONS[name])
    assert _lowered(_gradient(attend), q, k[:, :, :2], v[:, :, :2]) == 3 + (name != "full")


def test_transformations_lower(on_tpu):
    arrays = square(128, heads=1, batch=(2,))
    gradient = _gradient(eqa.Attention(mechanism="splash"))
    assert _lowered(jax.vmap(gradient), *arrays) == 3
    assert _lowered(lambda *xs: jax.jvp(gradient, xs, xs), *arrays) == 3
    with jax.enable_x64(True):
        assert _lowered(gradient, arrays[0], *(x[:, :, :1] for x in arrays[1:])) == 3


@pytest.mark.parametrize(
    "kind",
    [eqa.Ring]
    + [pytest.param(x, marks=pytest.mark.thorough) for x in (eqa.AllGather, eqa.Ulysses)],
)
def test_lowers_over_a_mesh(kind, on_tpu):
    attend = eqa.Attention(mechanism=kind(inner="splash"), mask=eqa.Causal(), **_over(2))
    arrays = square(512, heads=2, dim=64, batch=(1,), dtype=jnp.bfloat16)
    assert "splash: tiles of " in attend.explain(*arrays)
    assert _lowered(_gradient(attend), *arrays) >= 4


def _shapes(q_len=32, kv_len=32, heads=(2, 2), dims=(8, 8), dtype=jnp.float32):
    shapes = ((q_len, heads[0]), (kv_len, heads[1]), (kv_len, heads[1]))
    sizes = (dims[0], *dims)
    return [jnp.zeros((1, *s, d), dtype) for s, d in zip(shapes, sizes)]


def _parity(q_pos, kv_pos, head, q_feature, kv_feature, params):
    return (q_pos + kv_pos) % 2 == 0


_ids = eqa.Segments(jnp.zeros(32, int))


@pytest.mark.parametrize(
    "options, reason",
    (
        (dict(score=eqa.SoftCap(jnp.array(2.0))), "no score but one SoftCap"),
        (dict(score=(eqa.SoftCap(2.0), eqa.SoftCap(3.0))), "no score but one SoftCap"),
        (dict(score=eqa.ALiBi.standard(2)), "no score but one SoftCap"),
        (dict(mask=eqa.Causal(jnp.array(2))), "no mask Causal"),
        (dict(mask=eqa.Causal() & eqa.Predicate(_parity)), "no mask Predicate"),
        (dict(mask=~_ids), "no mask Segments"),
        (dict(mask=_ids & _ids), "one Segments only"),
        (dict(mask=eqa.block_mask(eqa.Causal(), 32, 32)), "no mask BlockMask"),
        (dict(mask=eqa.Causal(), kv_positions=jnp.arange(32)), "positions of keys"),
        (dict(precision="highest"), "no precision"),
        (dict(dropout=0.5, key=jax.random.key(0)), "no dropout"),
        (dict(mask=_ids, kv_positions=jnp.arange(32), scale=jnp.ones(2)), None),
        (dict(mask=~eqa.PrefixLM(3) | eqa.Dense(jnp.ones((32, 32), bool))), None),
    ),
    ids=lambda x: None if isinstance(x, dict) else str(x),
)
def test_refusals(options, reason):
    found = []

    def look():
        request = _on_tpu(make_request(*_shapes(), **options))
        found.extend(eqa.Splash().unsupported(request))

    jax.eval_shape(look)  # Nothing need be computed.
    assert len(found) == (reason is not None)
    assert reason is None or reason in found[0]


@pytest.mark.slow
def test_refusals_of_shapes_and_machines():
    def reasons(request):
        return " | ".join(eqa.Splash().unsupported(request))

    assert reasons(make_request(*_shapes())) == "it runs on TPUs, not on cpu"
    half = _on_tpu(make_request(*_shapes(dtype=jnp.float16)))
    assert reasons(half) == "it computes in bfloat16 or float32, not in float16"
    rounded = make_request(*_shapes(dtype=jnp.bfloat16), scale=jnp.ones(2))
    assert "scale that is an array" in reasons(_on_tpu(rounded))
    wide = _on_tpu(make_request(*_shapes(dims=(264, 8))))
    assert reasons(wide) == "head_dim must be from 1 to 256, and is 264"
    with pytest.raises(eqa.UnsupportedError, match="runs on TPUs.*blockwise"):
        eqa.attend(*_shapes(), mechanism="splash")
    for name, value in (("block_q", 100), ("block_k", 0)):
        with pytest.raises(ValueError, match=rf"Splash\({name}\).*multiple of 128"):
            eqa.Splash(**{name: value})
    with pytest.raises(TypeError, match=r"Splash\(block_q\)"):
        eqa.Splash(block_q=True)


def test_other_versions_of_jax_are_refused(monkeypatch):
    """Those whose functions have other parameters, or are elsewhere."""
    request = _on_tpu(make_request(*_shapes()))
    assert kernels.not_as_known() == ()
    of_old = kernels.not_as_known.__wrapped__
    monkeypatch.setattr(kernels, "not_as_known", of_old)
    with monkeypatch.context() as patch:
        patch.setattr(kernels._jax(), "_splash_attention_bwd_dq", lambda q, k, v: None)
        (reason,) = eqa.Splash().unsupported(request)
        assert f"jax {jax.__version__}" in reason and "_bwd_dq differ" in reason
    monkeypatch.setattr(kernels, "_MODULE", "jax.experimental.nowhere")
    assert "jax.experimental.nowhere" in eqa.Splash().unsupported(request)[0]


def test_auto(on_tpu):
    arrays = _shapes(2048, 2048)
    attend = eqa.Attention(mask=eqa.Causal())
    assert "splash: tiles of 512 queries" in attend.explain(*arrays)
    text = attend.explain(*arrays, score=eqa.ALiBi.standard(2))
    assert "blockwise: " in text and "not splash: it computes no score but" in text
    few = attend.explain(*_shapes(1, 2048))
    assert "splash" not in few.split("mechanisms:")[0]


def _computed(mask, kv_len=512):
    """The tiles of each row, and how long the loop over them is; by queries, by keys."""
    arrays = _shapes(512, kv_len, (1, 1))

    def both(mask):
        request = make_request(*arrays, mask=mask)
        found = [tiles(request, 128, 128, by_key) for by_key in (False, True)]
        return [(x.number[0], x.kind[0]) for x in found]

    for number, kind in compiled(both, mask):
        number, kind = np.asarray(number), np.asarray(kind)
        rows = [sorted(n[k > 0].tolist()) for n, k in zip(number, kind)]
        yield rows, kind.shape[1]


@pytest.mark.slow
def test_tiles_that_are_skipped():
    before = [list(range(n + 1)) for n in range(4)]
    after = [list(range(n, 4)) for n in range(4)]
    assert [*_computed(eqa.Causal())] == [(before, 4), (after, 4)]
    # The loop over keys is no longer than the window.
    window = eqa.Causal() & eqa.SlidingWindow(5)
    before, after = [[0], [0, 1], [1, 2], [2, 3]], [[0, 1], [1, 2], [2, 3], [3]]
    assert [*_computed(window)] == [(before, 2), (after, 2)]
    # Segments are arrays: what is skipped is known only when it runs.
    ids = eqa.Segments(np.arange(512) // 256)
    both = [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [*_computed(ids)] == [(both, 4), (both, 4)]
    dense = np.zeros((512, 500), bool)
    dense[130, 499] = True
    found = [([[], [3], [], []], 4), ([[], [], [], [1]], 4)]
    assert [*_computed(eqa.Dense(dense), 500)] == found
    assert tiles(make_request(*_shapes(512, 512)), 128, 128, False) is None
