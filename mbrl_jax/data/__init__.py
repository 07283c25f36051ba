"""Replay on the device.

`ring` holds steps, `sequence` reads them in windows, `prioritised` chooses rows by priority and
`windows` does so for windows; `online` is a queue of fresh windows.
"""

from mbrl_jax.data import online, prioritised, ring, sequence, windows

__all__ = ["online", "prioritised", "ring", "sequence", "windows"]
