"""From equinox's layer to ours, and the names that others have for mechanisms."""

import enum
import inspect
import pathlib
import re

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from eqx_attention._distributed.table import ELSEWHERE, MECHANISMS

from .helpers import assert_close, compiled


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


_SIZES = dict(key_size=5, value_size=6, output_size=9, qk_size=7, vo_size=8)
_BIASES = ("query", "key", "value", "output")


def _filled(tree, seed=0):
    """Random numbers in the place of shapes, without a compiled program for each."""
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    fill = lambda x: jnp.asarray(rng.standard_normal(x.shape) / 3, x.dtype)  # noqa: E731
    return jax.tree.map(lambda x: fill(x) if is_shape(x) else x, tree)


def _made(cls, **options):
    options = _SIZES | options
    return eqx.filter_eval_shape(cls, 3, 12, **options, key=jr.key(0))


def _theirs(**options):
    biases = {f"use_{name}_bias": True for name in _BIASES}
    return _filled(_made(eqx.nn.MultiheadAttention, **(biases | options)))


def _inputs(dtype="float32"):
    shapes = (5, 12), (7, 5), (7, 6)
    return _filled(tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes), seed=1)


def _mask(*shape):
    mask = np.random.default_rng(2).random((*shape, 5, 7)) < 0.6
    return jnp.asarray(mask | (np.arange(7) == 0))


