"""Answers on disk: several ranks, cut lines, lines of others."""

import pytest

from tide_megatron.base.errors import DataError
from tide_megatron.tasks.answers import AnswerFile, count_answers, read_answers


def write(folder, rank, *names):
    file = AnswerFile(folder, rank)
    file.add({"name": name, "reply": f"{name} ü\n"} for name in names)
    file.close()


def test_all_ranks_files_are_read(tmp_path):
    write(tmp_path, 1, "c", "a")
    write(tmp_path, 0, "b")
    write(tmp_path, 0, "d")
    assert list(read_answers(tmp_path)) == ["a", "b", "c", "d"]
    assert read_answers(tmp_path)["a"] == {"name": "a", "reply": "a ü\n"}
    assert count_answers(tmp_path) == 4
    assert read_answers(tmp_path / "nothing") == {}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_cut_line_is_no_answer_and_goes_when_the_file_grows(tmp_path, cut):
    write(tmp_path, 0, "a", "a longer name than the next one's")
    file = tmp_path / "answers-0000.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    assert list(read_answers(tmp_path)) == ["a"]
    write(tmp_path, 0, "c")
    assert list(read_answers(tmp_path)) == ["a", "c"]
    assert file.read_bytes().endswith(b"\n")


def test_a_line_of_others_is_named(tmp_path):
    write(tmp_path, 3, "a")
    file = tmp_path / "answers-0003.jsonl"
    file.write_text(file.read_text() + "[1]\n")
    with pytest.raises(DataError, match=r"answers-0003\.jsonl, line 2: no answer of ours; remove the line"):
        read_answers(tmp_path)
