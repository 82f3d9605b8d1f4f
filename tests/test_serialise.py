"""`save` and `load`."""

import functools as ft
import hashlib
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import tracemalloc

import equinox as eqx
import eqx_attention as eqa
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from eqx_attention import _serialise
from eqx_attention._known import dtypes


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


def even(q_pos, kv_pos, head, q_feature, kv_feature, params):
    return (q_pos + kv_pos) % 2 == 0


def unknown(q_pos, kv_pos, q_feature, kv_feature, params):
    return q_pos[0] <= q_pos[1], q_pos[0] > q_pos[1]


def shifted(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return logit + params["shift"].astype(logit.dtype)


_key = jr.key(0)
MODULES = {
    "full": lambda: eqa.Full(),
    "causal": lambda: eqa.Causal(),
    "causal_traced": lambda: eqa.Causal(jnp.array([1, 2])),
    "window": lambda: eqa.SlidingWindow(3, None),
    "prefix_lm": lambda: eqa.PrefixLM(4),
    "chunked": lambda: ~eqa.Chunked(4) | eqa.Causal(-1),
    "segments": lambda: eqa.Segments.from_lengths([2, 4]),
    "padding": lambda: eqa.Padding(jnp.array([3, 4])),
    "padding_by_numbers": lambda: eqa.Padding(3, jnp.array([4, 5])),
    "keys": lambda: eqa.Keys(jnp.array([True, False, True]), jnp.array([1, 0])),
    "dense": lambda: eqa.Dense(jr.bernoulli(_key, 0.5, (2, 1, 5, 5))),
    "predicate": lambda: eqa.Predicate(even, jnp.arange(6) % 3, jnp.arange(6)),
    "block_mask": lambda: eqa.block_mask(eqa.Causal(), 5, 7, block_q=2, block_k=2),
    "alibi": lambda: eqa.ALiBi.standard(6),
    "soft_cap": lambda: eqa.SoftCap(30.0),
    "soft_cap_traced": lambda: eqa.SoftCap(jnp.array(30.0)),
    "relative": lambda: eqa.RelativeBias(jr.normal(_key, (32, 4))),
    "bias": lambda: eqa.Bias(jr.normal(_key, (1, 5, 5), jnp.bfloat16)),
    "score_fn": lambda: eqa.ScoreFn(shifted, params={"shift": jnp.array(0.5)}),
    "vanilla": lambda: eqa.Vanilla(),
    "blockwise": lambda: eqa.Blockwise(16, 32),
    "auto": lambda: eqa.Auto(),
    "two_axes": lambda: eqa.Ulysses(inner=eqa.AllGather("blockwise")),
    "sharding": lambda: eqa.Sharding(batch=("dp", "fsdp"), heads="tp", sequence="sp"),
    "config": lambda: eqa.AttentionConfig(mask=eqa.Causal(), score=(make("score_fn"),)),
    "attention": lambda: eqa.Attention(
        mask=eqa.Causal() & eqa.Predicate(even),
        score=(eqa.ALiBi.standard(2),),
        scale=jnp.array([0.1, 0.2]),
    ),
    "multihead": lambda: eqa.MultiheadAttention(
        num_heads=4,
        query_size=16,
        num_kv_heads=2,
        rotary=eqa.RotaryEmbedding(4, scaling=eqa.LinearScaling(2.0)),
        qk_norm="l2",
        attention=eqa.AttentionConfig(mask=eqa.Causal(), precision="highest"),
        key=_key,
    ),
    "latent": lambda: eqa.MultiheadLatentAttention(
        2, 8, kv_rank=6, q_rank=4, use_latent_bias=True, dtype=jnp.bfloat16, key=_key
    ),
    "rotary": lambda: eqa.RotaryEmbedding(8, scaling=eqa.YaRNScaling(4.0, 32)),
    "feed_forward": lambda: eqa.FeedForward(4, dtype=jnp.bfloat16, key=_key),
    "cache": lambda: eqa.StaticCache.init(
        capacity=4, num_kv_heads=2, head_dim=3, batch=(2,), dtype=jnp.bfloat16
    ),
    "linear": lambda: eqx.nn.Linear(2, 3, key=_key),
    "mlp": lambda: eqx.nn.MLP(2, 2, 4, 2, activation=jax.nn.gelu, key=_key),
    "sequential": lambda: eqx.nn.Sequential(
        [eqx.nn.LayerNorm(3), eqx.nn.Lambda(jax.nn.silu)]
    ),
    "containers": lambda: {"a": [1, (2.5, None), {3: "c"}], "b": np.arange(3), "d": _key},
    "scalars": lambda: (np.float32(3), np.int8(-1), np.bool_(True), float("inf")),
    "empty": lambda: (jnp.zeros((0, 3)), jnp.zeros((2, 0, 2**33), jnp.int8)),
}


@ft.cache
def make(name: str):
    return MODULES[name]()


FUNCTIONS = {"even": even, "shifted": shifted}


def same(a, b) -> bool:
    """Whether two modules are the same in every type, static value and bit."""
    a_leaves, a_def = jax.tree.flatten(a)
    b_leaves, b_def = jax.tree.flatten(b)
    if a_def != b_def:
        return False
    for x, y in zip(a_leaves, b_leaves):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            if x.dtype != y.dtype:
                return False
            x, y = jr.key_data(x), jr.key_data(y)
        if getattr(x, "weak_type", False) != getattr(y, "weak_type", False):
            return False
        if type(x) is not type(y):
            return False
        if hasattr(x, "dtype"):
            x, y = np.asarray(x), np.asarray(y)
            if (x.dtype, x.shape, x.tobytes()) != (y.dtype, y.shape, y.tobytes()):
                return False
        elif x is not y and x != y:
            return False
    return True


@pytest.fixture
def path(tmp_path):
    return tmp_path / "module.eqx"


def refuse(path, *words: str, **kwargs):
    with pytest.raises(eqa.SerialisationError) as info:
        eqa.load(path, **kwargs)
    for word in (path.name, *words):
        assert word in str(info.value)


def forge(path, payload: bytes = b"", leaves=(), structure=None, /, **fields):
    """Writes a file whose checksums are right, whatever else it says."""
    header = {
        "format": "eqx_attention",
        "version": 1,
        "header_sha256": "0" * 64,
        "package_version": "0",
        "payload_bytes": len(payload),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
        "check": True,
        "leaves": list(leaves),
        "structure": structure,
    } | fields
    digest = hashlib.sha256(_serialise._line(header)).hexdigest()
    line = _serialise._line(header | {"header_sha256": digest})
    path.write_bytes(line + payload)


@pytest.mark.parametrize("name", MODULES)
def test_round_trip(name, path):
    module = make(name)
    eqa.save(path, module)
    loaded = eqa.load(path, functions=FUNCTIONS)
    assert same(loaded, module)
    assert repr(loaded) == repr(module)
    eqa.save(str(path), loaded)  # and again, to the same bytes
    before = path.read_bytes()
    eqa.save(path, eqa.load(path, functions=FUNCTIONS))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


_leaves = st.builds(
    lambda shape, dtype, seed: jnp.asarray(
        np.random.default_rng(seed).integers(-8, 8, shape), dtype
    ),
    st.sampled_from([(), (0,), (3,), (2, 3)]),
    st.sampled_from([jnp.int8, jnp.bool_, jnp.float32, jnp.bfloat16, jnp.float8_e5m2]),
    st.integers(0, 99),
)
_modules = st.sampled_from(["window", "alibi", "linear"]).map(make)


@hypothesis.given(st.recursive(_leaves | _modules, lambda x: st.lists(x).map(tuple)))
def test_round_trip_of_random_trees(tree):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tree.eqx")
        eqa.save(path, tree)
        assert same(eqa.load(path), tree)


def test_attention_computes_the_same(path):
    attention = make("attention")
    query, key_, value = jr.normal(jr.key(1), (3, 7, 2, 8))
    eqa.save(path, attention)
    loaded = eqa.load(path, functions=FUNCTIONS)
    want, got = (a(query, key_, value) for a in (attention, loaded))
    assert want.tobytes() == got.tobytes()


def test_multihead_computes_the_same(path):
    layer, x = make("multihead"), jr.normal(jr.key(1), (7, 16))
    eqa.save(path, layer)
    want, got = (m(x, x, x) for m in (layer, eqa.load(path)))
    assert want.tobytes() == got.tobytes()


@pytest.mark.parametrize("name", dtypes())
def test_dtypes(name, path, x64):
    dtype = dtypes()[name]
    numbers = np.arange(6).reshape(2, 3) % 2
    module = (jnp.asarray(numbers, dtype), numbers.astype(dtype))
    eqa.save(path, module)
    assert same(eqa.load(path), module)


@pytest.mark.parametrize("x", [np.arange(6.0).reshape(2, 3).T, np.arange(3, dtype=">i4")])
def test_numpy_layouts(x, path):
    eqa.save(path, x)
    loaded = eqa.load(path)
    assert loaded.shape == x.shape and (loaded == x).all() and loaded.flags.writeable


@pytest.mark.parametrize("bits", [0x7FC00001, 0xFF800000, 0x80000000, 0x00000001])
def test_every_bit_is_kept(bits, path):
    x = jax.lax.bitcast_convert_type(jnp.full((2,), bits, jnp.uint32), jnp.float32)
    eqa.save(path, x)
    assert same(eqa.load(path), x)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_prng_keys(impl, path):
    keys = jr.split(jr.key(3, impl=impl), 4)
    eqa.save(path, keys)
    assert same(eqa.load(path), keys)


def test_no_silent_rounding_to_32_bits(path):
    with jax.enable_x64(True):
        eqa.save(path, jnp.ones(2, jnp.float64))
        assert eqa.load(path).dtype == jnp.float64
    refuse(path, "float64", "jax_enable_x64")
    eqa.save(path, np.ones(2))  # NumPy's own stay as they are
    assert eqa.load(path).dtype == np.float64


@pytest.mark.parametrize("name", ["attention", "multihead", "alibi", "soft_cap_traced"])
def test_stacked_layers(name, path):
    arrays, static = eqx.partition(make(name), eqx.is_array)
    stack = eqx.combine(jax.tree.map(lambda x: jnp.stack([x, x]), arrays), static)
    eqa.save(path, stack)
    assert same(eqa.load(path, functions=FUNCTIONS), stack)


def test_inference_mode(path):
    layer = eqx.nn.inference_mode(make("multihead"))
    eqa.save(path, layer)
    assert same(eqa.load(path), layer)


def test_sharded_arrays(path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    x = jax.device_put(jnp.arange(16), sharding)
    eqa.save(path, x)
    assert same(eqa.load(path), jnp.arange(16))


def test_mesh(path):
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("sp", "tp"), axis_types=kinds)
    eqa.save(path, (mesh, eqa.Causal()))
    refuse(path, "mesh")
    refuse(path, "'sp'", mesh=jax.make_mesh((8,), ("dp",), axis_types=kinds[:1]))
    other = jax.make_mesh((2, 4), ("sp", "tp"), axis_types=kinds)
    assert eqa.load(path, mesh=other) == (other, eqa.Causal())
    eqa.save(path, eqa.Causal())
    assert eqa.load(path, mesh=mesh) == eqa.Causal()  # not needed: fine
    with pytest.raises(eqa.SerialisationError, match="second mesh"):
        eqa.save(path, (mesh, other))


def test_functions(path):
    def make(sign):
        def fn(q_pos, kv_pos, head, q_feature, kv_feature, params):
            return sign * (q_pos - kv_pos) >= 0

        return fn

    up, down = make(1), make(-1)
    module = tuple(eqa.Predicate(f, summary=unknown) for f in (up, down, up))
    eqa.save(path, module)
    refuse(path, "'fn'", "'fn#2'", "'unknown'", "functions=")
    refuse(path, "'fn#2'", functions={"fn": up, "unknown": unknown})
    functions = {"fn": up, "fn#2": down, "unknown": unknown, "unused": even}
    assert same(eqa.load(path, functions=functions), module)
    with pytest.raises(TypeError, match="functions"):
        eqa.load(path, functions={"fn": 3})  # pyright: ignore


class Foreign(eqx.Module):
    x: int = 0


@pytest.mark.parametrize(
    "value, word",
    [
        (Foreign(), "Foreign"),
        (object(), "object"),
        (np.array(["a"]), "<U1"),
        (np.array([object()]), "object"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "ShapeDtypeStruct"),
        (jax.tree_util.Partial(even), "Partial"),
        (eqx.filter_jit(even), "equinox"),
        (int, "type"),
        (1j, "complex"),
    ],
)
def test_what_cannot_be_saved(value, word, path):
    path.write_bytes(b"old")
    with pytest.raises(eqa.SerialisationError, match=word):
        eqa.save(path, {"a": (eqa.Causal(), value)})
    assert path.read_bytes() == b"old"
    assert len(os.listdir(path.parent)) == 1


def test_traced_arrays_cannot_be_saved(path):
    with pytest.raises(eqa.SerialisationError, match="traced"):
        jax.jit(lambda x: eqa.save(path, eqa.ALiBi(x)))(jnp.ones(2))


def test_too_deep_to_save(path):
    tree = ()
    for _ in range(100_000):
        tree = (tree,)
    with pytest.raises(eqa.SerialisationError, match="deep"):
        eqa.save(path, tree)


# Damage.


@pytest.fixture
def small(path):
    eqa.save(path, (eqa.ALiBi(jnp.array([1.5, -2.0])), eqa.SlidingWindow(3)))
    return path


def test_truncated_anywhere(small):
    data = small.read_bytes()
    refuse_empty = "not an eqx_attention file"
    for n in range(len(data)):
        small.write_bytes(data[:n])
        refuse(small, "truncated" if n else refuse_empty)


def test_flipped_bits(small):
    """Each bit of the payload, and one of each byte of the header."""
    data = small.read_bytes()
    start = data.index(b"\n") + 1
    for i in range(len(data)):
        for bit in range(8) if i >= start else [i % 8]:
            flipped = bytearray(data)
            flipped[i] ^= 1 << bit
            small.write_bytes(flipped)
            refuse(small, *(["corrupted (checksum)"] if i >= start else []))


def test_extra_bytes(small):
    small.write_bytes(small.read_bytes() + b"\0")
    refuse(small, "corrupted", "1 bytes after the end")


def test_newer_version(path):
    forge(path, version=7, something="new")
    refuse(path, "written by a newer version 7; this is 1")
    forge(path, version=0)
    refuse(path, "corrupted")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"\0" * 1000,
        b"{}",
        b'{"format": "safetensors", "version": 1}\n',
        b'{"__metadata__": {}}',
        pickle.dumps({"format": "eqx_attention"}),
        np.random.default_rng(0).bytes(4096),
        b"\x93NUMPY\x01\x00",
        b"PK\x03\x04",
    ],
)
def test_foreign_files(data, path):
    path.write_bytes(data)
    refuse(path, "not an eqx_attention file")


