"""Filled in by the layer's owner."""
