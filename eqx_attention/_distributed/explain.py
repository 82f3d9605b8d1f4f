"""What a sharding makes of a call, in words."""

from .._mechanism import Request
from .sharding import Shards


def explain_shards(local: Request, shards: Shards) -> str:
    """A line that says what each device has, and what is done with the results."""
    batch, q_len, heads, _ = local.query.shape
    _, kv_len, kv_heads, _ = local.key_.shape
    sizes = ", ".join(f"{name}={size}" for name, size in shards.mesh.shape.items())
    line = (
        f"sharding over a mesh of {sizes}: a device has {batch} batch elements, {heads} "
        f"heads of queries and {kv_heads} of keys, {q_len} queries and {kv_len} keys"
    )
    merged = shards.sharding.merged
    n = shards.size(merged)
    if n == 1:
        return line
    channels = local.value.shape[-1] + 1
    size = (n - 1) * batch * q_len * heads * channels * local.dtype.itemsize
    names = ", ".join(map(repr, merged))
    return (
        f"{line}; results are merged over {names}: {size / 2**20:.3f} MiB received a "
        "device, in 1 collective"
    )
