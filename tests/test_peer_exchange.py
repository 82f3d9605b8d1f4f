"""Heads for tokens, by the kernel that writes into the other devices' memory: which tile
goes where, when it is used, and that it lowers. What it moves is checked on GPUs."""

import itertools
import math

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention import _call, _device
from eqx_attention._distributed import peers
from eqx_attention._kernel import peer_exchange
from eqx_attention._kernel.peer_exchange import FEWEST, Share, Tiles
from jax.sharding import Mesh, PartitionSpec as P

from .helpers import compiled


NEW = _device.version_of_jax() >= (0, 11)


def _tiles_of_block(tiles: Tiles, n: int, blocks: int, start: int):
    """Of each block: how many tiles it moves, and the first ones that it could."""

    def one(block, i):
        share = Share(tiles, n, block, blocks, start)
        return share.count, jnp.stack(share.at(i))

    most = n * -(-tiles.places // blocks)
    over = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    count, found = compiled(over, jnp.arange(blocks), jnp.arange(most))
    return np.asarray(count)[:, 0], np.asarray(found)


@pytest.mark.parametrize(
    "n, arrays, batch, length, channels, blocks, start",
    [
        (4, 2, 2, 21, 48, 5, 3),
        pytest.param(2, 1, 1, 8, 16, 132, 7, marks=pytest.mark.slow),
        pytest.param(3, 3, 1, 40, 1024, 7, 0, marks=pytest.mark.slow),
    ],
)
def test_each_part_arrives(monkeypatch, n, arrays, batch, length, channels, blocks, start):
    """Tiles, moved one by one, are the collective, there and back; and at any time not all
    blocks write to the same device."""
    monkeypatch.setattr(peer_exchange, "_TILE", 512)
    tiles = Tiles.of(arrays, batch, length, channels, 2)
    counts, found = _tiles_of_block(tiles, n, blocks, start)
    assert len({*found[counts > 0, 0, 1]}) == min(n, (counts > 0).sum())
    assert max(counts) - min(counts) <= n
    assert (found[start % blocks, 0, [0, 2, 3, 4]] == 0).all()  # where others ended
    shape = (arrays, batch, length, n, tiles.lines, tiles.inner)
    parts = np.arange(n * math.prod(shape)).reshape(n, *shape)
    there = np.full((n, arrays, batch, n, *parts.shape[3:4], *parts.shape[5:]), -1)
    back = np.full_like(parts, -1)
    for tile in itertools.chain(*(f[:c] for f, c in zip(found, counts, strict=True))):
        array, shift, b, row, line = map(int, tile)
        rows, lines = slice(row, row + tiles.rows), slice(line, line + tiles.part)
        for me in range(n):
            other = (me + shift) % n
            piece = parts[me, array, b, rows, other, lines]
            assert piece.shape == tiles.shape
            there[other, array, b, me, rows, lines] = piece
            back[me, array, b, rows, other, lines] = there[other, array, b, me, rows, lines]
    np.testing.assert_array_equal(there, np.moveaxis(parts, [0, 4], [3, 0]))
    np.testing.assert_array_equal(back, parts)


def test_tiles_are_what_the_copy_engine_takes():
    for itemsize, length, channels in itertools.product(
        (2, 4), (8, 9, 250, 8192), (8, 24, 72, 80, 128, 512, 640, 2104, 4096, 8192)
    ):
        tiles = Tiles.of(1, 1, length, channels, itemsize)
        assert tiles.lines * tiles.inner == channels
        assert tiles.lines % tiles.part == 0 and tiles.inner * itemsize % 16 == 0
        assert max(tiles.shape) <= 256 and FEWEST <= tiles.rows <= length
        size = math.prod(tiles.shape) * itemsize
        assert size % 128 == 0 and size <= 16 * 1024
        assert (
            size >= 8 * 1024
            or tiles.part < tiles.lines
            or tiles.rows in (256, length // 8 * 8)
        )


def _over(fn, mesh, specs, out_specs):
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out_specs)


def test_the_primitive_is_the_collective():
    """Its transpose too, under a `jax.shard_map` that checks types; elsewhere than on a
    GPU, it is the collective that it lowers to."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    shapes = ((2, 12, 8, 5), (2, 8, 4, 3), (2, 12, 8, 1))
    xs = [jnp.arange(math.prod(s), dtype=jnp.float32).reshape(s) for s in shapes]

    def both(kernel):
        def local(xs):
            there = peers.to_heads(xs, "x", 4, kernel)
            back = peers.to_tokens(there, "x", 4, kernel)
            move = lambda xs: peers.to_heads(xs, "x", 4, kernel)  # noqa: E731
            (transposed,) = jax.linear_transpose(move, xs)([2 * x for x in there])
            _, tangents = jax.jvp(move, (xs,), (back,))
            return there, back, transposed, tangents

        tokens, heads = P(None, "x"), P(None, None, "x")
        return _over(local, mesh, (tokens,), (heads, tokens, tokens, heads))

    plain, primitive = compiled(lambda xs: (both(False)(xs), both(True)(xs)), xs)
    for x, y, z, w in zip(xs, *(plain[i] for i in (0, 1, 2)), strict=True):
        assert (x == y).all() and (x == z).all() and (2 * x == w).all()
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(primitive), strict=True):
        assert (x == y).all()


@pytest.fixture
def hopper(monkeypatch):
    """As if the first device were a Hopper GPU, and jax recent."""
    monkeypatch.setattr(_device, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(_device, "version_of_jax", lambda: (0, 11, 2))
    monkeypatch.setattr(_call, "platform_of", lambda *_: "gpu")


def _attention(devices, axes=("x",), mechanism=None, **sharding):
    mesh = Mesh(np.array(devices), axes)
    mechanism = mechanism or eqa.Ulysses(inner="vanilla")
    sharding = eqa.Sharding(**sharding or {"sequence": "x"})
    options = dict(mechanism=mechanism, sharding=sharding, mesh=mesh)
    return eqa.Attention(mask=eqa.Causal(), **options)


def _qkv(length=64, kv_heads=8):
    shapes = [(2, length, heads, 64) for heads in (8, kv_heads, kv_heads)]
    return [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]


def _lowered(attention, qkv):
    """Value and gradients, for a GPU."""

    def both(*qkv):
        out, back = jax.vjp(attention, *qkv)
        return out, back(out)

    return jax.jit(both).trace(*qkv).lower(lowering_platforms=("cuda",)).as_text()


def _replicas(text):
    """Of kernels that know of other devices: which these are."""
    parts = text.split('xla_replica_ids = "')[1:]
    return [part.partition('"')[0] for part in parts]


CASES = {
    "one axis": (lambda d: d[:4], ("x",), {}, 8),
    "two axes, repeated heads": (
        lambda d: d.reshape(2, 4),
        ("y", "x"),
        dict(batch="y", sequence="x"),
        2,
    ),
    "nested": (
        lambda d: d.reshape(4, 2),
        ("x", "y"),
        dict(sequence=("y", "x"), mechanism=eqa.Ulysses(eqa.Ulysses("vanilla"))),
        8,
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow if n else ()) for n, x in enumerate(CASES)],
)
def test_lowers(name, hopper):
    """To one kernel forward, and two more backward; and to no collective."""
    devices, axes, options, kv_heads = CASES[name]
    devices = devices(np.array(jax.devices()))
    attention, qkv = _attention(devices, axes, **options), _qkv(kv_heads=kv_heads)
    assert "exchanged by our kernel" in attention.explain(*qkv)
    if not NEW:
        return
    text = _lowered(attention, qkv)
    assert "all_to_all" not in text and "all_gather" not in text
    exchanges = 2 if name == "nested" else 1
    # The forward pass has two exchanges, its backward pass one there and one back.
    ids = ",".join(str(x.id) for x in devices.flat)
    assert _replicas(text) == 4 * exchanges * [ids]


def test_other_devices_use_collectives(hopper):
    """Those that are not in order: only the mesh says so."""
    if not NEW:
        return
    text = _lowered(_attention(jax.devices()[:2][::-1]), _qkv())
    assert "all_to_all" in text and not _replicas(text)


def test_reasons(hopper, monkeypatch):
    """Of each of which the exchange is a collective, as `explain` says."""

    attention = _attention(jax.devices()[:4])

    def found(qkv):
        return attention.explain(*qkv).splitlines()[0]

    assert "exchanged by our kernel" in found(_qkv())
    for qkv, reason in (
        (_qkv(length=28), "it needs 8 tokens a device, not 7"),
        ([x.astype(jnp.float8_e4m3fn) for x in _qkv()], "not float8_e4m3fn"),
    ):
        line = found(qkv)
        assert "by a collective, not by our kernel (it " in line and reason in line
    for module, name, value, reason in (
        (_device, "compute_capability", (8, 0), "on Hopper GPUs, not on one of 8.0"),
        (_device, "version_of_jax", (0, 10, 2), "it needs jax 0.11 or later"),
        (jax, "process_count", 2, "it needs devices of one process, not of 2"),
        (_call, "platform_of", "cpu", "on Hopper GPUs, not on cpu"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_, value=value: value)
            assert reason in found(_qkv())


def test_meshes():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    both = frozenset(mesh.axis_names)
    assert not peers.mesh_unsupported(mesh, both)
    assert not peers.mesh_unsupported(mesh.abstract_mesh, both)
    (reason,) = peers.mesh_unsupported(mesh, frozenset("y"))
    assert "a jax.shard_map over ['x'] too" in reason
    (reason,) = peers.mesh_unsupported(Mesh(mesh.devices.T, ("x", "y")), both)
    assert "the devices from 0 to 7 in order, not [0, 4" in reason
    many = jax.sharding.AbstractMesh((4, 4), ("x", "y"))
    (reason,) = peers.mesh_unsupported(many, both)
    assert reason == "it needs at most 8 devices, not 16"
