"""Attention over a mesh is attention on one device: values, gradients, dropout's bits."""

import functools as ft
import re

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from .helpers import assert_close, compiled, fast_jit, operands, Shape


# No length is a multiple of any number of devices.
SHAPE = Shape((2,), 13, 11, 4, 2, 8, 8)
KEY = jax.random.key(0)


def mesh_of(kind=AxisType.Auto, **sizes):
    names = tuple(sizes)
    return jax.make_mesh(tuple(sizes.values()), names, axis_types=(kind,) * len(names))


COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def program(fn, *args) -> str:
    options = {"xla_backend_optimization_level": 0}
    text = jax.jit(fn).lower(*args).compile(compiler_options=options).as_text()
    assert text is not None
    return text


def collectives(fn, *args) -> list[str]:
    return re.findall(rf" ({COLLECTIVES})(?:-start)?\(", program(fn, *args))


def problem(seed: int = 1):
    """Arrays to differentiate, and those that are given."""
    rng = np.random.default_rng(seed)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
    batch, heads = SHAPE.batch[0], SHAPE.q_heads
    q, k, v = operands(SHAPE)
    slopes = jnp.abs(normal(heads))
    bias = normal(heads, SHAPE.q_len, SHAPE.kv_len)
    features = (normal(SHAPE.q_len), normal(batch, SHAPE.kv_len), normal(2))
    wrt = (q, k, v, normal(heads), slopes, bias, features)
    # The queries of the last segment see no key.
    q_ids, kv_ids = (jnp.arange(n, dtype=jnp.int32) // 5 for n in (SHAPE.q_len, 10))
    given = (
        jnp.stack([q_ids, jnp.zeros_like(q_ids)]),
        jnp.concatenate([kv_ids, jnp.ones((1,), jnp.int32)]),
        jnp.asarray(rng.random((batch, 1, SHAPE.q_len, SHAPE.kv_len)) < 0.9),
        normal(batch, SHAPE.q_len, heads, SHAPE.value_dim),
        normal(batch, SHAPE.q_len, heads),
    )
    return wrt, given


def of_features(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    even = jnp.where(head % 2 == 0, params[0], params[1])
    return logit + even * q_feature * kv_feature


def value_and_grad(wrt, given, **options):
    q_ids, kv_ids, seen, dout, dlse = given

    def loss(wrt):
        q, k, v, sinks, slopes, bias, features = wrt
        out, lse = eqa.attend(
            q,
            k,
            v,
            mask=eqa.Causal(2) & eqa.Segments(q_ids, kv_ids) & eqa.Dense(seen),
            score=(
                eqa.SoftCap(8.0),
                eqa.ALiBi(slopes),
                eqa.Bias(bias),
                eqa.ScoreFn(of_features, *features),
            ),
            sinks=sinks,
            dropout=0.2,
            key=KEY,
            q_positions="end",
            return_lse=True,
            **options,
        )
        return (out * dout).sum() + (lse * dlse).sum(), (out, lse)

    (_, result), grads = jax.value_and_grad(loss, has_aux=True)(wrt)
    return result, grads


@ft.cache
def reference():
    wrt, given = problem()
    return fast_jit(lambda: value_and_grad(wrt, given, mechanism="vanilla"))()


TWO_D = eqa.Ulysses(inner=eqa.AllGather())
CASES = {
    "dp tp": ("blockwise", dict(dp=2, tp=2), dict(batch="dp", heads="tp")),
    "dp sp": ("all_gather", dict(dp=2, sp=3), dict(batch="dp", sequence="sp")),
    "sp tp": ("ulysses", dict(sp=2, tp=2), dict(sequence="sp", heads="tp")),
    "dp sp tp": (
        "auto",
        dict(dp=2, sp=2, tp=2),
        dict(batch="dp", sequence="sp", heads="tp"),
    ),
    "key heads are repeated": ("ulysses", dict(sp=4), dict(sequence="sp")),
    "n is 5": ("all_gather", dict(sp=5), dict(sequence="sp")),
    "two axes": (TWO_D, dict(r=2, u=2, tp=2), dict(sequence=("r", "u"), heads="tp")),
    "queries alone": ("vanilla", dict(sp=3), dict(query_sequence="sp")),
    "keys alone": ("blockwise", dict(sp=3, dp=2), dict(key_sequence="sp", batch="dp")),
    "a grid": ("vanilla", dict(a=2, b=3), dict(query_sequence="a", key_sequence="b")),
}
EXPLICIT = ("sp tp", "a grid")
# What others test too.
RARE = ("queries alone", "dp sp", "sp tp")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.thorough if n in RARE else ()) for n in CASES],
)
def test_as_on_one_device(name):
    mechanism, sizes, axes = CASES[name]
    mesh = mesh_of(AxisType.Explicit if name in EXPLICIT else AxisType.Auto, **sizes)
    options = dict(mechanism=mechanism, sharding=eqa.Sharding(**axes), mesh=mesh)
    wrt, given = problem()
    got = fast_jit(lambda *args: value_and_grad(*args, **options))(wrt, given)
    assert_close(got, reference(), 1e-5)


