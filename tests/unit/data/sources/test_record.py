"""Records: what a line may be, what of it is used, and what is refused by name."""

import json

import pytest

from tide_megatron.base.errors import ConfigError, RecordError
from tide_megatron.data.sources.record import Learn, Reading, parse_record
from tide_megatron.text.templates import Inputs

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 7}'


def line(*messages):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]})


def read(text, **options):
    return parse_record(text if isinstance(text, bytes) else text.encode(), Reading(**options))


def record(*, last=None, **keys):
    """Return a record's line; `last` adds to its reply."""
    reply = {"role": "assistant", "content": "b"} | (last or {})
    return json.dumps({"messages": [{"role": "user", "content": "a"}, reply], **keys})


def test_a_record_has_its_messages():
    found = read(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n")
    assert found.messages == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert found.inputs == Inputs()
    assert found.source is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"{", "not JSON"),
        (b"[]", "no messages"),
        (b"{}", "no messages"),
        (b'{"conversations": [{"from": "human"}]}', "this one has 'conversations': rewrite it"),
        (b'{"messages": []}', "no messages"),
        (b'{"messages": ["hi"]}', "message 1: must be an object"),
        (
            line(("user", "a"), ("asistant", "b")),
            "message 2: unknown role 'asistant': did you mean 'assistant'?",
        ),
        (line(("user", "a"), (None, "b")), "unknown role None"),
        (line(("user", "a"), ("assistant", " \n")), "the assistant's content is empty"),
        (line(("user", ""), ("assistant", "b")), "message 1: the user's content is empty"),
        (line(("user", 3), ("assistant", "b")), "the user's content is a number"),
        (line(("user", {"a": 1}), ("assistant", "b")), "the user's content is an object"),
        (line(("user", True), ("assistant", "b")), "the user's content is true or false"),
        (line(("function", "a"), ("assistant", "b")), "unknown role 'function': write it as role tool"),
        (line(("tool", [{"type": "text"}]), ("assistant", "b")), "a part without text"),
        (line(("user", [1]), ("assistant", "b")), "a part without text"),
        (line(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "b")), "type 'image_url'"),
        (line(("user", []), ("assistant", "b")), "the user's content is empty"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        (GOOD.replace("7}", "[" * 900 + "]" * 900 + "}"), None),
        (GOOD.replace("7}", "NaN}"), "NaN is no JSON number"),
        (GOOD.replace("7}", '7, "id": 8}'), "the key 'id' stands twice"),
        (GOOD.replace('"b"}', '"b", "content": "c"}'), "the key 'content' stands twice"),
        (GOOD.replace("7}", '"\\ud800"}'), "half of a surrogate pair"),
        ("[" + GOOD + "]", "an array"),
        (line(("user", "a")), "no reply"),
        (line(("user", "a"), ("assistant", "b"), ("user", "c")), "no reply"),
        (line(("assistant", "b")), "a reply without a request"),
        (line(("user", "a"), ("assistant", "\ud800")), "half of a surrogate pair"),
    ],
)
def test_bad_lines_are_named(bad, message):
    if message is None:
        assert len(read(bad).messages) == 2
        return
    with pytest.raises(RecordError) as caught:
        read(bad)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert 0 < len(caught.value.kind) < 80


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (record(last={"weight": 0}), "message 2: weight 0: leave the record out"),
        (record(last={"weight": False}), "message 2: weight false"),
        (record(last={"train": False}), "message 2: train false"),
        (record(last={"training": 0}), "message 2: training 0"),
        (record(last={"weight": 0.5}), "weight is 0.5: only 0 and 1"),
        (record(last={"weight": "1"}), "weight is '1'"),
        (record(weight=0), "the record: weight 0"),
        (
            record(last={"function_call": {"name": "f"}}),
            "function_call is not read here: write it as tool_calls",
        ),
        (record(last={"images": ["x.png"]}), "images is not read here: only text"),
        (record(last={"refusal": "no"}), "refusal is not read here"),
        (record(last={"prefix": True}), "prefix is not read here"),
        (record(functions=[{"name": "f"}]), "functions is not read here: write them as tools"),
        (record(system="Be brief."), "system is not read here: make it the first message"),
        (record(images=["x.png"]), "images is not read here"),
        (record(enable_thinking=True), "chat_template_kwargs"),
        (record(tools={"name": "f"}), "tools: must be a list of objects, not an object"),
        (record(tools="[{"), "tools: text that is no JSON"),
        (record(documents=["text"]), "documents: must be a list of objects"),
        (record(chat_template_kwargs=[1]), "chat_template_kwargs: must be an object, not a list"),
        (record(last={"tool_calls": "add(1)"}), "message 2: tool_calls must be"),
        (record(last={"tool_calls": [{"name": 3}]}), "message 2: tool_calls must be"),
        (record(last={"tool_calls": [{"name": "f", "arguments": 3}]}), "arguments of a tool call"),
        (record(last={"reasoning_content": ["x"]}), "reasoning_content is a list"),
        (record(last={"thinking": "x", "reasoning_content": "y"}), "reasoning_content and thinking differ"),
        (record(last={"content": None}), "message 2: the assistant's content is empty"),
    ],
)
def test_what_would_be_dropped_is_refused(text, message):
    with pytest.raises(RecordError) as caught:
        read(text)
    assert message in str(caught.value)


ALL = {"learn": Learn.ALL}
TURNS = [
    ("user", "a"),
    ("assistant", "b"),
    ("user", "c"),
    ("assistant", "d"),
    ("user", "e"),
    ("assistant", "f"),
]


