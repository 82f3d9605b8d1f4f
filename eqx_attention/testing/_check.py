"""`check`: does a mechanism, or anyone's function, compute attention?"""

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqx_attention as eqa

from ._cases import Case, cases as random_cases, Inputs, precision_for, statistics_dtype
from ._reference import (
    dense_gradients,
    FAST_COMPILE,
    Gradients,
    prepare,
    pull_back,
    reference_gradients,
)


# What a wrong function may raise. Anything else is a bug here or an interrupt.
_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,  # among them JAX's, Equinox's and `NotImplementedError`
    TypeError,
    ValueError,
)

_TOLERANCES = {"float64": 1e-12, "float32": 1e-5}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One array against the reference.

    **Fields:**

    - `name`: `out`, `lse`, or `d` and an argument's name.
    - `error`: the largest absolute difference.
    - `tolerance`: the largest one allowed.
    - `problem`: what else is wrong (a shape, a dtype, NaN), or the empty string.
    """

    name: str
    error: float
    tolerance: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.error <= self.tolerance

    def __str__(self) -> str:
        numbers = f"{self.name} {self.error:.1e} (allowed {self.tolerance:.1e})"
        return f"{self.name} {self.problem}" if self.problem else numbers


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one case.

    **Fields:**

    - `case`: the [`eqx_attention.testing.Case`][].
    - `status`: `"passed"`, `"failed"` or `"unsupported"`.
    - `comparisons`: a tuple of [`eqx_attention.testing.Comparison`][].
    - `message`: the error that was raised, if one was.
    - `seconds`: the time that the function took, compilation included.
    """

    case: Case
    status: str
    comparisons: tuple[Comparison, ...] = ()
    message: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.status == "failed" and self.comparisons:
            detail = "; ".join(str(c) for c in self.comparisons if not c.ok)
        elif self.comparisons:
            detail = str(max(self.comparisons, key=_badness))
        else:
            detail = " ".join(self.message.split())[:300]
        return f"{self.status:<11}  {self.case.name}: {detail}"


def _badness(comparison: Comparison) -> float:
    return comparison.error / max(comparison.tolerance, 1e-300)


@dataclasses.dataclass(frozen=True)
class Report:
    """What [`eqx_attention.testing.check`][] found. It prints as a table.

    **Fields:**

    - `name`: of what was checked.
    - `outcomes`: a tuple of [`eqx_attention.testing.Outcome`][], one a case.
    """

    name: str
    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> tuple[Outcome, ...]:
        """The cases that agree with the reference."""
        return tuple(o for o in self.outcomes if o.status == "passed")

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The cases that differ from the reference, or raised an error."""
        return tuple(o for o in self.outcomes if o.status == "failed")

    @property
    def unsupported(self) -> tuple[Outcome, ...]:
        """The cases that were refused."""
        return tuple(o for o in self.outcomes if o.status == "unsupported")

    def summary(self) -> str:
        """One line."""
        seconds = sum(o.seconds for o in self.outcomes)
        return (
            f"{self.name}: {len(self.passed)} passed, {len(self.failures)} failed, "
            f"{len(self.unsupported)} unsupported, in {seconds:.1f} s"
        )

    def __str__(self) -> str:
        return "\n".join([*map(str, self.outcomes), self.summary()])

    def raise_on_failure(self) -> "Report":
        """**Returns:** this report, so that calls may be chained.

        **Raises:** an `AssertionError` that lists the failures, if there are any.
        """
        if self.failures:
            shown = [str(o) for o in self.failures[:20]]
            more = len(self.failures) - len(shown)
            shown += [f"... and {more} more"] if more else []
            raise AssertionError("\n".join([self.summary(), *shown]))
        return self


def as_function(attention: Any) -> tuple[str, Callable]:
    """The name, and the function with `attend`'s signature, of what is checked."""
    if isinstance(attention, str | eqa.AbstractMechanism):
        name = attention if isinstance(attention, str) else repr(attention)
        return name, functools.partial(eqa.attend, mechanism=attention)
    if not callable(attention):
        raise TypeError(
            "expected the name of a mechanism, a mechanism, or a function with the "
            f"signature of `attend`; got {attention!r}."
        )
    return getattr(attention, "__name__", type(attention).__name__), attention


