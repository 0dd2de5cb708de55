"""Replays of collated batches: collate_cross.npz and collate_shared.npz, over the chats of map_*.json.

Student tensors must be equal. Each sample's teacher tokens, chunks or pairs are compared with what our data
holds; a difference is excused only where the reference's rule, carried out from its own search, gives what
was recorded. Block sizes are read off the batch: any common divisor of the filled lengths fills alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from goldens.alignment import REPLACED, blanked, even_spaces, replaced, same_bytes
from goldens.chats import SIDE, Chat, Found, read_cross, read_shared
from goldens.mapped import LAST_PAIR
from goldens.matrices import Matrices
from goldens.row import Excuse, Golden, Row, judge
from tide_megatron.data.sample import Sample
from tide_megatron.diffusion.batch import IGNORED
from tide_megatron.diffusion.padding import pad_to_blocks, pad_to_length
from tide_megatron.text.chat import labels_of

LAST_CHUNK = "spec 4.1: the reference ends the teacher with its last chunk; ours keeps the turn's end"
CUT = "bug 4: the reference cuts the teacher inside a chunk, which stays active"
CUT_PAIR = "spec 4.2: the reference cuts the teacher anywhere; ours ends with a whole pair"


def replay_collate_cross(path: Path) -> list[Row]:
    """Replay collate_cross.npz: the batch of every pair of kinds, padded to itself or to a fixed length."""
    golden, rows = Golden(path), []
    chats = _kept(read_cross(path.parent / "map_cross.json"))
    for prefix in golden.prefixes("([^_]+_){2}(dyn|fixed)"):
        teacher_kind, student_kind, padding = prefix.split("_")
        real = _compare_students(golden, prefix, chats, is_fixed=padding == "fixed")
        matrices = Matrices(
            student=golden.read(f"{prefix}_alignment_matrix_student"),
            teacher=golden.read(f"{prefix}_alignment_matrix_teacher"),
        )
        ids, labels, mask = (
            golden.read(f"{prefix}_teacher_{field}") for field in ("input_ids", "labels", "attention_mask")
        )
        kinds = (teacher_kind, student_kind)
        found = [searched_chunks(chat, kinds, own) for chat, own in zip(chats, real, strict=True)]
        limit = ids.shape[1]  # the longest sample is this long; nobody else can have been cut
        is_cut = any(_end(one, chat) > limit for one, chat in zip(found, chats, strict=True))
        for number, chat in enumerate(chats):
            label, places = f"{prefix}, sample {number}", matrices.places(number)
            rows.append(
                _judge_chunks((path.name, label), chat, places, found[number], limit if is_cut else None)
            )
            recorded = [field[number].tolist() for field in (ids, labels, mask)]
            end = min(_end(found[number], chat), limit)
            rows.append(_judge_teacher((path.name, label), chat, recorded, end, limit if is_cut else None))
        widths = torch.tensor(
            [int(mask.sum(dim=1).max()), max(len(matrices.places(n)) for n in range(len(chats)))]
        )
        same = (
            widths.tolist() == [limit, matrices.student.shape[2]] and matrices.teacher.shape[2] == widths[1]
        )
        golden.add(f"{prefix}, padding", "replayed" if same else "failed")
    return [*golden.rows(), *rows]


def searched_chunks(chat: Chat, kinds: tuple[str, str], real: int) -> Found:
    """Align the reference's ranges as it does, before its limit on teacher tokens.

    Args:
        chat: the sample.
        kinds: template tables of teacher and student.
        real: student tokens, end tokens of the last block included.
    """
    ranges = chat.searched_ranges()
    sides = [(chat.teacher.tokenizer, chat.teacher.encoded.ids), (chat.student.tokenizer, chat.cut().ids)]
    pieces = [[tokenizer.token_bytes(token) for token in ids] for tokenizer, ids in sides]
    places, faults = [], list(ranges.faults)
    for t0, t1, s0, s1 in ranges.places:
        if s0 >= real:
            continue
        both = even_spaces(pieces[0][t0:t1], pieces[1][s0 : min(s1, real)])
        found = same_bytes(replaced(*both, kinds), *blanked(both, kinds))
        if found != same_bytes(replaced(*both), *both):
            faults.append(REPLACED)
        places += [[t0 + a, t0 + b, s0 + c, s0 + d] for a, b, c, d in found]
    return Found(places=places, faults=faults)


def _judge_chunks(
    name: tuple[str, str], chat: Chat, recorded: list[list[int]], found: Found, limit: int | None
) -> Row:
    """Compare the chunks of one sample: all of them, and those that are learnt."""
    sample = _sample(chat, limit)
    prompt, flat = chat.student.encoded.prompt_tokens, sample.row[f"{SIDE}.chunks"]
    ours = [[c.teacher_start, c.teacher_end, c.student_start, c.student_end] for c in chat.chunks(limit)]
    stored = [[*flat[at + 2 : at + 4], *flat[at : at + 2]] for at in range(0, len(flat), 4)]
    theirs, faults = found.places, list(found.faults)
    if limit is not None:
        theirs = [_clipped(place, limit) for place in theirs]
        faults += [CUT] * (theirs != found.places)

    def with_learnt(places: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        return places, [place for place in places if place[2] >= prompt]

    excuse = Excuse(
        bug=Found(places=[], faults=faults).bug,
        spoilt=with_learnt(theirs),
        sound=with_learnt(chat.sound_chunks(limit)),
    )
    return judge(name[0], f"{name[1]}: chunks", with_learnt(recorded), (ours, stored), excuse)


def _judge_teacher(
    name: tuple[str, str], chat: Chat, recorded: list[list[int]], end: int, limit: int | None
) -> Row:
    """Compare the teacher's ids, labels and attention mask of one sample."""
    whole, pad, width = chat.teacher.encoded, chat.teacher.tokenizer.pad_id, len(recorded[0])

    def padded(ids: Sequence[int], replies: Sequence[int]) -> list[list[int]]:
        length = max(width, len(ids))
        filled = pad_to_length(ids, labels_of(ids, replies, IGNORED), length, pad)
        return [*filled, _mask(len(ids), length)]

    def cut(end: int) -> list[list[int]]:
        return padded(whole.ids[:end], [min(place, end) for place in whole.replies])

    sample = _sample(chat, limit)
    stored = sample.row[f"{SIDE}.ids"]
    excuse = Excuse(
        bug=LAST_CHUNK if end < len(stored) else CUT, spoilt=cut(end), sound=cut(chat.sound_end(limit))
    )
    ours = padded(stored, sample.row[f"{SIDE}.replies"])
    return judge(name[0], f"{name[1]}: teacher", recorded, ours, excuse)


