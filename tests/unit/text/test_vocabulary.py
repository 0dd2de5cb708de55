"""When ids of two tokenizers are the same bytes, and what is said when they are not."""

import json
import re

import pytest

from tests.small_tokenizer import write_tokenizer
from tide_megatron.base.errors import ConfigError
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.text.vocabulary import differing_ids, require_shared


def load(folder, change=lambda content: None, **options):
    """Load the small tokenizer after a change to its tokenizer.json."""
    write_tokenizer(folder, **{key: options.pop(key) for key in ("special",) if key in options})
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.load(folder, **options)


def swap(first, second):
    def change(content):
        entries = content["model"]["vocab"]
        left, right = (spelling for spelling, token in entries.items() if token in (first, second))
        entries[left], entries[right] = entries[right], entries[left]

    return change


def rename(old, new):
    def change(content):
        for token in content["added_tokens"]:
            token["content"] = new if token["content"] == old else token["content"]
        entries = content["model"]["vocab"]
        entries[new] = entries.pop(old)

    return change


def forget_last(content):
    entries = content["model"]["vocab"]
    last = max(entries, key=entries.get)
    del entries[last]
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != last]


@pytest.fixture
def student(tmp_path):
    return load(tmp_path / "student")


def test_copies_agree_everywhere(student, tmp_path):
    teacher = load(tmp_path / "teacher")
    assert differing_ids(student, teacher, student.vocabulary_size) == []
    require_shared(student, teacher, student.vocabulary_size, "losses.kl")


def test_two_swapped_entries_are_found_and_named_with_their_bytes(student, tmp_path):
    teacher = load(tmp_path / "teacher", swap(50, 60))
    assert differing_ids(student, teacher, student.vocabulary_size) == [50, 60]
    left, right = student.token_bytes(50), teacher.token_bytes(50)
    said = (
        f"losses.kl: 2 of the first 312 ids are different bytes in {student.name} and {teacher.name} "
        f"(id 50: {left!r} against {right!r}); set shared_vocab_size to 50 or less"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        require_shared(student, teacher, student.vocabulary_size, "losses.kl")


def test_only_the_compared_ids_count(student, tmp_path):
    teacher = load(tmp_path / "teacher", swap(50, 60))
    require_shared(student, teacher, 50, "losses.kl")
    assert differing_ids(student, teacher, 51) == [50]


def test_an_id_that_one_side_lacks_differs(student, tmp_path):
    teacher = load(tmp_path / "teacher", forget_last)
    assert teacher.vocabulary_size == student.vocabulary_size - 1
    last = student.vocabulary_size - 1
    assert differing_ids(student, teacher, student.vocabulary_size) == [last]
    assert differing_ids(teacher, student, student.vocabulary_size) == [last]


def test_ids_that_nobody_has_agree(student, tmp_path):
    assert differing_ids(student, load(tmp_path / "teacher"), student.vocabulary_size + 8) == []


def test_mask_tokens_may_be_spelt_differently(student, tmp_path):
    teacher = load(tmp_path / "teacher", rename("<|mask|>", "[MASK]"), mask="[MASK]")
    assert teacher.mask_id == student.mask_id
    assert differing_ids(student, teacher, student.vocabulary_size) == []


def test_other_special_tokens_may_not(student, tmp_path):
    teacher = load(tmp_path / "teacher", rename("<|im_start|>", "[START]"))
    assert differing_ids(student, teacher, student.vocabulary_size) == [student.encode("<|im_start|>")[0]]


def test_a_mask_token_added_behind_the_vocabulary_is_exempt(tmp_path):
    special = ("<|pad|>", "<|im_start|>", "<|im_end|>")
    student = load(tmp_path / "student", special=special)
    teacher = load(tmp_path / "teacher", special=special, mask="[MASK]")
    assert student.mask_was_added
    assert differing_ids(student, teacher, student.vocabulary_size) == []
