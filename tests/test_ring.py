"""Rings of fake devices, against attention on one: values, and all gradients."""

import functools as ft
import re

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention._distributed import ring
from eqx_attention._distributed.cargo import Cargo
from eqx_attention.testing import Case
from jax.sharding import PartitionSpec as P

from .helpers import assert_close, compiled, operands, Shape, square


def mesh_of(*sizes: int):
    names = ("sp",) if len(sizes) == 1 else ("a", "b")
    devices = np.asarray(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    return jax.sharding.Mesh(devices, names)


def ring_of(n: int | tuple[int, int], *, layout="auto", scan=True, inner="auto"):
    """`attend` over a ring."""
    mesh = mesh_of(*((n,) if isinstance(n, int) else n))
    return ft.partial(
        eqa.attend,
        mechanism=eqa.Ring(inner, layout, scan),
        sharding=eqa.Sharding(sequence=mesh.axis_names),
        mesh=mesh,
    )


vanilla = ft.partial(eqa.attend, mechanism="vanilla")


def gradients(attend, arguments, options, weights):
    """`(out, lse)` and the gradients of a function of both, with respect to `arguments`:
    query, keys, values and options."""

    def loss(arguments):
        (q, k, v), more = arguments
        out, lse = attend(q, k, v, return_lse=True, **more, **options)
        seen = jnp.where(jnp.isneginf(lse), 0, lse)
        return (out * weights[0]).sum() + (seen * weights[1]).sum(), (out, lse)

    found, (out, lse) = eqx.filter_grad(loss, has_aux=True)(arguments)
    return found, out, lse


def cotangents(q, value_dim: int):
    rng = np.random.default_rng(9)
    shape = (*q.shape[:-1], value_dim)
    return tuple(
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (shape, shape[:-1])
    )


def check(attend, qkv, more, options):
    arguments = (qkv, more)
    weights = cotangents(qkv[0], qkv[2].shape[-1])
    expected = compiled(gradients, vanilla, arguments, options, weights)
    got = compiled(gradients, attend, arguments, options, weights)
    assert_close(got, expected, 1e-5)


def normal(*shape, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_all_options_at_once():
    # 29 tokens do not divide by 4: documents cross devices, the last of them is padded,
    # and two queries see nothing.
    qkv = operands(Shape((2,), 29, 29, 4, 2, 8, 6))
    documents = np.repeat([0, 1, 2, 3], [5, 9, 13, 2])
    queries = np.where(np.arange(29) % 17 == 3, -1, documents)
    more = dict(
        score=(
            eqa.ALiBi(jnp.asarray([0.5, 0.25, 0.1, 0.05])),
            eqa.SoftCap(jnp.asarray(5.0)),
            eqa.Bias(normal(4, 29, 29)),
        ),
        scale=jnp.asarray([0.3, 0.4, 0.5, 0.6]),
        sinks=normal(4),
    )
    options = dict(
        mask=eqa.Causal() & eqa.Segments(queries, documents),
        dropout=0.2,
        key=jax.random.key(1),
    )
    check(ring_of(4), qkv, more, options)


def test_windows_and_positions_that_are_given():
    # Queries and keys of other numbers; what belongs to keys travels, and so does its
    # gradient.
    qkv = operands(Shape((2,), 10, 21, 2, 1, 8, 8))

    def plus(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
        return logit + q_feature * kv_feature + params

    score = eqa.ScoreFn(plus, normal(2, 10), normal(21, seed=1), jnp.asarray(0.3))
    more = dict(score=(score, eqa.RelativeBias(normal(8, 2), max_distance=6)))
    seen = normal(10, 21, seed=2) > -1
    options = dict(
        mask=eqa.SlidingWindow(jnp.asarray([7, 4]), 5) & eqa.Dense(seen),
        kv_positions=jnp.arange(21)[None] // 2 + jnp.asarray([[0], [3]]),
        dropout=0.1,
        key=jax.random.PRNGKey(3),
    )
    check(ring_of(5, scan=False), qkv, more, options)


def test_causal_over_eight_devices():
    # `auto` exchanges halves here, and back; both passes have a loop.
    qkv = square(32, heads=2, dim=4, batch=(1,))
    more = dict(score=(eqa.Bias(normal(32, 32)),))
    options = dict(mask=eqa.Causal(), dropout=0.2, key=jax.random.key(1))
    check(ring_of(8), qkv, more, options)


def test_a_window_of_a_few_of_a_devices_keys():
    # A device's own keys are not halved, as those of others come in no time.
    options = dict(mask=eqa.Causal() & eqa.SlidingWindow(3))
    check(ring_of(2, inner="vanilla"), square(32, heads=2, dim=4), {}, options)


@pytest.mark.thorough
def test_a_window_over_two_axes():
    qkv = square(32, heads=2, dim=4)
    more = dict(score=(eqa.ALiBi.standard(2),))
    options = dict(mask=eqa.Causal() & eqa.SlidingWindow(5))
    check(ring_of((2, 3), layout="contiguous"), qkv, more, options)


def test_a_ring_between_groups_that_exchange_heads():
    mesh = mesh_of(2, 2)
    attend = ft.partial(
        eqa.attend,
        mechanism=eqa.Ulysses(eqa.Ring("vanilla")),
        sharding=eqa.Sharding(sequence=mesh.axis_names),
        mesh=mesh,
    )
    qkv = operands(Shape((2,), 15, 15, 4, 2, 4, 4))
    more = dict(score=(eqa.ALiBi.standard(4),))
    options = dict(mask=eqa.Causal(), dropout=0.2, key=jax.random.key(1))
    check(attend, qkv, more, options)


def test_the_zigzag_layout_is_a_permutation_of_one_device():
    n = 3
    q, k, v = operands(Shape((2,), 24, 24, 2, 2, 8, 8))
    slopes, bias = jnp.asarray([0.5, 0.1]), normal(2, 24, 24)
    ids = jnp.asarray(np.repeat([0, 1], [11, 13]))
    weights = cotangents(q, 8)
    laid = ft.partial(eqa.to_layout, n=n)
    back = ft.partial(eqa.from_layout, n=n)
    options = dict(dropout=0.2, key=jax.random.key(1), return_lse=True)

    def one(q, k, v, slopes, bias):
        mask = eqa.Causal() & eqa.Segments(ids) & eqa.Padding(20)
        score = (eqa.ALiBi(slopes), eqa.Bias(bias))
        return vanilla(q, k, v, mask=mask, score=score, **options)

    def many(q, k, v, slopes, bias):
        mask = eqa.Causal() & eqa.Segments(laid(ids)) & eqa.Padding(20)
        score = (eqa.ALiBi(slopes), eqa.Bias(laid(laid(bias), axis=-2)))
        qkv = (laid(x, axis=1) for x in (q, k, v))
        ring = ring_of(n, layout="zigzag")
        out, lse = ring(*qkv, mask=mask, score=score, **options)
        return back(out, axis=1), back(lse, axis=1)

    def both_modes(fn, arguments):
        def loss(arguments):
            out, lse = fn(*arguments)
            return (out * weights[0]).sum() + (lse * weights[1]).sum()

        # Forward mode is computed by the portable tangent, which has to know the layout.
        moved = jax.jvp(fn, arguments, jax.tree.map(jnp.cos, arguments))
        return moved, jax.grad(loss)(arguments)

    arguments = (q, k, v, slopes, bias)
    expected = compiled(both_modes, one, arguments)
    assert_close(compiled(both_modes, many, arguments), expected, 1e-5)


class Picky(eqa.AbstractMechanism):
    """Wants positions that are counted from the first token, as cuDNN does."""

    def unsupported(self, request):
        q, kv = request.pairs.q, request.pairs.kv
        return () if q.counted and kv.counted and q.shift == kv.shift else ("shifted",)

    def forward(self, request):
        assert not self.unsupported(request)
        return eqa.Vanilla().forward(request)

    def backward(self, request, out, lse, dout, dlse, wrt):
        assert not self.unsupported(request)
        return eqa.Vanilla().backward(request, out, lse, dout, dlse, wrt)

    def blocks(self, request):
        return eqa.Vanilla().blocks(request)

    def explain(self, request):
        return "picky"


def test_hops_are_what_the_mechanism_within_computes():
    qkv = square(32, heads=2, dim=4)
    check(ring_of(4, inner=Picky()), qkv, {}, dict(mask=eqa.Causal()))
    window = eqa.Causal() & eqa.SlidingWindow(5)
    with pytest.raises(eqa.UnsupportedError, match="shifted"):
        ring_of(4, inner=Picky())(*qkv, mask=window)


@pytest.mark.parametrize("layout", ("auto", "contiguous"))
def test_on_a_gpu_nothing_is_chosen_while_it_runs(layout, monkeypatch):
    monkeypatch.setattr(ring, "_LEVEL", ("cpu",))
    attend = ring_of(4, layout=layout, inner="vanilla")
    check(attend, square(32, heads=2, dim=4), {}, dict(mask=eqa.Causal()))


def test_layouts_and_numbers_of_devices_agree():
    q, k, v = square(24, heads=2, dim=4)
    options = dict(mask=eqa.Causal(), return_lse=True)
    expected = compiled(ft.partial(vanilla, **options), q, k, v)
    for n, layout, scan in ((1, "auto", True), (2, "contiguous", True), (3, "auto", False)):
        attend = ft.partial(ring_of(n, layout=layout, scan=scan), **options)
        assert_close(compiled(attend, q, k, v), expected, 1e-6)


def test_how_often_anything_is_sent():
    n = 4
    q, k, v = square(32, heads=2, dim=4)

    def sent(mask, **options):
        """The messages of the forward pass, as compiled."""
        fn = jax.jit(ft.partial(ring_of(n, **options), mask=mask))
        options = {"xla_backend_optimization_level": 0}
        text = fn.lower(q, k, v).compile(options).as_text()
        assert text is not None
        assert not re.search(r" (all-to-all|all-gather|all-reduce|reduce-scatter)\(", text)
        return len(re.findall(r" collective-permute\(", text))

    def sent_by_both(mask, **options):
        """Of both passes, before XLA for CPUs takes the same message for both."""
        attend = ft.partial(ring_of(n, **options), mask=mask)
        fn = jax.jit(jax.grad(lambda *qkv: attend(*qkv).sum(), (0, 1, 2)))
        text = fn.lower(q, k, v).as_text()
        # Which XLA for GPUs may have kernels do, and then fails to compile.
        assert "dynamic_update_slice" not in text
        waits = text.count("stablehlo.optimization_barrier")
        return text.count('"stablehlo.collective_permute"'), waits

    # Keys and values are one message: n - 1 of them; one before a loop and one in it.
    assert sent(eqa.Full(), scan=False) == n - 1
    assert sent(eqa.Full()) == 2
    assert sent(eqa.Causal(), layout="zigzag", scan=False) == n - 1
    # Two exchanges of halves, there and back.
    assert sent(eqa.Causal(), scan=False) == n - 1 + 4
    # A window of less than a device: one hop. Of chunks that are devices': none.
    window = eqa.Causal() & eqa.SlidingWindow(5)
    assert sent(window) == 1
    assert sent(eqa.Chunked(8)) == 0
    # In the backward pass again; and their gradients as often, but one hop later, and
    # together with keys while there are any.
    both = (n - 1) + (n + 1)
    assert sent_by_both(eqa.Full(), scan=False)[0] == both
    # Before the backward pass; of each hop in the middle, before it is sent on; and after
    # half of a device's own keys.
    waits = 1 + (2 + 1) + 1
    assert sent_by_both(eqa.Causal(), layout="zigzag", scan=False) == (both, waits)
    sent_of_many, waits = sent_by_both(window)
    assert sent_of_many == 3
    # A device's own keys are not halved to wait for a few of others.
    assert sent_by_both(eqa.Causal() & eqa.SlidingWindow(2)) == (3, waits - 1)


def test_several_dtypes_are_one_message():
    arrays = [
        jnp.arange(5, dtype=jnp.bfloat16).reshape(5, 1),
        jnp.asarray([True, False, True]),
        jnp.arange(3, dtype=jnp.int8),
        jnp.zeros((0, 2), jnp.bfloat16),
        jnp.linspace(0, 1, 4),
    ]
    for some in (arrays, arrays[:1]):
        cargo = Cargo(some)
        assert cargo.num_bytes == (36 if len(some) > 1 else 10)
        for x, y in zip(some, cargo.arrays(), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
    # Keys in bfloat16, with their gradients in float32.
    case = Case("ring", "causal", shape=Shape((1,), 16, 16, 2, 1, 4, 4), dtype="bfloat16")
    eqa.testing.check(ring_of(4), cases=[case]).raise_on_failure()


def test_what_nothing_sees():
    # What pads one query sees none of the keys that hold NaN; and where no pair is
    # visible, there is no hop.
    shape = Shape((2,), 1, 13, 2, 1, 4, 4)
    cases = [
        Case("hidden", "window", shape=shape, poison=True),
        Case("nothing", eqa.Prefix(0), shape=shape),
    ]
    eqa.testing.check(ring_of(3), cases=cases).raise_on_failure()


def test_inside_of_your_own_shard_map():
    n = 3
    q, k, v = square(24, heads=2, dim=4)
    mask = eqa.Causal()

    def of_device(q, k, v):
        return eqa.attend(
            q, k, v, mask=mask, mechanism="ring", sharding=eqa.Sharding(sequence="sp")
        )

    mapped = jax.shard_map(of_device, mesh=mesh_of(n), in_specs=P("sp"), out_specs=P("sp"))
    assert_close(compiled(mapped, q, k, v), vanilla(q, k, v, mask=mask), 1e-5)


def test_explain():
    q, k, v = square(64, heads=2, dim=4)
    attend = ring_of(4)
    mesh, sharding = attend.keywords["mesh"], attend.keywords["sharding"]

    def explained(mask, **options):
        ring = eqa.Ring(**options)
        config = eqa.AttentionConfig(mechanism=ring, mask=mask, sharding=sharding)
        return eqa.Attention.from_config(config, mesh=mesh).explain(q, k, v)

    text = explained(eqa.Causal())
    assert "ring: 3 of 3 hops over 4 devices along 'sp'" in text
    assert "imbalance 1.00; layout zigzag, by exchange: contiguous, the imbalance" in text
    text = explained(eqa.Causal() & eqa.SlidingWindow(5))
    assert "ring: 1 of 3 hops" in text and "layout contiguous" in text
    assert "hop 1: 6 queries × 6 keys, nothing on 1 of 4 devices" in text
    assert "imbalance 1.7" in explained(eqa.Causal(), layout="contiguous")
    config = eqa.AttentionConfig(mechanism=eqa.Ring("vanilla", "zigzag", False))
    assert eqa.AttentionConfig.from_json(config.to_json()) == config


def test_refusals():
    q, k, v = square(12, heads=2, dim=4)
    with pytest.raises(ValueError, match=r"Ring\(layout\): expected .* got 'spiral'"):
        eqa.Ring(layout="spiral")
    with pytest.raises(ValueError, match=r"Ring\(inner\): expected one of .* 'nothing'"):
        eqa.Ring("nothing")
    with pytest.raises(eqa.UnsupportedError, match="needs a sharding of the sequence"):
        eqa.attend(q, k, v, mechanism="ring")
    with pytest.raises(eqa.UnsupportedError, match="lengths that are multiples of 8"):
        ring_of(4, layout="zigzag")(q, k, v)
    with pytest.raises(ValueError, match="multiple of 8, as Ring.* got 15. Pad it"):
        ring_of(4, layout="zigzag")(*square(15, heads=2, dim=4))
    with pytest.raises(eqa.UnsupportedError, match="it runs on Hopper GPUs, not on cpu"):
        ring_of(4, inner="flash")(q, k, v)
    table = eqa.block_mask(eqa.Causal(), 12, 12)
    with pytest.raises(eqa.UnsupportedError, match="a BlockMask is bound to tokens"):
        ring_of(3, layout="zigzag")(q, k, v, mask=table)
