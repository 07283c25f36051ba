"""Replay on the device: `ring` of steps, `sequence` of windows, `prioritised` choice of rows."""

from mbrl_jax.data import prioritised, ring, sequence

__all__ = ["prioritised", "ring", "sequence"]
