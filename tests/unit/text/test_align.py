"""Chunks: equal bytes, minimal, in order, whatever templates and tokenizers do to a text; ids that agree."""

import itertools
import json
import re

import numpy
import pytest

from tests.small_tokenizer import CHATML, write_other, write_tokenizer
from tide_megatron.base.errors import ConfigError
from tide_megatron.text.align import align, align_chats, differing_ids, require_shared
from tide_megatron.text.chat import Encoded, encode_chat
from tide_megatron.text.templates.places import Content
from tide_megatron.text.tokenizer import Tokenizer

CHATS = [
    ["Add two numbers.", "def add(left, right):\n    return left + right"],
    ["user", "assistant", "user", "user"],
    ["  same  ", "same", "same", " same\n\n"],
    ["ROLE <role>", "role_end ASSISTANT</role>"],
    ["line\r\nline", "a\r\n\r\nb\r"],
    ["zero\u200bwidth\u200d", "\ufeffx\u2060y\u00ad"],
    ["👩‍💻🏳️‍🌈", "e\u0301\u0302 ﬁ ﷺ 👨‍👩‍👧‍👦 日本語 ก็"],
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return Tokenizer.load(write_tokenizer(folder / "student")), Tokenizer.load(
        write_other(folder / "teacher")
    )


def chat(contents):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def bytes_of(tokenizer, ids):
    return b"".join(tokenizer.token_bytes(token) for token in ids)


def boundaries(tokenizer, encoded, message):
    """List the offsets in the original content at which a token of the side starts or ends whole."""
    content, offset, found = encoded.contents[message], 0, set()
    for token in encoded.ids:
        end = offset + len(tokenizer.token_bytes(token))
        for place in (offset, end):
            if content.start <= place <= content.end:
                found.add(place - content.start + content.skipped)
        offset = end
    return found


@pytest.mark.parametrize("contents", CHATS)
@pytest.mark.parametrize("swapped", [False, True])
def test_chunks_are_equal_bytes_minimal_ordered_and_cover_each_content(pair, contents, swapped):
    left, right = pair[::-1] if swapped else pair
    student, teacher = (encode_chat(side, chat(contents), aligned=True) for side in (left, right))
    for message, content in enumerate(contents):
        common = sorted(boundaries(left, student, message) & boundaries(right, teacher, message))
        chunks = align_chats(student, teacher, [message])
        spelled = []
        for chunk in chunks:
            mine = bytes_of(left, student.ids[chunk.student_start : chunk.student_end])
            assert mine == bytes_of(right, teacher.ids[chunk.teacher_start : chunk.teacher_end])
            spelled.append(mine)
        raw = content.encode()
        assert b"".join(spelled) == raw[common[0] : common[-1]]
        assert spelled == [raw[a:b] for a, b in itertools.pairwise(common)]
        for chunk, after in itertools.pairwise(chunks):
            assert (chunk.student_end, chunk.teacher_end) == (after.student_start, after.teacher_start)


def test_messages_that_repeat_are_kept_apart(pair):
    contents = ["same", "same", "same", "same"]
    student, teacher = (encode_chat(side, chat(contents), aligned=True) for side in pair)
    starts = [align_chats(student, teacher, [message])[0] for message in range(4)]
    assert sorted({chunk.student_start for chunk in starts}) == [chunk.student_start for chunk in starts]
    assert len({chunk.teacher_start for chunk in starts}) == 4
    assert align_chats(student, teacher) == [
        chunk for message in range(4) for chunk in align_chats(student, teacher, [message])
    ]


def test_a_template_that_trims_a_message_still_aligns_with_one_that_does_not(pair):
    student, teacher = (encode_chat(side, chat(["x", " \n left right \n"]), aligned=True) for side in pair)
    chunks = align_chats(student, teacher, [1])
    text = bytes_of(pair[1], teacher.ids[chunks[0].teacher_start : chunks[-1].teacher_end])
    assert text == b" right"  # the student has " left" as one token, of which the teacher lost the space
    assert student.contents[1].skipped == 0
    assert teacher.contents[1].skipped == 3


def test_a_token_over_the_edge_of_a_content_is_in_no_chunk(tmp_path, pair):
    glued = CHATML.replace("<|im_start|>{{ m['role'] }}\n", "{{ m['role'] }} return ").replace(
        "<|im_start|>assistant\n", "assistant return "
    )
    left = Tokenizer.load(write_tokenizer(tmp_path / "glued", chat_template=glued))
    student = encode_chat(left, chat(["one", "  two"]), aligned=True)
    teacher = encode_chat(pair[1], chat(["one", "  two"]), aligned=True)
    place = student.contents[1]
    for chunk in align_chats(student, teacher, [1]):
        assert student.ends[chunk.student_start - 1] >= place.start
        assert student.ends[chunk.student_end - 1] <= place.end


def test_a_cut_conversation_has_the_whole_chunks_before_the_cut(pair):
    messages = chat(["x", "left right left right left"])
    whole = encode_chat(pair[0], messages, aligned=True)
    teacher = encode_chat(pair[1], messages, aligned=True)
    chunks = align_chats(whole, teacher)
    for length in range(len(whole.ids) + 1):
        cut = encode_chat(pair[0], messages, max_tokens=max(1, length), aligned=True)
        assert align_chats(cut, teacher) == [c for c in chunks if c.student_end <= max(1, length)]


def one_text(start, end, ends):
    """Return a conversation of one text at the bytes [start, end), and nothing but places of tokens."""
    content = Content(start=start, end=end, skipped=0)
    return Encoded(
        ids=[*range(len(ends))],
        replies=[0, len(ends)],
        reply_bytes=0,
        uncut_tokens=len(ends),
        ends=numpy.array(ends, dtype=numpy.int64),
        contents=[content],
    )


@pytest.mark.parametrize(
    ("left", "right", "chunks"),
    [
        ((9, 13, [1, 3, 5, 7, 9, 11, 13]), (5, 9, [5, 9]), [(5, 7, 1, 2)]),
        ((0, 2, [1, 2]), (0, 2, [1, 2]), [(0, 1, 0, 1), (1, 2, 1, 2)]),
        ((2, 6, [3, 5, 7]), (0, 4, [2, 5]), []),
        ((0, 1, [2]), (0, 1, [3]), []),
        ((0, 3, []), (0, 3, [1, 3]), []),
        # a token without bytes goes with what follows it
        ((0, 3, [0, 3]), (4, 7, [4, 4, 7]), [(0, 2, 1, 3)]),
    ],
)
def test_common_boundaries_cut(left, right, chunks):
    sides = one_text(*left), one_text(*right)
    assert align_chats(*sides) == chunks
    other = one_text(0, 2, [1, 2])
    found = align([other, sides[0], other], [other, sides[1], other])
    assert found.spans[found.conversation == 1].tolist() == [list(chunk) for chunk in chunks]
    assert found.spans[found.conversation == 2].tolist() == [[0, 1, 0, 1], [1, 2, 1, 2]]


def load(folder, change=lambda content: None, **options):
    """Load the small tokenizer after a change to its tokenizer.json."""
    write_tokenizer(folder, **{key: options.pop(key) for key in ("special",) if key in options})
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.load(folder, **options)


def swap(first, second):
    def change(content):
        entries = content["model"]["vocab"]
        left, right = (spelling for spelling, token in entries.items() if token in (first, second))
        entries[left], entries[right] = entries[right], entries[left]

    return change


def rename(old, new):
    def change(content):
        for token in content["added_tokens"]:
            token["content"] = new if token["content"] == old else token["content"]
        entries = content["model"]["vocab"]
        entries[new] = entries.pop(old)

    return change


def forget_last(content):
    entries = content["model"]["vocab"]
    last = max(entries, key=entries.get)
    del entries[last]
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != last]


