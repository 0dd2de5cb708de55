"""What chat templates see, held against the renderer of transformers on the same folders."""

import json

import pytest

from tests.small_tokenizer import CHATML, write_tokenizer
from tide_megatron.base.errors import ConfigError, DataError, RecordError
from tide_megatron.text.chat import encode_chat
from tide_megatron.text.templates import Inputs
from tide_megatron.text.tokenizer import Tokenizer

TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Zürich <b>", "parameters": {"b": 1}}}
]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALLED = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "c1"},
    {"role": "assistant", "reasoning_content": "so", "content": "two"},
]
AGENT = """{%- if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {{- '<|im_start|>assistant\n' }}
    {%- if m.reasoning_content is string and loop.index0 > ns.last %}
      {{- '<think>\n' + m.reasoning_content.strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {%- generation %}{{ m.content | default('') }}
      {%- for call in m.tool_calls or [] %}
        {%- set call = call.function if call.function else call %}
        {{- '\n<tool_call>\n{"name": "' ~ call.name }}
        {{- '", "arguments": ' ~ call.arguments | tojson ~ '}\n</tool_call>' }}
      {%- endfor %}
    {%- endgeneration %}
    {{- '<|im_end|>\n' }}
  {%- elif m.role == 'tool' %}
    {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
  {%- else %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
"""As agents' templates are: tools, calls, answers of tools, reasoning behind the last question only."""
SEEN = (
    "{{ tools is defined }}{{ tools is none }}{{ documents is defined }}{{ documents is none }}"
    "{{ bos_token is defined }}{{ add_generation_prompt }}{{ cls_token is defined }}"
)


def written(folder, template, config=None, files=None):
    """Write a tokenizer folder with a template, entries of its configuration, and files beside it."""
    write_tokenizer(
        folder, chat_template=template, tokenizer_class="PreTrainedTokenizerFast", **(config or {})
    )
    for name, content in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def theirs(folder, messages, **options):
    """Render with transformers; special tokens that we always have are given to both sides."""
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def case(template, messages=ASKED, *, config=None, files=None, **options):
    """Return a template, what is in its folder, and what it is given."""
    return template, config, files, messages, options


