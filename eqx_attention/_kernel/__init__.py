"""Kernels for GPUs, in Pallas' Mosaic GPU dialect, and how those that jax has for TPUs are
called. Imported only when used."""
