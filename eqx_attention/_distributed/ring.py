import dataclasses

import equinox as eqx
import jax
from jax import lax
from jaxtyping import Array, Float

from .._dropout import Dropout
from .._errors import UnsupportedError
from .._mask import BlockMask
from .._mechanism import AbstractMechanism, Blocks, Blockwise, Gradients, Request
from .._tokens import Tokens
from .cargo import Cargo
from .choice import choose, Chosen, devices_of
from .hop import Rows
from .inner import as_inner, check_inner, not_split
from .layout import chunks_of, LAYOUTS
from .passes import Passes
from .plan import level, Side
from .zigzag import Exchange, to_zigzag


# Where what is computed is not to be chosen while it runs: see `level`.
_LEVEL = ("gpu",)


class Ring(AbstractMechanism):
    """Keys and values go round a ring of devices, and each attends to what it has.

    What a device keeps is linear in its own part of the sequence. Each hop runs another
    mechanism, with its own kernels and its own backward pass, which is given the
    log-sum-exp over all keys; results are merged in float32. While a hop is computed, the
    next keys are on their way; in the backward pass also the gradients of those of the
    hop before, in float32.

    What the mask hides is neither computed nor, where no device needs it, sent: a window
    costs the few hops that it reaches over, of as many keys as it reaches. Dropout, the
    scores and the mask are those of the whole sequence.

    ??? cite

        [Ring Attention with Blockwise Transformers for Near-Infinite
        Context](https://arxiv.org/abs/2310.01889)

        ```bibtex
        @inproceedings{liu2024ring,
            title={Ring Attention with Blockwise Transformers for Near-Infinite Context},
            author={Liu, Hao and Zaharia, Matei and Abbeel, Pieter},
            booktitle={International Conference on Learning Representations},
            year={2024}
        }
        ```
    """

    inner: str | AbstractMechanism = eqx.field(static=True)
    layout: str = eqx.field(static=True)
    scan: bool = eqx.field(static=True)

    def __init__(
        self,
        inner: str | AbstractMechanism = "auto",
        layout: str = "auto",
        scan: bool = True,
    ):
        """**Arguments:**

        - `inner`: what computes a hop: the name of a mechanism, or a mechanism. Default
            `"auto"`.
        - `layout`: in which order the tokens are. `"zigzag"` says that all arrays have
            been permuted by [`eqx_attention.to_layout`][] (per-token arrays of masks and
            scores, and both axes of pairwise ones, likewise), so that a causal mask makes
            equal work for all devices; indices and default positions are those before.
            `"contiguous"` says that they have not, and leaves it so. The default `"auto"`
            says so too, but exchanges halves between the devices, there and back, where
            the mask makes unequal work.
        - `scan`: whether the hops between the first and the last are one loop; otherwise
            each has code of its own, which on four H200 was 6 % faster at 32,768 tokens
            and 5 % slower at 131,072, forward. Default `True`.

        **Raises:** `ValueError` for a name or a layout that there is not.
        """
        self.inner = inner
        self.layout = layout
        self.scan = scan
        self.__check_init__()

    def __check_init__(self):
        check_inner("Ring", self.inner)
        if self.layout not in ("auto", *LAYOUTS):
            raise ValueError(
                "Ring(layout): expected 'auto', 'contiguous' or 'zigzag', got "
                f"{self.layout!r}."
            )

    def unsupported(self, request: Request) -> tuple[str, ...]:
        if reasons := not_split(request):
            return reasons
        found: dict[str, None] = {}

        def look(request: Request):
            found.update(dict.fromkeys(self._reasons(request)))
            return ()

        eqx.filter_eval_shape(look, request)
        return tuple(found)

    def forward(
        self, request: Request
    ) -> tuple[
        Float[Array, "batch q_len q_heads value_dim"], Float[Array, "batch q_len q_heads"]
    ]:
        exchange, passes = self._ready(request)
        out, lse = passes.forward()
        out, lse = exchange.back(out.astype(request.result_dtype), lse)
        return out, lse

    def backward(
        self,
        request: Request,
        out: Float[Array, "batch q_len q_heads value_dim"],
        lse: Float[Array, "batch q_len q_heads"],
        dout: Float[Array, "batch q_len q_heads value_dim"],
        dlse: Float[Array, "batch q_len q_heads"] | None,
        wrt: tuple[int, ...],
    ) -> Gradients:
        # Else XLA may take the keys of all devices from the forward pass, and keep them; or
        # send them before that is done.
        kept = (request.key_, request.value, lse, dout)
        key_, value, lse, dout = lax.optimization_barrier(kept)
        request = dataclasses.replace(request, key_=key_, value=value)
        exchange, passes = self._ready(request)
        rows = exchange.there(out, lse, dout, *([] if dlse is None else [dlse]))
        rows = Rows(rows[0], rows[1], rows[2], None if dlse is None else rows[3], wrt)
        sums, (dk, dv, *sent) = passes.backward(rows)
        local = passes.local
        dleaves = dict(zip(local.staying(wrt), sums.leaves, strict=True))
        dleaves |= dict(zip(local.going(wrt), sent, strict=True))
        dqkv = [x.astype(request.result_dtype) for x in (sums.query, dk, dv)]
        dq, dk, dv = exchange.back(*dqkv)
        return dq, dk, dv, tuple(exchange.leaves_back([dleaves[n] for n in wrt], wrt))

    def blocks(self, request: Request) -> Blocks:
        return Blockwise().blocks(request)

    def explain(self, request: Request) -> str:
        found = []

        def look(request: Request):
            found.append(self._explained(request))
            return ()

        eqx.filter_eval_shape(look, request)
        return found[0]

    def _explained(self, request: Request) -> str:
        chosen = self._chosen(request)
        inner, n = as_inner(self.inner), chosen.devices.count
        local = chosen.local(request, 0)
        texts: dict[str, list[str]] = {}
        forward = backward = 0
        for hop in chosen.plan.hops:
            keys = local.keys(*hop.keys)
            if hop.shift:
                forward += keys.cargo.num_bytes
                gradients = local.no_gradients(keys, ())
                backward += keys.cargo.num_bytes + Cargo(gradients).num_bytes
            steps = [s for s in hop.steps if s is not None]
            text = " or ".join(
                f"{s.query[1] - s.query[0]} queries × {s.key[1] - s.key[0]} keys"
                for s in steps
            )
            idle = sum(hop.steps[w] is None for w in hop.which)
            text += f", nothing on {idle} of {n} devices" if idle else ""
            how = inner.explain(local.hop(steps[0], keys)[0]).splitlines()[0]
            texts.setdefault(f"{text}: {how}", []).append(str(hop.shift))
        if exchanged(self.layout, chosen):
            # Half of a device's tokens, there and back.
            item, rows = request.query.dtype.itemsize, request.query.size
            kv = request.key_.size + request.value.size
            out = rows // request.query.shape[-1] * request.value.shape[-1]
            forward += (rows + kv + out) * item // 2
            backward += (2 * rows + 2 * kv + 2 * out) * item // 2
        hops = sum(hop.shift > 0 for hop in chosen.plan.hops)
        mib = [f"{x / 2**20:.2f} MiB" for x in (forward, backward)]
        lines = [
            f"ring: {hops} of {n - 1} hops over {n} devices along "
            f"{', '.join(map(repr, chosen.devices.names))}; each sends {mib[0]} forward, "
            f"{mib[1]} backward; imbalance {chosen.plan.imbalance:.2f}; layout {chosen.why}"
        ]
        for text, numbers in texts.items():
            lines.append(f"  hop {', '.join(numbers)}: {text}")
        return "\n".join(lines)

    def _reasons(self, request: Request):
        """Why a request that is split is refused."""
        n = devices_of(request).count
        if self.layout == "zigzag":
            if any(length % 2 for length in request.lengths):
                q_len, kv_len = (n * length for length in request.lengths)
                yield (
                    f"the zigzag layout over {n} devices needs lengths that are multiples "
                    f"of {2 * n}, and these are {q_len} and {kv_len}"
                )
                return
            if _has_block_mask(request):
                yield "a BlockMask is bound to tokens that are not in the zigzag layout"
        yield from self._refused(request, self._chosen(request))

    def _refused(self, request: Request, chosen: Chosen):
        # Any device and any keys will do: what is looked at are types and shapes.
        inner, local = as_inner(self.inner), chosen.local(request, 0)
        for hop in chosen.plan.hops:
            keys = local.keys(*hop.keys)
            for step in hop.steps:
                if step is not None:
                    yield from inner.unsupported(local.hop(step, keys)[0])

    def _chosen(self, request: Request) -> Chosen:
        chosen = choose(request, self.layout)
        same = chosen._replace(plan=level(chosen.plan, request.pairs.mask))
        if request.platform not in _LEVEL or same.plan == chosen.plan:
            return chosen
        reasons: list[str] = []

        def look(request: Request):
            reasons.extend(self._refused(request, same))
            return ()

        eqx.filter_eval_shape(look, request)
        return chosen if reasons else same

    def _ready(self, request: Request) -> tuple[Exchange, Passes]:
        chosen = self._chosen(request)
        devices = chosen.devices
        if self.layout == "zigzag" and request.split.chunks != chosen.q.chunks:
            raise UnsupportedError(
                "Ring(layout='zigzag') expects that no other mechanism has changed which "
                "tokens a device has; use layout='auto' within another mechanism."
            )
        exchange = Exchange(request, devices, exchanged(self.layout, chosen))
        local = chosen.local(exchange.request, devices.me())
        plans = (chosen.plan, chosen.loose())
        return exchange, Passes(as_inner(self.inner), local, *plans, self.scan)


