"""A stream of any length through a cache of bounded size: a window, and the first tokens.

    uv run examples/streaming.py
    uv run examples/streaming.py --without window

A query sees the tokens of a window before it and the first few of the stream, and has a
learned sink a head. The cache holds just these. What comes out, chunk by chunk, is what one
call for the whole sequence gives, and what the formula says, with all weights at once.
"""

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
from gallery.flags import add, parser


HEADS, KV_HEADS, DIM = 4, 2, 16


# The old cache's memory is reused for the new one: all but the first argument is donated.
@eqx.filter_jit(donate="all-except-first")
def step(new, cache):
    query, key_, value, sinks = new
    cache = cache.append(key_, value)
    return cache.attend(query, mask=eqa.Causal(), sinks=sinks), cache


def formula(query, key_, value, sinks, rows, window: int, num_first: int) -> np.ndarray:
    """The outputs of some rows, in double precision, straight from the definition."""
    query, key_, value, sinks = (
        np.asarray(x, np.float64) for x in (query, key_, value, sinks)
    )
    key_, value = (x.repeat(HEADS // KV_HEADS, axis=1) for x in (key_, value))
    i, j = rows[:, None], np.arange(len(key_))
    visible = (j <= i) & ((j >= i - window) | (j < num_first))
    logits = np.einsum("qhd,khd->hqk", query[rows], key_) / np.sqrt(DIM)
    weights = np.exp(np.where(visible, logits, -np.inf))
    total = weights.sum(-1, keepdims=True) + np.exp(sinks)[:, None, None]
    return np.einsum("hqk,khd->qhd", weights / total, value)


def num_bytes(cache: eqa.AbstractCache) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(cache))


def main(argv: list[str] | None = None) -> float:
    flags = parser(__doc__, parts=("window", "first", "sinks"))
    add(flags, "--context", 8192, "tokens")
    add(flags, "--window", 255, "tokens that a query sees before its own")
    add(flags, "--first", 4, "tokens at the start that all queries see")
    add(flags, "--chunk", 64, "tokens at a time, of which --context is a multiple")
    args = flags.parse_args(argv)
    if args.context % args.chunk != 0:
        flags.error(f"--chunk must divide --context; got {args.chunk} and {args.context}")

    rng = np.random.default_rng(args.seed)
    query, key_, value = (
        jnp.asarray(rng.normal(size=(args.context, heads, DIM)), jnp.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    sinks = jnp.asarray(rng.normal(size=HEADS), jnp.float32)
    num_first = 0 if args.without == "first" else args.first
    used_sinks = None if args.without == "sinks" else sinks
    cache = eqa.RollingCache.init(
        args.window, KV_HEADS, DIM, num_first=num_first, chunk=args.chunk
    )
    mask = eqa.Causal() & (eqa.SlidingWindow(args.window) | eqa.Prefix(num_first))
    everything = eqa.StaticCache.init(args.context, KV_HEADS, DIM)
    size, size_of_everything = num_bytes(cache), num_bytes(everything)
    if args.without == "window":
        cache, mask = everything, eqa.Causal()

    outs = []
    for start in range(0, args.context, args.chunk):
        chunk = slice(start, start + args.chunk)
        out, cache = step((query[chunk], key_[chunk], value[chunk], used_sinks), cache)
        outs.append(out)
    out = np.concatenate(outs)

    whole = eqa.attend(query, key_, value, mask=mask, sinks=used_sinks)
    rows = rng.permutation(args.context)[:512]
    expected = formula(query, key_, value, sinks, rows, args.window, args.first)
    error = float(np.abs(out[rows] - expected).max())
    error_of_whole = float(np.abs(np.asarray(whole)[rows] - expected).max())
    print(f"cache       {num_bytes(cache):,} bytes; for all tokens, {size_of_everything:,}")
    print(f"tokens      {int(cache.length):,}, {args.chunk} at a time")
    print(f"difference  {error:.1e} from the formula, {error_of_whole:.1e} in one call")
    assert num_bytes(cache) == size, "the cache is not of the size that the window needs"
    assert error < 1e-5, f"streamed, it differs by {error:.1e}"
    assert error_of_whole < 1e-5, f"in one call, it differs by {error_of_whole:.1e}"
    return error


if __name__ == "__main__":
    main()