CASES = {
    "what is always defined": case(SEEN),
    "tools": case("{{ tools | tojson }}{{ documents is none }}", tools=TOOLS),
    "empty tools": case("{% if tools is not none %}T{% endif %}{% if tools %}U{% endif %}", tools=[]),
    "documents": case("{% for d in documents %}{{ d.text }}{% endfor %}", documents=[{"text": "x"}]),
    "named tokens": case(
        "{{ bos_token }}{{ image_token }}", config={"bos_token": "<|pad|>", "image_token": "<|mask|>"}
    ),
    "a token as an object": case(
        "{{ bos_token }}", config={"bos_token": {"content": "<|pad|>", "__type": "AddedToken"}}
    ),
    "a null token": case("{{ bos_token }}{{ bos_token is defined }}", config={"bos_token": None}),
    "extra tokens": case(
        "{{ image_token }}{{ boi }}",
        config={"extra_special_tokens": {"image_token": "<|pad|>", "boi": "<|mask|>"}},
    ),
    "extra tokens without names": case("{{ boi is defined }}", config={"extra_special_tokens": ["<|pad|>"]}),
    "the map": case("{{ bos_token }}", files={"special_tokens_map.json": {"bos_token": "<|pad|>"}}),
    "the map before the configuration": case(
        "{{ bos_token }}",
        config={"bos_token": "<|mask|>"},
        files={"special_tokens_map.json": {"bos_token": {"content": "<|pad|>"}}},
    ),
    "no map beside added tokens": case(
        "{{ bos_token is defined }}",
        config={"added_tokens_decoder": {}},
        files={"special_tokens_map.json": {"bos_token": "<|pad|>"}},
    ),
    "a file before the configuration": case(
        "no", files={"chat_template.jinja": "{{ messages[0].content }}\n"}
    ),
    "a list": case(
        [{"name": "default", "template": "D{{ tools is none }}"}, {"name": "tool_use", "template": "T"}]
    ),
    "a list with tools": case(
        [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T{{ tools | length }}"}],
        tools=TOOLS,
    ),
    "files with tools": case(
        "no",
        files={
            "chat_template.jinja": "D",
            "additional_chat_templates/tool_use.jinja": "T{{ tools | length }}",
        },
        tools=TOOLS,
    ),
    "loop controls": case("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}"),
    "generation": case(
        "{% for m in messages %}{%- generation -%} {{ m.content }}x {% set y = 1 %}"
        "{% endgeneration %}{{ y }}\n{% endfor %}"
    ),
    "json": case(
        "{{ messages | tojson(indent=2, sort_keys=true) }}{{ '<ü>' | tojson(ensure_ascii=true) }}"
        "{{ [1, 2] | tojson(separators=(',', ':')) }}"
    ),
    "namespaces": case(
        "{% set ns = namespace(a=1, self=2) %}{% set ns.a = 3 %}{{ ns.a }}{{ dict(a=1) }}"
        "{{ dict.fromkeys(['x']) }}"
    ),
    "an option": case(
        "{{ enable_thinking }}{{ budget }}{{ effort }}", enable_thinking=True, budget=3, effort="high"
    ),
    "keys without values": case(
        "{{ 'content' in messages[1] }}{{ messages[1].content is defined }}{{ messages[1].name is defined }}",
        [ASKED[0], {"role": "assistant", "content": None, "name": None}],
    ),
    "other keys": case(
        "{{ messages[0].name }}{{ messages[0] | tojson }}", [{"role": "user", "content": "a", "name": "Eve"}]
    ),
    "names of reasoning": case(
        "{{ messages[1].thinking }}{{ messages[1].reasoning_content }}{{ messages[1].reasoning }}",
        [ASKED[0], {"role": "assistant", "content": "b", "reasoning": "r"}],
    ),
    "an agent": case(AGENT, CALLED, tools=TOOLS, enable_thinking=True),
    "an agent without thinking": case(AGENT, CALLED[:2], add_generation_prompt=True, enable_thinking=False),
}


@pytest.mark.parametrize("name", CASES)
def test_templates_see_what_they_see_under_transformers(name, tmp_path):
    template, config, files, messages, options = CASES[name]
    folder = written(tmp_path, template, config, files)
    expected = theirs(folder, messages, **options)
    inputs = {key: options[key] for key in ("tools", "documents") if key in options}
    prompted = options.get("add_generation_prompt", False)
    chosen = {k: v for k, v in options.items() if k not in (*inputs, "add_generation_prompt")}
    ours = Tokenizer.load(folder, chat_template_kwargs={"enable_thinking": None, **chosen})
    assert ours.chat.render(messages, add_generation_prompt=prompted, inputs=Inputs(**inputs)) == expected
    ours.save(tmp_path / "saved")  # a student that takes it along
    again = Tokenizer.load(tmp_path / "saved")
    assert again.digest == ours.digest
    assert theirs(tmp_path / "saved", messages, **options) == expected
    assert again.chat.render(messages, add_generation_prompt=prompted, inputs=Inputs(**inputs)) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% set ns = namespace(_a=1) %}",
        "{% set ns = namespace() %}{% set ns['_a'] = 1 %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}{{ messages.nothing.at.all }}",
        "{{ messages[7].content }}",
    ],
)
def test_what_transformers_refuses_is_refused(template, tmp_path):
    folder = written(tmp_path, template)
    with pytest.raises(Exception):  # noqa: B017, PT011  whatever Jinja raises
        theirs(folder, ASKED)
    with pytest.raises(DataError):
        Tokenizer.load(folder).chat.render(ASKED, add_generation_prompt=False)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_template_has_no_clock_until_a_date_is_fixed(tmp_path, guarded):
    call = "{{ strftime_now('%d %b %Y') }}"
    folder = written(
        tmp_path, f"{{% if strftime_now is defined %}}{call}{{% else %}}-{{% endif %}}" if guarded else call
    )
    loaded = Tokenizer.load(folder)
    if guarded:
        assert loaded.chat.render(ASKED, add_generation_prompt=False) == "-"
    else:
        with pytest.raises(RecordError, match="give the option strftime_now="):
            loaded.chat.render(ASKED, add_generation_prompt=False)
    fixed = Tokenizer.load(folder, chat_template_kwargs={"strftime_now": "2025-01-31"})
    assert fixed.chat.render(ASKED, add_generation_prompt=False) == "31 Jan 2025"
    with pytest.raises(ConfigError, match="strftime_now: 'soon' is no date"):
        Tokenizer.load(folder, chat_template_kwargs={"strftime_now": "soon"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_thinkin": True}, "reads no 'enable_thinkin': did you mean 'enable_thinking'"),
        ({"tools": []}, "tools comes from the records"),
        ({"messages": 1}, "messages comes from the records"),
        ({"enable_thinking": {1, 2}}, "is no JSON value"),
        ({"enable_thinking": float("nan")}, "is no JSON value"),
    ],
)
def test_options_that_do_nothing_are_refused(tmp_path, options, message):
    folder = written(tmp_path, AGENT)
    with pytest.raises(ConfigError, match=message):
        Tokenizer.load(folder, chat_template_kwargs=options)
    with pytest.raises(RecordError, match=message):
        encode_chat(Tokenizer.load(folder), ASKED, inputs=Inputs(chat_template_kwargs=options))
    with pytest.raises(ConfigError, match="it has no options"):
        Tokenizer.load(written(tmp_path / "b", CHATML), chat_template_kwargs={"enable_thinking": True})


