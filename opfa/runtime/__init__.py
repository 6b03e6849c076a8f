"""Sparse encoders on CPUs, in kernels that skip zeros."""

from opfa.runtime.encoder import load, runs_in, speed_up
from opfa.runtime.explain import Explanation, explain
from opfa.runtime.swap import swap

__all__ = ["Explanation", "explain", "load", "runs_in", "speed_up", "swap"]
