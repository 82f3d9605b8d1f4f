"""Which tiles the kernels use: measured on an H200, by benchmarks/gpu_check.py.

Overlapping pays where nothing is masked, and for narrow heads in the backward; with a mask
it runs out of registers.
"""

from . import hopper_backward, hopper_forward


def forward_blocks(head_dim: int, value_dim: int, masked: bool) -> hopper_forward.Blocks:
    """`masked` is whether any tile may be masked."""
    warpgroups = 3 if max(head_dim, value_dim) <= 64 else 2
    return hopper_forward.Blocks(warpgroups=warpgroups, overlap=not masked)


def backward_blocks(head_dim: int, value_dim: int, masked: bool) -> hopper_backward.Blocks:
    if max(head_dim, value_dim) <= 64:
        return hopper_backward.Blocks(query=128, overlap=True)
    return hopper_backward.Blocks(query=64, overlap=not masked)
