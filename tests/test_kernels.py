"""The kernels for GPUs, as far as a machine without one goes: they lower, they refuse what
they do not support, and masks and scores are split as they should be.

What they compute is checked on a GPU by benchmarks/gpu_check.py, whose cases these are.
"""

import re

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention import _call, _device
from eqx_attention._kernel.lookup import NotElementwise
from eqx_attention._kernel.tables import (
    longest_first,
    sees_no_later,
    table,
    table_in_order,
)
from eqx_attention._kernel.terms import logit_fn, Term, visible_fn
from eqx_attention._mechanism import attention, cudnn
from eqx_attention._mechanism.measured import faster
from eqx_attention._mechanism.plan import by_rank

from .helpers import compiled
from .kernel_cases import CASES, HOPPER, make_case, make_request, on_hopper


NEW = _device.version_of_jax() >= (0, 11)


@pytest.fixture
def hopper(monkeypatch):
    """As if the first device were a Hopper GPU, and jax recent."""
    for module in (_device, cudnn):
        monkeypatch.setattr(module, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(_device, "version_of_jax", lambda: (0, 11, 2))


@pytest.mark.parametrize("name", list(CASES.SUPPORT))
def test_expected_support(name, hopper):
    able = CASES.SUPPORT[name][0]
    arrays, _, options = make_case(name)
    request = on_hopper(make_request(*arrays, **options))
    for mechanism, kind in (("flash", eqa.Flash), ("cudnn", eqa.CuDNN)):
        assert (not kind().unsupported(request)) == (mechanism in able)
    expected = [n for n in ("cudnn", "flash") if n in able] or ["vanilla", "blockwise"]
    if len(expected) == 2 and able:
        few = request.lengths[0] <= 8
        expected = ["decode" if few else faster(request)[0]]
    chosen, _ = eqa.Auto().choose(request)
    assert type(chosen).__name__.lower() in expected


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if n % 3 else ())
        for n, name in enumerate(HOPPER)
    ],
)
def test_lowering(name):
    """Forward and backward lower for a GPU, where jax has what they are written in."""
    (q, k, v), dout, options = make_case(name)
    arrays, static = eqx.partition(options, eqx.is_array)
    if not NEW:
        request = on_hopper(make_request(q, k, v, **options))
        assert any("jax" in reason for reason in eqa.Flash().unsupported(request))
        return

    def grads(q, k, v, dout, arrays):
        def out(q, k, v):
            request = make_request(q, k, v, **eqx.combine(arrays, static))
            return attention(eqa.Flash(), request)[0]

        primal, pull = jax.vjp(out, q, k, v)
        return pull(dout.astype(primal.dtype))

    lowered = jax.jit(grads).trace(q, k, v, dout, arrays)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def _flash(q, k, v, score=()):
    request = on_hopper(make_request(q, k, v, mask=eqa.Causal(), score=score))
    return attention(eqa.Flash(), request)[0]


def _gradient(q, k, v, dout):
    return jax.vjp(_flash, q, k, v)[1](dout)


def _sharded(*arrays):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    return jax.shard_map(_gradient, mesh=mesh, in_specs=spec, out_specs=spec)(*arrays)


def _of_slopes(q, k, v, dout):
    def loss(score):
        return (_flash(q, k, v, (score,)) * dout).sum()

    return jax.grad(loss)(eqa.ALiBi.standard(4))


