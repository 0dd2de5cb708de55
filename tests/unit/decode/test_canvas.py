"""One reply's arithmetic: blocks, what is committed when, and where it ends."""

import pytest

from tide_megatron.decode.canvas import Canvas, Rules
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.schedule import Picks, block_steps, choose, planned_counts

MASK, PAD, END, CALL = 99, 0, 50, 51


def canvas(prompt=(1, 2, 3), *, block=4, pads=0, **words):
    options = Decoding(**{"new_tokens": 9, **words})
    rules = Rules(
        options=options,
        block=block,
        mask_id=MASK,
        pad_id=PAD,
        end_ids=frozenset({END}),
        stop_ids=frozenset({CALL} if "<call>" in options.stop else ()),
        decode=lambda ids: "".join(chr(96 + token) for token in ids if token < 27),
    )
    return Canvas(rules, 0, list(prompt), options.new_tokens, pads)


def write(one, tokens, *, confidence=None):
    """Commit the tokens meant for the reply's places, the leftmost the surest, until it ends."""
    while not one.ended:
        places = [slot - one.reply_start for slot in one.masked]
        sure = [confidence[place] if confidence else 1 - place / 100 for place in places]
        one.commit(Picks(tokens=[tokens[place] for place in places], confidence=sure, entropy=[]))
    return one.reply()


def test_blocks_are_counted_from_the_prompts_first_token():
    one, blocks = canvas(), []
    tokens = list(range(1, 10))
    while not one.ended:
        blocks.append((one.start, one.end, tuple(one.masked)))
        places = [slot - one.reply_start for slot in one.masked]
        one.commit(Picks(tokens=[tokens[p] for p in places], confidence=[1.0] * len(places), entropy=[]))
    assert list(dict.fromkeys(block[:2] for block in blocks)) == [(0, 4), (4, 8), (8, 12)]
    assert blocks[0][2] == (3,)
    reply = one.reply()
    assert reply.ids == tuple(tokens)
    assert (reply.text, reply.order, reply.ended) == ("abcdefghi", tuple(range(9)), "length")
    assert reply.forwards == 9


def test_what_is_surest_is_committed_first_and_noted():
    reply = write(canvas(new_tokens=5), [1, 2, 3, 4, 5], confidence=[0.1, 0.2, 0.9, 0.5, 0.7])
    assert reply.order == (0, 4, 1, 3, 2)


def test_an_end_token_ends_a_reply_once_all_before_it_is_written():
    reply = write(canvas(), [1, 2, END, 4, 5, 6, 7, 8, 9])
    assert (reply.ids, reply.text, reply.ended, reply.forwards) == ((1, 2), "ab", "eos", 3)
    late = write(canvas(), [1, 2, END, 4, 5, 6, 7, 8, 9], confidence=[0.9, 0.1, 0.8, 0.7, 0.6, 0, 0, 0, 0])
    assert (late.ids, late.forwards) == ((1, 2), 5)
    assert write(canvas(), [END] * 9).ids == ()


@pytest.mark.parametrize(
    ("stop", "ids", "text"),
    [
        (("cd",), (1, 2), "ab"),  # inside a block
        (("ef",), (1, 2, 3, 4), "abcd"),  # across a border of blocks (5 | 6)
        (("gh", "b"), (1,), "a"),  # the first in the text, whichever is named first
        (("a",), (), ""),
    ],
)
def test_stop_texts_are_found_across_tokens_and_blocks(stop, ids, text):
    reply = write(canvas(stop=stop), list(range(1, 10)))
    assert (reply.ids, reply.text, reply.ended) == (ids, text, "stop")


def test_a_stop_text_goes_before_an_end_behind_it_and_may_be_a_special_token():
    assert write(canvas(stop=("b",)), [1, 2, END, 4, 5, 6, 7, 8, 9]).ended == "stop"
    assert write(canvas(stop=("z",)), [1, END, 26, 4, 5, 6, 7, 8, 9]).ended == "eos"
    special = write(canvas(stop=("<call>",)), [1, 2, CALL, 4, 5, 6, 7, 8, 9])
    assert (special.ids, special.ended) == ((1, 2), "stop")