@pytest.mark.parametrize("mechanism", ["all_gather", "ulysses"])
def test_transformations(mechanism):
    """Forward over reverse, `vmap`, a scan over layers that are rematerialised."""
    mesh, sharding = mesh_of(sp=2), eqa.Sharding(sequence="sp")
    q, k, v = operands(Shape((3,), 6, 6, 2, 2, 4, 4))

    def run(**options):
        attend = ft.partial(eqa.attend, mask=eqa.Causal(), **options)

        def loss(q, k, v):
            @jax.checkpoint
            def layer(x, scale):
                return jax.vmap(attend, (0, None, 0))(x * scale, k[0], v), None

            scales = jnp.asarray([0.9, 1.1], jnp.float32)
            return jnp.sin(jax.lax.scan(layer, q, scales)[0]).sum()

        grad = jax.grad(loss, argnums=(0, 1, 2))
        return compiled(lambda *qkv: jax.jvp(grad, qkv, qkv), q, k, v)

    got = run(mechanism=mechanism, sharding=sharding, mesh=mesh)
    assert_close(got, run(mechanism="vanilla"), 1e-5)


@pytest.mark.parametrize("mechanism", ["vanilla", "blockwise"])
def test_batch_and_heads_need_no_collectives(mechanism):
    """Nor does an axis that is mapped over, and split."""
    mesh = mesh_of(dp=2, tp=2)
    placed = NamedSharding(mesh, P("dp", None, "tp"))
    qkv = operands(Shape((2,), 8, 8, 4, 2, 8, 8))
    qkv = [jax.device_put(x, placed) for x in qkv]
    mask = eqa.Causal() & eqa.Padding(7)
    options = dict(mechanism=mechanism, mesh=mesh, mask=mask, dropout=0.1, key=KEY)
    attend = ft.partial(eqa.attend, score=eqa.ALiBi.standard(4), **options)
    if mechanism == "vanilla":
        attend = ft.partial(attend, sharding=eqa.Sharding(heads="tp"))
        attend = jax.vmap(attend, spmd_axis_name="dp")
    else:
        attend = ft.partial(attend, sharding=eqa.Sharding(batch="dp", heads="tp"))

    def both(*qkv):
        out, pull = jax.vjp(attend, *qkv)
        return out, pull(out)

    assert collectives(both, *qkv) == []


