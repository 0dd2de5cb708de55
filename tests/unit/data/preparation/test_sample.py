"""Data for a teacher with its own tokens: columns, truncation, and what a batch carries of them."""

import dataclasses

import numpy
import pytest
import torch

from tests.small_tokenizer import CHATML, write_chats, write_other, write_tokenizer
from tide_megatron.base.errors import ConfigError, DataError, TideError
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.loader import Loader, SideReading
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.preparation.sample import SideChoice
from tide_megatron.diffusion.batch import IGNORED
from tide_megatron.text.align import align_chats
from tide_megatron.text.chat import encode_chat
from tide_megatron.text.tokenizer import Tokenizer

PAIRS = [
    ("add two", "def add(left, right):\n    return left + right"),
    ("same", "same"),
    ("left right left right", "return 12345 and 日本語 👩‍💻 again"),
    ("x", "left " * 9),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return Tokenizer.load(write_tokenizer(folder / "student")), Tokenizer.load(
        write_other(folder / "teacher")
    )


@pytest.fixture
def run(tokenizers, tmp_path):
    def run(max_length=128, side_length=None, name="data", pairs=PAIRS, **options):
        chats = write_chats(tmp_path / "chats.jsonl", pairs)
        sides = {"own": SideChoice(tokenizer=tokenizers[1], max_length=side_length)}
        prepare([chats], tokenizers[0], tmp_path / name, max_length=max_length, sides=sides, **options)
        return PreparedData(tmp_path / name)

    return run


def chats():
    return [
        [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}] for ask, reply in PAIRS
    ]


def test_columns_hold_the_teachers_tokens_and_the_chunks_of_the_reply(run, tokenizers):
    columns = run()
    assert columns.manifest.sides["own"].max_length == 256
    for sample, messages in enumerate(chats()):
        row = columns.row(sample)
        student, teacher = (encode_chat(side, messages, aligned=True) for side in tokenizers)
        assert row["own.ids"].tolist() == teacher.ids
        assert row["own.replies"].tolist() == teacher.replies
        chunks = align_chats(student, teacher, [1])
        assert chunks
        assert row["own.chunks"].reshape(-1, 4).tolist() == [list(chunk) for chunk in chunks]
        assert min(chunk.student_start for chunk in chunks) >= student.replies[0]


def test_statistics_say_how_much_is_aligned(run):
    columns = run()
    side = columns.manifest.sides["own"]
    spans = numpy.concatenate([columns.row(n)["own.chunks"].reshape(-1, 4) for n in range(len(columns))])
    assert side.chunks == len(spans)
    assert side.aligned_bytes == sum(len(reply.strip().encode()) for _, reply in PAIRS)
    assert side.longest == max(len(columns.row(n)["own.ids"]) for n in range(len(columns)))
    assert (side.cut, side.without_chunks, side.pairs) == (0, 0, 0)


@pytest.mark.parametrize("max_length", range(14, 40, 3))
def test_a_cut_student_leaves_whole_chunks_and_cuts_the_teacher_behind_them(run, max_length):
    whole, cut = run(name="whole"), run(max_length, name="cut", on_long="truncate")
    kept = 0
    for sample in range(len(cut)):
        row = cut.row(sample)
        ids = row["ids"].tolist()
        (source,) = [n for n in range(len(whole)) if whole.row(n)["ids"][: len(ids)].tolist() == ids]
        full = whole.row(source)
        spans, all_spans = (r["own.chunks"].reshape(-1, 4) for r in (row, full))
        fits = all_spans[all_spans[:, 1] <= len(row["ids"])]
        assert spans.tolist() == fits.tolist()
        if len(row["ids"]) < len(full["ids"]):
            kept += 1
            if len(spans):
                assert len(row["own.ids"]) == spans[-1, 3]
            assert len(row["own.ids"]) < len(full["own.ids"])
    assert kept or max_length > 35


