"""A reply in cells that a person reads, and the page that replays it."""

import html
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from tests.unit.decode.small import load_tokenizer
from tide_megatron.decode.options import Decoding
from tide_megatron.decode.order import EARLY, LATE, MIDDLE, Cell, cells, colour, coloured, legend
from tide_megatron.decode.replay_page import render, words_of
from tide_megatron.decode.reply import Reply


def reply(ids, order, text="", forwards=None):
    return Reply(
        ids=tuple(ids), text=text, order=tuple(order), ended="eos", forwards=forwards or max(order) + 1
    )


def test_tokens_that_cut_a_character_are_one_cell(tmp_path):
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a漢b", opening=False)
    assert len(ids) == 5, "the small tokenizer spells a Chinese character in three bytes"
    found = cells(tokenizer, reply(ids, [4, 0, 3, 1, 2]))
    assert found == [
        Cell(text="a", steps=(4,)),
        Cell(text="漢", steps=(0, 3, 1)),
        Cell(text="b", steps=(2,)),
    ]
    assert [cell.known_at for cell in found] == [4, 3, 2]
    cut = cells(tokenizer, reply(ids[:3], [0, 1, 2]))
    assert cut[-1] == Cell(text="\N{REPLACEMENT CHARACTER}", steps=(1, 2))
    assert cells(tokenizer, reply([], [], forwards=1)) == []


def test_colours_go_from_the_first_to_the_last_forward():
    assert [colour(step, 9) for step in (0, 4, 8)] == [EARLY, MIDDLE, LATE]
    assert colour(0, 1) == EARLY
    text = coloured([Cell(text="a[b]", steps=(0,)), Cell(text="c", steps=(0, 8))], 9)
    assert text.plain == "a[b]c"
    assert [str(span.style) for span in text.spans] == [
        f"black on rgb({','.join(map(str, place))})" for place in (EARLY, LATE)
    ]
    assert "of 9 forwards" in legend(9).plain


class Page(HTMLParser):
    """Every tag with its attributes, and the text of the cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self._cell = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._cell = dict(attrs).get("data-steps") if tag == "i" else None

    def handle_data(self, data):
        if self._cell is not None:
            self.cells.append((data, self._cell))

    def handle_endtag(self, tag):
        self._cell = None


def test_the_page_has_every_cell_and_nothing_from_elsewhere():
    bad = '</script><script>alert("1")</script> & <b>'
    shown = [
        SimpleNamespace(
            messages=[{"role": "user", "content": bad}],
            reply=reply([1, 2, 3], [1, 0, 2], forwards=3),
            cells=[Cell(text=bad, steps=(1,)), Cell(text="漢", steps=(0, 2))],
        ),
        SimpleNamespace(
            messages=[{"role": "user", "content": "b"}],
            reply=reply([1], [0]),
            cells=[Cell(text="x", steps=(0,))],
        ),
    ]
    text = render(bad, shown, Decoding(schedule="confidence", new_tokens=32, stop=("END",)))
    page = Page(text)
    assert page.cells == [(bad, "1"), ("漢", "0 2"), ("x", "0")]
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert text.count(html.escape(bad)) == 4, "title twice, message, cell"
    assert not re.search(r"(src|href)=|https?:|url\(|@import", text)
    assert [attrs["data-forwards"] for _, attrs in page.tags if "data-forwards" in attrs] == ["3", "1"]
    (bar,) = [attrs for _, attrs in page.tags if attrs.get("id") == "bar"]
    assert (bar["max"], bar["value"]) == ("3", "3")
    assert "new tokens 32, schedule confidence, threshold 0.9, stop" in text
    assert "ended by an end token" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Decoding(), "new tokens 256, schedule count, seed 0"),
        (
            Decoding(schedule="entropy", temperature=0.5, batch=1, cache=False),
            "new tokens 256, schedule entropy, threshold 0.1, temperature 0.5, seed 0",
        ),
    ],
)
def test_how_replies_were_decoded_in_words(options, said):
    assert words_of(options) == said
