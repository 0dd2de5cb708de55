"""`tide chat`: lines in, replies out, on a terminal or through pipes; the rank function of a conversation."""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tide_megatron.base.device import Device
from tide_megatron.base.disk import disk_words
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.base.files import local_path
from tide_megatron.base.read import is_text
from tide_megatron.base.stop import StopFlag
from tide_megatron.decode.dialogue import Dialogue, Said
from tide_megatron.decode.opening import open_decoder
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.order import cells, coloured, legend
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.options import Arithmetic

HELP = """\
/system TEXT  set the system prompt, from the next message on; without TEXT: show it
/reset        forget the conversation
/save FILE    append the conversation to a JSONL file
/quit         end; so does Ctrl-D
Ctrl-C ends a reply. A line that ends in \\ goes on in the next one; // begins a message with a slash.
"""
PROMPT, MORE = "> ", ". "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Talk:
    """How a conversation is had."""

    options: Decoding
    system: str | None = None
    """System prompt."""
    show_order: bool = False
    """Show each reply once more, in the colours of the order in which it was committed."""


def talk(
    place: Path,
    wanted: Talk,
    context: Context | None = None,
    mask: str | None = None,
    arithmetic: Arithmetic | None = None,
    *,
    device: Device,
    stop: StopFlag,
) -> None:
    """Talk until the input ends; a rank function for `run_ranks`, on one rank.

    Args:
        place: see `open_decoder`.
        wanted: how.
        context: see `open_decoder`.
        mask: see `open_decoder`.
        arithmetic: see `open_decoder`.
        device: where to compute.
        stop: SIGINT ends a reply and not the conversation; other stop signals end it.

    Raises:
        TideError: a model that cannot be read, or has no chat template.
    """
    if multiprocessing.parent_process() is not None:
        raise ConfigError(
            "--device cpu: a conversation needs the terminal of its own process, which sees GPUs; hide them: "
            "CUDA_VISIBLE_DEVICES= tide chat ..."
        )
    decoder = open_decoder(place, device, arithmetic, mask, context)
    decoder.prompt_ids([{"role": "user", "content": "."}])  # a model without a template is told at once
    dialogue = Dialogue(decoder, wanted.options, wanted.system)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 - lines can be edited, and those before come back

        print(f"{place}: a message a line; /help says more, Ctrl-D ends")
    with stop.interruptible():
        converse(dialogue, _lines(is_terminal), wanted, is_terminal=is_terminal)


def converse(dialogue: Dialogue, lines: Iterator[str], wanted: Talk, *, is_terminal: bool) -> None:
    """Answer lines until there are no more, or one of them says so.

    Args:
        dialogue: with whom.
        lines: messages and commands.
        wanted: how.
        is_terminal: a person reads; else nothing but replies goes to stdout.
    """
    for line in lines:
        if line.split(" ")[0] == "/quit":
            return
        try:
            _take(dialogue, line, wanted, is_terminal=is_terminal)
        except KeyboardInterrupt as end:
            if type(end) is not KeyboardInterrupt:
                raise  # somebody asks the process to end
            _tell("interrupted")


def _take(dialogue: Dialogue, line: str, wanted: Talk, *, is_terminal: bool) -> None:
    """Do what a line says."""
    word, _, rest = line.partition(" ")
    if line.startswith("/") and not line.startswith("//"):
        _COMMANDS.get(word, _unknown)(dialogue, rest.strip(), word)
        return
    text = line.removeprefix("/") if line.startswith("//") else line
    if not is_text(text):
        _tell("the line is no UTF-8 text; write it anew")
    elif text.strip():
        _answer(dialogue, text, wanted, is_terminal=is_terminal)


def _answer(dialogue: Dialogue, text: str, wanted: Talk, *, is_terminal: bool) -> None:
    try:
        turn = dialogue.ask(text, lambda new: print(new, end="", flush=True))
    except DataError as fault:
        _tell(str(fault))
        return
    print(flush=True)
    if wanted.show_order and turn.reply is not None and turn.reply.ids:
        import rich

        found = cells(dialogue.decoder.tokenizer, turn.reply)
        rich.print(coloured(found, turn.reply.forwards))
        rich.print(legend(turn.reply.forwards))
    _tell_turn(dialogue, turn)
    if is_terminal:
        print(flush=True)


def _tell_turn(dialogue: Dialogue, turn: Said) -> None:
    if turn.dropped:
        window = dialogue.decoder.window
        _tell(f"the oldest {turn.dropped} messages were dropped: the model reads {window} tokens at a time")
    if turn.is_interrupted:
        _tell("interrupted")
    elif turn.reply is not None and turn.reply.ended == "length":
        _tell(f"cut after {len(turn.reply.ids)} tokens")


def _system(dialogue: Dialogue, text: str, word: str) -> None:
    if text:
        dialogue.system = text
    _tell(f"system prompt: {dialogue.system}" if dialogue.system else "there is no system prompt")


def _reset(dialogue: Dialogue, text: str, word: str) -> None:
    dialogue.reset()
    _tell("the conversation begins anew")


def _save(dialogue: Dialogue, text: str, word: str) -> None:
    if not text:
        _tell("/save needs a file: /save chats.jsonl")
        return
    try:
        dialogue.save(local_path(text))
        _tell(f"{len(dialogue.messages)} messages appended to {text}")
    except ConfigError as fault:
        _tell(str(fault))
    except OSError as fault:
        _tell(disk_words(fault))


def _help(dialogue: Dialogue, text: str, word: str) -> None:
    _tell(HELP.rstrip())


def _unknown(dialogue: Dialogue, text: str, word: str) -> None:
    _tell(f"{word} is no command; /help names them, and /{word} sends it as a message")


_COMMANDS: dict[str, Callable[[Dialogue, str, str], None]] = {
    "/system": _system,
    "/reset": _reset,
    "/save": _save,
    "/help": _help,
}


def _tell(words: str) -> None:
    """Say something that is not the model's."""
    print(f"[{words}]" if "\n" not in words else words, file=sys.stderr, flush=True)


def _lines(is_terminal: bool) -> Iterator[str]:
    """Yield what is typed or piped in, lines that go on joined; Ctrl-C gives up the line that is typed."""
    parts: list[str] = []
    while True:
        try:
            line = input((MORE if parts else PROMPT) if is_terminal else "")
        except EOFError:
            if parts:
                yield "\n".join(parts)
            if is_terminal:
                print()
            return
        except UnicodeDecodeError:
            _tell("the line is no UTF-8 text; write it anew")
            continue
        except KeyboardInterrupt as end:
            if type(end) is not KeyboardInterrupt or not is_terminal:
                raise
            parts = []
            print()
            _tell("Ctrl-D or /quit ends")
            continue
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        yield "\n".join([*parts, line])
        parts = []
