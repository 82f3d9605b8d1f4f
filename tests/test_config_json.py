"""`AttentionConfig.to_json` and `from_json`."""

import dataclasses
import json
import math
import os
import tempfile

import equinox as eqx
import eqx_attention as eqa
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention._describe import describe, parse, rebuild


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


_window = st.none() | st.integers(0, 2**31 - 1)
_leaf_masks = st.one_of(
    st.just(eqa.Full()),
    st.builds(eqa.Causal, st.integers(-(2**31) + 1, 2**31 - 1)),
    st.builds(eqa.SlidingWindow, _window, _window),
    st.builds(eqa.Prefix, st.integers(0, 1000)),
    st.builds(eqa.PrefixLM, st.integers(0, 1000)),
    st.builds(eqa.Chunked, st.integers(1, 1000)),
)
masks = st.recursive(
    _leaf_masks,
    lambda m: st.one_of(
        st.builds(lambda a, b: a & b, m, m),
        st.builds(lambda a, b: a | b, m, m),
        st.builds(lambda a: ~a, m),
    ),
    max_leaves=6,
)
_positive = st.floats(1e-300, 1e300) | st.integers(1, 10**6)
scores = st.lists(st.builds(eqa.SoftCap, _positive), max_size=3).map(tuple)
mechanisms = st.one_of(
    st.sampled_from(["auto", "vanilla", "blockwise"]),
    st.just(eqa.Vanilla()),
    st.builds(eqa.Blockwise, *[st.none() | st.integers(1, 4096)] * 2),
)
configs = st.builds(
    eqa.AttentionConfig,
    mechanism=mechanisms,
    mask=masks,
    score=scores,
    scale=st.none() | _positive,
    dropout=st.floats(0, 1, exclude_max=True) | st.just(0),
    precision=st.sampled_from([None, "highest", *jax.lax.Precision]),
    dtype=st.sampled_from([None, jnp.bfloat16, np.dtype("float32"), jnp.float16]),
)
simple = eqa.AttentionConfig(mask=eqa.Causal() & eqa.SlidingWindow(255))


def change(config: eqa.AttentionConfig = simple, **fields) -> str:
    return json.dumps(json.loads(config.to_json()) | fields)


def refuse(text: str, *words: str):
    with pytest.raises(ValueError) as info:
        eqa.AttentionConfig.from_json(text)
    for word in words:
        assert word in str(info.value)


@hypothesis.given(configs)
def test_round_trip(config):
    text = config.to_json()
    again = eqa.AttentionConfig.from_json(text)
    assert eqx.tree_equal(again, config) is True
    assert again == config
    assert repr(again) == repr(config)
    assert jax.tree.structure(again) == jax.tree.structure(config)
    assert again.to_json() == text
    json.loads(text, parse_constant=pytest.fail)  # no NaN, no Infinity


@hypothesis.given(configs)
def test_round_trip_through_a_file(config):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.eqx")
        eqa.save(path, config)
        again = eqa.load(path)
    assert again == config
    assert jax.tree.structure(again) == jax.tree.structure(config)


def test_what_it_looks_like():
    mask = {
        "type": "And",
        "masks": [
            {"type": "Causal", "offset": 0},
            {"type": "SlidingWindow", "left": 255, "right": 0},
        ],
    }
    got = json.loads(simple.to_json())
    assert got["version"] == 1 and got["type"] == "AttentionConfig"
    assert got["mask"] == mask and got["mechanism"] == "auto" and got["score"] == []


