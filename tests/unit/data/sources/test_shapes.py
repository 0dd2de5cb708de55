"""Rows of the usual shapes become the records that stand here; what fits none, or two, is refused by name."""

import json

import pytest
from pydantic import ValidationError

from tide_megatron.base.errors import DataError, RecordError
from tide_megatron.data.sources.choice import ColumnNames, SourceChoice
from tide_megatron.data.sources.opening import find_sources
from tide_megatron.data.sources.record import parse_record
from tide_megatron.data.sources.shapes import RowMapping

ASK, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
CALL = {"name": "f", "arguments": {"x": 1}}


def record(row, **options):
    return RowMapping(SourceChoice(path="x", **options)).record(row)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [ASK, REPLY], "prompt": "a", "id": 3}, [ASK, REPLY]),
        ({"prompt": "a", "response": "b"}, [ASK, REPLY]),
        ({"prompt": "a", "completion": "b"}, [ASK, REPLY]),
        ({"prompt": [ASK], "completion": [REPLY]}, [ASK, REPLY]),
        ({"prompt": [SYSTEM, ASK], "completion": "b"}, [SYSTEM, ASK, REPLY]),
        ({"instruction": "a", "output": "b", "tag": "t", "code": "c", "testcase": ["d"]}, [ASK, REPLY]),
        ({"instruction": "a", "response": "b"}, [ASK, REPLY]),
        ({"instruction": "a", "input": "", "output": "b"}, [ASK, REPLY]),
        ({"instruction": "a", "input": None, "output": "b"}, [ASK, REPLY]),
        ({"instruction": "a", "input": "i", "output": "b"}, [{**ASK, "content": "a\n\ni"}, REPLY]),
        ({"instruction": "a", "context": "i", "response": "b"}, [{**ASK, "content": "a\n\ni"}, REPLY]),
        ({"instruction": "", "input": "a", "output": "b"}, [ASK, REPLY]),
        ({"instruction": "a", "output": "b", "system": "s"}, [SYSTEM, ASK, REPLY]),
        ({"instruction": "a", "output": "b", "history": [["a", "b"]]}, [ASK, REPLY, ASK, REPLY]),
        ({"system_prompt": "s", "question": "a", "response": "b"}, [SYSTEM, ASK, REPLY]),
        ({"question": "a", "answer": "b"}, [ASK, REPLY]),
        ({"query": "a", "response": "b"}, [ASK, REPLY]),
        ({"conversations": TURNS}, [ASK, REPLY]),
        ({"conversations": json.dumps(TURNS)}, [ASK, REPLY]),
        ({"conversations": TURNS, "system": "s"}, [SYSTEM, ASK, REPLY]),
        ({"conversations": TURNS, "system": ""}, [ASK, REPLY]),
        ({"conversations": [{"from": "system", "value": "s"}, *TURNS], "system": "s"}, [SYSTEM, ASK, REPLY]),
        ({"conversations": [ASK, REPLY]}, [ASK, REPLY]),
        ({"conversation": TURNS}, [ASK, REPLY]),
        ({"messages": TURNS}, [ASK, REPLY]),
        ({"messages": [ASK, {**REPLY, "weight": 1}]}, [ASK, {**REPLY, "weight": 1}]),
        (
            {"conversations": [TURNS[0], {"from": "function_call", "value": json.dumps(CALL)}]},
            [ASK, {"role": "assistant", "tool_calls": [CALL]}],
        ),
        (
            {"conversations": [*TURNS, {"from": "observation", "value": "o"}]},
            [ASK, REPLY, {"role": "tool", "content": "o"}],
        ),
    ],
)
def test_shapes_are_told_by_their_columns(row, messages):
    assert record(row)["messages"] == messages


