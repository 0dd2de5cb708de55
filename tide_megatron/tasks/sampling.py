"""Replies to many conversations, on all ranks: shown at the end, or written into a file as they come.

A file of replies is made beside its place (`.NAME.partial`, where every rank appends to a file of its own)
and takes its name when it is whole, in the order asked. What decides the replies is written down before the
first one: the same command goes on where one was killed, and another model, other conversations or options
are refused by name. Where batches do not change the arithmetic (fp32 on the CPU), any number of ranks and of
kills gives the same file.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_megatron.base.device import Device
from tide_megatron.base.disk import disk_faults, place_of
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.base.files import PARTIAL, discard, write_text
from tide_megatron.base.lease import lease_beside, leased
from tide_megatron.base.read import json_of
from tide_megatron.base.stop import StopFlag
from tide_megatron.decode.conversations import Conversation, digest_of
from tide_megatron.decode.decoder import Decoder, prompt_ids
from tide_megatron.decode.opening import find
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.order import Cell, cells
from tide_megatron.decode.ranks import decode_over_ranks
from tide_megatron.decode.reply import Reply
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.options import Arithmetic
from tide_megatron.models.weights import read_architecture
from tide_megatron.parallel.collectives import (
    barrier,
    broadcast_object,
    fail_together,
    held_by_first,
    is_first,
    own_share,
)
from tide_megatron.tasks.answer_progress import AnswerProgress
from tide_megatron.tasks.answers import WRITE_SECONDS, Answer, AnswerFile, read_answers
from tide_megatron.tasks.folder import deciding, differences_told, model_facts
from tide_megatron.text.tokenizer import Tokenizer

ABOUT = ".about.json"
"""How the name of the file ends that says what a file of replies is of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is asked, how it is answered, and where the replies go."""

    conversations: Sequence[Conversation]
    options: Decoding
    out: Path | None = None
    """File of replies; None: they are only returned."""

    def __post_init__(self) -> None:
        """Refuse a way of decoding in which batches would decide replies that are written as they come."""
        if self.out is not None and self.options.schedule == "reference" and self.options.batch > 1:
            raise ConfigError(
                f"--batch: {self.options.batch} under --schedule reference makes replies depend on which "
                "prompts are padded together, and so on ranks and restarts; use --batch 1 with --out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """One conversation's reply, as it is shown."""

    conversation: Conversation
    reply: Reply
    cells: Sequence[Cell]

    @property
    def messages(self) -> Sequence[Mapping[str, str]]:
        """What was asked."""
        return self.conversation.messages


def sample_conversations(
    place: Path,
    work: Sampling,
    context: Context | None = None,
    mask: str | None = None,
    arithmetic: Arithmetic | None = None,
    *,
    device: Device,
    stop: StopFlag,
) -> list[Sampled]:
    """Open a model on every rank and reply to conversations; a rank function for `run_ranks`.

    Args:
        place: see `opening.find`.
        work: what is asked, and how.
        context: see `opening.find`.
        mask: see `opening.find`.
        arithmetic: see `opening.find`.
        device: where to compute.
        stop: after a stop signal no further conversation is begun.

    Returns:
        The replies in order, the same on every rank; where stopped, those before the first that was not
        begun.

    Raises:
        TideError: a model or a conversation that cannot be read, or an `out` that holds something else.
    """
    with fail_together():
        found = find(place, mask, context)
        window = read_architecture(found.folder).max_positions
        asked = [
            prompt_of(found.tokenizer, window, number, one) for number, one in enumerate(work.conversations)
        ]
    decoder = found.open(device, arithmetic)
    with stop.finishing("the replies under way are the last ones", is_last=True):
        if work.out is None:
            replies = decode_over_ranks(decoder, asked, work.options, stop=stop)
        else:
            replies = _written(work, work.out, decoder, asked, arithmetic or Arithmetic(), stop)
    return [
        Sampled(conversation=one, reply=reply, cells=cells(decoder.tokenizer, reply))
        for one, reply in zip(work.conversations, replies, strict=False)
    ]


def prompt_of(tokenizer: Tokenizer, window: int, number: int, asked: Conversation) -> list[int]:
    """Return a conversation's tokens.

    Args:
        tokenizer: of the model.
        window: positions of the model.
        number: of the conversation, from 0 on.
        asked: the conversation.

    Raises:
        DataError: it cannot be read, or leaves no room for a reply; names it.
    """
    name = f"number {number + 1}" if asked.id is None else f"id {asked.id!r}"
    try:
        ids = prompt_ids(tokenizer, asked.messages)
    except DataError as fault:
        raise DataError(f"prompts, {name}: {fault}") from None
    if len(ids) >= window:
        raise DataError(
            f"prompts, {name}: has {len(ids)} tokens, and the model {window} positions for prompt "
            "and reply together (max_position_embeddings); shorten it"
        )
    return ids


def _written(
    work: Sampling,
    out: Path,
    decoder: Decoder,
    asked: Sequence[Sequence[int]],
    arithmetic: Arithmetic,
    stop: StopFlag,
) -> list[Reply]:
    """Write replies as they come, and the file when it is whole. All ranks call it together."""
    facts = _facts(work, decoder, arithmetic)
    with held_by_first(lambda: leased(lease_beside(place_of(out, ConfigError)), f"--out: {out}", stop=stop)):
        with fail_together():
            whole = _begin(out, facts) if is_first() else None
        whole = broadcast_object(whole if is_first() else None)
        if whole is None:
            _decode_rest(work, _partial(out), decoder, asked, stop)
            barrier()
            with fail_together():
                found = read_answers(_partial(out)) if is_first() else {}
                lines = [found[name] for name in map(_name, range(len(asked))) if name in found]
                if is_first() and len(lines) == len(asked):
                    _finish(out, facts, work.conversations, lines)
            numbered = {int(line["name"]): line for line in lines}
            whole = [numbered[number] for number in _unbroken(numbered, len(asked))]
            whole = broadcast_object(whole if is_first() else None)
    return [_reply_of(line) for line in whole]


