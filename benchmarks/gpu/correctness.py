"""Each case of `SUPPORT` on each mechanism, against `Vanilla` in float32; and those of
decoding, in `decoding.py`.

At the highest precision, on fresh random data each time; twice, so that a race shows; and
on memory that held NaN before, so that what is not written shows.
"""

import concurrent.futures as futures
import contextlib
import functools as ft
import multiprocessing
import os
from typing import Any

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np

from . import decoding
from .cases import BOTH, MECHANISMS, operands, REPRODUCIBLE, SUPPORT
from .errors import errors_of


# Options of a case that are not those of `eqa.attend`.
_OURS = ("return_lse", "nan", "nan queries")


def _poison():
    """Leaves NaN in the memory that is given out next."""
    jax.block_until_ready([jnp.full((2**24,), jnp.nan) for _ in range(4)])


def _value_and_grads(mechanism, options, with_lse):
    @jax.jit
    def value(q, k, v, dout, dlse):
        def attend(q, k, v):
            return eqa.attend(q, k, v, mechanism=mechanism, return_lse=True, **options)

        (out, lse), pull = jax.vjp(attend, q, k, v)
        return out, lse, *pull((dout, dlse if with_lse else jnp.zeros_like(lse)))

    return value


def check(name: str, mechanism: str) -> dict[str, Any]:
    """One case on one mechanism: errors relative to `Vanilla` in float32."""
    _, shape, make = SUPPORT[name]
    options = make()
    dtype = jnp.dtype(options.pop("dtype", "bfloat16"))
    with_lse = options.pop("return_lse", False)
    hidden, unseen = (options.pop(name, None) for name in ("nan", "nan queries"))
    seed = int.from_bytes(os.urandom(4), "little") >> 1
    q, k, v, dout = operands(shape, dtype, seed)
    dlse = jax.random.normal(jax.random.key(seed), dout.shape[:-1], jnp.float32)
    if hidden is not None:  # Tokens whose keys and values are NaN.
        k, v = (jnp.where(hidden[..., None, None], jnp.nan, x) for x in (k, v))
    if unseen is not None:  # Those that see nothing, and what comes back for them.
        q, dout = (jnp.where(unseen[..., None, None], jnp.nan, x) for x in (q, dout))
    run = _value_and_grads(MECHANISMS[mechanism], options, with_lse)
    _poison()
    got = jax.block_until_ready(run(q, k, v, dout, dlse))
    _poison()
    again = jax.block_until_ready(run(q, k, v, dout, dlse))
    wide = [x.astype(jnp.float32) for x in (q, k, v, dout)]
    with jax.default_matmul_precision("highest"):
        want = _value_and_grads("vanilla", options, with_lse)(*wide, dlse)
    errors: dict[str, float] = {}
    for part, a, b, w in zip(("out", "lse", "dq", "dk", "dv"), got, again, want):
        a, b, w = (np.asarray(x, np.float32) for x in (a, b, w))
        empty = np.isneginf(w)
        assert (np.isneginf(a) == empty).all(), part
        # What sees NaN is NaN.
        left_out = empty | np.isnan(w)
        assert hidden is not None or not np.isnan(w).any(), part
        if part == "out":
            assert not np.isnan(w).all(), part
            assert (np.isnan(a) == np.isnan(w)).all(), part
        errors |= errors_of(part, a, b, w, left_out)
    limit = 8e-3 if dtype == jnp.bfloat16 else 2e-3
    exact = ("out", "lse", "dk", "dv") + (("dq",) if mechanism == REPRODUCIBLE else ())
    good = all(errors[x] <= limit for x in ("out", "lse", "dq", "dk", "dv"))
    # cuDNN's lse of one query differs in its last bit now and then.
    again = 1e-7 if mechanism == "cudnn" else 0
    good = good and all(errors[f"{x} twice"] <= again for x in exact)
    good = good and errors["dq twice"] <= 1e-3
    return {"case": name, "mechanism": mechanism, "good": good, **errors}


def supported(name: str, mechanism: str) -> bool:
    _, shape, make = SUPPORT[name]
    options = make()
    dtype = options.pop("dtype", "bfloat16")
    options = {k: x for k, x in options.items() if k not in _OURS}
    q, k, v, _ = operands(shape, jnp.dtype(dtype), 0)
    try:
        jax.eval_shape(ft.partial(eqa.attend, mechanism=mechanism, **options), q, k, v)
    except eqa.UnsupportedError as error:
        print(f"refused  {mechanism:6s} {name}: {error}", flush=True)
        return False
    return True


@contextlib.contextmanager
def _without_autotuning():
    """For the processes that start meanwhile. XLA would else try many kernels for each of
    the small products of the reference, which takes minutes."""
    before = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{before} --xla_gpu_autotune_level=0"
    yield
    os.environ["XLA_FLAGS"] = before


def correctness(workers: int, only: str) -> list[dict[str, Any]]:
    rows, cases = [], []
    for name, (able, *_) in SUPPORT.items():
        if only not in name:
            continue
        for mechanism in BOTH:
            found = supported(name, mechanism)
            if found != (mechanism in able):
                rows.append({"case": name, "mechanism": mechanism, "good": False})
                print(f"BAD      {mechanism:6s} {name}: supported is {found}", flush=True)
            elif found:
                cases.append((name, mechanism))
        cases += [(name, mechanism) for mechanism in able if mechanism not in BOTH]
    decoded = [(name, decoding.DECODE) for name in decoding.ALL if only in name]
    context = multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(workers, mp_context=context)
    with _without_autotuning(), pool:
        jobs = {pool.submit(check, *case): case for case in cases}
        jobs |= {pool.submit(decoding.check, case[0]): case for case in decoded}
        for job in futures.as_completed(jobs):
            error = job.exception()
            if error is None:
                row = job.result()
            else:
                name, mechanism = jobs[job]
                text = f"{type(error).__name__}: {str(error)[:300]}"
                row = {"case": name, "mechanism": mechanism, "good": False, "error": text}
            rows.append(row)
            parts = ("out", "lse", "dq", "dk", "dv", "dq twice")
            numbers = " ".join(f"{p} {row[p]:.1e}" for p in parts if p in row)
            verdict = "ok" if row["good"] else "BAD"
            numbers = row.get("error", numbers)
            print(
                f"{verdict:8s} {row['mechanism']:6s} {row['case']}: {numbers}", flush=True
            )
    return rows
