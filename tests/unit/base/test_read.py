"""Whatever stands under a small file's name: its value, or one short reason."""

import os

import pytest

from tide_megatron.base.read import doubled_key, json_of, text_of


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ('{"a": "\u00e4"}', {"a": "\u00e4"}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        ('["\\\\ud800"]', ["\\ud800"]),
        ("[1, null, NaN]", None),
        ('{"a": 1, "a": 2}', {"a": 2}),
    ],
)
def test_what_is_json_is_read(tmp_path, content, value):
    (tmp_path / "x.json").write_text(content)
    found = json_of(tmp_path / "x.json")
    assert value is None or found == value


def a_pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(), "it is no file"),
        (a_pipe, "it is no file"),
        (lambda path: path.write_bytes("[1]".encode("utf-16")), "no UTF-8 text, from byte 0 on"),
        (lambda path: path.write_bytes(b'["\xe4"]'), "no UTF-8 text, from byte 2 on"),
        (lambda path: path.write_text("[" * 200_000), "nested too deep"),
        (lambda path: path.write_text('{"a": ["\\ud800"]}'), "half of a surrogate pair"),
        (lambda path: path.write_text('{"\\uDFFF": 1}'), "half of a surrogate pair"),
        (lambda path: path.write_text('["\\ude00\\ud83d"]'), "half of a surrogate pair"),
        (lambda path: path.write_text("{"), "Expecting"),
        (lambda path: path.write_text(""), "Expecting value"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
)
def test_what_is_not_has_a_reason(tmp_path, make, reason):
    make(tmp_path / "x.json")
    with pytest.raises(ValueError, match=reason):
        json_of(tmp_path / "x.json")


def test_a_missing_file_is_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError):
        text_of(tmp_path / "x.json")


def test_the_first_doubled_key_is_found():
    assert doubled_key([("a", 1), ("b", 2), ("b", 3), ("a", 4)]) == "a"
    assert doubled_key([("a", 1), ("b", 2)]) is None
