"""Ranks of one node that need the same weights: the disk gives every byte once."""

from bench.load_node import forget, load, write_model
from bench.shapes import QWEN3_06B
from tide_megatron.launch.ranks import run_ranks

OTHER_READS = 2**23
"""What a rank may read beside, such as modules that it imports late."""


def test_two_ranks_read_every_byte_from_the_disk_once(tmp_path):
    size = write_model(tmp_path, QWEN3_06B | {"num_hidden_layers": 1, "vocab_size": 4096})
    assert size > 4 * OTHER_READS
    forget(tmp_path)
    each = run_ranks(load, (tmp_path, "ahead"), 2, "cpu")
    assert all(rank["own_bytes"] > 0.99 * size for rank in each)
    assert sum(rank["disk_bytes"] for rank in each) < size + OTHER_READS  # 0 where files live in memory
