"""Fixtures for all tests: the goldens folder and the gloo pools; device tests are skipped without one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.parallel.pool import Pools
from tide_megatron.base.log import ROOT

# A busy machine is no fault of an example: time is held by pytest's own limit.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")
torch.set_num_threads(1)  # two cores are shared by up to four ranks; also makes sums repeat


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _log_of_its_own() -> Iterator[None]:
    """Take back what a command set up for its log: another test would find its handlers."""
    logger = logging.getLogger(ROOT)
    handlers, level, propagates = [*logger.handlers], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagates
    logger.setLevel(level)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Return the folder of recorded numbers; TIDE_GOLDENS names another one of that format."""
    return Path(os.environ.get("TIDE_GOLDENS", Path(__file__).parent / "golden" / "data"))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pools]:
    """Give `pool(world_size).run(function, *args) -> [result of each rank]` (tests/parallel/pool.py)."""
    pools = Pools()
    yield pools
    pools.close()