@pytest.mark.parametrize(
    "fn",
    (
        _sharded,
        lambda *xs: jax.vmap(_gradient)(*(jnp.stack([x, x]) for x in xs)),
        lambda q, k, v, t: jax.jvp(_flash, (q, k, v), (t, t, t)),
        lambda *xs: jax.jvp(_gradient, xs, xs),
        _of_slopes,
    ),
    ids=("shard_map", "vmap", "jvp", "hvp", "gradient of slopes"),
)
def test_transformations_lower(fn):
    if not NEW:
        assert "0.11" in " ".join(eqa.Flash().unsupported(make_request(*3 * [_small()])))
        return
    lowered = jax.jit(fn).trace(*4 * [_small()])
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    "mechanism, axes",
    (
        (eqa.Ulysses(inner="flash"), "sequence"),
        (eqa.AllGather(inner="flash"), "sequence"),
        ("flash", "key_sequence"),
        ("flash", "heads"),
    ),
)
def test_lowers_over_a_mesh(mechanism, axes, hopper, monkeypatch):
    """With tables of tiles, and numbers of heads, that differ from device to device."""
    monkeypatch.setattr(_call, "platform_of", lambda *_: "gpu")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    options = dict(mechanism=mechanism, sharding=eqa.Sharding(**{axes: "x"}), mesh=mesh)
    options |= dict(mask=eqa.Causal(), score=eqa.ALiBi.standard(4))
    attention = eqa.Attention(**options)
    assert "flash: tiles of" in attention.explain(*3 * [_small()])
    if not NEW:
        return

    def loss(*qkv):
        return attention(*qkv).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*3 * [_small()])
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_decoding_lowers_over_a_mesh(hopper, monkeypatch):
    """From a cache that is split: numbers of keys differ from device to device."""
    monkeypatch.setattr(_call, "platform_of", lambda *_: "gpu")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = eqa.Sharding(key_sequence="x")
    attention = eqa.Attention(
        mechanism="decode", mask=eqa.Padding(200), sharding=sharding, mesh=mesh
    )
    arrays = (_small()[:, :1], *2 * [_small()[:, :, :2]])
    assert "in a kernel for Hopper" in attention.explain(*arrays)
    if NEW:
        lowered = jax.jit(attention).trace(*arrays)
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text


