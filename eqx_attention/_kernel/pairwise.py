"""An elementwise function of a (query, key) pair, split into what is computed outside of a
kernel and what is computed in it.

The function is traced at one pair, into a graph. What belongs to one side alone (a query, a
key, a head) is computed outside, once for each token, by any operation of JAX; only what
joins the two sides is computed in the kernel, on a whole tile at once, and that must be
elementwise. So a function may look into a table by head or by feature, and yet costs the
kernel one load for each row. What looks into a table by pair becomes a `Lookup` there.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Literal
from jaxtyping import Array

from .factors import is_constant, simplified
from .hopper import LAYOUTS
from .lookup import Lookup, NotElementwise


HEAD, QUERY, KEY, PAIR = "head", "query", "key", "pair"
# What Mosaic GPU computes elementwise; the rest must belong to one side.
_ELEMENTWISE = frozenset(
    """abs add add_any and clamp convert_element_type cos div eq erf exp exp2 ge gt
    integer_pow le log log1p logistic lt max min mul ne neg not one_minus_square or rem
    rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sqrt
    square sub tanh xor""".split()
)
_SHAPE = frozenset(
    """broadcast_in_dim copy copy_p expand_dims reshape squeeze stop_gradient
    transpose""".split()
)
# Of numbers of 8 bits, it has these.
_ANY_WIDTH = _SHAPE | {"convert_element_type"}
_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")


class Node(NamedTuple):
    """One value of the graph. `axes` are those on which it depends. A `table` is one that
    pairs look into: it has more than one entry."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Any, ...]
    axes: frozenset[str]
    inside: bool
    number: int
    dtype: Any
    table: bool = False


