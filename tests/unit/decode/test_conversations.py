"""Prompts from JSON lines, and what is no prompt."""

import json

import pytest

from tide_megatron.base.errors import DataError
from tide_megatron.decode.conversations import conversation, digest_of, read_conversations

USER, SYSTEM = {"role": "user", "content": "a"}, {"role": "system", "content": "s"}
REPLY = {"role": "assistant", "content": "b"}


def write(folder, *records):
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records) + "\n")
    return file


def test_prompts_and_messages(tmp_path):
    file = write(
        tmp_path,
        {"prompt": "x", "id": "first"},
        "",
        {"messages": [SYSTEM, USER, REPLY, USER], "id": 7},
        {"messages": [USER, REPLY], "source": "of another tool"},
    )
    found = read_conversations(file, system="t")
    assert [one.id for one in found] == ["first", 7, None]
    assert found[0] == read_conversations(write(tmp_path, {"prompt": "x", "id": "first"}), "t")[0]
    assert found[0].messages == conversation("x", "t").messages
    assert [message["role"] for message in found[1].messages] == ["system", "user", "assistant", "user"]
    assert found[1].messages[0]["content"] == "s", "its own system prompt stays"
    assert [message["content"] for message in found[2].messages] == ["t", "a"], "asked without its reply"
    assert digest_of(found) != digest_of(found[:2])
    assert digest_of(found[:1]) != digest_of(read_conversations(write(tmp_path, {"prompt": "x"}), "t"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: Expecting"),
        ("[]", "no object"),
        ({"text": "x"}, "neither prompt nor messages"),
        ({"prompt": "x", "messages": [USER]}, "both prompt and messages"),
        ({"prompt": 3}, "no list of messages with a role"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "no list of messages with a role"),
        ({"messages": "x"}, "no list of messages"),
        ({"messages": []}, "no message of the user's"),
        ({"messages": [REPLY]}, "no message of the user's"),
        ({"prompt": "x", "id": [1]}, "id is [1]"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_lines_that_are_no_prompts_are_named(tmp_path, line, said):
    with pytest.raises(DataError) as caught:
        read_conversations(write(tmp_path, {"prompt": "x"}, line))
    assert "prompts.jsonl, line 2: " in str(caught.value)
    assert said in str(caught.value)


def test_files_without_prompts(tmp_path):
    with pytest.raises(DataError, match="is not there"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="it is no file"):
        read_conversations(tmp_path)
    with pytest.raises(DataError, match="has no line"):
        read_conversations(write(tmp_path, ""))