def replay_collate_shared(path: Path) -> list[Row]:
    """Replay collate_shared.npz: one vocabulary under two templates, for every limit on teacher tokens."""
    golden, rows = Golden(path), []
    chats = _kept(read_shared(path.parent / "map_shared.json"))
    for prefix in golden.prefixes(r"tml\d+"):
        limit = int(prefix.removeprefix("tml"))
        _compare_students(golden, prefix, chats, is_fixed=True)
        ids, mask, count = (
            golden.read(f"{prefix}_{field}")
            for field in ("teacher_input_ids", "teacher_attention_mask", "n_aligned")
        )
        slots = torch.stack([golden.read(f"{prefix}_align_{side}") for side in ("teacher", "student")], dim=2)
        block = math.gcd(*mask.sum(dim=1).tolist())
        same = int(mask.sum(dim=1).max()) == ids.shape[1] and slots.shape[1] == max(1, int(count.max()))
        used = torch.arange(slots.shape[1]) < count[:, None]
        same &= not slots[~used].any()
        golden.add(f"{prefix}, padding", "replayed" if same else "failed")
        for number, chat in enumerate(chats):
            found = chat.searched_pairs()
            pairs = [pair for pair in found.places if pair[0] < limit]
            label, recorded = f"{prefix}, sample {number}", slots[number, : int(count[number])].tolist()
            excuse = Excuse(bug=found.bug, spoilt=pairs, sound=chat.sound_pairs(limit))
            rows.append(judge(path.name, f"{label}: pairs", recorded, chat.pairs(limit), excuse))
            whole, stored = chat.teacher.encoded.ids, _sample(chat, limit).row[f"{SIDE}.ids"]
            end = min(max((t + 1 for t, _ in found.places), default=len(whole)), limit)
            ours, spoilt, sound = (
                _filled(chat, own, block, ids.shape[1])
                for own in (stored, whole[:end], whole[: chat.sound_end(limit)])
            )
            bug = LAST_PAIR if end < len(stored) else CUT_PAIR
            told = [ids[number].tolist(), mask[number].tolist()]
            excuse = Excuse(bug=bug, spoilt=spoilt, sound=sound)
            rows.append(judge(path.name, f"{label}: teacher", told, ours, excuse))
    return [*golden.rows(), *rows]


