"""What `tide data inspect` tells is what is in the columns; its page escapes all that records bring."""

import html.parser
import json
import re

import numpy
import pytest
from typer.testing import CliRunner

from tests.small_tokenizer import write_other, write_tokenizer
from tide_megatron import api
from tide_megatron.base.errors import DataError
from tide_megatron.commands import app
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.sets import inspection as module
from tide_megatron.data.sets.inspection import Inspection, spelling
from tide_megatron.text.tokenizer import Tokenizer

EVIL = "<script>alert('x')</script>"
RECORDS = [
    ("return left", "def add(left, right):\n    return left + right", "a & b"),
    (EVIL, f"日本 is {EVIL}", "<b>"),
    ("long", "the same " * 90, "a & b"),
    *[(f"n {n}", "ok " * n, "third") for n in range(1, 20)],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspected")
    write_tokenizer(root / "student")
    write_other(root / "teacher")
    lines = [
        json.dumps(
            {
                "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}],
                "source": source,
            }
        )
        for ask, reply, source in RECORDS
    ]
    (root / "chats.jsonl").write_text("\n".join([*lines, "{", '{"messages": []}']))
    api.prepare(
        root / "data",
        [root / "chats.jsonl"],
        tokenizer=root / "student",
        teachers={"other": str(root / "teacher")},
        max_length=120,
        on_long="truncate",
        on_bad="skip",
        workers=1,
    )
    return root


@pytest.fixture(scope="module")
def data(folder):
    return PreparedData(folder / "data")


def test_counts_are_those_of_the_rows(folder, data):
    facts = Inspection(folder / "data").facts()
    rows = [data.row(number) for number in range(len(data))]
    for side, name in (("", "ids"), ("other", "other.ids")):
        lengths = sorted(len(row[name]) for row in rows)
        found = facts.lengths[side]
        assert found.longest == lengths[-1]
        assert found.median == lengths[(len(lengths) - 1) // 2]
        assert found.nine_of_ten == lengths[-(-9 * len(lengths) // 10) - 1]
        wanted, _ = numpy.histogram(lengths, bins=[*found.edges[:-1], found.edges[-1] - 1])
        assert (sum(found.counts), found.counts) == (len(rows), wanted.tolist())
    chunks = [chunk for row in rows for chunk in row["other.chunks"].reshape(-1, 4).tolist()]
    covered = facts.coverage["other"]
    assert covered.chunks == len(chunks)
    assert covered.single == sum(b - a == d - c == 1 for a, b, c, d in chunks) > 0
    assert 0.5 < covered.share_of_bytes <= 1
    names, numbers = data.sources_of(numpy.arange(len(data)))
    assert facts.sources == {name: (numbers == n).sum() for n, name in enumerate(names)}
    assert module.shares(facts)[2:] == [("not JSON", 1), ("no messages", 1)]


def test_memory_is_read_in_pieces(folder, monkeypatch):
    whole = Inspection(folder / "data").facts()
    monkeypatch.setattr("tide_megatron.data.columns._PIECE", 8)
    assert Inspection(folder / "data").facts() == whole


def test_a_sample_is_shown_by_chunks(folder, data):
    tokenizers = {"": Tokenizer.load(folder / "student"), "other": Tokenizer.load(folder / "teacher")}
    shown = Inspection(folder / "data").sample(0, tokenizers)
    student, teacher = shown.sides["other"]
    assert (shown.number, shown.source) == (0, "a & b")
    assert "".join(token.text for token in student if token.is_learnt).startswith(RECORDS[0][1])
    chunks = data.row(0)["other.chunks"].reshape(-1, 4)
    for number in range(len(chunks)):
        texts = ["".join(t.text for t in side if t.chunk == number) for side in (student, teacher)]
        assert texts[0] == texts[1] != ""
    assert {token.chunk for token in teacher if token.chunk is not None} == set(range(len(chunks)))


def test_bytes_that_are_no_characters_are_shown_as_bytes(folder):
    student = Tokenizer.load(folder / "student")
    ids = student.encode("日")
    assert [spelling(student, one) for one in ids] == ["<E6>", "<97>", "<A5>"]
    assert spelling(student, student.eos_id) == "<|im_end|>"
    assert spelling(student, 10**6) == "<1000000?>"


class Checked(html.parser.HTMLParser):
    """Counts tags, and refuses what is opened and not closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        if tag not in ("meta", "br", "line", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "rect"):
            assert self.open.pop() == tag


def test_the_page_is_whole_and_brings_nothing_of_the_records_to_life(folder, tmp_path):
    words = ["data", "inspect", str(folder / "data"), "--sample", "1", "--html", str(tmp_path / "page.html")]
    words += ["--tokenizer", str(folder / "student"), "--teacher", f"other={folder / 'teacher'}"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    parser = Checked()
    parser.feed(page)
    assert parser.open == []
    assert parser.tags.count("script") == 1, "our own"
    assert "b" not in parser.tags
    assert "&lt;b&gt;" in page
    assert "http" not in re.sub(r"<!doctype.*?>", "", page)
    assert str(folder) not in page
    assert 'data-chunk="0"' in page


def test_without_tokenizers_ids_are_shown(folder, data, tmp_path):
    facts, shown = api.inspect_data(folder / "data", sample=2, page=tmp_path / "page.html")
    assert [int(token.text) for token in shown.student] == data.row(2)["ids"].tolist()
    assert "Numbers are ids" in (tmp_path / "page.html").read_text()
    assert facts.manifest.samples == len(data)


def test_programs_get_json(folder):
    done = CliRunner().invoke(app, ["data", "inspect", str(folder / "data"), "--json"])
    values = json.loads(done.output)
    assert values["samples"] == len(RECORDS)
    assert values["sources"] == {"a & b": 2, "<b>": 1, "third": 19}
    assert values["teachers"]["other"]["chunks"] > 0


def test_the_terminal_shows_it(folder):
    words = ["data", "inspect", str(folder / "data"), "--sample", "1", "--tokenizer", str(folder / "student")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for said in ("sample 1 from <b>", "<|im_start|>", "not JSON", "other, ", "third"):
        assert said in done.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sample": 99}, "no sample 99; it has 0 to 21"),
        ({"tokenizer": "teacher"}, "is not the tokenizer and template that the student"),
        ({"teachers": {"other": "student"}}, "is not the tokenizer and template that teacher other"),
        ({"teachers": {"llada": "teacher"}}, "has no teacher 'llada'; its teachers: other"),
    ],
)
def test_what_does_not_belong_to_it_is_refused(folder, options, said):
    if "tokenizer" in options:
        options = {"tokenizer": folder / options["tokenizer"]}
    if "teachers" in options:
        options = {"teachers": {key: str(folder / name) for key, name in options["teachers"].items()}}
    with pytest.raises(DataError, match=said):
        api.inspect_data(folder / "data", **options)


def test_damaged_data_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="no prepared data"):
        api.inspect_data(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (folder / "data").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "ids.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"ids\.bin: is missing or has not the \d+ bytes"):
        api.inspect_data(copy)
