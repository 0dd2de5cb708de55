"""What is left out, why, and that the same rows are left out every time."""

import json
import random
import tracemalloc

import pytest

from tests.small_tables import chat, write_parquet
from tide_megatron.base.errors import DataError
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.preparation import encoding
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.sources.choice import Filters, OfAll, SourceChoice
from tide_megatron.data.sources.filters import Seen, chat_digest, drawn, is_in_portion
from tide_megatron.data.sources.opening import find_sources


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def read(choices, **of_all):
    """Return what is kept, and why the rest is not, over all sources."""
    kept, left_out = [], []
    for source in find_sources(choices, OfAll(**of_all)).open():
        source.check()
        for _, line in source.lines():
            (kept if isinstance(line, bytes) else left_out).append(line)
    return [json.loads(line) for line in kept], left_out


def numbers(kept):
    return [int(record["messages"][0]["content"].split()[1]) for record in kept]


ROWS = [
    chat(n, lang=["en", "de", None][n % 3], score=n, meta={"lang": ["x", "y"][n % 2]}, ok=n % 2 == 0)
    for n in range(12)
]


@pytest.mark.parametrize("kind", ["lines", "parquet"])
@pytest.mark.parametrize(
    ("filters", "kept", "reason"),
    [
        ({"where": {"lang": "en"}}, [0, 3, 6, 9], 'lang is not "en"'),
        ({"where": {"lang": ("en", "de")}}, [0, 1, 3, 4, 6, 7, 9, 10], 'lang is not "en" or "de"'),
        ({"where": {"lang": None}}, [2, 5, 8, 11], "lang is not null"),
        ({"where": {"meta.lang": "y", "score": (1, 2, 3)}}, [1, 3], 'meta.lang is not "y"'),
        ({"where": {"ok": True}}, [0, 2, 4, 6, 8, 10], "ok is not true"),
        ({"where": {"score": True}}, [], "score is not true"),  # 1 is not true
        ({"reply_contains": "reply 1"}, [1, 10, 11], "reply without 'reply 1'"),
        ({"min_chars": 14}, [10, 11], "below min_chars"),
        ({"max_chars": 12}, list(range(10)), "above max_chars"),
        ({"min_reply_chars": 8}, [10, 11], "below min_reply_chars"),
        ({"max_reply_chars": 7}, list(range(10)), "above max_reply_chars"),
    ],
)
def test_filters_keep_what_they_say(tmp_path, kind, filters, kept, reason):
    write = write_parquet if kind == "parquet" else write_lines
    choice = SourceChoice(path=str(write(tmp_path / "a", ROWS)), filters=Filters(**filters))
    found, left_out = read([choice])
    assert numbers(found) == kept
    assert reason in left_out
    plain = SourceChoice(path=choice.path)
    assert read([plain], filters=Filters(**filters)) == (found, left_out)


def test_tokens_are_counted_by_the_students_tokenizer(tokenizer, tmp_path):
    rows = [chat(n * 7) for n in (1, 111, 2, 11111111111)]
    (tmp_path / "a").write_text("\n".join(map(json.dumps, rows)))
    prepare([tmp_path / "a"], tokenizer, tmp_path / "all", max_length=64)
    lengths = [len(PreparedData(tmp_path / "all").row(n)["ids"]) for n in range(4)]
    limits = Filters(min_tokens=min(lengths) + 1, max_tokens=max(lengths) - 1)
    found = find_sources([SourceChoice(path=str(tmp_path / "a"), filters=limits)])
    manifest = prepare(found, tokenizer, tmp_path / "some", max_length=64)
    assert manifest.samples == sum(min(lengths) < length < max(lengths) for length in lengths) > 0
    assert manifest.statistics.skipped == {
        "below min_tokens": lengths.count(min(lengths)),
        "above max_tokens": lengths.count(max(lengths)),
    }


