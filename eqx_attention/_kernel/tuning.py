"""Which tiles the kernels use: measured on an H200, see benchmarks/."""

from . import hopper_backward, hopper_forward


def forward_blocks(head_dim: int, value_dim: int) -> hopper_forward.Blocks:
    widest = max(head_dim, value_dim)
    if widest <= 64:
        return hopper_forward.Blocks(query=64, key=128, stages=2, warpgroups=3)
    return hopper_forward.Blocks(query=64, key=128, stages=2, warpgroups=2)


def backward_blocks(head_dim: int, value_dim: int) -> hopper_backward.Blocks:
    if max(head_dim, value_dim) <= 64:
        return hopper_backward.Blocks(query=128, key=64, stages=2)
    return hopper_backward.Blocks(query=64, key=64, stages=2)