def test_how_many_collectives():
    """Keys and values in one; again in the backward pass, where XLA does not keep them, as
    it does on CPUs; and one that adds up their gradients."""
    mesh, sharding = mesh_of(sp=2), eqa.Sharding(sequence="sp")
    qkv = operands(Shape((1,), 8, 8, 4, 4, 8, 8))
    qkv = [jax.device_put(x, NamedSharding(mesh, P(None, "sp"))) for x in qkv]

    def found(mechanism, fn=lambda x: x):
        options = dict(mechanism=mechanism, sharding=sharding, mesh=mesh)
        attend = ft.partial(eqa.attend, **options)
        return collectives(fn(attend), *qkv)

    def grad(attend):
        return jax.grad(lambda *qkv: attend(*qkv).sum(), argnums=(0, 1, 2))

    assert found("all_gather") == ["all-gather"]
    # Those of the output and of its log-sum-exp, XLA may make one.
    assert found("ulysses") in (2 * ["all-to-all"], 3 * ["all-to-all"])
    *gathers, summed = sorted(found("all_gather", grad))
    assert summed == "reduce-scatter" and set(gathers) == {"all-gather"}
    assert len(gathers) <= 2
    assert set(found("ulysses", grad)) == {"all-to-all"}


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_of_a_shard_map_of_ones_own(check_vma):
    """Arrays are one device's; `Bias` has all keys; numbers are of the whole."""
    mesh, sharding = mesh_of(dp=2, sp=2), eqa.Sharding(batch="dp", sequence="sp")
    q, k, v = operands(Shape((2,), 6, 8, 4, 2, 8, 8))
    rng = np.random.default_rng(0)
    bias = jnp.asarray(rng.standard_normal((2, 1, 6, 8)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 2, (2, 8)), jnp.int32)

    def attend(q, k, v, bias, ids, **options):
        return eqa.attend(
            q,
            k,
            v,
            mask=eqa.Causal() & ~eqa.Segments(ids[:, : q.shape[1]], ids),
            score=eqa.Bias(bias),
            dropout=0.2,
            key=KEY,
            q_positions="end",
            **options,
        )

    def grad(fn):
        total = lambda *xs: jnp.sin(fn(*xs, ids)).sum()  # noqa: E731
        return jax.value_and_grad(total, argnums=(0, 1, 2, 3))

    def of_device(q, k, v, bias, q_ids, ids):
        mask = eqa.Causal() & ~eqa.Segments(q_ids, ids)
        options = dict(mask=mask, score=eqa.Bias(bias), q_positions="end")
        options |= dict(dropout=0.2, key=KEY, mechanism="all_gather", sharding=sharding)
        return eqa.attend(q, k, v, **options)

    spec = P("dp", "sp")
    specs = (spec, spec, spec, P("dp", None, "sp"), spec, spec)
    over = jax.shard_map(
        of_device, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=check_vma
    )
    own = lambda q, k, v, bias, ids: over(q, k, v, bias, ids[:, :6], ids)  # noqa: E731
    plain = ft.partial(attend, mechanism="vanilla")
    got, expected = (compiled(grad(f), q, k, v, bias) for f in (own, plain))
    assert_close(got, expected, 1e-5)


def test_decoding_from_a_cache_that_is_split():
    """The cache stays where it is: what moves is one array, as large as the results."""
    mesh, sharding = mesh_of(sp=4), eqa.Sharding(key_sequence="sp")
    q, k, v = operands(Shape((2,), 1, 6, 4, 2, 8, 8))
    cache = eqa.StaticCache.init(16, 2, 8, batch=(2,)).append(k, v)

    def decode(q, cache, **options):
        cache = cache.append(k[:, :1], v[:, :1])
        options |= dict(mask=eqa.SlidingWindow(3), return_lse=True)
        return cache.attend(q, **options), cache

    expected = compiled(decode, q, cache)
    tokens = NamedSharding(mesh, P(None, "sp"))
    place = lambda x: x if x.ndim == 1 else jax.device_put(x, tokens)  # noqa: E731
    cache = jax.tree.map(place, cache)
    over = ft.partial(decode, sharding=sharding, mesh=mesh)
    got = compiled(over, q, cache)
    assert_close(got, expected, 1e-5)
    assert got[1].key_.sharding == cache.key_.sharding
    # 4 parts of 2 sequences × 1 query × 4 heads × (8 channels and a log-sum-exp); and for
    # the check that the cache is not full, a number a sequence.
    text = program(over, q, cache)
    moved = re.findall(rf"= (\S+) (?:{COLLECTIVES})\(", text)
    moved = [re.sub(r"\{.*", "", shape) for shape in moved]
    assert sorted(moved) in (["f32[4,2,1,4,9]"], ["f32[4,2,1,4,9]", "s32[2]"])


