"""Replay on the device: `ring` of steps, `sequence` of windows, `prioritised` choice of rows."""