def test_a_cut_teacher_leaves_whole_chunks(run):
    whole = run(name="whole")
    for limit in range(22, 45, 4):
        cut = run(side_length=limit, name=f"cut{limit}")
        for sample in range(len(cut)):
            row, full = cut.row(sample), whole.row(sample)
            spans, all_spans = (r["own.chunks"].reshape(-1, 4) for r in (row, full))
            assert len(row["own.ids"]) <= limit
            assert row["ids"].tolist() == full["ids"].tolist()
            assert spans.tolist() == all_spans[all_spans[:, 3] <= limit].tolist()
            assert row["own.ids"].tolist() == full["own.ids"][: len(row["own.ids"])].tolist()


@pytest.mark.parametrize("max_length", [28, 33, 38])
def test_a_side_that_was_cut_is_filled_with_pads_that_the_teacher_does_not_see(run, tokenizers, max_length):
    whole = run(name="whole")
    columns = run(max_length, name="cut", on_long="truncate")
    assert columns.manifest.sides["own"].cut > 0
    kinds = set()
    for sample in range(len(columns)):
        length, full = (len(part.row(sample)["own.ids"]) for part in (columns, whole))
        side = loader_of(columns, block_size=16).batch_of([sample]).sides["big"]
        filled = -(-length // 16) * 16
        token, seen = (tokenizers[1].pad_id, length) if length < full else (tokenizers[1].eos_id, filled)
        assert side.ids[0, length:].tolist() == [token] * (filled - length)
        assert side.lengths.tolist() == [seen]
        kinds.add(length < full)
    assert kinds == {True, False}


def loader_of(columns, block_size=4, known=None):
    sides = {"big": SideReading(side="own", block_size=block_size, known=known)}
    return Loader(columns=columns, samples=2, block_size=8, sides=sides)


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_batch_carries_the_side_padded_with_the_teachers_own_tokens(run, tokenizers, block_size):
    columns = run()
    batch = loader_of(columns, block_size).batch_of([2, 0])
    side = batch.sides["big"]
    for place, sample in enumerate((2, 0)):
        ids = columns.row(sample)["own.ids"].tolist()
        filled = -(-len(ids) // block_size) * block_size
        assert side.lengths[place] == filled
        assert side.ids[place, : len(ids)].tolist() == ids
        assert (side.ids[place, len(ids) : filled] == tokenizers[1].eos_id).all()
        mine = side.sample == place
        assert side.spans[mine].tolist() == columns.row(sample)["own.chunks"].reshape(-1, 4).tolist()
        assert side.number[mine].tolist() == list(range(int(mine.sum())))
    assert side.ids.shape[1] == int(side.lengths.max())


def test_an_id_that_a_sides_teacher_does_not_know_is_named(run):
    columns = run()
    highest = int(loader_of(columns).batch_of([0]).sides["big"].ids.max())
    loader_of(columns, known=(highest + 1, "teachers.big")).batch_of([0])
    few = loader_of(columns, known=(highest, "teachers.big"))
    for loader in (few, few.of_teacher("big", 4)):
        with pytest.raises(
            DataError, match=rf"sample 0 has the token id {highest}, but teachers\.big knows "
        ):
            loader.batch_of([0])


def test_a_teacher_can_be_scored_on_its_own_tokens(run):
    columns = run()
    own = loader_of(columns).of_teacher("big", 4)
    batch = own.batch_of([0, 1])
    row = columns.row(0)
    start, end = row["own.replies"].tolist()
    assert batch.ids[0, : len(row["own.ids"])].tolist() == row["own.ids"].tolist()
    assert (batch.labels[0, :start] == IGNORED).all()
    assert batch.labels[0, start:end].tolist() == row["own.ids"][start:end].tolist()
    assert batch.reply_bytes[0] == row["reply_bytes"][0]
    assert own.longest == -(-columns.manifest.sides["own"].longest // 4) * 4
    shared = loader_of(columns).of_teacher("another", 2)
    assert torch.equal(shared.batch_of([0]).ids, dataclasses.replace(shared, main=None).batch_of([0]).ids)
    assert shared.block_size == 2


def test_a_side_is_found_by_tokenizer_and_template(run, tokenizers, tmp_path):
    manifest = run().manifest
    assert manifest.side_of(tokenizers[1].digest) == "own"
    assert manifest.side_of(tokenizers[0].digest) is None
    other = Tokenizer.load(write_other(tmp_path / "again"), chat_template_kwargs={"enable_thinking": None})
    assert manifest.side_of(other.digest) is None


def test_data_without_sides_has_the_digest_it_always_had(tokenizers, tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl", PAIRS)
    manifest = prepare([chats], tokenizers[0], tmp_path / "out", max_length=128)
    assert "sides" not in (tmp_path / "out/manifest.json").read_text()
    assert manifest.digest == PreparedData(tmp_path / "out").manifest.digest
    assert manifest.sides == {}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("own", r"teacher 'own': write NAME=FOLDER"),
        ("=x", r"teacher '=x': write NAME=FOLDER"),
        ("own=x,maks=<m>", r"unknown option 'maks'; did you mean 'mask'"),
        ("own=x,max_length=many", r"max_length 'many' is no number of tokens"),
    ],
)
def test_a_word_that_names_no_side_is_refused(word, said):
    with pytest.raises(ConfigError, match=said):
        SideChoice.read(SideChoice.split(word)[1])


def test_bad_names_and_windows_of_a_side_are_refused(tokenizers, tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl", PAIRS)
    for name, length, said in (("a.b", None, "letters, digits"), ("own", 1, "max_length 1 is too short")):
        sides = {name: SideChoice(tokenizer=tokenizers[1], max_length=length)}
        with pytest.raises(ConfigError, match=said):
            prepare([chats], tokenizers[0], tmp_path / "out", max_length=128, sides=sides)
        assert not (tmp_path / "out").exists()


def test_a_side_without_any_chunk_is_refused(run, tmp_path):
    with pytest.raises(
        DataError, match=r"teacher own: no chunk of any reply .* raise its max_length above 8"
    ):
        run(side_length=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl"]


def test_chunks_outside_the_tokens_are_refused(run, tmp_path):
    columns = run()
    spans = numpy.memmap(tmp_path / "data/own.chunks.bin", dtype=numpy.int32, mode="r+")
    spans[3] = 9999
    spans.flush()
    with pytest.raises(DataError, match="content changed"):
        PreparedData(tmp_path / "data")
    with pytest.raises(DataError, match=r"own\.chunks of sample 0 points outside the tokens"):
        PreparedData(tmp_path / "data", compare_digests=False)
    assert len(columns) == len(PAIRS)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("", {}),
        ("template=qwen3", {"template": "qwen3"}),
        ("chat_template_kwargs.think=true", {"chat_template_kwargs": {"think": True}}),
        ("chat_template_kwargs.think=low", {"chat_template_kwargs": {"think": "low"}}),
        (
            "chat_template_kwargs.think=3,mask=<|pad|>",
            {"chat_template_kwargs": {"think": 3}, "mask": "<|pad|>"},
        ),
        (
            "chat_template_kwargs.enable_thinking=null",
            {"chat_template_kwargs": {"enable_thinking": None}},
        ),
    ],
)
def test_a_place_names_template_and_options(tmp_path, words, options):
    folder = write_tokenizer(
        tmp_path, chat_template=CHATML + "{{ think }}", eos_token="<|im_end|>", pad_token=None
    )
    read = SideChoice.read(",".join(word for word in (str(folder), words) if word))
    assert read.tokenizer.digest == Tokenizer.load(folder, **options).digest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("templat=qwen3", "unknown option 'templat'; did you mean 'template'"),
        ("template=qwen", "template: 'qwen' is unknown: did you mean 'qwen3'"),
        ("chat_template_kwargs.thin=1", "reads no 'thin': did you mean 'think'"),
        ("chat_template_kwargs.tools=1", "tools comes from the records"),
        ("max_length=x", "max_length 'x' is no number"),
        ("max_length=\u00b2", "is no number"),
    ],
)
def test_what_a_place_cannot_name_is_refused(tmp_path, words, message):
    folder = write_tokenizer(tmp_path, chat_template=CHATML + "{{ think }}")
    with pytest.raises(TideError, match=message):
        SideChoice.read(f"{folder},{words}")
