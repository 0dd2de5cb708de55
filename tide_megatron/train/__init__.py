"""A run: its recipe, its step, its loop, its checkpoints."""