def exchanged(layout: str, chosen: Chosen) -> bool:
    """Whether tokens are brought into the layout at each call."""
    return layout == "auto" and chosen.layout == "zigzag"


def check_layout(mechanism: AbstractMechanism, lengths: tuple[int, int], n: int) -> None:
    """That tokens that are said to be laid out over `n` devices can be.

    **Raises:** `ValueError` if not.
    """
    if not (isinstance(mechanism, Ring) and mechanism.layout == "zigzag"):
        return
    for name, length in zip(("query", "key_, value"), lengths, strict=True):
        if length % (2 * n):
            raise ValueError(
                f"{name}: expected a length that is a multiple of {2 * n}, as "
                f"Ring(layout='zigzag') is asked for over {n} devices; got {length}. Pad "
                "it before `to_layout`."
            )


def laid_out(mechanism: AbstractMechanism, request: Request) -> Request:
    """A device's part of what the mechanism takes to be in its layout: what goes by index
    was made for the order that tokens have anyway."""
    zigzag = isinstance(mechanism, Ring) and mechanism.layout == "zigzag"
    if not (zigzag and request.split.key) or any(n % 2 for n in request.lengths):
        return request
    devices, pairs = devices_of(request), request.pairs
    chunks = chunks_of("zigzag", devices.count)

    def tokens(old: Tokens) -> Tokens:
        if old.index is None:
            return old
        side = Side(chunks, old.length // 2, None)
        index = side.indices(devices.me(), (0, old.length))
        return dataclasses.replace(old, index=index.reshape(old.index.shape))

    pairs = dataclasses.replace(pairs, q=tokens(pairs.q), kv=tokens(pairs.kv))
    if pairs.dropout is not None:
        words = ((pairs.dropout.q_words, 2), (pairs.dropout.kv_words, 3))
        q_words, kv_words = to_zigzag(words, devices)
        dropout = Dropout(q_words, kv_words, pairs.dropout.rate)
        pairs = dataclasses.replace(pairs, dropout=dropout)
    split = request.split._replace(chunks=chunks)
    return dataclasses.replace(request, pairs=pairs, split=split)


def _has_block_mask(request: Request) -> bool:
    is_one = lambda x: isinstance(x, BlockMask)  # noqa: E731
    return any(map(is_one, jax.tree.leaves(request.pairs.mask, is_leaf=is_one)))
