"""Kinds of tokenizer files, one module each, behind the interface of `backend.py`."""