def test_a_filter_on_a_column_that_is_not_there_is_refused_or_fits_nothing(tmp_path):
    filters = Filters(where={"language": "en"})
    with pytest.raises(DataError, match=r"filters\.where: no column 'language'; did you mean 'lang'"):
        read([SourceChoice(path=str(write_parquet(tmp_path / "a", ROWS)), filters=filters)])
    kept, left_out = read([SourceChoice(path=write_lines(tmp_path / "b", ROWS), filters=filters)])
    assert (kept, len(left_out)) == ([], 12)


def test_the_same_chat_is_kept_once_whatever_stands_around_it(tmp_path):
    same = [
        chat(1, id=1),
        chat(1, id=2, source="other"),
        {"prompt": " ask  1\n", "response": "reply 1"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "ask 1"}]},
                chat(1)["messages"][1],
            ]
        },
    ]
    paths = [write_lines(tmp_path / f"{n}", [row]) for n, row in enumerate([*same, chat(2)])]
    kept, left_out = read([SourceChoice(path=path) for path in paths], dedup=True)
    assert numbers(kept) == [1, 2]
    assert left_out == ["duplicate"] * 3
    assert chat_digest(chat(1)) != chat_digest(chat(1, tools=[{"name": "f"}]))
    assert chat_digest(chat("a bc")) != chat_digest(chat("ab c"))
    calls = [[{"name": "f", "arguments": each}] for each in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2})]
    one, turned, other = (chat(1, tools=None) for _ in calls)
    for record, call in zip((one, turned, other), calls, strict=True):
        record["messages"][1]["tool_calls"] = call
    assert chat_digest(one) == chat_digest(turned) != chat_digest(other)
    swapped = {"messages": [{**chat(1)["messages"][0], "role": "assistant"}, chat(1)["messages"][1]]}
    assert chat_digest(chat(1)) != chat_digest(swapped)


def test_taking_the_first_counts_what_is_kept(tmp_path):
    rows = [chat(n, lang=["en", "de"][n % 2]) for n in range(40)]
    for write in (write_lines, write_parquet):
        choice = SourceChoice(
            path=str(write(tmp_path / "a", rows)), take=3, filters=Filters(where={"lang": "de"})
        )
        kept, left_out = read([choice])
        assert numbers(kept) == [1, 3, 5]
        assert len(kept) + len(left_out) == 40


@pytest.mark.parametrize("dedup", [False, True])
def test_a_seeded_choice_is_exact_in_order_and_over_all_files(tmp_path, dedup):
    (tmp_path / "s").mkdir()
    write_lines(tmp_path / "s/a.jsonl", [chat(n) for n in range(30)])
    write_parquet(tmp_path / "s/b.parquet", [chat(n) for n in range(20, 60)])
    write_lines(tmp_path / "last", [chat(n) for n in range(60)])
    choices = {
        seed: [
            SourceChoice(path=str(tmp_path / "s"), take=12, take_seed=seed),
            SourceChoice(path=str(tmp_path / "last")),
        ]
        for seed in (1, 2)
    }
    first, again, other = (numbers(read(choices[seed], dedup=dedup)[0]) for seed in (1, 1, 2))
    assert first == again != other
    taken, rest = (first[:12], first[12:])
    assert taken == sorted(taken)
    assert len({n for n in taken if n >= 30}) > 2
    # What was seen and not taken is not lost: it comes from the next source.
    assert sorted([*taken, *rest]) == (list(range(60)) if dedup else sorted([*taken, *range(60)]))


def test_a_draw_is_fair():
    counts = dict.fromkeys(range(20), 0)
    for seed in range(2000):
        for number in drawn(range(20), 5, seed):
            counts[number] += 1
    assert min(counts.values()) > 420
    assert max(counts.values()) < 580
    assert drawn(range(3), 5, 0) == {0, 1, 2}


def test_portions_are_disjoint_whole_and_of_their_size(tmp_path):
    choice = [SourceChoice(path=write_lines(tmp_path / "a", [chat(n) for n in range(2000)] + [chat(3)]))]
    train, held_out = (read(choice, portion=each)[0] for each in ((0.0, 0.9), (0.9, 1.0)))
    assert sorted(numbers(train) + numbers(held_out)) == sorted([*range(2000), 3])
    assert not {*numbers(train)} & {*numbers(held_out)}
    assert 150 < len(held_out) < 250
    assert is_in_portion(bytes(16), (0.0, 1.0))


