"""Chunks: equal bytes, minimal, in order, whatever the templates and tokenizers do to the text."""

import itertools

import pytest

from tests.small_tokenizer import CHATML, write_other, write_tokenizer
from tide_megatron.text.align import Chunk, align_boundaries, align_chats
from tide_megatron.text.chat import encode_chat
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


@pytest.mark.parametrize(
    ("left", "right", "chunks"),
    [
        ([(0, 5), (2, 6), (4, 7)], [(0, 1), (4, 2)], [Chunk(5, 7, 1, 2)]),
        ([(0, 0), (1, 1), (2, 2)], [(0, 0), (1, 1), (2, 2)], [Chunk(0, 1, 0, 1), Chunk(1, 2, 1, 2)]),
        ([(1, 3), (3, 4)], [(0, 0), (3, 1)], []),
        ([(0, 0)], [(0, 0)], []),
        ([], [(0, 0), (1, 1)], []),
        # a token without bytes goes with what follows it
        ([(0, 0), (0, 1), (3, 2)], [(0, 4), (3, 5)], [Chunk(0, 2, 4, 5)]),
    ],
)
def test_common_boundaries_cut(left, right, chunks):
    assert align_boundaries(left, right) == chunks