@pytest.mark.parametrize("field", [*json.loads(simple.to_json())])
def test_missing_field(field):
    data = json.loads(simple.to_json())
    del data[field]
    refuse(json.dumps(data), field)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"masc": None}, ["masc", "'mask'"]),
        ({"_scale": None}, ["_scale"]),
        ({"version": 2}, ["version", "2"]),
        ({"version": "1"}, ["version"]),
        ({"version": True}, ["version"]),
        ({"type": "Causal"}, ["AttentionConfig"]),
        ({"mask": None}, ["mask"]),
        ({"mask": "causal"}, ["mask"]),
        ({"mask": {}}, ["mask"]),
        ({"mask": {"type": "Causal"}}, ["mask", "offset", "missing"]),
        ({"mask": {"type": "Causal", "offset": 0, "of": 1}}, ["mask", "of", "Causal"]),
        ({"mask": {"type": "Causal", "offset": "0"}}, ["mask.offset", "number"]),
        ({"mask": {"type": "Causal", "offset": None}}, ["mask", "offset", "None"]),
        ({"mask": {"type": "Causal", "offset": [0]}}, ["mask.offset"]),
        ({"mask": {"type": "Chunked", "size": 0}}, ["mask", "size"]),
        ({"mask": {"type": "Prefix", "length": -1}}, ["mask", "length", "-1"]),
        ({"mask": {"type": "And", "masks": []}}, ["mask"]),
        ({"mask": {"type": "And", "masks": {"type": "Full"}}}, ["mask.masks"]),
        ({"mask": {"type": "And", "masks": [{"type": "Vanilla"}]}}, ["mask"]),
        ({"mask": {"type": "Vanilla"}}, ["mask"]),
        ({"mask": {"type": "Not", "mask": {"type": "Nought"}}}, ["mask.mask", "Nought"]),
        ({"mask": {"type": "SoftCap", "cap": 1.0}}, ["mask", "SoftCap"]),
        ({"score": [{"type": "Full"}]}, ["score"]),
        ({"score": None}, ["score"]),
        ({"score": [{"type": "SoftCap", "cap": -1.0}]}, ["score[0]", "cap"]),
        ({"scale": "1"}, ["scale"]),
        ({"scale": -1}, ["scale"]),
        ({"dropout": 1.0}, ["dropout"]),
        ({"dropout": "0.1"}, ["dropout"]),
        ({"mechanism": "fast"}, ["mechanism", "fast"]),
        ({"mechanism": None}, ["mechanism"]),
        ({"mechanism": {"type": "Full"}}, ["mechanism"]),
        ({"precision": {"precision": "EXACT"}}, ["precision", "EXACT"]),
        ({"dtype": {"dtype": "object"}}, ["dtype", "object"]),
        ({"dtype": {"dtype": "int32"}}, ["dtype", "int32"]),
    ],
)
def test_refusals_name_the_field(fields, words):
    refuse(change(**fields), *words)


def test_refusals_name_the_path():
    masks = [{"type": "Full"}, {"type": "SlidingWindow", "left": -3, "right": 0}]
    mask = {"type": "And", "masks": masks}
    refuse(change(mask=mask), "mask.masks[1]", "left", "-3")


@pytest.mark.parametrize(
    "value",
    [
        {"type": "os.system", "command": "touch executed"},
        {"type": "builtins.eval"},
        {"type": "eqx_attention._static.Static", "value": 0},
        {"type": "AbstractMask"},
        {"type": "save"},
        {"type": "__builtins__"},
        {"type": ["Full"]},
        {"type": None},
        {"function": "os.system"},
        {"leaf": 0},
        {"mesh": ["x"]},
        {"!python/object": "os.system"},
    ],
)
def test_only_known_types(value):
    refuse(change(mask=value), "mask")
    refuse(change(mechanism=value), "mechanism")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "config",
        "null",
        "[]",
        "[1",
        "{}",
        '"AttentionConfig"',
        "NaN",
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        "1" * 10_000,
        "\x00",
    ],
)
def test_not_a_config(text):
    refuse(text, "AttentionConfig")


_REPLACEMENTS = {
    "mechanism": eqa.Blockwise(8, 8),
    "mask": eqa.Prefix(3),
    "score": (eqa.SoftCap(2.0),),
    "scale": 3.0,
    "dropout": 0.5,
    "precision": "highest",
    "dtype": np.dtype("float16"),
    "sharding": eqa.Sharding(batch=("dp", "fsdp"), heads="tp", sequence="sp"),
}


@pytest.mark.parametrize("field", _REPLACEMENTS)
@pytest.mark.parametrize("config", [simple, eqa.AttentionConfig(scale=0.5, dropout=0.1)])
def test_replace(field, config):
    value = _REPLACEMENTS[field]
    new = dataclasses.replace(config, **{field: value})
    assert getattr(new, field) == value and new != config
    for f in dataclasses.fields(config):
        if f.name != field:
            assert getattr(new, f.name) == getattr(config, f.name)
    assert eqa.AttentionConfig.from_json(new.to_json()) == new
    back = dataclasses.replace(new, **{field: getattr(config, field)})
    assert back == config and hash(back) == hash(config)


