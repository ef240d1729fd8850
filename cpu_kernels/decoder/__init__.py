"""Kernels of a decoder layer beside its matrices."""
