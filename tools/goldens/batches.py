"""Replays of collated batches: collate_cross.npz and collate_shared.npz, over the chats of map_*.json.

Student tensors must be equal. Each sample's teacher tokens, chunks or pairs are compared with what our data
holds; a difference is excused only where the reference's rule, carried out on what map_*.json holds, gives
what was recorded, and a sound one gives ours. Block sizes are read off the batch: any common divisor of the
filled lengths fills alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from goldens.chats import SIDE, Chat, read_cross, read_shared
from goldens.chunks import REPLACED, Chunks, Kinds, Matrices
from goldens.row import Golden, Row, judge
from goldens.texts import FIRST, LAST_PAIR, pairs_are_earlier
from tide_megatron.diffusion.batch import IGNORED, pad_to_blocks, pad_to_length
from tide_megatron.text.chat import labels_of

LAST_CHUNK = "spec 4.1: the reference ends the teacher with its last chunk; ours keeps the turn's end"
CUT = "bug 4: the reference cuts the teacher inside a chunk, which stays active"
CUT_PAIR = "spec 4.2: the reference cuts the teacher anywhere; ours ends with a whole pair"


def replay_collate_cross(path: Path) -> list[Row]:
    """Replay collate_cross.npz: the batch of every pair of kinds, padded to itself or to a fixed length."""
    golden, rows = Golden(path), []
    chats = _kept(read_cross(path.parent / "map_cross.json"))
    for prefix in _prefixes(golden, "([^_]+_){2}(dyn|fixed)"):
        teacher_kind, student_kind, padding = prefix.split("_")
        _compare_students(golden, prefix, chats, is_fixed=padding == "fixed")
        kinds, matrices = (teacher_kind, student_kind), Matrices.read(golden, f"{prefix}_alignment_matrix")
        names = ("input_ids", "labels", "attention_mask")
        fields = [golden.read(f"{prefix}_teacher_{name}") for name in names]
        found = [chat.chunks_within(chat.told["ranges"], kinds) for chat in chats]
        ends = [one[-1][1] if one else len(chat.teacher.ids) for one, chat in zip(found, chats, strict=True)]
        width = fields[0].shape[1]  # the longest sample is this long; nobody else can have been cut
        limit = width if max(ends) > width else None
        for number, chat in enumerate(chats):
            label, places = f"{prefix}, sample {number}", matrices.places(number)
            rows.append(_judge_chunks((path.name, f"{label}: chunks"), chat, kinds, places, limit))
            recorded, end = [field[number].tolist() for field in fields], min(ends[number], width)
            rows.append(_judge_teacher((path.name, f"{label}: teacher"), chat, recorded, end, limit))
        columns = max(len(matrices.places(number)) for number in range(len(chats)))
        same = int(fields[2].sum(dim=1).max()) == width
        same &= matrices.student.shape[2] == matrices.teacher.shape[2] == columns
        golden.add(f"{prefix}, padding", "replayed" if same else "failed")
    return [*golden.rows(), *rows]


def _judge_chunks(
    name: tuple[str, str], chat: Chat, kinds: Kinds, recorded: Chunks, limit: int | None
) -> Row:
    """Compare the chunks of one sample: all of them, and those that are learnt."""
    flat, prompt = _row(chat, limit)[f"{SIDE}.chunks"], chat.student.encoded.prompt_tokens
    stored = [[*flat[at + 2 : at + 4], *flat[at : at + 2]] for at in range(0, len(flat), 4)]

    def with_learnt(places: Chunks) -> tuple[Chunks, Chunks]:
        return places, [place for place in places if place[2] >= prompt]

    ours, ranges = (chat.chunks(limit), stored), chat.told["ranges"]
    found = chat.chunks_within(ranges, kinds)
    cut = found if limit is None else [_clipped(place, limit) for place in found]
    bugs = {FIRST: ranges != chat.ranges(), REPLACED: found != chat.chunks_within(ranges), CUT: cut != found}
    is_explained = recorded == cut and ours == with_learnt(chat.sound_chunks(limit))
    bug = "; ".join(bug for bug, is_at_work in bugs.items() if is_at_work and is_explained)
    return judge(*name, with_learnt(recorded), ours, bug)


def _clipped(place: list[int], limit: int) -> list[int]:
    """Cut a chunk's teacher side at the limit, as the reference's matrices do."""
    start, end = place[0], min(place[1], limit)
    return [*((start, end) if start < end else (0, 0)), *place[2:]]


def _judge_teacher(
    name: tuple[str, str], chat: Chat, recorded: list[list[int]], end: int, limit: int | None
) -> Row:
    """Compare the teacher's ids, labels and attention mask of one sample."""
    whole, pad = chat.teacher.encoded, chat.teacher.tokenizer.pad_id
    stored = _row(chat, limit)

    def padded(ids: Sequence[int], replies: Sequence[int]) -> list[list[int]]:
        length = max(len(recorded[0]), len(ids))
        return [*pad_to_length(ids, labels_of(ids, replies, IGNORED), length, pad), _mask(len(ids), length)]

    def cut(end: int) -> list[list[int]]:
        return padded(whole.ids[:end], [min(place, end) for place in whole.replies])

    ours = padded(stored[f"{SIDE}.ids"], stored[f"{SIDE}.replies"])
    bug = LAST_CHUNK if end < len(stored[f"{SIDE}.ids"]) else CUT
    is_explained = recorded == cut(end) and ours == cut(chat.sound_end(limit))
    return judge(*name, recorded, ours, bug if is_explained else "")