def test_replace_checks():
    assert set(_REPLACEMENTS) == {f.name for f in dataclasses.fields(simple)}
    with pytest.raises(ValueError, match="scale"):
        dataclasses.replace(simple, scale=-1.0)
    with pytest.raises(TypeError, match="sharding"):
        dataclasses.replace(simple, sharding="dp")
    learned = dataclasses.replace(simple, scale=np.ones(2, np.float32))
    kept = dataclasses.replace(learned, dropout=0.5).scale
    assert isinstance(kept, jax.Array) and kept.tolist() == [1.0, 1.0]


def test_files_and_scales():
    """A scale in a file is a number or an array, as it was when there was another field."""
    for scale in (2, 2.5, None):
        config = eqa.AttentionConfig.from_json(change(scale=scale))
        assert config == eqa.AttentionConfig(mask=simple.mask, scale=scale)


def test_strict_json():
    text = simple.to_json()
    refuse(text.replace('"dropout": 0.0', '"dropout": NaN'), "NaN")
    refuse(text.replace('"dropout": 0.0', '"dropout": 1e999'), "1e999")
    twice = text.replace('"dropout": 0.0', '"dropout": 0.0, "dropout": 0.5')
    refuse(twice, "'dropout'", "twice")


def test_deep_masks_are_refused():
    mask = {"type": "Full"}
    for _ in range(300):
        mask = {"type": "Not", "mask": mask}
    for _ in range(100):
        mask = {"type": "And", "masks": [mask]}
    try:
        eqa.AttentionConfig.from_json(change(mask=mask))
    except ValueError as error:
        assert "deep" in str(error)


def test_wrong_argument():
    with pytest.raises(TypeError):
        eqa.AttentionConfig.from_json(b"{}")  # pyright: ignore


def test_arrays_are_refused_by_path():
    mask = eqa.Causal() & eqa.Dense(jnp.ones((2, 2), bool))
    with pytest.raises(ValueError, match=r"mask\.masks\[1\]\.array: arrays .*save"):
        eqa.AttentionConfig(mask=mask).to_json()
    with pytest.raises(ValueError, match=r"score\[1\]\.slopes: arrays"):
        score = (eqa.SoftCap(30.0), eqa.ALiBi.standard(2))
        eqa.AttentionConfig(score=score).to_json()
    with pytest.raises(ValueError, match=r"mask\.offset: arrays"):
        eqa.AttentionConfig(mask=eqa.Causal(jnp.array(3))).to_json()
    with pytest.raises(ValueError, match=r"scale: arrays"):
        eqa.AttentionConfig(scale=jnp.ones(4)).to_json()


def test_functions_are_refused_by_path():
    mask = ~eqa.Predicate(lambda q, k, head, qf, kf, params: q >= k)
    with pytest.raises(ValueError, match=r"mask\.mask\.fn: functions .*save"):
        eqa.AttentionConfig(mask=mask).to_json()


_plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([np.dtype("int8"), jnp.bfloat16, np.float32, *jax.lax.Precision]),
    lambda x: st.one_of(
        st.lists(x, max_size=3),
        st.lists(x, max_size=3).map(tuple),
        st.dictionaries(st.text() | st.integers() | st.none(), x, max_size=3),
    ),
)


def _same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(_same, a.values(), b.values()))
    if isinstance(a, float):
        if math.isnan(a):
            return math.isnan(b)
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    return a == b


@hypothesis.given(_plain)
def test_plain_values(value):
    text = json.dumps(describe(value), allow_nan=False)
    assert _same(rebuild(parse(text)), value)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        1j,
        b"bytes",
        {1, 2},
        range(3),
        int,
        Ellipsis,
        np.dtype("U3"),
        np.dtype(">i4"),
    ],
)
def test_unknown_values(value):
    with pytest.raises(eqa.SerialisationError, match=r"\[1\]\.*"):
        describe((0, value))
