"""Layouts as arithmetic, process groups made from them, and the collectives our own code calls."""
