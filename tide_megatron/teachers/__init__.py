"""Frozen models in layouts of their own: views in, rows for the vocabulary group out."""
