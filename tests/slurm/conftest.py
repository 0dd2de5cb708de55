"""The SLURM that all tests of this folder share."""

import pytest

from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    with (
        Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running