def _same(a, b) -> bool:
    """Equal in structure and bit by bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(np.array_equal(x, y) for x, y in pairs)


def _loss(mha_and_x, mask):
    mha, x = mha_and_x
    out = mha(*x, mask)
    return jnp.sum(out**2), out


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-14)])
def test_value_and_gradients(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        theirs, x = _theirs(dtype=dtype), _inputs(dtype)
        masks = (_mask(),) if dtype == "float32" else (None, _mask(), _mask(3))
        ours = eqa.from_equinox(theirs)
        assert ours.query_proj.weight.dtype == dtype

        def results(mha):
            value_and_grad = eqx.filter_value_and_grad(_loss, has_aux=True)
            return [value_and_grad((mha, x), mask) for mask in masks]

        both = compiled(lambda pair: [results(mha) for mha in pair], (theirs, ours))
        for old, new in zip(*both, strict=True):
            assert new[0][1].dtype == dtype
            # Their gradients are modules too, with None where there is nothing to derive.
            old = (old[0], (eqa.from_equinox(old[1][0]), old[1][1]))
            assert_close(new, old, tolerance)


def test_all_is_kept():
    for name in _BIASES:
        biases = {f"use_{other}_bias": other == name for other in _BIASES}
        theirs = _theirs(dropout_p=0.3, inference=name == "key", **biases)
        ours = eqa.from_equinox(theirs)
        assert _same(jax.tree.leaves(ours), jax.tree.leaves(theirs))
        for field, value in vars(theirs).items():
            assert field.endswith("proj") or getattr(ours, field) == value, field
        assert ours.num_kv_heads == 3
        assert ours.attention.dropout == 0.3
        assert ours.attention.inference is (name == "key")
        # It is what the constructor makes, and not less.
        made = _made(
            eqa.MultiheadAttention, **biases, dropout_p=0.3, inference=name == "key"
        )
        assert eqx.filter_eval_shape(lambda x: x, ours) == made


def test_inference_and_dropout():
    theirs, x = _theirs(dropout_p=0.5), _inputs()
    ours = eqa.from_equinox(theirs)
    with pytest.raises(ValueError, match="key"):
        ours(*x)
    off = eqx.nn.inference_mode(theirs)

    @compiled
    def outputs():
        with_dropout = ours(*x, key=jr.key(1))
        plain = eqa.from_equinox(off)(*x)
        return with_dropout, plain, off(*x), ours(*x, inference=True)

    with_dropout, plain, expected, again = outputs
    assert_close(plain, expected, 2e-6)
    assert_close(again, expected, 2e-6)
    assert float(jnp.abs(with_dropout - plain).max()) > 0.1


def test_no_visible_key():
    """The documented difference."""
    theirs, x = _theirs(), _inputs()
    ours = eqa.from_equinox(theirs)
    mask = jnp.ones((5, 7), bool).at[2].set(False)
    old, new = compiled(lambda: (theirs(*x, mask), ours(*x, mask)))
    assert_close(new[2], ours.output_proj.bias, 0)
    assert float(jnp.abs(new - old)[2].max()) > 0.1
    assert_close(jnp.delete(new, 2, axis=0), jnp.delete(old, 2, axis=0), 2e-6)


def test_inputs_that_only_equinox_takes():
    """The other documented difference."""
    theirs, x = _theirs(), _inputs()
    ours, mask = eqa.from_equinox(theirs), _mask()
    shape = jax.eval_shape(lambda: ours(*x, mask)).shape
    assert jax.eval_shape(lambda: ours(*x, np.asarray(mask))).shape == shape
    with jax.numpy_dtype_promotion("standard"):
        for change in (np.asarray, lambda x: x.astype(int), lambda x: x + 0j):
            inputs = [change(a) for a in x]
            jax.eval_shape(lambda: theirs(*inputs, mask))
            with pytest.raises(TypeError, match="parameter 'query'"):
                ours(*inputs, mask)
        jax.eval_shape(lambda: theirs(*x, mask.astype(int)))
        with pytest.raises(TypeError, match="parameter 'mask'"):
            ours(*x, mask.astype(int))


def test_any_leaves():
    """It changes the layer around the leaves, and so comes before or after what changes
    leaves."""
    theirs = _theirs(dropout_p=0.3)
    ours = eqa.from_equinox(theirs)
    for spec in (eqx.is_array, eqx.is_inexact_array, lambda x: x is theirs.key_proj.bias):
        filtered = eqa.from_equinox(eqx.filter(theirs, spec))
        assert _same(filtered, eqx.filter(ours, spec))
    shapes = eqx.filter_eval_shape(lambda x: x, theirs)
    assert eqa.from_equinox(shapes) == eqx.filter_eval_shape(lambda x: x, ours)
    assert eqx.filter_eval_shape(eqa.from_equinox, theirs) == eqa.from_equinox(shapes)
    stack = lambda x: np.stack([x, x]) if eqx.is_array(x) else x  # noqa: E731
    stacked = eqa.from_equinox(jax.tree.map(stack, theirs))
    assert _same(stacked, jax.tree.map(stack, ours))


def test_in_a_model_with_its_optimiser():
    model = [_theirs(), eqx.nn.Dropout(0.1), _theirs(dropout_p=0.1)]
    optimiser = optax.adam(1e-3)
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    state = jax.tree.map(lambda x: np.asarray(x) + 1, state)

    def is_theirs(x):
        return isinstance(x, eqx.nn.MultiheadAttention)

    def convert(tree):
        change = lambda x: eqa.from_equinox(x) if is_theirs(x) else x  # noqa: E731
        return jax.tree.map(change, tree, is_leaf=is_theirs)

    new_model, new_state = convert(model), convert(state)
    assert isinstance(new_model[0], eqa.MultiheadAttention)
    fresh = optimiser.init(eqx.filter(new_model, eqx.is_inexact_array))
    assert _same(new_state, jax.tree.map(lambda x: np.asarray(x) + 1, fresh))


class _Subclass(eqx.nn.MultiheadAttention):
    pass


class _Wrapped(eqx.Module):
    linear: eqx.nn.Linear


def _changed(where, value):
    return lambda: eqx.tree_at(where, _theirs(dropout_p=0.1), value)


@pytest.mark.parametrize(
    "make, error, match",
    [
        (eqx.nn.Identity, TypeError, "parameter 'module'"),
        (lambda: _made(_Subclass), TypeError, "module: .*got _Subclass"),
        (
            _changed(lambda m: m.value_proj, _Wrapped(_theirs().value_proj)),
            TypeError,
            r"module\.value_proj: expected an equinox.nn.Linear; got _Wrapped",
        ),
        (
            _changed(lambda m: m.key_proj, _theirs(qk_size=2).key_proj),
            ValueError,
            "key_proj must have in_features=5 and out_features=21; got 5 and 6",
        ),
        (
            _changed(lambda m: m.output_proj.weight, np.zeros((9, 23), np.float32)),
            ValueError,
            r"module\.output_proj\.weight: expected shape \(9, 24\), got \(9, 23\)",
        ),
        (
            _changed(lambda m: m.query_proj.bias, np.zeros(20, np.float32)),
            ValueError,
            r"module\.query_proj\.bias: expected shape \(21,\), got \(20,\)",
        ),
        (
            _changed(lambda m: m.key_proj.weight, np.zeros((21, 5), np.complex64)),
            TypeError,
            r"module\.key_proj\.weight: expected real numbers, got complex64",
        ),
        (
            _changed(lambda m: m.dropout, eqx.nn.Identity()),
            TypeError,
            r"module\.dropout: expected an equinox.nn.Dropout; got Identity",
        ),
        (_changed(lambda m: m.dropout.p, 1.0), ValueError, r"dropout_p: .*\[0, 1\).*1.0"),
        (_changed(lambda m: m.dropout.p, np.ones(())), ValueError, "dropout_p: .*1.0"),
    ],
)
def test_refusals(make, error, match):
    with pytest.raises(error, match=match):
        eqa.from_equinox(make())


class _EasyDeL(enum.StrEnum):
    FLASH_ATTN2 = "flash_attn2"


_OLD = [(t, ours) for ours, theirs in ELSEWHERE.items() for t in theirs]


@pytest.mark.parametrize("old, ours", [(o, n) for o, n in _OLD if n in MECHANISMS])
def test_old_names(old, ours):
    match = f"expected one of .*got '{old}', which is called '{ours}' here"
    x = jnp.ones((2, 1, 1))
    for make in (
        lambda: eqa.attend(x, x, x, mechanism=old),
        lambda: eqa.Attention(old),
        lambda: eqa.AttentionConfig(mechanism=old.upper()),
        lambda: eqa.Ring(inner=old),
    ):
        with pytest.raises(ValueError, match=f"(?i){match}"):
            make()
    assert old not in MECHANISMS


def test_old_names_elsewhere():
    """Where names come from: a file, an enumeration, and fingers."""
    text = eqa.AttentionConfig("flash").to_json().replace('"flash"', '"flash_attn2"')
    with pytest.raises(eqa.SerialisationError, match="'flash_attn2', .* 'flash' here"):
        eqa.AttentionConfig.from_json(text)
    with pytest.raises(ValueError, match="got 'flash_attn2', which is called 'flash' here"):
        eqa.Attention(_EasyDeL.FLASH_ATTN2)
    for typo, ours in (("blockwize", "blockwise"), ("Vanilla", "vanilla")):
        with pytest.raises(ValueError, match=f"got '{typo}'; did you mean '{ours}'"):
            eqa.Attention(typo)
    with pytest.raises(ValueError, match=r"got 'nothing'\.$"):
        eqa.Attention("nothing")
    named = [old for old, _ in _OLD]
    assert len(named) == len(set(named))
    # Those that the sources had; what is not in the table is a name of ours already.
    sources = "vanilla_attention flash_attn2 blockwise_attn sdpa cudnn_flash_attn2 "
    sources += "ring_attention splash_attention vanilla ring blockwise cudnn"
    assert all(old in named or old in MECHANISMS for old in sources.split())


# The arguments of EasyDeL's module in all its versions, which are on no package index.
_EASYDEL = """mesh attn_mechanism sm_scale softmax_scale num_attention_heads num_q_heads
    num_kv_heads head_dims block_k block_q block_b blocksize_k blocksize_q blocksize_b
    block_k_major block_q_major_dkv block_k_major_dkv block_k_dkv block_q_dkv
    block_k_major_dq block_k_dq block_q_dq partition_axis batch_axis head_axis sequence_axis
    query_sequence_axis key_sequence_axis attention_dim_axis hidden_state_axis
    bias_head_sequence_axis bias_key_sequence_axis generation_query_sequence_axis
    generation_key_sequence_axis generation_head_axis generation_attention_dim_axis
    scan_ring_attention scan_attention_layers attention_dropout dropout_prob dtype precision
    force_float32_tpu shard_attention_computation use_sharding_constraint axis_name platform
    backend backward_pass_impl base_config base_module_class rngs requires_cache _do_check
    query_states key_states value_states query_sequence_length key_value_sequence_length
    bias attention_mask segment_ids causal deterministic dropout_rng uses_cache causal_mask
    mode mask_info sliding_window cache_metadata cache_view init_bias softmax_aux
    logits_soft_cap prevent_cse cum_seqlens_q cum_seqlens_k normalize_output fused_backward
    compute_dtype optimized mask_value vmem_limit_bytes policy"""


def test_page_has_a_row_for_each_argument():
    page = pathlib.Path(__file__).parent.parent / "docs" / "migrating.md"
    sections = re.split(r"^##+ ", page.read_text(), flags=re.MULTILINE)
    rows = {}
    for section in sections:
        cells = re.findall(r"^\| (.*?) \| .* \|$", section, re.MULTILINE)
        names = [re.findall(r"`([\w.]+)", cell) for cell in cells]
        rows[section.splitlines()[0].split()[-1]] = {n for row in names for n in row}

    def missing(section, names):
        return set(names) - rows[section] - {"self"}

    def arguments(fn):
        return inspect.signature(fn).parameters

    layer = eqx.nn.MultiheadAttention
    assert (
        missing("jax.nn.dot_product_attention", arguments(jax.nn.dot_product_attention))
        == set()
    )
    assert missing("eqx.nn.MultiheadAttention", arguments(layer.__init__)) == set()
    assert missing("eqx.nn.MultiheadAttention", arguments(layer.__call__)) == set()
    assert missing("FlexibleAttentionModule", _EASYDEL.split()) == set()
    names = page.read_text().partition("### Names of mechanisms")[2]
    for ours, theirs in ELSEWHERE.items():
        row = re.search(rf'^\| `"{ours}"` \| (.*) \|$', names, re.MULTILINE)
        assert row is not None
        assert set(theirs) <= set(re.findall(r"`(\w+)`", row[1])), ours
