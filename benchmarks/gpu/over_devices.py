"""One sequence over several devices, and on one of them: what is compiled, and called."""

import functools as ft
import re
from collections.abc import Callable
from typing import Any, NamedTuple


HEADS, DIM = 16, 128


class Case(NamedTuple):
    length: int
    window: int | None = None

    @property
    def name(self) -> str:
        return f"window {self.window}" if self.window else "causal"

    @property
    def mask(self):
        import eqx_attention as eqa

        window = eqa.SlidingWindow(self.window - 1) if self.window else None
        return eqa.Causal() & window if window else eqa.Causal()

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, self.length, HEADS, DIM

    @property
    def pairs(self) -> int:
        if self.window is None:
            return self.length * (self.length + 1) // 2
        return self.window * self.length - self.window * (self.window - 1) // 2


def mechanism_of(strategy: str) -> Any:
    import eqx_attention as eqa

    kind, *words = strategy.split()
    if kind != "ring":
        return kind
    inner = [w for w in words if w in ("flash", "cudnn")]
    return eqa.Ring(*inner, layout=words[0], scan="unrolled" not in words)


class Prepared(NamedTuple):
    """What is timed, already compiled."""

    call: Callable[[], Any]
    note: dict[str, Any]


class Benchmark:
    def __init__(self, devices: list[Any]):
        import jax
        import numpy as np

        self.devices = devices
        self.made: dict[tuple[Case, bool], list[Any]] = {}
        self.mesh = jax.sharding.Mesh(np.asarray(devices), ("sp",))

    def attend(self, strategy: str, case: Case) -> Callable:
        """`strategy` is that of all devices, or the name of a mechanism for one."""
        import eqx_attention as eqa

        if strategy in self.alone():
            return ft.partial(eqa.attend, mask=case.mask, mechanism=strategy)
        return ft.partial(
            eqa.attend,
            mask=case.mask,
            mechanism=mechanism_of(strategy),
            sharding=eqa.Sharding(sequence="sp"),
            mesh=self.mesh,
        )

    def alone(self) -> tuple[str, ...]:
        on_gpu = self.devices[0].platform == "gpu"
        return ("flash", "cudnn") if on_gpu else ("blockwise",)

    def where(self, strategy: str) -> Any:
        """Where the arrays of a strategy are, or of a mechanism for one device."""
        from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding

        if strategy in self.alone():
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, P(None, "sp"))

    def operands(self, case: Case, strategy: str) -> list[Any]:
        """`query, key_, value, dout`, made where they belong: one set for one device, and
        one for all, of one case at a time."""
        import jax
        import jax.numpy as jnp

        place = (case, strategy in self.alone())
        if place not in self.made:
            self.made = {at: x for at, x in self.made.items() if at[0] == case}

            @ft.partial(jax.jit, out_shardings=self.where(strategy))
            def make(key):
                return jax.random.normal(key, case.shape, jnp.bfloat16)

            keys = jax.random.split(jax.random.key(0), 4)
            self.made[place] = [make(key) for key in keys]
        return self.made[place]

    def compiled(self, strategy: str, case: Case, which: str, **options: Any) -> Any:
        """Of shapes: that may be done of several at once."""
        import jax
        import jax.numpy as jnp

        attend, where = self.attend(strategy, case), self.where(strategy)
        one = jax.ShapeDtypeStruct(case.shape, jnp.bfloat16, sharding=where)

        def both(q, k, v, dout):
            out, pull = jax.vjp(attend, q, k, v)
            return out, *pull(dout)

        fn, count = (both, 4) if "backward" in which else (attend, 3)
        return jax.jit(fn).lower(*[one] * count).compile(options or None)

    def prepared(self, strategy: str, case: Case, which: str, compiled: Any) -> Prepared:
        import jax

        arrays = self.operands(case, strategy)[: 4 if "backward" in which else 3]
        call = ft.partial(compiled, *arrays)
        if self.devices[0].platform == "cpu":
            # Devices of a CPU that wait for one another may do so forever, if there is
            # more than one call.
            return Prepared(lambda: jax.block_until_ready(call()), _memory(compiled))
        return Prepared(call, _memory(compiled))

    def explained(self, strategy: str, case: Case) -> dict[str, Any]:
        """What the strategy says that it sends, in MiB a device."""
        import eqx_attention as eqa
        import jax
        import jax.numpy as jnp

        config = eqa.AttentionConfig(
            mask=case.mask,
            mechanism=mechanism_of(strategy),
            sharding=eqa.Sharding(sequence="sp"),
        )
        attention = eqa.Attention.from_config(config, mesh=self.mesh)
        shape = jax.ShapeDtypeStruct(case.shape, jnp.bfloat16)
        found = []

        def look(q, k, v):
            found.append(attention.explain(q, k, v))
            return ()

        jax.eval_shape(look, shape, shape, shape)
        text = found[0].split("\nmechanisms:")[0]
        moved = re.search(r"([\d.]+) MiB[a-z ]* forward, ([\d.]+) MiB backward", text)
        mib = [float(x) for x in moved.groups()] if moved else None
        return {"explain": text, "sent_mib": mib}

    def errors(self, strategy: str, case: Case) -> dict[str, float]:
        """Those of the output and of the gradients, relative to those of plain attention in
        bfloat16: against plain attention in float32."""
        import eqx_attention as eqa
        import jax
        import jax.numpy as jnp

        n = len(self.devices)
        arrays = self.operands(case, self.alone()[0])
        plain = ft.partial(eqa.attend, mask=case.mask, mechanism="vanilla")
        attend = self.attend(strategy, case)

        def run(attend, arrays, laid_out=lambda x: x, back=lambda x: x):
            def fn(*arrays):
                *qkv, dout = (laid_out(x) for x in arrays)
                out, pull = jax.vjp(attend, *qkv)
                return [back(x).astype(jnp.float32) for x in (out, *pull(dout))]

            return jax.jit(fn)(*arrays)

        wide = [x.astype(jnp.float32) for x in arrays]
        with jax.default_matmul_precision("highest"):
            want = run(plain, wide)
        reference = run(plain, arrays)
        split = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        arrays = [jax.device_put(x, split) for x in arrays]
        moves = ()
        if "zigzag" in strategy:
            moves = (ft.partial(eqa.to_layout, n=n, axis=1),)
            moves += (ft.partial(eqa.from_layout, n=n, axis=1),)
        got = run(attend, arrays, *moves)
        names = ("out", "dq", "dk", "dv")
        ratios = {}
        for name, g, r, w in zip(names, got, reference, want, strict=True):
            g, r, w = (jax.device_get(x) for x in (g, r, w))
            ratios[name] = float(abs(g - w).max() / max(abs(r - w).max(), 1e-30))
        return ratios


def _memory(compiled: Any) -> dict[str, Any]:
    """GiB of each device, as XLA plans it."""
    stats = compiled.memory_analysis()
    if stats is None:
        return {}
    sizes = {
        "temporaries_gib": stats.temp_size_in_bytes,
        "arguments_gib": stats.argument_size_in_bytes,
        "results_gib": stats.output_size_in_bytes,
    }
    return {name: size / 2**30 for name, size in sizes.items()}