def test_eqx_serialised_leaves_are_foreign(path):
    eqx.tree_serialise_leaves(path, eqa.ALiBi.standard(4))
    refuse(path, "not an eqx_attention file")


def test_not_files(path):
    with pytest.raises(FileNotFoundError):
        eqa.load(path)
    path.mkdir()
    refuse(path, "not an eqx_attention file")
    with pytest.raises(OSError):
        eqa.save(path, eqa.Full())
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(FileNotFoundError):
        eqa.save(path / "no" / "folder.eqx", eqa.Full())


def test_wrong_arguments(path):
    for bad in (None, 3, b"path"):
        with pytest.raises(TypeError, match="path"):
            eqa.save(bad, eqa.Full())
        with pytest.raises(TypeError, match="path"):
            eqa.load(bad)
    with pytest.raises(TypeError, match="mesh"):
        eqa.load(path, mesh="x")  # pyright: ignore


# Files made by an adversary, whose checksums are right.

_FLOATS = {"kind": "jax", "dtype": "float32", "shape": [2]}
_LEAF = {"leaf": 0}


def test_forge_is_a_good_file(path):
    forge(path, bytes(8), [_FLOATS], {"type": "ALiBi", "slopes": _LEAF})
    assert same(eqa.load(path), eqa.ALiBi(jnp.zeros(2)))


