"""Vocabulary heads joined with losses, in a plain and in a fused form."""
