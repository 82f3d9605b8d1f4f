"""Kernels for GPUs, in Pallas' Mosaic GPU dialect. Imported only when used."""
