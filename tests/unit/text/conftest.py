"""Real tokenizers, written and loaded once for all tests of the text layer."""

import pytest

from tests.real_tokenizers import (
    write_cl100k,
    write_deepseek,
    write_metaspace,
    write_qwen3,
    write_sentencepiece,
)
from tide_megatron.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def real_folders(tmp_path_factory):
    """Return the folder of each real tokenizer by name."""
    root = tmp_path_factory.mktemp("real")
    return {
        "qwen3": write_qwen3(root / "qwen3"),
        "cl100k": write_cl100k(root / "cl100k"),
        "deepseek": write_deepseek(root / "deepseek"),
        "sentencepiece": write_sentencepiece(root / "sentencepiece"),
        "metaspace": write_metaspace(root / "metaspace", legacy=False),
        "metaspace_legacy": write_metaspace(root / "metaspace_legacy", legacy=True),
    }


@pytest.fixture(scope="session")
def real(real_folders):
    """Return each real tokenizer by name; those whose folders have no chat template have none."""
    return {name: Tokenizer.load(folder, add_mask=True) for name, folder in real_folders.items()}
