"""Ask a model the questions of a task, on all ranks, answer by answer.

Every rank holds the whole model and answers its share of what nobody has answered yet. Replies are judged
and written down as they end, some at a time, so that a kill or a signal to stop costs what is under way.
Questions are dealt in the order of their prompts' lengths, so that ranks get shares alike. Random draws are a
pure function of a question's number, never of rank, batch or start: where batches do not change the
arithmetic (fp32 on the CPU), any number of ranks and of kills gives the same answers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_megatron.decode.decoder import Decoder
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.reply import Reply
from tide_megatron.parallel.collectives import barrier, broadcast_object, fail_together, is_first, own_share
from tide_megatron.tasks.answer_progress import AnswerProgress
from tide_megatron.tasks.answers import WRITE_SECONDS, Answer, AnswerFile, read_answers
from tide_megatron.tasks.prompts import Prompts
from tide_megatron.tasks.task import Task, judge_all


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenQuestion:
    """One question as this model reads it."""

    name: str
    number: int
    """The key of its random draws; no two questions of a task share it."""
    ids: tuple[int, ...]
    room: int
    """New tokens that its reply may have; 0: it is not decoded."""


def prepare(task: Task, chosen: Sequence[int], decoding: Decoding, prompts: Prompts) -> list[OpenQuestion]:
    """Return questions as tokens, each with the room that its prompt leaves.

    Args:
        task: theirs.
        chosen: numbers of those that are asked.
        decoding: how they are answered.
        prompts: how the model is asked.

    Raises:
        DataError: the task's data are not here, or a prompt that cannot be.
    """
    questions, found = task.questions(), []
    for number in chosen:
        question = questions[number]
        ids = prompts.ids(prompts.text(question.messages), question.name, question.prefix)
        room = prompts.room(len(ids), decoding)
        found.append(OpenQuestion(name=question.name, number=number, ids=tuple(ids), room=room))
    return found


def ask(
    task: Task,
    asked: Sequence[OpenQuestion],
    decoding: Decoding,
    decoder: Decoder,
    prompts: Prompts,
    folder: Path,
) -> dict[str, Answer]:
    """Answer what is not answered yet, and return all answers. All ranks call it together.

    Args:
        task: its judge.
        asked: by `prepare`, the same on every rank.
        decoding: how they are answered.
        decoder: the whole model on this rank.
        prompts: how it is asked.
        folder: of the task's answers; every rank sees it.

    Returns:
        Answers by the questions' names, in the order asked.

    Raises:
        TideError: an answer that cannot be read or written, or a judge's fault.
    """
    rank, ranks = own_share()
    questions = {question.name: question for question in task.questions()}
    with fail_together():
        known = read_answers(folder) if is_first() else {}
        file = AnswerFile(folder, rank)
    answered = broadcast_object(set(known) if is_first() else None)
    left = [one for one in asked if one.name not in answered]
    progress = AnswerProgress(task.name, folder, len(asked), len(asked) - len(left))

    def write(replies: list[dict[str, Any]]) -> None:
        decoded = [reply for reply in replies if reply["room"]]
        verdicts = iter(judge_all(task, [(questions[reply["name"]], reply["reply"]) for reply in decoded]))
        for reply in replies:
            verdict = next(verdicts) if reply["room"] else None
            reply["score"] = verdict.score if verdict else 0.0
            reply["why"] = verdict.why if verdict else prompts.no_room(reply["prompt_tokens"])
        file.add(replies)
        progress.tell()

    with fail_together():
        try:
            decode_all(longest_first(left)[rank::ranks], decoding, decoder, prompts, write)
        finally:
            file.close()
    barrier()
    with fail_together():
        known = read_answers(folder) if is_first() else {}
    answers = broadcast_object(known if is_first() else None)
    return {one.name: answers[one.name] for one in asked}


def longest_first(questions: Sequence[OpenQuestion]) -> list[OpenQuestion]:
    """Return questions by the lengths of their prompts: those under way together are alike."""
    return sorted(questions, key=lambda one: (-len(one.ids), one.number))


def decode_all(
    questions: Sequence[OpenQuestion],
    decoding: Decoding,
    decoder: Decoder,
    prompts: Prompts,
    write: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Decode questions, and hand over their answers, without a judgement, as they end. Not a collective.

    Args:
        questions: of different numbers.
        decoding: how.
        decoder: the whole model on this rank.
        prompts: how it is asked.
        write: takes some answers; what it takes is kept.
    """
    if without := [one for one in questions if not one.room]:
        nothing = {"reply": "", "tokens": 0, "forwards": 0, "ended": "no room", "seconds": 0.0}
        write([{**_asked_of(one, decoding), **nothing} for one in without])
    waiting = {one.number: one for one in questions if one.room}
    ended: list[dict[str, Any]] = []
    began = time.perf_counter()

    def flush() -> None:
        nonlocal began
        seconds = round((time.perf_counter() - began) / len(ended), 4)
        write([{**answer, "seconds": seconds} for answer in ended])
        ended.clear()
        began = time.perf_counter()  # judging is not decoding

    def take(number: int, reply: Reply) -> None:
        if not reply.ended:
            return
        ended.append(
            {
                **_asked_of(waiting[number], decoding),
                "reply": prompts.reply(reply.text),
                "tokens": len(reply.ids),
                "forwards": reply.forwards,
                "ended": reply.ended,
            }
        )
        if len(ended) >= decoding.batch or time.perf_counter() - began > WRITE_SECONDS:
            flush()

    decoder.decode([one.ids for one in waiting.values()], decoding, numbers=list(waiting), on_block=take)
    if ended:
        flush()


def _asked_of(one: OpenQuestion, decoding: Decoding) -> dict[str, Any]:
    return {
        "name": one.name,
        "prompt_tokens": len(one.ids),
        "new_tokens": decoding.new_tokens,
        "room": one.room,
    }


def counts_of(answers: Mapping[str, Answer]) -> dict[str, Any]:
    """Return what the answers of one task cost, and how many had less room than was asked for."""
    rooms = [(int(answer["room"]), int(answer["new_tokens"])) for answer in answers.values()]
    seconds, tokens = (
        sum(float(answer[key]) for answer in answers.values()) for key in ("seconds", "tokens")
    )
    forwards = sum(int(answer["forwards"]) for answer in answers.values())
    return {
        "less_room": sum(0 < room < wanted for room, wanted in rooms),
        "no_room": sum(room == 0 for room, _ in rooms),
        "tokens": int(tokens),
        "tokens_per_forward": tokens / forwards if forwards else None,
        "rank_seconds": seconds,
        "tokens_per_second_and_rank": tokens / seconds if seconds else None,
    }
