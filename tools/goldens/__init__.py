"""Replays of golden vectors, one module per family; `tools/replay_goldens.py` makes the table."""