def _unbroken(known: Mapping[int, Any], count: int) -> range:
    """Return the numbers before the first that is not known."""
    return range(next((number for number in range(count) if number not in known), count))


def _decode_rest(
    work: Sampling, partial: Path, decoder: Decoder, asked: Sequence[Sequence[int]], stop: StopFlag
) -> None:
    """Reply to what has no reply yet, this rank's share of it. All ranks call it together."""
    rank, ranks = own_share()
    with fail_together():
        known = set(read_answers(partial)) if is_first() else set[str]()
    known = broadcast_object(known if is_first() else None)
    left = [number for number in range(len(asked)) if _name(number) not in known]
    left.sort(key=lambda number: (-len(asked[number]), number))  # those under way together are alike
    own, ended, wrote = left[rank::ranks], list[dict[str, Any]](), time.monotonic()
    progress = AnswerProgress("replies", partial, len(asked), len(asked) - len(left))
    with fail_together(), disk_faults(partial, DataError, "; the same command goes on"):
        file = AnswerFile(partial, rank)
        try:

            def take(number: int, reply: Reply) -> None:
                nonlocal wrote
                if reply.ended:
                    ended.append({"name": _name(number), **dataclasses.asdict(reply)})
                if len(ended) >= work.options.batch or (ended and time.monotonic() > wrote + WRITE_SECONDS):
                    file.add(ended)
                    ended.clear()
                    wrote = time.monotonic()
                    progress.tell()

            prompts = [asked[number] for number in own]
            decoder.decode(prompts, work.options, numbers=own, on_block=take, stop=stop)
            file.add(ended)
        finally:
            file.close()


def _name(number: int) -> str:
    return f"{number:09d}"


def _reply_of(line: Answer) -> Reply:
    values = {field.name: line[field.name] for field in dataclasses.fields(Reply)}
    return Reply(**{**values, "ids": tuple(values["ids"]), "order": tuple(values["order"])})


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}{PARTIAL}")


def _facts(work: Sampling, decoder: Decoder, arithmetic: Arithmetic) -> dict[str, Any]:
    """Return what decides the replies."""
    facts = {
        **model_facts(decoder, arithmetic),
        "prompts": digest_of(work.conversations),
        "number of prompts": len(work.conversations),
        **deciding(dataclasses.asdict(work.options)),
    }
    return dict(json.loads(json.dumps(facts)))  # as they come back


def _begin(out: Path, facts: Mapping[str, Any]) -> list[Answer] | None:
    """Make sure that what stands at the place is of this work; return it where it is whole (rank 0).

    Raises:
        ConfigError: something else stands there.
    """
    about = out.with_name(out.name + ABOUT)
    if out.exists() or about.exists():
        _compare(out, about, facts)
        if out.exists():
            return _read_whole(out)
    partial = _partial(out)
    state = partial / "asked.json"
    if partial.exists():
        _compare(out, state, facts)
        return None
    with disk_faults(partial, ConfigError):
        partial.mkdir(parents=True)
        write_text(state, json.dumps(facts, indent=1) + "\n")
    return None


def _compare(out: Path, file: Path, facts: Mapping[str, Any]) -> None:
    remedy = "give another --out, or remove it"
    try:
        there = json_of(file)
    except FileNotFoundError:
        raise ConfigError(f"--out: {out} is there, and no output of tide sample; {remedy}") from None
    except ValueError as fault:
        raise ConfigError(f"--out: {file}: {fault}; {remedy}") from None
    if told := differences_told(there, facts):
        raise ConfigError(f"--out: {out} is of another work: {told}; {remedy}")


def _finish(
    out: Path, facts: Mapping[str, Any], conversations: Sequence[Conversation], lines: Sequence[Answer]
) -> None:
    """Give the replies their file (rank 0)."""
    text = ""
    for number, (one, line) in enumerate(zip(conversations, lines, strict=True)):
        reply = _reply_of(line)
        record = {
            "number": number,
            **({} if one.id is None else {"id": one.id}),
            "messages": list(one.messages),
            "reply": reply.text,
            "ended": reply.ended,
            "forwards": reply.forwards,
            "tokens": reply.ids,
            "order": reply.order,
        }
        text += json.dumps(record, ensure_ascii=False) + "\n"
    with disk_faults(out, ConfigError, "; the same command goes on"):
        write_text(out.with_name(out.name + ABOUT), json.dumps(facts, indent=1) + "\n")
        write_text(out, text)
        discard(_partial(out))


def _read_whole(out: Path) -> list[Answer]:
    """Read a file that `_finish` wrote.

    Raises:
        DataError: it is not as it was written.
    """
    lines: list[Answer] = []
    try:
        for number, line in enumerate(out.read_text(encoding="utf-8").splitlines()):
            record = json.loads(line)
            named = {"text": record["reply"], "ids": record["tokens"], "name": _name(number)}
            lines.append({**named, **{key: record[key] for key in ("order", "ended", "forwards")}})
    except (ValueError, KeyError, TypeError) as fault:
        raise DataError(
            f"--out: {out}: not as it was written ({fault}); remove it, and sample anew"
        ) from None
    return lines
