"""What `tools/chaos.py` plants and how it looks at what becomes of it; see there."""