def check(
    mechanism_or_function: Any,
    *,
    cases: Iterable[Case] | int = 100,
    gradients: bool = True,
    jit: bool = True,
    fast_compile: bool = True,
) -> Report:
    """Compares an attention function with the float64 reference, case by case.

    For each case it compares the output, the lse (if the case asks for it) and the
    gradients of the query, keys, values, sinks, scale and every floating-point array of
    the scores; and that each has the shape and the dtype that it should have.

    - In float64 they have to agree to 1e-12, and in float32 to 1e-5, times the largest
        magnitude in the array (or one, if that is larger).
    - In bfloat16 and float16 the largest error may be twice that of plain attention in
        that dtype, with a softmax in float32; or the spacing of that dtype at the largest
        magnitude in the array, or what is allowed in float32, if that is larger.
    - Where the reference is zero or minus infinity because no key is visible, the output,
        the lse and the gradient of the query have to be that exactly.

    **Arguments:**

    - `mechanism_or_function`: the name of a mechanism; a mechanism, such as
        `eqa.Blockwise(block_q=16)`; or a function. A function is called as
        [`eqx_attention.attend`][] is, with those keyword arguments that a case uses (and
        always `mask`), and returns what it returns. A keyword argument that it does not
        have makes a case that uses it unsupported.
    - `cases`: the cases, or a number `n` for `eqa.testing.cases(n)`.
    - `gradients`: whether to differentiate.
    - `jit`: whether to compile each call as a whole. If so then the arrays of masks and
        positions are traced.
    - `fast_compile`: whether to compile with few of XLA's optimisations. Most of the time
        goes to compiling.

    **Returns:** a [`eqx_attention.testing.Report`][]. A case that raises
    [`eqx_attention.UnsupportedError`][] is reported as unsupported; one that raises
    another `TypeError`, `ValueError`, `ArithmeticError`, `AssertionError`,
    `AttributeError`, `LookupError` or `RuntimeError` is reported as failed.

    **Raises:** a `TypeError` if it is given something that is not callable.
    """
    name, fn = as_function(mechanism_or_function)
    if isinstance(cases, int):
        cases = random_cases(cases)
    run = functools.partial(
        _run, fn, gradients=gradients, jit=jit, fast_compile=fast_compile
    )
    return Report(name, tuple(_outcome(run, fn, case, gradients) for case in cases))


def _outcome(run: Callable, fn: Callable, case: Case, gradients: bool) -> Outcome:
    with precision_for(case.dtype):
        inputs = case.build()
        missing = _missing(fn, inputs.options)
        if missing:
            message = f"it has no argument {missing}"
            return Outcome(case, "unsupported", message=message)
        start = time.perf_counter()
        try:
            got = jax.block_until_ready(run(inputs))
        except eqa.UnsupportedError as e:
            return Outcome(case, "unsupported", message=str(e))
        except _ERRORS as e:
            message = f"{type(e).__name__}: {e}"
            return Outcome(case, "failed", message=message)
        seconds = time.perf_counter() - start
        comparisons = tuple(_compare(case, inputs, got, gradients))
    status = "passed" if all(c.ok for c in comparisons) else "failed"
    return Outcome(case, status, comparisons, seconds=seconds)


def _missing(fn: Callable, options: dict[str, Any]) -> str:
    parameters = inspect.signature(fn).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return ""
    return ", ".join(sorted(set(options) - {p.name for p in parameters}))


def _run(
    fn: Callable, inputs: Inputs, *, gradients: bool, jit: bool, fast_compile: bool
) -> tuple[Any, Any, Any]:
    """`(out, lse or None, gradients or None)` of the function."""
    names = ("score", "sinks", "scale")
    arguments = dict(query=inputs.query, key_=inputs.key_, value=inputs.value)
    arguments |= {n: x for n, x in inputs.options.items() if n in names}
    others = {n: x for n, x in inputs.options.items() if n not in names}

    def call(arguments, others, dout, dlse):
        def values(arguments):
            arguments = dict(arguments)
            arrays = [arguments.pop(n) for n in ("query", "key_", "value")]
            result = fn(*arrays, **arguments, **others)
            out, lse = result if inputs.dlse is not None else (result, None)
            if out.shape != inputs.dout.shape:
                raise ValueError(f"out has shape {out.shape}, expected {inputs.dout.shape}")
            return out, lse

        if not gradients:
            return *values(arguments), None
        return pull_back(values, arguments, dout, dlse)

    every = (arguments, others, inputs.dout, inputs.dlse)
    if not jit:
        return call(*every)
    dynamic, static = eqx.partition(every, eqx.is_array)
    compiled = jax.jit(
        lambda dynamic: call(*eqx.combine(dynamic, static)),
        compiler_options=FAST_COMPILE if fast_compile else None,
    )
    return compiled(dynamic)