def replay_collate_shared(path: Path) -> list[Row]:
    """Replay collate_shared.npz: one vocabulary under two templates, for every limit on teacher tokens."""
    golden, rows = Golden(path), []
    chats = _kept(read_shared(path.parent / "map_shared.json"))
    for prefix in _prefixes(golden, r"tml\d+"):
        limit = int(prefix.removeprefix("tml"))
        _compare_students(golden, prefix, chats, is_fixed=True)
        ids, mask, count, *align = (
            golden.read(f"{prefix}_{name}")
            for name in (
                "teacher_input_ids",
                "teacher_attention_mask",
                "n_aligned",
                "align_teacher",
                "align_student",
            )
        )
        slots, filled = torch.stack(align, dim=2), mask.sum(dim=1)
        used = torch.arange(slots.shape[1]) < count[:, None]
        same = int(filled.max()) == ids.shape[1] and slots.shape[1] == max(1, int(count.max()))
        golden.add(f"{prefix}, padding", "replayed" if same and not slots[~used].any() else "failed")
        block = math.gcd(*filled.tolist())
        for number, chat in enumerate(chats):
            label, pairs = f"{prefix}, sample {number}", slots[number, used[number]].tolist()
            rows.append(_judge_pairs((path.name, f"{label}: pairs"), chat, pairs, limit))
            stored, told = _row(chat, limit)[f"{SIDE}.ids"], chat.told["teacher_input_ids"][:limit]
            sound = chat.teacher.ids[: chat.sound_end(limit)]
            ours, spoilt = (_filled(chat, own, block, ids.shape[1]) for own in (stored, told))
            recorded = [ids[number].tolist(), mask[number].tolist()]
            bug = LAST_PAIR if len(told) < len(stored) else CUT_PAIR
            is_explained = recorded == spoilt and stored == sound
            rows.append(judge(path.name, f"{label}: teacher", recorded, ours, bug if is_explained else ""))
    return [*golden.rows(), *rows]


def _judge_pairs(name: tuple[str, str], chat: Chat, recorded: list[list[int]], limit: int) -> Row:
    """Compare the pairs of one sample, which are those of its row in map_shared.json within the limit."""
    told = [list(pair) for pair in zip(chat.told["align_teacher"], chat.told["align_student"], strict=True)]
    whole, ours = (chat.pairs(chat.chunks(end, chat.replies)) for end in (None, limit))
    is_explained = recorded == [pair for pair in told if pair[0] < limit] and pairs_are_earlier(
        chat, told, whole
    )
    is_sound = ours == [pair for pair in whole if pair[0] < limit]
    return judge(*name, recorded, ours, FIRST if is_explained and is_sound else "")


def _filled(chat: Chat, ids: Sequence[int], block: int, width: int) -> list[list[int]]:
    """Fill teacher ids to whole blocks and pad them to `width`; return ids and attention mask."""
    tokenizer = chat.teacher.tokenizer
    blocks, labels = pad_to_blocks(ids, ids, block, tokenizer.eos_id)
    length = max(width, len(blocks))
    return [pad_to_length(blocks, labels, length, tokenizer.pad_id)[0], _mask(len(blocks), length)]


def _compare_students(golden: Golden, prefix: str, chats: list[Chat], *, is_fixed: bool) -> None:
    """Compare the student's tensors."""
    is_labelled = golden.read(f"{prefix}_labels") != IGNORED
    filled_to = (is_labelled * torch.arange(1, is_labelled.shape[1] + 1)).amax(dim=1)
    block, tokenizer = math.gcd(*filled_to.tolist()), chats[0].student.tokenizer
    examples = []
    for row in (_row(chat, None) for chat in chats):
        labels = labels_of(row["ids"], row["replies"], IGNORED)
        examples.append(pad_to_blocks(row["ids"], labels, block, tokenizer.eos_id))
    width = chats[0].max_length if is_fixed else max(len(ids) for ids, _ in examples)
    padded = [
        (*pad_to_length(ids, labels, width, tokenizer.pad_id), _mask(width if is_fixed else len(ids), width))
        for ids, labels in examples
    ]
    fields = zip(("input_ids", "labels", "attention_mask"), zip(*padded, strict=True), strict=True)
    ours = {f"{prefix}_{name}": torch.tensor(values) for name, values in fields}
    golden.compare(f"{prefix}, student", ours, tolerance=0.0)


def _prefixes(golden: Golden, pattern: str) -> list[str]:
    """List the batches of a file: what stands before `_input_ids`."""
    return [key.removesuffix("_input_ids") for key in golden.keys(f"({pattern})_input_ids")]


def _mask(real: int, length: int) -> list[int]:
    """Return an attention mask."""
    return [1] * real + [0] * (length - real)


def _kept(chats: list[Chat]) -> list[Chat]:
    """Return the chats that are collated."""
    return [chat for chat in chats if not chat.told["_discard"]]


def _row(chat: Chat, limit: int | None) -> dict[str, list[int]]:
    """Return our row of a chat that is kept."""
    sample = chat.sample(limit)
    if isinstance(sample, str):
        raise ValueError(f"we leave out what the reference kept: {sample}")
    return {name: values.tolist() for name, values in sample.row.items()}