@pytest.fixture
def student(tmp_path):
    return load(tmp_path / "student")


def test_copies_agree_everywhere(student, tmp_path):
    teacher = load(tmp_path / "teacher")
    assert differing_ids(student, teacher, student.vocabulary_size) == []
    require_shared(student, teacher, student.vocabulary_size, "losses.kl")


def test_two_swapped_entries_are_found_and_named_with_their_bytes(student, tmp_path):
    teacher = load(tmp_path / "teacher", swap(50, 60))
    assert differing_ids(student, teacher, student.vocabulary_size) == [50, 60]
    left, right = student.token_bytes(50), teacher.token_bytes(50)
    said = (
        f"losses.kl: 2 of the first 312 ids are different bytes in {student.name} and {teacher.name} "
        f"(id 50: {left!r} against {right!r}); set shared_vocab_size to 50 or less"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        require_shared(student, teacher, student.vocabulary_size, "losses.kl")


def test_only_the_compared_ids_count(student, tmp_path):
    teacher = load(tmp_path / "teacher", swap(50, 60))
    require_shared(student, teacher, 50, "losses.kl")
    assert differing_ids(student, teacher, 51) == [50]


def test_an_id_that_one_side_lacks_differs(student, tmp_path):
    teacher = load(tmp_path / "teacher", forget_last)
    assert teacher.vocabulary_size == student.vocabulary_size - 1
    last = student.vocabulary_size - 1
    assert differing_ids(student, teacher, student.vocabulary_size) == [last]
    assert differing_ids(teacher, student, student.vocabulary_size) == [last]


def test_ids_that_nobody_has_agree(student, tmp_path):
    assert differing_ids(student, load(tmp_path / "teacher"), student.vocabulary_size + 8) == []


def test_mask_tokens_may_be_spelt_differently(student, tmp_path):
    teacher = load(tmp_path / "teacher", rename("<|mask|>", "[MASK]"), mask="[MASK]")
    assert teacher.mask_id == student.mask_id
    assert differing_ids(student, teacher, student.vocabulary_size) == []


def test_other_special_tokens_may_not(student, tmp_path):
    teacher = load(tmp_path / "teacher", rename("<|im_start|>", "[START]"))
    assert differing_ids(student, teacher, student.vocabulary_size) == [student.encode("<|im_start|>")[0]]


def test_a_mask_token_added_behind_the_vocabulary_is_exempt(tmp_path):
    special = ("<|pad|>", "<|im_start|>", "<|im_end|>")
    student = load(tmp_path / "student", special=special, add_mask=True)
    teacher = load(tmp_path / "teacher", special=special, mask="[MASK]", add_mask=True)
    assert student.mask_was_added
    assert differing_ids(student, teacher, student.vocabulary_size) == []