def test_what_cannot_be_rows_is_decoded_without_the_kernel(hopper, monkeypatch):
    """Tables of each head, in which rows of several heads would look; and tiles that were
    counted for each head."""
    monkeypatch.setattr(_call, "platform_of", lambda *_: "gpu")
    arrays = (_small()[:, :1], *2 * [_small()[:, :, :2]])
    dense = jnp.arange(4)[:, None, None] == (jnp.arange(256) // 64)[None, None]
    table = eqa.RelativeBias(jnp.ones((32, 4)), bidirectional=True, max_distance=128)
    for options in (
        {"score": table},
        {"mask": eqa.block_mask(dense, 1, 256, num_heads=4, block_q=1, block_k=64)},
    ):
        attention = eqa.Attention(mechanism="decode", **options)
        assert "splits of" in attention.explain(*arrays)
    shared = eqa.block_mask(dense[0], 1, 256, block_q=1, block_k=64)
    attention = eqa.Attention(mechanism="decode", mask=shared)
    assert "in a kernel" in attention.explain(*arrays)


def _small():
    return jnp.zeros((4, 256, 4, 64), jnp.bfloat16)


def test_refusals_name_the_reason(hopper):
    shape = (1, 64, 2, 64)
    q = jnp.zeros(shape, jnp.bfloat16)
    cpu = make_request(q, q, q)
    assert "not on cpu" in eqa.Flash().unsupported(cpu)[0]
    assert "not on cpu" in eqa.CuDNN().unsupported(cpu)[0]
    with pytest.raises(eqa.UnsupportedError, match="not on cpu.*blockwise"):
        eqa.attend(q, q, q, mechanism="flash")
    request = on_hopper(make_request(*3 * [q.astype(jnp.float32)]))
    for kind in (eqa.Flash, eqa.CuDNN):
        assert "not in float32" in kind().unsupported(request)[0]
    wide = on_hopper(make_request(*3 * [jnp.zeros((1, 64, 2, 264), jnp.bfloat16)]))
    assert "head_dim" in eqa.Flash().unsupported(wide)[0]
    score = eqa.ScoreFn(lambda logit, *_: jnp.sort(logit, axis=-1))
    request = on_hopper(make_request(q, q, q, score=(score,)))
    assert "no sort of pairs, as this score" in eqa.Flash().unsupported(request)[0]


def test_other_gpus(hopper, monkeypatch):
    q = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    request = on_hopper(make_request(q, q, q))
    assert type(eqa.Auto().choose(request)[0]) is eqa.Flash
    for module in (_device, cudnn):
        monkeypatch.setattr(module, "compute_capability", lambda: (7, 5))
    assert "7.5" in eqa.Flash().unsupported(request)[0]
    assert "7.5" in eqa.CuDNN().unsupported(request)[0]
    assert type(eqa.Auto().choose(request)[0]) is eqa.Vanilla


def _fn(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return logit * params["table"][head] + jnp.sort(params["table"])[0] + q_feature


def test_what_belongs_to_one_side_is_computed_outside():
    q, k, v = (jnp.zeros((1, n, 4, 64), jnp.bfloat16) for n in (6, 8, 8))
    params = {"table": jnp.arange(4.0)}
    score = eqa.ScoreFn(_fn, q_features=jnp.arange(6.0), params=params)
    request = make_request(q, k, v, score=(score,))
    inputs = Term(request, logit_fn, 4, 4).inputs()
    shapes = sorted(x.array.shape for x in inputs)
    # A number a head (two of them: the last is of none), and one a query, padded.
    assert shapes == [(1, 1), (1, 1, 8), (1, 4)]
    by_head = next(x.array for x in inputs if x.array.shape == (1, 4))
    # With the scale, which is a power of two.
    assert np.array_equal(by_head[0], np.arange(4.0) / 8)


def test_pairs_must_be_elementwise():
    def sorts(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
        return jnp.sort(logit, axis=-1)

    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    request = make_request(q, q, q, score=(eqa.ScoreFn(sorts),))
    with pytest.raises(NotElementwise, match="sort"):
        Term(request, logit_fn, 8, 8)


@pytest.mark.parametrize(
    "fn, word",
    (
        (lambda logit, *_: jnp.abs(logit) ** 0.5, "pow"),
        (lambda logit, *_: logit % 3.0, "rem"),
        (lambda x, i, j, *_: x * abs((i - j).astype(jnp.int8)).astype(x.dtype), "8-bit"),
    ),
)
def test_what_the_compiler_lacks_is_refused(fn, word, hopper):
    q = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    request = on_hopper(make_request(q, q, q, score=(eqa.ScoreFn(fn),)))
    assert word in " ".join(eqa.Flash().unsupported(request))


def _several(table, i, _):
    return table.reshape(5, 8)[jnp.clip(i, 0, 4)].sum(-1)


def _of_queries(table, i, feature):
    table = jnp.concatenate([feature[..., None], feature[..., None] + 1], axis=-1)
    return jnp.take_along_axis(table, jnp.clip(i, 0, 1)[..., None], axis=-1)[..., 0]


def _joined(table, i, _):
    i = i[..., None]
    return table[jnp.concatenate([i, -i], axis=-1)].sum(-1)


def _one_hot(table, i, _):
    return table.at[i].get(mode=jax.lax.GatherScatterMode.ONE_HOT)


@pytest.mark.parametrize(
    "fn, reason",
    (
        (_several, "gather of several elements a pair"),
        (_of_queries, "gather of pairs from a table of each query or key"),
        (_joined, "concatenate of pairs"),
        (_one_hot, "gather of pairs in mode"),
        (
            lambda t, i, _: t.astype(jnp.complex64)[i].real,
            "gather of pairs from a table of complex64",
        ),
    ),
)
def test_lookups_that_are_refused(fn, reason, hopper):
    def of_pair(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
        return logit + fn(params["t"], q_pos - kv_pos, q_feature)

    q = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    params = {"t": jnp.arange(40.0)}
    score = eqa.ScoreFn(of_pair, q_features=jnp.zeros(64), params=params)
    request = on_hopper(make_request(q, q, q, score=(score,)))
    (found,) = eqa.Flash().unsupported(request)
    assert re.search(f"compute no ({reason}).*, as this score does", found)


@pytest.mark.parametrize("batch, heads, tokens", ((1, 2, 2048), (2, 16, 512)))
def test_tiles_of_blockwise_grow_where_there_are_few_heads(batch, heads, tokens):
    q = jnp.zeros((batch, 4096, heads, 1))
    request = make_request(q, q, q)
    assert eqa.Blockwise().blocks(request).query == 512
    blocks = eqa.Blockwise().blocks(on_hopper(request))
    assert (blocks.query, blocks.key) == (tokens, tokens)


def test_cudnn_refuses_what_was_not_checked(hopper):
    q = jnp.zeros((2, 64, 2, 64), jnp.bfloat16)
    lengths = jnp.array([3, 5])
    both = eqa.Padding(lengths) & eqa.Causal()
    for options in ({"mask": both}, {"mask": eqa.Padding(lengths, lengths)}):
        request = on_hopper(make_request(q, q, q, **options))
        assert eqa.CuDNN().unsupported(request)
        assert not eqa.Flash().unsupported(request)


@pytest.mark.parametrize(("by_key", "in_order"), ((False, False), (True, True)))
@pytest.mark.parametrize("kv_len", (64, 50, 5))
@pytest.mark.parametrize(
    "mask",
    (
        eqa.Full(),
        eqa.Causal(),
        eqa.Causal() & eqa.SlidingWindow(9),
        ~eqa.Causal(),
        eqa.Segments(jnp.arange(40) // 11, jnp.arange(64) // 11),
    ),
    ids=repr,
)
def test_tables_hold_each_tile_that_is_seen(mask, kv_len, by_key, in_order):
    """Against the dense mask: what is visible is in a tile of the table, and what is in a
    tile that is FULL is visible (and no token beyond the end). In order, each run of tiles
    goes backwards, and tiles before those that are FULL are behind them."""
    if isinstance(mask, eqa.Segments):
        mask = eqa.Segments(jnp.arange(40) // 11, jnp.arange(kv_len) // 11)
    q, k = (jnp.zeros((1, n, 2, 64), jnp.bfloat16) for n in (40, kv_len))
    request = make_request(q, k, k, mask=mask)
    block_q, block_k = 16, 8
    got, order = table(request, block_q, block_k, by_key), None
    if in_order:
        got, order = table_in_order(request, block_q, block_k)
    columns, full, some = (np.asarray(x) for x in got)
    high = np.zeros_like(full) if order is None else np.asarray(order.high)
    before = None if order is None else np.asarray(order.before)
    dense = np.zeros((48, -(-kv_len // 8) * 8), bool)
    visible = eqa.attention_weights(*(x.astype(jnp.float32) for x in (q, k)), mask=mask)
    dense[:40, :kv_len] = np.asarray(visible)[0, 0] > 0
    covered = np.zeros_like(dense)
    count: dict[int, int] = {}
    for row in range(full.shape[2]):
        for n in range(some[0, 0, row]):
            i, j = (columns[0, 0, row, n], row) if by_key else (row, columns[0, 0, row, n])
            tile = slice(i * 16, i * 16 + 16), slice(j * 8, j * 8 + 8)
            covered[tile] = True
            column = columns[0, 0, row, n]
            if before is not None:
                assert before[0, 0, row, n] == count.get(column, 0)
            count[column] = count.get(column, 0) + 1
            if high[0, 0, row] <= n < high[0, 0, row] + full[0, 0, row]:
                rows = tile[0].start, min(tile[0].stop, 40)
                assert dense[slice(*rows), tile[1]].all()
        first = int(high[0, 0, row])
        runs = np.split(columns[0, 0, row], (first, first + full[0, 0, row]))
        if in_order:
            runs[2] = runs[2][: some[0, 0, row] - first - full[0, 0, row]]
            assert all((np.diff(run) < 0).all() for run in runs)
            assert not first or runs[0].min() > runs[1].max()
    assert covered[dense].all()
    if in_order:
        # The first that adds to a column writes it, so that each has one.
        assert sorted(count) == list(range(3))


def test_which_masks_see_no_later_keys():
    def found(mask, q_len=40, **options):
        q, k = (jnp.zeros((1, n, 2, 64), jnp.bfloat16) for n in (q_len, 40))
        return sees_no_later(make_request(q, k, k, mask=mask, **options))

    assert found(eqa.Causal()) and found(eqa.Causal(offset=-3) & eqa.SlidingWindow(9))
    assert not found(eqa.Full())
    assert not found(eqa.Causal(offset=1))
    assert not found(eqa.Causal(offset=jnp.zeros((), jnp.int32)))
    assert not found(eqa.Causal() | eqa.Prefix(3))
    assert not found(eqa.Causal(), q_len=39)
    assert not found(eqa.Causal(), q_positions=jnp.arange(40))


def test_rows_with_the_most_tiles_come_first():
    """Those of documents, which are known at run time; causal ones need no list."""
    q = jnp.zeros((2, 64, 1, 64), jnp.bfloat16)
    ids = jnp.stack([jnp.arange(64) // 24, jnp.arange(64) // 64])

    def tiles(mask):
        return table(make_request(q, q, q, mask=mask), 8, 8)

    def rows(ids):
        found = tiles(eqa.Causal() & eqa.Segments(ids))
        return found.some, longest_first(found)

    some, order = compiled(rows, ids)
    assert some[0, 0].tolist() == [1, 2, 3, 1, 2, 3, 1, 2]
    # Counted from the last: those of 3 tiles are 5 and 2, and so on.
    assert order[:, 0].tolist() == [[2, 5, 0, 3, 6, 1, 4, 7], list(range(8))]
    assert longest_first(tiles(eqa.Causal())) is None
    later = longest_first(tiles(~eqa.Causal()))
    assert later is not None and later[0, 0].tolist() == list(range(8))[::-1]


def test_hidden_rows_have_one_tile():
    """Those of padding too, whose queries do not see the keys of their own numbers."""
    q = jnp.zeros((1, 64, 1, 64), jnp.bfloat16)

    def some(length):
        mask = eqa.Causal() & eqa.Padding(length)
        request = make_request(q, q, q, mask=mask)
        return table(request, 8, 8).some, table(request, 8, 8, by_key=True).some

    by_query, by_key = compiled(some, jnp.array([16]))
    assert by_query.ravel().tolist() == [1, 2, 2, 2, 2, 2, 2, 2]
    assert by_key.ravel().tolist() == [8, 7, 1, 1, 1, 1, 1, 1]
    by_query, _ = compiled(some, jnp.array([0]))
    assert by_query.ravel().tolist() == [1] * 8


@pytest.mark.parametrize("columns", (1, 7, 257))
def test_columns_by_rank(columns):
    rank = np.random.default_rng(0).integers(0, 4, (1, 2, 3, columns))
    got = compiled(by_rank, jnp.asarray(rank, jnp.int8))
    assert np.array_equal(got, np.argsort(rank, axis=-1, stable=True))


def test_masks_beyond_the_end():
    """`~` of a mask sees nothing beyond the end of the keys."""
    q, k = (jnp.zeros((1, n, 1, 64), jnp.bfloat16) for n in (8, 5))
    visible = visible_fn(make_request(q, k, k, mask=~eqa.Causal()), 8)
    request = make_request(q, k, k, mask=~eqa.Causal())
    term = Term(request, visible, 8, 8)
    assert [x.dtype for x in term.graph.outputs] == [jnp.bool_]
    assert "lt" in {node.primitive.name for node in _nodes(term.graph.outputs[0])}


def _nodes(node):
    if getattr(node, "primitive", None) is not None:
        yield node
        for x in node.inputs:
            yield from _nodes(x)
