"""Sizes that users write."""

import pytest

from tide_megatron.base.errors import ConfigError
from tide_megatron.base.units import in_bytes, read_bytes


@pytest.mark.parametrize(
    ("text", "number"),
    [("5GB", 5_000_000_000), (" 1.5 kB ", 1500), ("7", 7), ("2tb", 2_000_000_000_000), ("5 GiB", 5 * 2**30)],
)
def test_sizes_are_read(text, number):
    assert read_bytes(text, "--size") == number


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "five", "3 lines", "0.4B"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"--size: .* as in 5GB"):
        read_bytes(text, "--size")


def test_what_is_written_is_read_back():
    assert read_bytes(in_bytes(1_270_000), "--size") == 1_270_000