def test_long_headers(path, monkeypatch):
    """JSON of empty lists would take 25 times its length in memory."""
    forge(path, structure=1)
    line = path.read_bytes().removesuffix(b"1}\n")
    path.write_bytes(line + b"[" + b"[]," * (2**24 // 3) + b"[]]}\n")
    tracemalloc.start()
    refuse(path, "corrupted", "longer than 16 MiB")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**26
    path.unlink()
    monkeypatch.setattr(_serialise, "_MAX_HEADER", 600)
    eqa.save(path, [1] * 20)
    assert eqa.load(path) == [1] * 20
    with pytest.raises(eqa.SerialisationError, match="too many parts"):
        eqa.save(path, [1] * 200)
    assert eqa.load(path) == [1] * 20


@pytest.mark.parametrize(
    "shape",
    [[2**39], [2**20] * 32, [2**39, 0, 2], [-2], [2.0], [True, True], "2", [1] * 40, None],
)
def test_claimed_shapes_allocate_nothing(shape, path):
    forge(path, bytes(8), [_FLOATS | {"shape": shape}], _LEAF)
    tracemalloc.start()
    refuse(path)
    forge(path, bytes(8), [_FLOATS | {"shape": shape}], _LEAF, payload_bytes=2**41)
    refuse(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23


@pytest.mark.parametrize(
    "entry",
    [
        _FLOATS | {"dtype": "object"},
        _FLOATS | {"dtype": "V8"},
        _FLOATS | {"dtype": ["float32"]},
        _FLOATS | {"kind": "pickle"},
        _FLOATS | {"kind": ["jax"]},
        _FLOATS | {"kind": "scalar"},
        _FLOATS | {"kind": "threefry2x32"},
        _FLOATS | {"more": 1},
        {"kind": "rbg", "dtype": "uint32", "shape": [2]},
        {"kind": "threefry2x32", "dtype": "uint32", "shape": []},
        {"kind": "jax", "dtype": "bool", "shape": [8]},
        {},
        None,
    ],
)
def test_bad_leaves(entry, path):
    forge(path, b"\2" * 8, [entry], _LEAF)
    refuse(path, "corrupted")


@pytest.mark.parametrize(
    "structure",
    [
        {"type": "os.system", "command": "touch executed"},
        {"type": "builtins.eval", "source": "1"},
        {"type": "eqa.Full"},
        {"type": "eqx.nn.nn"},
        {"type": "Static", "value": 0},
        {"type": "AbstractMask"},
        {"type": "UnsupportedError"},
        {"type": "Full", "__class__": "os"},
        {"type": "Causal", "_offset": 0},
        {"type": "Causal", "offset": {"list": [_LEAF]}},
        {"type": "SlidingWindow", "left": -1, "right": 0},
        {"function": "os.system"},
        {"function": "builtins.eval"},
        {"leaf": 1},
        {"leaf": -1},
        {"leaf": 0.0},
        {"leaf": True},
        {"dict": [[[], 1]]},
        {"dict": [1]},
        {"list": "abc"},
        {"float": "1e3"},
        {"static": {"leaf": 0}},
        {"mesh": []},
        {"mesh": 3},
        {},
        {"a": 1},
        {"a": 1, "b": 2},
    ],
)
def test_bad_structures(structure, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forge(path, bytes(8), [_FLOATS], [_LEAF, structure])
    refuse(path)
    assert os.listdir(tmp_path) == [path.name]


def test_each_leaf_is_used_once(path):
    for structure in ([_LEAF, _LEAF], None, []):
        forge(path, bytes(8), [_FLOATS], structure)
        refuse(path, "corrupted")


@pytest.mark.parametrize("field", _serialise._HEADER)
def test_bad_headers(field, path):
    for bad in ({}, "0", -1, None):
        forge(path, bytes(8), [_FLOATS], _LEAF)
        if field != "structure" or bad is None:
            forge(path, bytes(8), [_FLOATS], _LEAF, **{field: bad})
            if not (field == "package_version" and bad == "0"):
                refuse(path)


_COMPLEX = {"kind": "jax", "dtype": "complex64", "shape": [1]}
_SCALAR = {"kind": "jax", "dtype": "complex64", "shape": []}


@pytest.mark.parametrize(
    "name, field, value, words",
    [
        ("relative", "max_distance", 8, "RelativeBias(max_distance)"),
        ("relative", "table", _COMPLEX, "RelativeBias(table)"),
        ("alibi", "slopes", _COMPLEX, "ALiBi(slopes)"),
        ("bias", "array", _COMPLEX, "Bias(array)"),
        ("soft_cap", "cap", -1.0, "SoftCap(cap)"),
        ("score_fn", "kv_features", _SCALAR, "ScoreFn(kv_features)"),
        ("predicate", "q_features", _SCALAR, "Predicate(q_features)"),
        ("dense", "array", _COMPLEX, "Dense(array)"),
        ("segments", "kv_ids", _COMPLEX, "Segments(kv_ids)"),
        ("keys", "q_valid", _COMPLEX, "Keys(q_valid)"),
        ("padding", "kv_lengths", -1, "Padding(kv_lengths)"),
        ("padding", "q_lengths", _COMPLEX, "Padding(q_lengths)"),
        ("block_mask", "block_q", 0, "BlockMask"),
        ("block_mask", "block_k", 3, "BlockMask(num_some)"),
        ("block_mask", "q_position", _COMPLEX, "BlockMask(q_position)"),
        ("attention", "dropout", 1.5, "dropout"),
        ("attention", "sharding", "dp", "sharding"),
        ("config", "scale", -1.0, "scale"),
    ],
)
def test_loaded_modules_are_checked(name, field, value, words, path):
    """One field was altered, and the checksums made right again."""
    eqa.save(path, make(name))
    line, _, payload = path.read_bytes().partition(b"\n")
    header = json.loads(line)
    assert header["check"]
    structure, leaves = header["structure"], header["leaves"]
    if value in (_COMPLEX, _SCALAR):
        value, leaves, payload = {"leaf": len(leaves)}, [*leaves, value], payload + bytes(8)
    structure = [structure | {field: value}, structure[field]]  # each leaf is used
    forge(path, payload, leaves, structure)
    refuse(path, words, functions=FUNCTIONS)


@pytest.mark.parametrize("depth", [100, 1000, 10**6])
def test_deep_files(depth, path):
    forge(path, b"", [], "deep")
    line = path.read_bytes()
    line = line.replace(json.loads(line)["header_sha256"].encode(), b"0" * 64)
    line = line.replace(b'"deep"', b"[" * depth + b"]" * depth)
    digest = hashlib.sha256(line).hexdigest().encode()
    path.write_bytes(line.replace(b"0" * 64, digest, 1))
    if depth == 100:
        assert jax.tree.leaves(eqa.load(path)) == []
    else:
        refuse(path, "deep")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just(1.5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x),
    max_leaves=4,
)


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.data())
def test_forged_files_load_or_are_refused(data):
    """Any other exception fails this test."""
    name = data.draw(st.sampled_from(sorted(MODULES)))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "forged.eqx"
        eqa.save(path, make(name))
        line, _, payload = path.read_bytes().partition(b"\n")
        header = json.loads(line)
        parent, key = header, "structure"
        while parent[key] and isinstance(parent[key], dict | list):
            if data.draw(st.integers(0, 3)) == 0:
                break
            parent = parent[key]
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            key = data.draw(st.sampled_from(keys))
        parent[key] = data.draw(_json | st.sampled_from([_LEAF, {"type": "Full"}]))
        forge(path, payload, header["leaves"], header["structure"])
        try:
            eqa.load(path, functions=FUNCTIONS)
        except eqa.SerialisationError:
            pass


# Atomicity.


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_failed_save_leaves_the_old_file(name, small, monkeypatch):
    before = small.read_bytes()

    def fail(*args):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(OSError, match="no space"):
            eqa.save(small, eqa.Full())
    assert small.read_bytes() == before
    assert os.listdir(small.parent) == [small.name]


def test_interrupted_save_leaves_the_old_file(small, monkeypatch):
    before = small.read_bytes()

    def interrupt(leaf):
        raise KeyboardInterrupt

    monkeypatch.setattr(_serialise, "_to_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        eqa.save(small, eqa.ALiBi.standard(4))
    assert small.read_bytes() == before
    assert os.listdir(small.parent) == [small.name]


_KILLED = """
import os, signal, sys
import eqx_attention as eqa
from eqx_attention import _serialise

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "write":
    written = []
    to_bytes = _serialise._to_bytes
    def second(leaf):
        written.append(leaf)
        return to_bytes(leaf) if len(written) < 2 else die()
    _serialise._to_bytes = second
else:
    setattr(os, sys.argv[2], die)
eqa.save(sys.argv[1], (eqa.ALiBi.standard(4), eqa.ALiBi.standard(8)))
"""


@pytest.mark.parametrize("when", ["write", "replace"])
def test_killed_save_leaves_the_old_file(when, small):
    before = small.read_bytes()
    root = os.path.dirname(os.path.dirname(os.path.abspath(eqa.__file__)))
    env = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, "-c", _KILLED, str(small), when]
    done = subprocess.run(command, env=env, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert small.read_bytes() == before
    assert len(os.listdir(small.parent)) == 2  # what was written so far
    eqa.save(small, eqa.Full())
    assert eqa.load(small) == eqa.Full()


def test_readers_never_see_half_a_file(small):
    modules = [eqa.ALiBi.standard(n) for n in (4, 8)]
    eqa.save(small, modules[0])
    stop = threading.Event()

    def write(module):
        while not stop.is_set():
            eqa.save(small, module)

    threads = [threading.Thread(target=write, args=(m,)) for m in modules]
    for thread in threads:
        thread.start()
    for _ in range(50):
        loaded = eqa.load(small)
        assert any(same(loaded, m) for m in modules)
    stop.set()
    for thread in threads:
        thread.join()
    assert os.listdir(small.parent) == [small.name]


def test_links_are_followed(small, tmp_path):
    link = tmp_path / "link.eqx"
    link.symlink_to(small)
    eqa.save(link, eqa.Full())
    assert link.is_symlink() and eqa.load(small) == eqa.Full()
