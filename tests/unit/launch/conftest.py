"""A machine with stand-ins of SLURM's programs, for tests of a job's script."""

import subprocess
import sys

import pytest

STUB = """#!{python}
import os, sys
name = os.path.basename(sys.argv[0])
with open(os.path.join({out!r}, name), "ab") as out:
    out.write("\\0".join([os.getcwd(), os.environ.get("SAID", ""), *sys.argv[1:]]).encode() + b"\\n\\n")
if name == "squeue":
    print(os.environ.get("STATE", ""))
sys.exit(int(os.environ.get("CODE", "0")) if name == "srun" else 0)
"""
"""Stands for a program of SLURM's: writes down where and with what it was called."""


@pytest.fixture
def machine(tmp_path):
    """Give a function that runs a script with stand-ins of SLURM's programs, and returns their words."""
    programs, out = tmp_path / "bin", tmp_path / "out"
    programs.mkdir()
    out.mkdir()
    for name in ("srun", "squeue", "scontrol", "sbatch"):
        path = programs / name
        path.write_text(STUB.format(python=sys.executable, out=str(out)))
        path.chmod(0o755)

    def run(script, **variables):
        done = subprocess.run(
            ["bash", "-c", script],
            env={"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "71234", "HOME": "/root", **variables},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        calls = {
            path.name: [call.decode().split("\0") for call in path.read_bytes().split(b"\n\n")[:-1]]
            for path in out.iterdir()
        }
        return done, calls

    run.programs = programs
    return run