def test_what_says_something_travels_on_and_is_used_or_refused():
    row = {"prompt": "a", "response": "b", "tools": [CALL], "source": "web", "lang": "de", "weight": 1}
    found = record(row)
    assert found == {"messages": [ASK, REPLY], "tools": [CALL], "source": "web", "weight": 1}
    for key, value in {"images": ["x"], "functions": [CALL], "weight": 0}.items():
        with pytest.raises(RecordError, match=key):
            parse_record(json.dumps(record(row | {key: value})).encode())
    unread = record({"messages": [ASK, REPLY], "system": "s"})
    with pytest.raises(RecordError, match="system is not read here"):
        parse_record(json.dumps(unread).encode())


@pytest.mark.parametrize(
    ("options", "row", "expected"),
    [
        (
            {"columns": ColumnNames(prompt="ask", response="said", system="sys", input="more")},
            {"ask": "a", "said": "b", "sys": "s", "more": "i", "prompt": "x", "messages": []},
            {"messages": [SYSTEM, {**ASK, "content": "a\n\ni"}, REPLY]},
        ),
        (
            {"columns": ColumnNames(messages="log", role="who", content="text"), "roles": {"me": "user"}},
            {"log": [{"who": "me", "text": "a"}, {"who": "assistant", "text": "b"}]},
            {"messages": [ASK, REPLY]},
        ),
        (
            {"columns": ColumnNames(tools="functions", source="origin")},
            {"messages": [ASK, REPLY], "functions": [CALL], "origin": "x", "source": "y"},
            {"messages": [ASK, REPLY], "tools": [CALL], "source": "x"},
        ),
        (
            {"columns": ColumnNames(system="persona")},
            {"messages": [ASK, REPLY], "persona": "s"},
            {"messages": [SYSTEM, ASK, REPLY]},
        ),
        ({"system_prompt": "s"}, {"messages": [ASK, REPLY]}, {"messages": [SYSTEM, ASK, REPLY]}),
        (
            {"system_prompt": "t"},
            {"messages": [SYSTEM, ASK, REPLY]},
            {"messages": [SYSTEM, ASK, REPLY]},
        ),
        (
            {"name": "mine"},
            {"messages": [ASK, REPLY], "source": "web"},
            {"messages": [ASK, REPLY], "source": "mine"},
        ),
        (
            {"shape": "prompt_response"},
            {"instruction": "x", "output": "y", "prompt": "a", "response": "b"},
            {"messages": [ASK, REPLY]},
        ),
        ({"roles": {"human": "tool"}}, {"messages": TURNS}, {"messages": [{**ASK, "role": "tool"}, REPLY]}),
    ],
)
def test_columns_can_be_named(options, row, expected):
    assert record(row, **options) == expected


@pytest.mark.parametrize(
    ("options", "row", "said"),
    [
        ({}, {"text": "a"}, "no messages: columns text; known are messages (messages); sharegpt"),
        ({}, {}, "no messages: no columns"),
        ({}, {"prompt": "a", "chosen": "b"}, "columns chosen, prompt"),
        (
            {},
            {"instruction": "a", "output": "b", "prompt": "c", "response": "d"},
            "can be read as instruction or prompt_response: choose a shape",
        ),
        ({}, {"prompt": "a", "response": "b", "completion": "c"}, "response and completion can be one thing"),
        ({}, {"question": "a", "answer": "b", "input": "c", "context": "d"}, "input and context can be one"),
        ({"shape": "sharegpt"}, {"messages": [ASK]}, "shape sharegpt needs conversations or conversation"),
        ({"columns": ColumnNames(messages="log")}, {"chat": []}, "no column 'log', which columns.messages"),
        ({}, {"prompt": "a", "input": 3, "response": "b"}, "column 'input': only text"),
        ({}, {"messages": "hello"}, "text that is no JSON list of messages"),
        ({}, {"messages": 3}, "no list of messages"),
        ({}, {"messages": {"role": ["user"], "content": []}}, "no list of messages"),
        ({}, {"instruction": "a", "output": "b", "history": [["x"]]}, "pairs of prompt and reply"),
        (
            {},
            {"conversations": [{"from": "function_call", "value": "f(x)"}]},
            "function_call: text that is no",
        ),
        ({}, {"conversations": [{"from": "system", "value": "t"}, *TURNS], "system": "s"}, "keep one"),
    ],
)
def test_what_fits_no_shape_is_refused(options, row, said):
    with pytest.raises(RecordError) as caught:
        record(row, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(caught.value.kind) < 80


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": 3, "response": "b"}, "the user's content is a number"),
        ({"prompt": "a", "response": None}, "the assistant's content is empty"),
        ({"prompt": "a", "response": ""}, "the assistant's content is empty"),
        ({"conversations": [*TURNS, TURNS[0]]}, "no reply: the last message must be the assistant's"),
        ({"conversations": [{"from": "alien", "value": "a"}, TURNS[1]]}, "unknown role 'alien'"),
        ({"conversations": ["a", "b"]}, "message 1: must be an object"),
        ({"messages": None}, "no messages"),
    ],
)
def test_what_a_shape_leaves_to_the_record_is_refused_there(row, said):
    with pytest.raises(RecordError, match=said):
        parse_record(json.dumps(record(row)).encode())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"columns": {"prompt": "a"}}, "prompt and response belong together"),
        ({"columns": {"prompt": "a", "response": "b", "messages": "c"}}, "two places for one conversation"),
        ({"columns": {"messages": "c"}, "shape": "sharegpt"}, "a shape, not both"),
        ({"roles": {"human": "customer"}}, "customer is no role"),
        ({"take_seed": 3}, "take_seed: goes with take"),
        ({"revision": "abc"}, "only a data set on the hub"),
    ],
)
def test_choices_that_cannot_be_are_refused(words, said):
    with pytest.raises(ValidationError, match=said):
        SourceChoice(path="x", **words)


