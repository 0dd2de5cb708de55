"""lm-evaluation-harness (the extra `eval`): its tasks asked of our models, and our models under its command.

Only `__main__` and `language_model` register anything with it; `loading` and `run` are what `tide evaluate`
calls.
"""
