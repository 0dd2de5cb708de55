"""A conversation: its history, its window, Ctrl-C, and what stdout gets."""

import json

import pytest

from tests.unit.decode.small import load_tokenizer, make_decoder
from tests.unit.models.conftest import groups  # noqa: F401 - the fixture
from tests.unit.models.shapes import DENSE
from tide_megatron.base.errors import DataError
from tide_megatron.base.stop import Stopped
from tide_megatron.decode.dialogue import Dialogue
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.terminal import Talk, converse

OPTIONS = Decoding(new_tokens=24, stop=())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def decoder(tokenizer, groups):  # noqa: F811 - the fixture
    return make_decoder(tokenizer, DENSE, groups, max_position_embeddings=128)


class Interrupting:
    """A decoder that hears Ctrl-C after so many blocks."""

    def __init__(self, decoder, blocks, error=KeyboardInterrupt):
        self._decoder, self._blocks, self._error = decoder, blocks, error

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def decode(self, prompts, options, *, numbers, on_block):
        blocks = iter(range(self._blocks))

        def hear(number, reply):
            on_block(number, reply)
            if next(blocks, None) is None:
                raise self._error

        if not self._blocks:
            raise self._error
        next(blocks)
        return self._decoder.decode(prompts, options, numbers=numbers, on_block=hear)


def test_the_history_goes_on_and_the_blocks_are_the_reply(decoder):
    session, shown = Dialogue(decoder, OPTIONS, "Be short."), []
    first = session.ask("one", shown.append)
    again = decoder.decode([decoder.prompt_ids(session.messages[:2])], OPTIONS, numbers=[0])[0]
    assert first.reply == again
    assert "".join(shown) == first.reply.text
    session.ask("two", shown.append)
    assert [message["role"] for message in session.messages] == ["system", *["user", "assistant"] * 2]
    assert session.history[1]["content"] == first.reply.text
    session.reset()
    assert session.messages == [{"role": "system", "content": "Be short."}]


def test_draws_depend_on_the_turn(decoder):
    options = Decoding(new_tokens=16, temperature=2.0, seed=3)
    texts = []
    for _ in range(2):
        session = Dialogue(decoder, options)
        texts.append([session.ask("one", lambda new: None).reply.ids])
        session.reset()
        texts[-1].append(session.ask("one", lambda new: None).reply.ids)
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_the_oldest_messages_leave_a_full_window(decoder):
    session = Dialogue(decoder, Decoding(new_tokens=40, steps=10), "s")
    turns = [session.ask("m" * 6 + str(turn), lambda new: None) for turn in range(5)]
    dropped = [turn.dropped for turn in turns]
    assert [turn.room for turn in turns] == [40] * 5, "none has less than was asked for"
    assert dropped[0] == 0
    assert dropped[-1] == 2
    assert session.history[0]["role"] == "user"
    assert len(decoder.prompt_ids(session.messages[:-1])) + 40 <= decoder.window
    assert session.messages[0]["role"] == "system"


def test_a_message_that_fills_the_window_is_refused_and_forgotten(decoder):
    session = Dialogue(decoder, OPTIONS)
    session.ask("one", lambda new: None)
    before = list(session.history)
    with pytest.raises(DataError, match=r"the message has \d+ tokens .* model 128 positions .*; shorten it"):
        session.ask("long " * 60, lambda new: None)
    assert session.history == before
    turn = session.ask("x" * 98, lambda new: None)
    assert 0 < turn.room < OPTIONS.new_tokens
    assert len(turn.reply.ids) <= turn.room


def test_ctrl_c_ends_the_reply_and_keeps_what_was_written(decoder):
    whole = Dialogue(decoder, OPTIONS).ask("one", lambda new: None).reply
    session, shown = Dialogue(Interrupting(decoder, 2), OPTIONS), []
    turn = session.ask("one", shown.append)
    assert turn.is_interrupted
    assert turn.reply.ended is None
    assert turn.reply.ids == whole.ids[: len(turn.reply.ids)]
    assert 0 < len(turn.reply.ids) < len(whole.ids)
    assert session.history[-1] == {"role": "assistant", "content": turn.reply.text}
    assert "".join(shown) == turn.reply.text
    session.decoder = Interrupting(decoder, 0)
    turn = session.ask("two", shown.append)
    assert (turn.reply, turn.is_interrupted, len(session.history)) == (None, True, 2)
    session.decoder = Interrupting(decoder, 1, Stopped("stopped by SIGTERM"))
    with pytest.raises(Stopped):
        session.ask("three", shown.append)


def talk(session, lines, capsys, *, is_terminal=False, **options):
    converse(session, iter(lines), Talk(options=OPTIONS, **options), is_terminal=is_terminal)
    return capsys.readouterr()


def test_lines_and_commands(decoder, tmp_path, capsys):
    session = Dialogue(decoder, OPTIONS)
    file = tmp_path / "chats.jsonl"
    lines = [
        "one",
        "",
        "/system Be kind.",
        f"/save {file}",
        "//slash",
        "/nonsense",
        "/save",
        "/reset",
        "/help",
    ]
    told = talk(session, [*lines, f"/save {tmp_path}/no/where", "/quit", "never"], capsys)
    assert session.system == "Be kind."
    saved = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    replies = [saved[2]["content"]]
    assert told.out.startswith(replies[0] + "\n")
    assert "[system prompt: Be kind.]" in told.err
    assert "[3 messages appended to" in told.err
    assert "[/nonsense is no command" in told.err
    assert "[/save needs a file" in told.err
    assert "/system TEXT" in told.err
    assert "no/where: " in told.err
    assert session.history == []
    assert told.out.count("[") == replies[0].count("[") or "[" not in told.err.splitlines()[0]


def test_a_command_beginning_with_two_slashes_is_a_message(decoder, capsys):
    session = Dialogue(decoder, OPTIONS)
    talk(session, ["//slash"], capsys)
    assert session.history[0]["content"] == "/slash"


def test_faults_and_ctrl_c_keep_the_conversation(decoder, capsys):
    session = Dialogue(Interrupting(decoder, 0), OPTIONS)
    told = talk(session, ["one", "long " * 60, "half \ud800"], capsys)
    assert "[interrupted]" in told.err
    assert "shorten it]" in told.err
    assert "no UTF-8 text" in told.err
    assert session.history == []


def test_the_order_can_be_shown(decoder, capsys):
    told = talk(Dialogue(decoder, OPTIONS), ["one"], capsys, show_order=True)
    assert "committed first" in told.out
    assert "[cut after 24 tokens]" in told.err or "interrupted" not in told.err