def test_seen_is_a_set():
    draw = random.Random(0)
    pool = [draw.randbytes(16) for _ in range(3000)] + [bytes(16), bytes(8) + b"x" * 8, b"x" * 8 + bytes(8)]
    below, known = Seen(), set(pool[:500])
    for digest in known:
        below.add(digest)
    seen = Seen(below)
    for digest in draw.choices(pool, k=9000):
        assert seen.add(digest) == (digest not in known)
        known.add(digest)
        assert digest in seen
    assert len(seen) == len(known) - 500
    assert len(below) == 500


def test_seen_is_small():
    draw = random.Random(0)
    tracemalloc.start()
    seen = Seen()
    for _ in range(30_000):
        seen.add(draw.randbytes(16))
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / 30_000 < 44
    assert most / 30_000 < 66


def test_left_out_rows_are_counted_by_reason_and_source(tokenizer, tmp_path):
    choices = [
        SourceChoice(
            path=write_lines(tmp_path / "a", ROWS), name="one", filters=Filters(where={"lang": "en"})
        ),
        SourceChoice(path=str(write_parquet(tmp_path / "b", ROWS)), name="two", take=5),
    ]
    found = find_sources(choices, OfAll(dedup=True))
    manifest = prepare(found, tokenizer, tmp_path / "out", max_length=64)
    assert manifest.statistics.skipped == {'lang is not "en"': 8, "duplicate": 4, "beyond take": 3}
    assert manifest.samples == 9
    assert manifest.source_names == ["one", "two"]
    first, second = manifest.sources
    assert first["records"] == second["records"] == 12
    assert first["options"] == {"name": "one", "filters": {"where": {"lang": "en"}}, "dedup": True}
    assert second["left_out"] == {"duplicate": 4, "beyond take": 3}
    again = prepare(found, tokenizer, tmp_path / "again", max_length=64, workers=1)
    assert (again.files, again.digest) == (manifest.files, manifest.digest)


def test_what_needs_no_encoding_comes_back_between_what_does(tmp_path):
    """Though what encodes may read far ahead."""

    class ReadsAhead:
        def encode(self, lines):
            return iter([(number, (line.decode(), None)) for number, line in lines])

    [source] = find_sources([SourceChoice(path=write_lines(tmp_path / "a", [chat(1)]))]).open()
    lines = [(1, "out"), (2, b"two"), (3, "out"), (5, "out"), (6, b"six"), (7, b"seven"), (9, "out")]
    found = [(number, said) for number, (said, _) in encoding.encoded(source, lines, ReadsAhead())]
    assert found == [(n, line if isinstance(line, str) else line.decode()) for n, line in lines]


def test_bad_and_left_out_rows_keep_their_places(tokenizer, tmp_path, monkeypatch):
    """Whatever the number of rows in a row that are no chat."""
    monkeypatch.setattr(encoding, "_MOST_ASIDE", 3)
    good, bad, out = chat(1, lang="en"), {"prompt": "a", "lang": "en"}, chat(2, lang="de")
    rows = [bad, out, good, *[out] * 9, bad, bad, good, *[bad] * 7]
    choice = SourceChoice(path=write_lines(tmp_path / "a", rows), filters=Filters(where={"lang": "en"}))
    for workers in (1, 2):
        manifest = prepare(
            find_sources([choice]),
            tokenizer,
            tmp_path / f"{workers}",
            max_length=64,
            on_bad="skip",
            workers=workers,
        )
        rejects = map(json.loads, (tmp_path / f"{workers}/rejects.jsonl").read_text().splitlines())
        assert [reject["line"] for reject in rejects] == [n for n, row in enumerate(rows, 1) if row is bad]
        assert manifest.samples == 2
        assert manifest.statistics.skipped == {'lang is not "en"': 10}
        assert manifest.sources[0]["records"] == len(rows)