def test_a_folder_keeps_its_options(tmp_path):
    loaded = Tokenizer.load(written(tmp_path, AGENT), chat_template_kwargs={"enable_thinking": True})
    loaded.save(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert kept["chat_template_kwargs"] == {"enable_thinking": True}
    back = Tokenizer.load(tmp_path / "saved", chat_template_kwargs={"enable_thinking": False})
    assert back.digest == Tokenizer.load(tmp_path).digest
    back.save(tmp_path / "plain")
    assert "chat_template_kwargs" not in (tmp_path / "plain/tokenizer_config.json").read_text()
    broken = written(tmp_path / "broken", AGENT, {"chat_template_kwargs": [1]})
    with pytest.raises(DataError, match="chat_template_kwargs: must be an object"):
        Tokenizer.load(broken)


def test_tokens_that_no_template_names_leave_the_digest_alone(tmp_path):
    plain = Tokenizer.load(written(tmp_path / "a", CHATML))
    more = written(
        tmp_path / "b",
        CHATML,
        {"extra_special_tokens": {"boi": "<|pad|>"}},
        {"special_tokens_map.json": {"cls_token": "<|pad|>"}},
    )
    assert Tokenizer.load(more).digest == plain.digest
    files = {"special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}}
    old = write_tokenizer(tmp_path / "c", eos_token=None, pad_token=None)
    (old / "special_tokens_map.json").write_text(json.dumps(files["special_tokens_map.json"]))
    assert Tokenizer.load(old).vocabulary_digest == plain.vocabulary_digest


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff\xfe"),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": ["x"]}]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": 1}]}'),
        ("tokenizer_config.json", b'{"extra_special_tokens": {"boi": 3}}'),
        ("special_tokens_map.json", b"{"),
        ("special_tokens_map.json", b"[]"),
        ("special_tokens_map.json", b'{"extra_special_tokens": {"boi": []}}'),
        ("additional_chat_templates/tool_use.jinja", b"\xff"),
    ],
)
def test_broken_files_beside_a_tokenizer_are_named(tmp_path, name, content):
    folder = written(tmp_path, None)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        Tokenizer.load(folder, eos="<|im_end|>")
    assert str(caught.value).startswith(str(folder / name))
    assert "\n" not in str(caught.value)


