"""Masks, scores and dropout of a request, as what a kernel loads and what it computes."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from .._mechanism.base import Pairs, Request
from .._static import Static, unwrap
from .._tokens import Tile
from .hopper import LAYOUTS
from .lookup import stored
from .pairwise import Evaluation, Graph, HEAD, KEY, NotElementwise, PAIR, QUERY, Value
from .tables import never_masked


def tile_of(pairs: Pairs, q_index, kv_index, head) -> Tile:
    """One pair's tokens; every array has the axes (head, query, key), of size one. Given
    are their places in these arrays."""
    q, kv = pairs.q, pairs.kv
    q_index = q_index if q.index is None else q.index
    kv_index = kv_index if kv.index is None else kv.index
    return Tile(
        q_index,
        kv_index,
        q_index + q.shift if q.position is None else q.position,
        kv_index + kv.shift if kv.position is None else kv.position,
        head if pairs.head is None else pairs.head,
    )


class Input(NamedTuple):
    """One array that the kernel is given: of (batch, head, query, key), padded to whole
    blocks, without those axes of queries and keys on which it does not depend. A table is
    of (batch, head, entries)."""

    array: Array
    query: bool
    key: bool
    boolean: bool
    table: bool = False

    def at(self, batch, head) -> tuple:
        return (
            0 if self.array.shape[0] == 1 else batch,
            0 if self.array.shape[1] == 1 else head,
        )


class Term:
    """One elementwise function of pairs: `fn(pairs, tile, key, logit)`, where `key` is the
    place of the key in these arrays."""

    def __init__(self, request: Request, fn: Any, block_q: int, block_k: int):
        """`block_q` and `block_k` are the sizes to which arrays are padded.

        **Raises:** `NotElementwise` if `fn` does more than a kernel can.
        """
        pairs = request.pairs
        leaves, treedef = jax.tree.flatten(pairs)
        where = [n for n, x in enumerate(leaves) if hasattr(x, "shape")]
        arrays = [leaves[n] for n in where]
        self.arrays = len(arrays)

        def of_pair(*xs):
            new = list(leaves)
            for n, x in zip(where, xs[:-5], strict=True):
                new[n] = x
            tree = jax.tree.unflatten(treedef, new)
            q_index, kv_index, head, *own = xs[-5:]
            return fn(tree, tile_of(tree, q_index, kv_index, head), kv_index, *own)

        single = [jax.ShapeDtypeStruct((1, 1, 1, *x.shape[4:]), x.dtype) for x in arrays]
        index = jax.ShapeDtypeStruct((1, 1, 1), jnp.int32)
        logit = jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)
        names = ("batch", HEAD, QUERY, KEY)
        axes = [
            frozenset(name for name, size in zip(names, x.shape) if size > 1)
            for x in arrays
        ]
        axes += [frozenset((x,)) for x in (QUERY, KEY, HEAD, PAIR, PAIR)]
        known = [True] * len(arrays) + [False, False, True, False, False]
        arguments = (*single, index, index, index, logit, logit)
        self.graph = Graph(of_pair, arguments, axes, known)
        self._outside = (request, arrays, block_q, block_k)

    def inputs(self, by_key: bool = False) -> list[Input]:
        """The arrays for the kernel. `by_key` is whether the rows of its tiles are keys."""
        request, arrays, block_q, block_k = self._outside
        q_len, kv_len = request.lengths
        heads = request.query.shape[2]

        def index(size: int, axis: int):
            shape = [1] * 7
            shape[axis] = size
            return jnp.arange(size, dtype=jnp.int32).reshape(shape)

        known = [x.reshape((*x.shape[:4], 1, 1, 1, *x.shape[4:])) for x in arrays]
        known += [index(q_len, 2), index(kv_len, 3), index(heads, 1)]
        known += [jnp.zeros((1,) * 7)] * 2
        found = self.graph.outside(known)
        return [
            _table(x) if node.table else _input(x, node.axes, block_q, block_k, by_key)
            for x, node in zip(found, self.graph.inputs, strict=True)
        ]


def _input(
    x: Array, axes: frozenset[str], block_q: int, block_k: int, by_key: bool
) -> Input:
    boolean = x.dtype == jnp.bool_
    query, key = QUERY in axes, KEY in axes
    if boolean:
        x = x.astype(jnp.int8 if query and key else jnp.int32)
    padding = [(0, 0), (0, 0), (0, 0), (0, 0)]
    if query:
        padding[2] = (0, -x.shape[2] % block_q)
    if key:
        padding[3] = (0, -x.shape[3] % block_k)
    if any(high for _, high in padding):
        x = jnp.pad(x, padding)
    if query and key:
        return Input(x.swapaxes(2, 3) if by_key else x, query, key, boolean)
    shape = (*x.shape[:2], *(s for s, there in zip(x.shape[2:], (query, key)) if there))
    return Input(x.reshape(shape), query, key, boolean)


def _table(x: Array) -> Input:
    x = x.astype(stored(x.dtype)).reshape((*x.shape[:2], x.shape[-1]))
    return Input(x, query=False, key=False, boolean=False, table=True)


class Place(NamedTuple):
    """Where a tile of a kernel is. `axis` is that of its queries: 0, or 1 if its rows are
    keys. `layouts` are those of one number a row, one a column, and of a tile."""

    batch: Any
    head: Any
    query: Any
    key: Any
    shape: tuple[int, int]
    axis: int = 0
    layouts: tuple[Any, ...] = LAYOUTS

    def queries(self):
        return pl.ds(self.query, self.shape[self.axis])

    def keys(self):
        return pl.ds(self.key, self.shape[1 - self.axis])

    def index(self, of_queries: bool) -> Value:
        axis = self.axis if of_queries else 1 - self.axis
        layout = self.layouts[axis]
        size = self.shape[axis]
        start = self.query if of_queries else self.key
        count = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)
        return Value(axis, count + start)


class Loaded(NamedTuple):
    """A term and the arrays that a kernel gives it."""

    term: Term
    inputs: tuple[Input, ...]
    refs: tuple[Any, ...]

    def load(self, place: Place, held: Sequence[Any] | None = None) -> list[Any]:
        """Loads what does not change from tile to tile of a row of tiles (if `held` is
        `None`), or the rest of it."""
        if held is None:
            return [None if x.key else _load(x, r, place) for x, r in self._pairs()]
        return [
            _load(x, r, place) if h is None else h
            for (x, r), h in zip(self._pairs(), held, strict=True)
        ]

    def _pairs(self):
        return list(zip(self.inputs, self.refs, strict=True))

    def at(self, loaded: Sequence[Any], place: Place) -> "AtTile":
        """The term on one tile, to be evaluated bit by bit."""
        values = [
            Value(None, r.at[x.at(place.batch, place.head)])
            if x.table
            else Value(_axis(x, place), a != 0 if x.boolean else a)
            for (x, r), a in zip(self._pairs(), loaded, strict=True)
        ]
        n = self.term.arrays
        own = {n: place.index(True), n + 1: place.index(False)}
        graph = self.term.graph
        inside = graph.inside(values, own, place.shape, place.layouts)
        return AtTile(inside, n + 3)


class AtTile:
    """A term on one tile. What one output needs of another is computed once."""

    def __init__(self, evaluation: Evaluation, first: int):
        self.evaluation, self.first = evaluation, first

    def __call__(self, output: int = 0, *arguments: Any) -> Any:
        """One output, on the whole tile. `arguments` are those that are given of pairs:
        the dot product, and the cotangent of the logit."""
        for n, x in enumerate(arguments):
            self.evaluation.arguments[self.first + n] = Value(2, x)
        return self.evaluation(output)


def _axis(x: Input, place: Place) -> int | None:
    if x.query and x.key:
        return 2
    return place.axis if x.query else 1 - place.axis if x.key else None


def _load(x: Input, ref: Any, place: Place) -> Any:
    if x.table:
        return None  # it is read pair by pair
    at, axis = x.at(place.batch, place.head), _axis(x, place)
    if axis is None:
        return ref[at]
    if axis == 2:
        both = (place.queries(), place.keys())
        at = (*at, *(both if place.axis == 0 else both[::-1]))
    else:
        at = (*at, place.queries() if x.query else place.keys())
    part = ref.at[at]
    return plgpu.load(part, layout=place.layouts[axis], optimized=False)


def visible_fn(request: Request, block_k: int):
    """Whether a pair is visible, also beyond the end of the keys."""
    kv_len = request.lengths[1]

    def visible(pairs: Pairs, tile: Tile, key, *_):
        out = pairs.mask.visible(tile)
        return out & (key < kv_len) if kv_len % block_k else out

    return visible


def logit_fn(pairs: Pairs, tile: Tile, key, product, *_):
    """The logit of a dot product."""
    out = product * unwrap(pairs.scale)
    for score in pairs.score:
        out = score(out, tile)
    return out


def pulled_logit_fn(pairs: Pairs, tile: Tile, key, product, cotangent):
    """The logit of a dot product, and from its cotangent that of the product."""
    out, pull = jax.vjp(ft.partial(logit_fn, pairs, tile, key), product)
    return out, *pull(cotangent)


def keep_fn(pairs: Pairs, tile: Tile, *_):
    """Whether dropout keeps a pair."""
    whole = jax.tree.map(lambda x: x[None], pairs.dropout)  # `keep` is of a batch
    return whole.keep()[0]


def folded_scale(pairs: Pairs) -> float | None:
    """A scale that the exponential can take in passing."""
    scale = pairs.scale
    foldable = isinstance(scale, Static) and scale.value > 0 and not pairs.score
    return scale.value if foldable else None


class Terms(NamedTuple):
    """The terms of a request, by name, and their arrays."""

    terms: dict[str, Term]
    inputs: dict[str, list[Input]]

    @property
    def arrays(self) -> list[Array]:
        return [x.array for xs in self.inputs.values() for x in xs]

    @property
    def count(self) -> int:
        return len(self.arrays)

    @property
    def masked(self) -> bool:
        """Whether any tile may have to be."""
        return "visible" in self.terms

    def given(self, refs: Sequence[Any]) -> dict[str, Loaded]:
        """In the kernel: each term with its references."""
        refs, out = list(refs), {}
        for name, inputs in self.inputs.items():
            own, refs = refs[: len(inputs)], refs[len(inputs) :]
            out[name] = Loaded(self.terms[name], tuple(inputs), tuple(own))
        return out


class RowTerms:
    """Terms of a row of tiles, in the kernel: what is the same for its tiles is loaded."""

    def __init__(self, terms: Terms, refs: Sequence[Any], place: Place):
        """`place` is that of the row: the key may be any."""
        self.given, self.place = terms.given(refs), place
        self.held = {name: term.load(place) for name, term in self.given.items()}

    def load(self, masked: bool, first_key: Callable[[], Any]) -> tuple[Any, dict] | None:
        """The first key of a tile and what is loaded of it, if anything; `masked` is
        whether of the mask too."""
        use = [n for n in self.given if masked or n != "visible"]
        if not use:
            return None
        here = self.place._replace(key=first_key())
        return here.key, {n: self.given[n].load(here, self.held[n]) for n in use}

    def at(self, found: tuple[Any, dict] | None) -> dict[str, AtTile]:
        """The terms on the tile of which this was loaded."""
        key, loaded = found or (None, {})
        here = self.place._replace(key=key)
        return {n: self.given[n].at(xs, here) for n, xs in loaded.items()}


def terms_of(
    request: Request,
    block_q: int,
    block_k: int,
    fns: dict[str, Any],
    by_key: bool = False,
) -> Terms:
    """`fns` may be terms already.

    **Raises:** `NotElementwise` if one of them does more than a kernel can.
    """
    terms = {
        name: fn if isinstance(fn, Term) else Term(request, fn, block_q, block_k)
        for name, fn in fns.items()
        if fn
    }
    return Terms(terms, {name: term.inputs(by_key) for name, term in terms.items()})


def forward_terms(request: Request, block_q: int, block_k: int) -> tuple[Terms, float]:
    """What the forward kernels need of pairs; and what products are to be multiplied with
    besides.

    **Raises:** `NotElementwise` if a mask or a score does more than a kernel can.
    """
    scale = folded_scale(request.pairs)
    fns = {
        "visible": None if never_masked(request, block_k) else visible_fn(request, block_k),
        "logit": logit_fn if scale is None else None,
        "keep": keep_fn if request.pairs.dropout is not None else None,
    }
    return terms_of(request, block_q, block_k, fns), 1.0 if scale is None else scale


def not_elementwise(request: Request) -> list[str]:
    """Why the mask or the scores of a request cannot be computed in a kernel, if so."""
    reasons = []
    fns = {"mask": visible_fn(request, 1), "score": pulled_logit_fn}
    for name, fn in fns.items():
        try:
            Term(request, fn, 1, 1)
        except NotElementwise as error:
            reasons.append(f"its kernels compute no {error}, as this {name} does")
    return reasons
