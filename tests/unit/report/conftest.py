"""Models and data that made-up runs name."""

import pytest

from tests.tiny_run import write_tiny_run


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("models") / "tiny").parent