def test_a_conversation_with_tools_is_learnt_whole(tmp_path):
    tokenizer = Tokenizer.load(written(tmp_path, AGENT), chat_template_kwargs={"enable_thinking": True})
    inputs = Inputs(tools=TOOLS)
    answer = encode_chat(tokenizer, CALLED, inputs=inputs, aligned=True)
    text = tokenizer.decode(answer.ids[answer.prompt_tokens :], keep_special=True)
    assert text == "<think>\nso\n</think>\n\ntwo<|im_end|>\n"
    assert answer.reply_bytes == len("so") + len("two")
    assert [(content.message, content.key) for content in answer.contents] == [
        *((0, "content"), (1, "content"), (2, "reasoning_content"), (3, "content")),
        *((4, "reasoning_content"), (4, "content")),
    ]
    call = encode_chat(tokenizer, CALLED[:3], inputs=inputs)
    shown = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü"}}\n</tool_call>'
    text = tokenizer.decode(call.ids[call.prompt_tokens :], keep_special=True)
    assert text == f"<think>\nhm\n</think>\n\n{shown}<|im_end|>\n"
    assert call.reply_bytes == len("hm") + len(f"\n</think>\n\n{shown}".encode())


def test_reasoning_of_earlier_turns_may_be_left_out(tmp_path):
    tokenizer = Tokenizer.load(written(tmp_path, AGENT), chat_template_kwargs={"enable_thinking": True})
    earlier = [*CALLED, {"role": "user", "content": "thanks"}, {"role": "assistant", "content": "so so"}]
    encoded = encode_chat(tokenizer, earlier, inputs=Inputs(tools=TOOLS), aligned=True)
    text = tokenizer.decode(encoded.ids, keep_special=True)
    assert "<think>" not in text
    empty = [content for content in encoded.contents if content.key != "content"]
    assert [content.end - content.start for content in empty] == [0, 0]
    assert encoded.reply_bytes == len("so so")


@pytest.mark.parametrize(
    ("template", "messages", "inputs", "message"),
    [
        (CHATML, ASKED, {"tools": TOOLS}, "does not show tools"),
        (CHATML, ASKED, {"documents": [{"text": "x"}]}, "does not show documents"),
        (CHATML, [ASKED[0], ASKED[1] | {"tool_calls": [CALL]}], {}, "does not show tool_calls"),
        (CHATML, [ASKED[0], ASKED[1] | {"reasoning_content": "r"}], {}, "does not show reasoning_content"),
        ("llada2", CALLED[1:2] + CALLED[3:4] + ASKED[1:], {}, "does not show role tool"),
        ("qwen3", [{"role": "developer", "content": "x"}, *ASKED], {}, "does not show role developer"),
        (AGENT.replace("call.arguments | tojson", "'{}'"), CALLED[:3], {}, "does not show the arguments"),
        (
            AGENT.replace("call.name", "'f'"),
            CALLED[:3],
            {},
            "does not show the name of the tool_calls of message 3",
        ),
        (AGENT.replace("> ns.last", "> 99"), CALLED, {}, "loses reasoning_content of message 5"),
        (AGENT, [*CALLED[:2], {"role": "assistant", "content": "<think>\nx\n</think>\n\ny"}], {}, None),
    ],
)
def test_what_a_template_drops_is_refused(tmp_path, template, messages, inputs, message):
    options = {"enable_thinking": True} if template.startswith("{%- if tools") else {}
    tokenizer = Tokenizer.load(written(tmp_path, template), chat_template_kwargs=options)
    if message is None:
        assert encode_chat(tokenizer, messages, inputs=Inputs(**inputs)).reply_bytes > 0
        return
    with pytest.raises(RecordError) as caught:
        encode_chat(tokenizer, messages, inputs=Inputs(**inputs))
    assert message in str(caught.value)


def test_a_thought_needs_a_prompt_that_leaves_room_for_it(tmp_path):
    tokenizer = Tokenizer.load(written(tmp_path, AGENT))
    thought = [ASKED[0], ASKED[1] | {"reasoning_content": "r"}]
    with pytest.raises(RecordError, match="give the option enable_thinking=true"):
        encode_chat(tokenizer, thought)
    own = Inputs(chat_template_kwargs={"enable_thinking": True})
    assert encode_chat(tokenizer, thought, inputs=own).reply_bytes == 2
