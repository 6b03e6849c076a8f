"""Sparse encoders on CPUs, in kernels that skip zeros."""

from opfa.runtime.encoder import load

__all__ = ["load"]