def test_the_reference_may_write_the_mask_which_leaves_a_place_open():
    one = canvas(prompt=(5,), pads=3, schedule="reference", new_tokens=4, steps=4)
    assert (one.ids[:4], one.positions[:5]) == ([PAD, PAD, PAD, 5], [0, 0, 0, 0, 1])
    assert one.visible.tolist() == [False] * 3 + [True] * 5
    for token in (MASK, 7, 8, 9):
        one.commit(Picks(tokens=[token] * len(one.masked), confidence=[0.5] * len(one.masked), entropy=[]))
    assert one.ended == "length"
    assert one.ids[4:] == [7, 8, 9, MASK]


def test_under_the_reference_a_written_pad_is_seen_by_nobody_once_its_block_is_finished():
    one = canvas(prompt=(1, 2, 3, 4), schedule="reference", new_tokens=8, steps=2)
    assert one.visible.all()
    one.commit(Picks(tokens=[5, PAD, 6, 7], confidence=[0.5] * 4, entropy=[]))
    assert one.visible.tolist() == [True] * 5 + [False] + [True] * 6
    assert one.positions == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10]


def test_guidance_hides_the_prompt_and_nothing_else():
    one = canvas(prompt=(5, PAD), pads=2, schedule="reference")
    assert one.fed(0, 5, blind=True) == [PAD, PAD, MASK, PAD, MASK]
    one = canvas(prompt=(5, PAD, 7))
    one.ids[3] = 8
    assert one.fed(1, 5, blind=True) == [MASK, MASK, 8, MASK]
    assert one.fed(1, 5, blind=False) == [PAD, 7, 8, MASK]


SURE = Picks(tokens=[1, 2, 3, 4], confidence=[0.2, 0.95, 0.91, 0.95], entropy=[2.0, 0.3, 0.4, 0.2])


@pytest.mark.parametrize(
    ("words", "planned", "chosen"),
    [
        ({}, 1, [1]),
        ({}, 3, [1, 3, 2]),
        ({"schedule": "confidence"}, 1, [1, 3, 2]),
        ({"schedule": "confidence", "threshold": 0.93}, 1, [1, 3]),
        ({"schedule": "confidence", "threshold": 0.99}, 1, [1]),
        ({"schedule": "confidence", "threshold": 0.99}, 4, [1, 3, 2, 0]),
        ({"schedule": "entropy"}, 1, [3]),
        ({"schedule": "entropy", "threshold": 0.2}, 1, [3, 1]),
        ({"schedule": "entropy", "threshold": 0.5}, 1, [3, 1, 2]),
        ({"schedule": "entropy", "threshold": 0.9}, 1, [3, 1, 2, 0]),
    ],
)
def test_what_a_schedule_commits(words, planned, chosen):
    assert choose(Decoding(**words), SURE, planned) == chosen


def test_steps_are_shared_among_blocks():
    assert block_steps(Decoding(new_tokens=256), 32) == 32
    assert block_steps(Decoding(new_tokens=256, steps=64), 32) == 8
    assert block_steps(Decoding(new_tokens=20, steps=6), 8) == 3
    assert block_steps(Decoding(new_tokens=20, steps=6, schedule="reference"), 8) == 2
    assert block_steps(Decoding(new_tokens=3), 32) == 3
    assert planned_counts(32, 7) == (5, 4, 5, 4, 5, 4, 5)
    assert planned_counts(3, 32) == (1, 1, 1)


def test_a_threshold_keeps_to_the_steps_it_was_given():
    """Nothing is above it, so each of the block's two steps commits half."""
    one = canvas(prompt=(), new_tokens=8, steps=4, schedule="confidence", threshold=0.99)
    reply = write(one, [1] * 8, confidence=[0.5] * 8)
    assert (reply.forwards, reply.order) == (4, (0, 0, 1, 1, 2, 2, 3, 3))