def test_block_mask():
    """It is bound to its tokens, and its table goes by their indices in the whole."""
    mesh, sharding = mesh_of(sp=2), eqa.Sharding(sequence="sp")
    qkv = operands(Shape((2,), 10, 10, 2, 2, 4, 4))
    mask = eqa.block_mask(eqa.Chunked(3) | eqa.Causal(-5), 10, 10, block_q=3, block_k=2)
    expected = compiled(lambda *qkv: eqa.attend(*qkv, mask=mask), *qkv)
    for mechanism in ("all_gather", "ulysses"):
        inner = eqa.Blockwise(block_q=2, block_k=3)
        over = {"all_gather": eqa.AllGather, "ulysses": eqa.Ulysses}[mechanism](inner)
        options = dict(mask=mask, mechanism=over, sharding=sharding, mesh=mesh)
        got = compiled(lambda *qkv, options=options: eqa.attend(*qkv, **options), *qkv)
        assert_close(got, expected, 1e-5)


def test_modules_and_files(tmp_path):
    mesh = mesh_of(dp=2, sp=2)
    sharding = eqa.Sharding(batch="dp", sequence=["sp"])
    config = eqa.AttentionConfig(mask=eqa.Causal(), sharding=sharding)
    assert eqa.AttentionConfig.from_json(config.to_json()) == config
    attention = eqa.Attention.from_config(config, mesh=mesh)
    q, k, v = operands(Shape((2,), 5, 5, 2, 2, 4, 4))
    out = attention(q, k, v)
    assert_close(out, eqa.attend(q, k, v, mask=eqa.Causal()), 1e-5)
    with jax.set_mesh(mesh):
        ambient = eqa.Attention.from_config(config)
        assert_close(jax.jit(ambient)(q, k, v), out, 1e-6)
    path = tmp_path / "attention.eqx"
    eqa.save(path, ambient)
    assert eqa.load(path) == ambient
    eqa.save(path, attention)
    with pytest.raises(eqa.SerialisationError, match="mesh"):
        eqa.load(path)
    loaded = eqa.load(path, mesh=mesh)
    assert loaded == attention
    assert_close(loaded(q, k, v), out, 1e-6)
    mha = eqa.MultiheadAttention.from_config(config, 2, 8, mesh=mesh, key=KEY)
    assert mha.attention.mesh == mesh and mha.attention.sharding == sharding


def test_explain():
    mesh = mesh_of(sp=4)
    qkv = operands(Shape((1,), 16, 16, 4, 4, 8, 8))
    attention = eqa.Attention(sharding=eqa.Sharding(sequence="sp"), mesh=mesh)
    text = attention.explain(*qkv, mask=eqa.Causal())
    for words in (
        "chosen by auto: forward and backward by the model",
        "MiB received a device forward",
        "4 queries and 4 keys",
        "blockwise: keys are split over 'sp'",
        "ulysses: supported",
    ):
        assert words in text
    imbalance = re.search(r"  all_gather: .* (\S+) times the mean work", text)
    assert imbalance is not None and float(imbalance[1]) == pytest.approx(58 / 34, abs=0.01)
    merged = eqa.Attention(sharding=eqa.Sharding(key_sequence="sp"), mesh=mesh)
    assert "results are merged over 'sp'" in merged.explain(*qkv)


def test_auto_chooses_by_cost():
    """Few heads leave no Ulysses; few keys are cheap to gather."""

    def chosen(shape, n):
        attention = eqa.Attention(sharding=eqa.Sharding(sequence="sp"), mesh=mesh_of(sp=n))
        return attention.explain(*operands(shape), mask=eqa.Causal()).partition(":")[0]

    assert chosen(Shape((1,), 2**16, 2**16, 4, 4, 8, 8), 4) != "all_gather"
    assert chosen(Shape((1,), 8, 8, 3, 3, 4, 4), 2) == "all_gather"


