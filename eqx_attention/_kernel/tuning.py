"""Which tiles the kernels use: measured on an H200, by benchmarks/gpu_check.py."""

from . import backward, hopper_forward


# Bytes of shared memory that the forward's tiles may take.
_SHARED = 225 * 1024


def forward_blocks(head_dim: int, value_dim: int) -> hopper_forward.Blocks:
    if max(head_dim, value_dim) <= 64:
        return hopper_forward.Blocks(warpgroups=3, overlap=False)
    wide = hopper_forward.Blocks()
    fixed = wide.rows * head_dim
    tiles = wide.stages * wide.key * (head_dim + value_dim)
    return wide if 2 * (fixed + tiles) <= _SHARED else wide._replace(key=64)


def backward_blocks(head_dim: int, value_dim: int, in_order: bool) -> backward.Blocks:
    if max(head_dim, value_dim) <= 64:
        return backward.Blocks(query=128, in_order=in_order)
    dout_stages = 2 if value_dim <= 128 else 1
    return backward.Blocks(dout_stages=dout_stages, in_order=in_order)