def turns(**keys):
    """Return TURNS as a line; `m2={"weight": 1}` says more about the second message."""
    messages = [{"role": role, "content": content} for role, content in TURNS]
    for name, more in keys.items():
        messages[int(name[1:]) - 1] |= more
    return json.dumps({"messages": messages})


def test_replies_to_learn():
    assert read(turns()).learnt == (5,)
    assert read(turns(), **ALL).learnt == (1, 3, 5)
    assert read(turns(m2={"weight": 0}, m4={"weight": 1}), **ALL).learnt == (3, 5)
    assert read(turns(m2={"train": False}, m4={"loss": 0.0}, m6={"weight": 1}), **ALL).learnt == (5,)
    greeting = line(("assistant", "hello"), *TURNS)
    with pytest.raises(RecordError, match="message 1: a reply without a request"):
        read(greeting, **ALL)
    assert read(greeting).learnt == (6,)


def test_an_unknown_choice_of_replies_is_refused():
    assert Reading.of(normalize=True, learn="all") == Reading(normalize=True, learn=Learn.ALL)
    with pytest.raises(ConfigError, match="learn: 'every' is unknown"):
        Reading.of(normalize=True, learn="every")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"m1": {"weight": 1}}, "message 1: weight 1: only replies are learnt"),
        ({"m6": {"weight": 0}}, "message 6: weight 0: leave the record out"),
        (
            {"m2": {"weight": 0, "train": 1}},
            "message 2: train 1: only replies are learnt, and it is none, or",
        ),
        ({"m2": {"weight": 0.5}}, "message 2: weight is 0.5: only 0 and 1"),
    ],
)
def test_weights_that_contradict_learning_all(keys, message):
    with pytest.raises(RecordError, match=message):
        read(turns(**keys), **ALL)


def test_weights_of_other_messages_must_say_what_is_done():
    def chat(**first):
        roles = ({"role": "user"}, {"role": "assistant", **first}, {"role": "user"}, {"role": "assistant"})
        return json.dumps({"messages": [{"content": "x", **role} for role in roles]})

    for said in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": None}, {}):
        assert "weight" not in read(chat(**said)).messages[1]
    with pytest.raises(RecordError, match="message 2: weight 1: only the last reply is learnt"):
        read(chat(weight=1))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"tools": [{"name": "f"}]}, Inputs(tools=[{"name": "f"}])),
        ({"tools": '[{"name": "f"}]'}, Inputs(tools=[{"name": "f"}])),
        ({"tools": None}, Inputs()),
        ({"tools": []}, Inputs(tools=[])),
        ({"documents": [{"text": "x"}]}, Inputs(documents=[{"text": "x"}])),
        ({"chat_template_kwargs": {"a": True}}, Inputs(chat_template_kwargs={"a": True})),
        ({"system": "", "images": [], "function_call": None, "weight": 1, "loss": 0.53}, Inputs()),
        ({"id": 1, "lang": "de", "prompt": "a", "metadata": {"x": [1]}}, Inputs()),
    ],
)
def test_what_a_record_says_reaches_its_template(keys, expected):
    assert read(record(**keys)).inputs == expected


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({"content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}, {"content": "a b"}),
        ({"content": ["a", {"text": "b", "cache_control": {}}]}, {"content": "ab"}),
        ({"content": None, "tool_calls": [CALL]}, {"tool_calls": [CALL]}),
        (
            {"content": "", "tool_calls": [CALL["function"]]},
            {"content": "", "tool_calls": [CALL["function"]]},
        ),
        ({"tool_calls": []}, {"content": "b"}),
        ({"reasoning_content": "r"}, {"content": "b", "reasoning_content": "r"}),
        ({"thinking": "r"}, {"content": "b", "thinking": "r", "reasoning_content": "r"}),
        (
            {"reasoning": "r", "reasoning_content": "r"},
            {"content": "b", "reasoning": "r", "reasoning_content": "r"},
        ),
        ({"reasoning_content": None, "weight": 1, "refusal": None}, {"content": "b"}),
        ({"name": "bot", "id": 3}, {"content": "b", "name": "bot", "id": 3}),
    ],
)
def test_what_a_message_says_is_kept(last, expected):
    assert read(record(last=last)).messages[1] == {"role": "assistant", **expected}


def test_a_tool_may_say_nothing_and_only_the_assistant_calls_it():
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "y"},
    ]
    assert [m["role"] for m in read(json.dumps({"messages": messages})).messages] == [
        *("user", "assistant", "tool", "assistant")
    ]
    messages[0]["tool_calls"] = [CALL]
    with pytest.raises(RecordError, match="message 1: tool_calls of the user"):
        read(json.dumps({"messages": messages}))


def test_a_system_key_that_repeats_the_first_message_says_nothing_new():
    messages = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    assert len(read(json.dumps({"messages": messages, "system": "x"})).messages) == 3


@pytest.mark.parametrize(
    ("value", "name"),
    [("web", "web"), ("", None), (None, None), (3, "3"), ({"b": 1, "a": 2}, '{"a": 2, "b": 1}')],
)
def test_a_record_names_its_source(value, name):
    assert read(record(source=value)).source == name


def test_all_text_can_be_put_into_nfc():
    loose, composed = "u\u0308", "\u00fc"
    line = record(last={"content": [loose], "reasoning_content": loose}, tools=[{loose: loose}], source=loose)
    found = parse_record(line.encode(), Reading(normalize=True))
    assert found.messages[1]["content"] == found.messages[1]["reasoning_content"] == composed
    assert found.inputs.tools == [{composed: composed}]
    assert parse_record(line.encode(), Reading()).messages[1]["content"] == loose
