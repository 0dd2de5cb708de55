"""Records: what a line may be, and that every complaint names file and line."""

import json

import pytest

from tide_megatron.base.errors import DataError
from tide_megatron.data.record import read_records

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 7}'


def line(*messages):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]})


def test_records_know_their_messages_and_place(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\n   \n" + GOOD.encode())
    records = list(read_records(file))
    assert [record.place for record in records] == [f"{file}:1", f"{file}:4"]
    assert records[1].messages == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert records[1].size_bytes == len(GOOD)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"{", "not JSON"),
        (b"[]", "no messages"),
        (b"{}", "no messages"),
        (b'{"messages": []}', "no messages"),
        (b'{"messages": ["hi"]}', "message 1: must be an object"),
        (
            line(("user", "a"), ("asistant", "b")),
            "message 2: unknown role 'asistant': did you mean 'assistant'?",
        ),
        (line(("user", "a"), (None, "b")), "unknown role None"),
        (line(("user", "a"), ("assistant", " \n")), "the assistant's content is empty"),
        (line(("user", ""), ("assistant", "b")), "message 1: the user's content is empty"),
        (line(("user", 3), ("assistant", "b")), "the user's content is empty"),
        (line(("user", "a")), "no reply"),
        (line(("user", "a"), ("assistant", "b"), ("user", "c")), "no reply"),
        (line(("assistant", "b")), "a reply without a request"),
        (line(("user", "a"), ("assistant", "\ud800")), "half of a surrogate pair"),
    ],
)
def test_bad_lines_are_named(tmp_path, bad, message):
    file = tmp_path / "chats.jsonl"
    file.write_bytes(GOOD.encode() + b"\n" + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n")
    with pytest.raises(DataError) as caught:
        list(read_records(file))
    assert str(caught.value).startswith(f"{file}:2: ")
    assert message in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(tmp_path))