def _filled(chat: Chat, ids: Sequence[int], block: int, width: int) -> list[list[int]]:
    """Fill teacher ids to whole blocks and pad them to `width`; return ids and attention mask."""
    tokenizer = chat.teacher.tokenizer
    blocks, labels = pad_to_blocks(ids, ids, block, tokenizer.eos_id)
    length = max(width, len(blocks))
    return [pad_to_length(blocks, labels, length, tokenizer.pad_id)[0], _mask(len(blocks), length)]


def _compare_students(golden: Golden, prefix: str, chats: list[Chat], *, is_fixed: bool) -> list[int]:
    """Compare the student's tensors; return each sample's attended tokens as recorded."""
    filled_to = (
        (golden.read(f"{prefix}_labels") != IGNORED) * torch.arange(1, _width(golden, prefix) + 1)
    ).amax(1)
    block = math.gcd(*filled_to.tolist())
    examples = []
    for chat in chats:
        row = _sample(chat, None).row
        labels = labels_of(row["ids"], row["replies"], IGNORED)
        examples.append(pad_to_blocks(row["ids"], labels, block, chat.student.tokenizer.eos_id))
    width = chats[0].max_length if is_fixed else max(len(ids) for ids, _ in examples)
    pad = chats[0].student.tokenizer.pad_id
    padded = [pad_to_length(ids, labels, width, pad) for ids, labels in examples]
    mask = [_mask(width if is_fixed else len(ids), width) for ids, _ in examples]
    pairs = [
        (f"{prefix}_input_ids", torch.tensor([ids for ids, _ in padded])),
        (f"{prefix}_labels", torch.tensor([labels for _, labels in padded])),
        (f"{prefix}_attention_mask", torch.tensor(mask)),
    ]
    golden.compare(f"{prefix}, student", pairs, 0.0)
    real: Tensor = golden.read(f"{prefix}_attention_mask").sum(dim=1)
    return [int(length) for length in real]


def _width(golden: Golden, prefix: str) -> int:
    return golden.read(f"{prefix}_labels").shape[1]


def _mask(real: int, length: int) -> list[int]:
    """Return an attention mask."""
    return [1] * real + [0] * (length - real)


def _clipped(place: list[int], limit: int) -> list[int]:
    """Cut a chunk's teacher side at the limit, as the reference's matrices do."""
    start, end = place[0], min(place[1], limit)
    return [*((start, end) if start < end else (0, 0)), *place[2:]]


def _end(found: Found, chat: Chat) -> int:
    """Return where the reference ends the teacher, before its limit."""
    return found.places[-1][1] if found.places else len(chat.teacher.encoded.ids)


def _kept(chats: list[Chat]) -> list[Chat]:
    """Return the chats that are collated."""
    return [chat for chat in chats if not chat.told["_discard"]]


def _sample(chat: Chat, limit: int | None) -> Sample:
    """Return our sample of a chat that is kept."""
    sample = chat.sample(limit)
    if isinstance(sample, str):
        raise ValueError(f"we leave out what the reference kept: {sample}")
    return sample