# The same cases are often given to several mechanisms.
@functools.lru_cache(maxsize=512)
def _expected(case: Case) -> tuple[Gradients, Any]:
    """The reference, and plain attention where that sets the tolerance."""
    inputs = case.build()
    q, k, v, options, dout, dlse = inputs
    options = {n: x for n, x in options.items() if n != "return_lse"}
    expected = reference_gradients(q, k, v, dout=dout, dlse=dlse, **options)
    plain = None if case.dtype in _TOLERANCES else _plain(inputs)
    return expected, jax.tree.map(np.asarray, plain)


def _compare(case: Case, inputs: Inputs, got: Any, gradients: bool):
    q, k, v, options, _, dlse = inputs
    expected, plain = _expected(case)
    out, lse, got_gradients = got
    real = statistics_dtype(case.dtype)
    empty = np.isneginf(expected.lse)
    if "sinks" in options:
        empty = np.zeros_like(empty)
    pairs = [("out", out, expected.out, plain and plain[0], q.dtype, empty)]
    if dlse is not None:
        pairs += [("lse", lse, expected.lse, plain and plain[1], real, empty)]
    if gradients:
        paths, _ = jax.tree_util.tree_flatten_with_path(expected.arguments)
        got_leaves = jax.tree.leaves(got_gradients)
        plain_leaves = jax.tree.leaves(plain[2]) if plain else [None] * len(paths)
        arguments = dict(query=q, key_=k, value=v, **options)
        arguments = {n: arguments.get(n, ()) for n in expected.arguments}
        given = jax.tree.leaves(eqx.filter(arguments, eqx.is_inexact_array))
        for (path, e), g, p, x in zip(paths, got_leaves, plain_leaves, given, strict=True):
            name = "d" + jax.tree_util.keystr(path, simple=True, separator=".")
            name = name.replace("._", ".")
            pairs += [(name, g, e, p, x.dtype, empty if name == "dquery" else None)]
    return [_comparison(case.dtype, *pair) for pair in pairs]


def _plain(inputs: Inputs) -> tuple[Any, Any, Any]:
    """Plain attention in the inputs' dtype, with a softmax in float32."""
    q, k, v, options, dout, dlse = inputs
    names = ("score", "sinks", "scale", "return_lse")
    prepared = prepare(q, k, **{n: x for n, x in options.items() if n not in names})
    arguments = dict(query=q, key_=k, value=v, score=())
    arguments |= {n: x for n, x in options.items() if n in names[:3]}
    if dlse is None:
        dlse = jnp.zeros(dout.shape[:-1], jnp.float32)
    return dense_gradients(arguments, prepared, dout, dlse, q.dtype, jnp.float32)


def _comparison(case_dtype, name, got, expected, plain, dtype, empty) -> Comparison:
    if got.shape != expected.shape:
        problem = f"has shape {got.shape}, expected {expected.shape}"
        return Comparison(name, np.inf, 0.0, problem)
    if got.dtype != dtype:
        problem = f"has dtype {got.dtype}, expected {dtype}"
        return Comparison(name, np.inf, 0.0, problem)
    got = np.asarray(got).astype(np.float64)
    if np.any(np.isnan(got)):
        return Comparison(name, np.inf, 0.0, "has NaN")
    error, magnitude = _error(got, expected)
    if plain is None:
        tolerance = _TOLERANCES[case_dtype] * max(1.0, magnitude)
    else:
        plain_error, _ = _error(np.asarray(plain).astype(np.float64), expected)
        spacing = float(jnp.finfo(case_dtype).eps) * magnitude
        # Where plain attention happens to be exact, nobody has to be better than float32.
        narrowest = _TOLERANCES["float32"] * max(1.0, magnitude)
        tolerance = max(2 * plain_error, spacing, narrowest)
    if empty is not None and np.any(got[empty] != expected[empty]):
        return Comparison(name, error, tolerance, "is wrong where no key is visible")
    return Comparison(name, error, tolerance)


def _error(got: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The largest absolute difference, and the largest magnitude."""
    same = got == expected  # also of infinities
    difference = np.abs(np.where(same, 0.0, got) - np.where(same, 0.0, expected))
    finite = np.where(np.isfinite(expected), expected, 0.0)
    return float(np.max(difference, initial=0)), float(np.max(np.abs(finite), initial=0))
