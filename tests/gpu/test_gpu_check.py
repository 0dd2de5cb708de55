"""What CUDA has to prove, check by check: the functions of `make gpu-check`, in processes of their own.

Skipped without a device, and without the assets that `make gpu-assets` makes on a CPU machine.
"""

import math

import pytest

from gpu_check.checks import CHECKS
from gpu_check.identity import FILE, ROOT, read_identity, require_same
from gpu_check.pack import unpack
from gpu_check.rows import Place
from gpu_check.runner import Plan, run_check

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]
ASSETS = ROOT / ".gpu"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Unpack Transformer Engine where the assets have it; refuse assets of another commit."""
    if not (ASSETS / FILE).is_file():
        pytest.skip("no .gpu/: make gpu-assets")
    require_same(read_identity(ASSETS), allowed=False)
    return unpack(ASSETS / "pack", tmp_path_factory.mktemp("pack"))[1]


@pytest.mark.parametrize("check", [pytest.param(check, id=check.name) for check in CHECKS])
def test_check(check, engine, tmp_path):
    place = Place(device="cuda", assets=ASSETS, scratch=tmp_path / "scratch", transformer_engine=engine)
    rows = run_check(check, Plan(place=place, logs=tmp_path, jobs=1, deadline=math.inf))
    faults = [f"{row.check}: {row.text}" for row in rows if row.verdict == "failed"]
    assert not faults, "\n".join(faults)
