"""How much memory the gradient of one transformer layer needs besides its arguments
and results: attention and feed-forward, blockwise in both, in attention only, and in
neither. Figures come from XLA's plan of the compiled program; nothing is run, so the
largest need not fit this machine.

    python benchmarks/memory.py
"""

import argparse
import pathlib

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
from eqx_attention._benchmark.files import write_json


SIZE, NUM_HEADS, BLOCK_SIZE = 512, 8, 512
VARIANTS = {
    "both": ("blockwise", BLOCK_SIZE),
    "attention only": ("blockwise", None),
    "neither": ("vanilla", None),
}


class Layer(eqx.Module):
    norm1: eqx.nn.RMSNorm
    mha: eqa.MultiheadAttention
    norm2: eqx.nn.RMSNorm
    ff: eqa.FeedForward

    def __init__(self, mechanism: str, block_size: int | None, *, key):
        key1, key2 = jr.split(key)
        config = eqa.AttentionConfig(mechanism=mechanism, mask=eqa.Causal())
        rotary = eqa.RotaryEmbedding(SIZE // NUM_HEADS)
        self.norm1 = eqx.nn.RMSNorm(SIZE)
        self.mha = eqa.MultiheadAttention.from_config(
            config, NUM_HEADS, SIZE, rotary=rotary, key=key1
        )
        self.norm2 = eqx.nn.RMSNorm(SIZE)
        self.ff = eqa.FeedForward(SIZE, block_size=block_size, key=key2)

    def __call__(self, x):
        y = jax.vmap(self.norm1)(x)
        x = x + self.mha(y, y, y)
        return x + self.ff(jax.vmap(self.norm2)(x))


def temporaries(variant: str, seq: int) -> int:
    """In bytes, of the gradient with respect to the parameters and the input."""
    layer = eqx.filter_eval_shape(Layer, *VARIANTS[variant], key=jr.key(0))
    params, static = eqx.partition(layer, lambda x: hasattr(x, "shape"))

    @jax.jit
    def grad(params, x):
        def loss(params, x):
            return jnp.sum(eqx.combine(params, static)(x) ** 2)

        return jax.grad(loss, argnums=(0, 1))(params, x)

    x = jax.ShapeDtypeStruct((seq, SIZE), jnp.float32)
    memory = grad.lower(params, x).compile().memory_analysis()
    assert memory is not None, "this backend does not tell"
    return memory.temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    default = pathlib.Path(__file__).parent / "results" / "memory_cpu.json"
    parser.add_argument("--json", type=pathlib.Path, default=default)
    parser.add_argument("--seq", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    args = parser.parse_args()
    print(f"size {SIZE}, {NUM_HEADS} heads, float32, causal; blocks of {BLOCK_SIZE}.")
    print("MiB of temporaries of the compiled gradient, by blockwise in:")
    print("".join(f"{title:>16}" for title in ("seq", *VARIANTS)))
    rows = []
    for seq in args.seq:
        row = {variant: temporaries(variant, seq) for variant in VARIANTS}
        figures = "".join(f"{x / 2**20:16,.1f}" for x in row.values())
        print(f"{seq:16}{figures}", flush=True)
        rows.append({"seq": seq, "temporary_bytes": row})
    settings = {
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "size": SIZE,
        "num_heads": NUM_HEADS,
        "dtype": "float32",
        "mask": "causal",
        "feed_forward_block_size": BLOCK_SIZE,
    }
    write_json(args.json, settings | {"rows": rows})


if __name__ == "__main__":
    main()