class Graph:
    """A function of a pair, as nodes.

    Each argument is said to be of some axes, and either an array known outside of the
    kernel or something that the kernel knows by itself.
    """

    def __init__(
        self, fn: Callable, arguments: Sequence[Any], axes: Sequence[frozenset[str]], known
    ):
        """`known[n]` is whether argument `n` is an array from outside."""
        closed = jax.make_jaxpr(fn)(*arguments)
        self.count = 0
        roots = [
            self._node(None, {"argument": n}, (), a, not k, x.dtype)
            for n, (x, a, k) in enumerate(zip(arguments, axes, known, strict=True))
        ]
        self.inputs: list[Node] = []
        self.give(self._run(closed.jaxpr, closed.consts, roots))

    def give(self, outputs: Sequence[Any]) -> None:
        """Makes these values the outputs."""
        self.outputs, self.inputs, seen = list(outputs), [], set()
        for out in self.outputs:
            self._collect(out, seen)

    def make(self, primitive: Any, inputs: Sequence[Any]) -> Node:
        """One more value, in float32."""
        if primitive is lax.select_n_p:
            inputs = [x.reshape(1, 1, 1) if is_constant(x) else x for x in inputs]
        axes, _, inside = _belongs([x for x in inputs if isinstance(x, Node)])
        dtype = jnp.dtype(jnp.float32)
        return self._node(primitive, {}, tuple(inputs), axes, inside, dtype)

    def _node(self, primitive, params, inputs, axes, inside, dtype, table=False) -> Node:
        self.count += 1
        return Node(primitive, params, inputs, axes, inside, self.count, dtype, table)

    def _run(self, jaxpr, consts, arguments) -> list[Any]:
        env: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))
        env |= {v: np.asarray(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}

        def read(v):
            return np.asarray(v.val, v.aval.dtype) if isinstance(v, Literal) else env[v]

        for eqn in jaxpr.eqns:
            inputs = tuple(read(v) for v in eqn.invars)
            name = eqn.primitive.name
            if name in _CALLS:
                inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                inner_consts = getattr(inner, "consts", ())
                inner = getattr(inner, "jaxpr", inner)
                outs = self._run(inner, inner_consts, inputs)
            else:
                outs = [self._apply(eqn, name, inputs)]
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _apply(self, eqn, name: str, inputs) -> Any:
        nodes = [x for x in inputs if isinstance(x, Node)]
        if not nodes and name in _SHAPE and eqn.outvars[0].aval.size == 1:
            return inputs[0].reshape(eqn.outvars[0].aval.shape)
        axes, joins, inside = _belongs(nodes)
        simple = name in _ELEMENTWISE or name in _SHAPE
        dtype: Any = getattr(eqn.outvars[0].aval, "dtype", None)
        if joins and name == "gather":
            return self._lookup(eqn, *inputs, axes)
        if any(map(_is_indices, nodes)):
            raise NotElementwise("concatenate of pairs")
        if joins and name == "concatenate" and all(v.aval.size == 1 for v in eqn.invars):
            return self._node(eqn.primitive, eqn.params, inputs, axes, True, dtype)
        # Mosaic GPU has remainders of integers alone.
        simple = simple and not (name == "rem" and jnp.issubdtype(dtype, jnp.floating))
        if (joins and not simple) or len(eqn.outvars) != 1:
            raise NotElementwise(f"{name} of pairs")
        inside = inside and simple
        dtypes = {x.dtype for x in nodes} - {jnp.dtype(bool)}
        if inside and name not in _ANY_WIDTH and any(d.itemsize == 1 for d in dtypes):
            raise NotElementwise(f"{name} of 8-bit numbers of pairs")
        if inside and all(x.dtype == jnp.float32 for x in inputs):
            found = simplified(self, name, inputs)
            if found is not None:
                return found
        return self._node(eqn.primitive, eqn.params, inputs, axes, inside, dtype)

    def _lookup(self, eqn, table: Any, index: Node, axes: frozenset[str]) -> Node:
        """A gather by pair. Its table is given to the kernel as one, whatever it is."""
        own = getattr(table, "axes", frozenset())
        if own & {QUERY, KEY, PAIR}:
            raise NotElementwise("gather of pairs from a table of each query or key")
        lookup = Lookup.of(eqn)
        given = self._node(lax.copy_p, {}, (table,), own, False, table.dtype, True)
        indices = index.inputs if _is_indices(index) else (index,)
        dtype: Any = eqn.outvars[0].aval.dtype
        inputs = (given, *indices)
        return self._node(eqn.primitive, {"lookup": lookup}, inputs, axes, True, dtype)

    def _collect(self, x: Any, seen: set[int]) -> None:
        """Finds the values that the kernel is given."""
        if not isinstance(x, Node) or x.number in seen:
            return
        seen.add(x.number)
        if not x.inside:
            self.inputs.append(x)
            return
        for y in x.inputs:
            self._collect(y, seen)

    def outside(self, arguments: Sequence[Array]) -> list[Array]:
        """The values of `inputs`, of the axes (batch, head, query, key), each of its full
        size or of one, and of the entries of a table; `arguments` are of these axes and
        those of the pair's own."""
        memo: dict[int, Array] = {}

        def value(x):
            if not isinstance(x, Node):
                return jnp.asarray(x)[None, None, None, None]
            if x.number not in memo:
                if x.primitive is None:
                    memo[x.number] = arguments[x.params["argument"]]
                else:
                    operands = [value(y) for y in x.inputs]
                    memo[x.number] = _mapped(x.primitive, x.params, operands)
            return memo[x.number]

        return [
            value(x).reshape((*value(x).shape[:4], *([-1] if x.table else [])))
            for x in self.inputs
        ]

    def inside(
        self,
        values: Sequence["Value"],
        arguments: dict[int, "Value"],
        shape: tuple[int, int],
        layouts: tuple[Any, ...] = LAYOUTS,
    ) -> "Evaluation":
        """Of a tile of `shape` in a kernel: `values` are those of `inputs`, and `arguments`
        are what the kernel knows by itself. `layouts` are those of one number a row, one a
        column, and of a tile."""
        memo = {x.number: v for x, v in zip(self.inputs, values, strict=True)}
        return Evaluation(self, memo, arguments, Frame(shape, layouts))


def _belongs(nodes: Sequence[Node]) -> tuple[frozenset[str], bool, bool]:
    """Of what is computed from these: its axes, whether it joins both sides, and whether
    it is computed in the kernel."""
    axes = frozenset().union(*(x.axes for x in nodes))
    joins = PAIR in axes or {QUERY, KEY} <= axes
    # Scalars of a head come from outside; a side's own words stay in the kernel while
    # they are made of nothing but what it knows by itself.
    sided = [x for x in nodes if x.axes & {QUERY, KEY, PAIR}]
    return axes, joins, joins or (bool(sided) and all(x.inside for x in sided))


class Frame(NamedTuple):
    """Of a tile in a kernel: its shape, and the layouts of one number a row, one a column,
    and of a tile."""

    shape: tuple[int, int]
    layouts: tuple[Any, ...]


class Evaluation(NamedTuple):
    """A graph on one tile, each node computed when first needed."""

    graph: Graph
    memo: dict[int, "Value"]
    arguments: dict[int, "Value"]
    frame: Frame

    def __call__(self, output: int) -> Any:
        node = self.graph.outputs[output]
        return self._value(node).on(2, self.frame, node.dtype)

    def _value(self, x: Any) -> "Value":
        if not isinstance(x, Node):
            return Value(None, x.item())
        if x.number not in self.memo:
            if x.primitive is None:
                value = self.arguments[x.params["argument"]]
            else:
                value = _elementwise(x, [self._value(y) for y in x.inputs], self.frame)
            self.memo[x.number] = value
        return self.memo[x.number]


class Value(NamedTuple):
    """What a kernel knows of a tile: a scalar (`axis` is `None`), one number a row (0) or
    column (1), or one a pair (2); or a reference to a table."""

    axis: int | None
    array: Any

    def on(self, axis: int | None, frame: Frame, dtype: Any) -> Any:
        """This, broadcast to the rows, to the columns or to the tile."""
        x, shape = self.array, frame.shape
        if self.axis == axis or axis is None:
            return jnp.asarray(x, dtype)
        if self.axis is None:
            full = shape if axis == 2 else (shape[axis],)
            x = jnp.full(full, x, dtype)
        else:
            x = lax.broadcast_in_dim(x, shape, [self.axis])
        return plgpu.layout_cast(x, frame.layouts[axis])


def _is_indices(x: Any) -> bool:
    """Whether this is several indices of a pair: for a gather, and nothing else."""
    inside = isinstance(x, Node) and x.inside
    return inside and getattr(x.primitive, "name", None) == "concatenate"


def _mapped(primitive, params, operands: list[Array]) -> Array:
    """Applies a primitive of single pairs along the first four axes."""

    def single(*xs):
        out = primitive.bind(*xs, **params)
        return out[0] if primitive.multiple_results else out

    shape = [max((x.shape[n] for x in operands), default=1) for n in range(4)]
    fn = single
    flags = [[x.shape[n] > 1 for n in range(4)] for x in operands]
    for n in reversed(range(4)):
        mapped = [0 if f[n] else None for f in flags]
        if any(m == 0 for m in mapped):
            fn = jax.vmap(fn, in_axes=mapped)
    squeezed = [
        x.reshape([s for s, f in zip(x.shape, fs) if f] + list(x.shape[4:]))
        for x, fs in zip(operands, flags)
    ]
    out = fn(*squeezed)
    rest = out.shape[sum(s > 1 for s in shape) :]
    return out.reshape((*shape, *rest))


def _elementwise(node: Node, operands: list[Value], frame: Frame) -> Value:
    name = node.primitive.name
    if name in _SHAPE:
        return operands[0]
    axes = {x.axis for x in operands} - {None}
    axis = axes.pop() if len(axes) == 1 else 2 if axes else None
    dtypes = [getattr(x, "dtype", None) for x in node.inputs]
    if name == "gather":
        (table, *indices), lookup = operands, node.params["lookup"]
        xs = [x.on(2, frame, d) for x, d in zip(indices, dtypes[1:], strict=True)]
        return Value(2, lookup(table.array, xs, node.dtype, frame.layouts[2]))
    xs = [x.on(axis, frame, d) for x, d in zip(operands, dtypes, strict=True)]
    if name == "convert_element_type":
        return Value(axis, xs[0].astype(node.params["new_dtype"]))
    if name == "integer_pow":
        return Value(axis, _power(xs[0], node.params["y"]))
    if name == "one_minus_square":
        return Value(axis, 1 - xs[0] * xs[0])
    if name == "add_any":
        return Value(axis, xs[0] + xs[1])
    if name == "log1p":
        return Value(axis, jnp.log(1 + xs[0]))
    if name == "logistic":
        return Value(axis, 1 / (1 + jnp.exp(-xs[0])))
    return Value(axis, node.primitive.bind(*xs, **node.params))


def _power(x: Any, y: int) -> Any:
    """What Mosaic GPU has of it are products."""
    if y == 0:
        return jnp.ones_like(x)
    if y == 1:
        return x
    return lax.integer_pow(x, y) if y > 1 else 1 / _power(x, -y)