def lines_of(tmp_path, *rows, **options):
    (tmp_path / "a").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    [source] = find_sources([SourceChoice(path=str(tmp_path / "a"), **options)]).open()
    return source, [line for _, line in source.lines()]


def test_json_lines_with_messages_are_handed_on_as_they_stand(tmp_path):
    text = '{"messages":  [ {"role": "user"} ]}'
    source, lines = lines_of(tmp_path, text, "{", {"prompt": "a", "response": "b"})
    assert lines[0] == text.encode() + b"\n"
    assert isinstance(lines[1], bytes)  # refused where it is encoded
    with pytest.raises(RecordError, match="'prompt': rewrite it"):
        parse_record(lines[2])
    assert "shape" not in source.describe(3)


def test_json_lines_of_another_shape_are_told_by_their_first_record(tmp_path):
    rows = [{"prompt": "a", "response": "b"}, {"question": "a", "answer": "b"}, {"text": "x"}, "{", "[1]"]
    source, lines = lines_of(tmp_path, *rows)
    assert [json.loads(line)["messages"] for line in lines[:2]] == [[ASK, REPLY]] * 2
    assert "columns text" in str(lines[2])
    assert "not JSON" in str(lines[3])
    assert lines[4] == b"[1]"
    assert source.describe(5)["shape"] == "prompt_response question_answer"


def test_a_key_that_stands_twice_is_refused_in_every_shape(tmp_path):
    _, [fault] = lines_of(
        tmp_path, '{"prompt": "a", "response": "b", "prompt": "c"}', shape="prompt_response"
    )
    assert "the key 'prompt' stands twice" in str(fault)
    _, [fault] = lines_of(tmp_path, '{"prompt": "\\ud800", "response": "b"}', shape="prompt_response")
    assert "surrogate" in str(fault)
    _, [fault] = lines_of(tmp_path, '{"a":' * 100_000, shape="prompt_response")
    assert "nested too deep" in str(fault)


def test_shards_of_one_source_have_one_shape(tmp_path):
    from tests.small_tables import chat, write_parquet

    write_parquet(tmp_path / "s/a.parquet", [chat(1)])
    write_parquet(tmp_path / "s/b.parquet", [{"prompt": "a", "response": "b"}])
    first, second = find_sources([tmp_path / "s"]).open()
    first.check()
    with pytest.raises(
        DataError, match=r"b\.parquet: has the shape prompt_response, .*a\.parquet has messages"
    ):
        second.check()