@pytest.mark.parametrize(
    "mask",
    (
        eqa.Full(),
        eqa.Causal() & eqa.SlidingWindow(64),
        eqa.SlidingWindow(64, right=64),
        eqa.SlidingWindow(300),
    ),
    ids=repr,
)
def test_auto_knows_what_a_ring_sends(mask):
    """What the model says is received is what the plan says is sent."""
    q, k, v = operands(Shape((1,), 1024, 1024, 8, 8, 64, 64))
    sharding = dict(sharding=eqa.Sharding(sequence="sp"), mesh=mesh_of(sp=4))

    def said(words, **options):
        text = eqa.Attention(**options, **sharding).explain(q, k, v, mask=mask)
        found = re.search(words, text)
        assert found is not None, text
        return [float(x) for x in found.groups()]

    received = said(r"ring: (\S+) MiB received a device forward, (\S+) MiB backward")
    sent = said(r"sends (\S+) MiB forward, (\S+) MiB backward", mechanism=eqa.Ring())
    assert received == pytest.approx(sent, rel=0.1)


MESH = mesh_of(dp=2, sp=4)
QKV = operands(Shape((2,), 8, 8, 4, 2, 8, 8))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: eqa.Sharding(), ValueError, "at least one"),
        (lambda: eqa.Sharding(batch="dp", heads="dp"), ValueError, "'dp' more than once"),
        (lambda: eqa.Sharding(sequence="a", key_sequence="b"), ValueError, "either"),
        (
            lambda: eqa.Sharding(query_sequence=("a", "b"), key_sequence="b"),
            ValueError,
            "'b' more than once",
        ),
        (lambda: eqa.Attention(mesh=MESH), ValueError, "no sharding"),
        (
            lambda: eqa.Attention(sharding=eqa.Sharding(batch="tp"), mesh=MESH),
            ValueError,
            r"axes of the mesh.*'tp'",
        ),
        (
            lambda: eqa.attend(*QKV, sharding=eqa.Sharding(batch="dp")),
            ValueError,
            "expected a mesh",
        ),
        (
            lambda: eqa.attend(*QKV, sharding=eqa.Sharding(batch="sp"), mesh=MESH),
            ValueError,
            "batch axes to be a multiple of 4.*got 2",
        ),
        (
            lambda: eqa.attend(*QKV, sharding=eqa.Sharding(heads="sp"), mesh=MESH),
            ValueError,
            "kv_heads to be a multiple of 4.*got 2",
        ),
        (
            lambda: eqa.attend(
                *QKV,
                mechanism="blockwise",
                sharding=eqa.Sharding(sequence="sp"),
                mesh=MESH,
            ),
            eqa.UnsupportedError,
            "keys are split over 'sp'.*all_gather, ulysses",
        ),
        (
            lambda: eqa.attend(*QKV, mechanism="all_gather"),
            eqa.UnsupportedError,
            "needs a sharding",
        ),
        (
            lambda: eqa.attend(
                *operands(Shape((), 8, 8, 3, 3, 8, 8)),
                mechanism="ulysses",
                sharding=eqa.Sharding(sequence="sp"),
                mesh=MESH,
            ),
            eqa.UnsupportedError,
            "a multiple of 4 query heads",
        ),
        (lambda: eqa.AllGather(inner="no"), ValueError, "AllGather"),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_there_is_one_ambient_mesh():
    with jax.set_mesh(mesh_of(sp=2)):
        with pytest.raises(ValueError, match="the ambient one has {'sp': 2}"):
            eqa.attend(*QKV, sharding=eqa.Sharding(sequence="sp"), mesh=MESH)
        with pytest.raises(ValueError, match="axes of the mesh.*got 'dp'"):
            eqa.attend(*QKV, sharding=eqa.Sharding(batch="dp"))


def test_errors_inside_of_a_shard_map():
    def refused(in_spec, words, positions="start", **axes):
        def of_device(q, k, v):
            kv = None if positions == "start" else jnp.arange(k.shape[1], dtype=jnp.int32)
            options = dict(q_positions=positions, kv_positions=kv)
            sharding = eqa.Sharding(**axes)
            return eqa.attend(q, k, v, sharding=sharding, mechanism="all_gather", **options)

        spec = P(None, in_spec)
        over = jax.shard_map(
            of_device,
            mesh=MESH,
            in_specs=spec,
            out_specs=spec,
            axis_names={"sp"},
        )
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(over, *QKV)

    refused("sp", "all of its axes", sequence="sp", batch="dp")
    refused("sp", "one device's tokens", positions="end", sequence="sp")
