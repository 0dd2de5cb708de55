"""`make gpu-check`: what CUDA has to prove, in minutes, and its rehearsal on a CPU.

`assets` makes on a CPU machine what a GPU machine needs (`.gpu/`); `__main__` runs the checks that `checks`
lists, each in a process of its own with its own time limit (`runner`), and writes one JSON line a row, and a
table. What a check is given is a `Place`, what it finds are `Row`s (`rows`). `tests/gpu` runs the same
functions under pytest.

A check imports nothing at module level but the standard library, this package and what stands on a bare GPU
machine (`machine_packages.txt`) or in the pack that `assets` brings along.
"""
