"""Kernels that turn weights into planes and scales, and back."""
