"""Parquet and Arrow: rows in order, nulls that Arrow adds taken out, damage named, memory bounded."""

import datetime
import decimal
import hashlib
import json
import subprocess
import sys

import pyarrow
import pytest

from tests.small_tables import chat, write_arrow, write_parquet
from tide_megatron.base.errors import DataError, RecordError
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.sources import tables
from tide_megatron.data.sources.choice import SourceChoice
from tide_megatron.data.sources.opening import find_sources
from tide_megatron.data.sources.record import parse_record


def read(path, **options):
    """Return what becomes of every row of a source, checked first."""
    sources = find_sources([SourceChoice(path=str(path), **options)]).open()
    for source in sources:
        source.check()
    return [
        (number, json.loads(line) if isinstance(line, bytes) else line)
        for source in sources
        for number, line in source.lines()
    ]


WRITERS = {
    "parquet": write_parquet,
    "arrow": write_arrow,
    "stream": lambda path, rows: write_arrow(path, rows, is_stream=True),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", ["chats.data", "chats.jsonl"])
def test_rows_come_in_order_whatever_the_name(tmp_path, kind, name):
    rows = [chat(number, source="s", id=number) for number in range(233)]
    file = WRITERS[kind](tmp_path / name, rows)
    expected = [{"messages": row["messages"], "source": "s"} for row in rows]
    assert read(file) == [*enumerate(expected, 1)]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_table_gives_the_data_of_its_json_lines(tokenizer, tmp_path, kind):
    rows = [chat(number, source=f"s{number % 3}") for number in range(50)]
    file = WRITERS[kind](tmp_path / "table", rows)
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    of_table = prepare([file], tokenizer, tmp_path / "a", max_length=64)
    of_lines = prepare([tmp_path / "chats.jsonl"], tokenizer, tmp_path / "b", max_length=64)
    assert of_table.files == of_lines.files
    assert of_table.source_names == of_lines.source_names == ["s0", "s1", "s2"]
    [said] = of_table.sources
    assert said == {
        "name": "table",
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "records": 50,
        "shape": "messages",
    }


def test_nulls_that_arrow_adds_say_nothing(tmp_path):
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    other = {"function": {"name": "say", "arguments": {"b": "x"}}}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [each]}]}
        for each in (call, other)
    ]
    rows.append(chat(3, tools=[{"name": "f", "parameters": {"x": {"type": "int"}}}]))
    rows[2]["messages"][1]["reasoning_content"] = "r"
    rows[0]["tools"] = None  # the first row's keys are the columns
    found = [record for _, record in read(write_parquet(tmp_path / "a", rows))]
    assert [parse_record(json.dumps(record).encode()).messages for record in found] == [
        tuple(row["messages"]) for row in rows
    ]
    assert found[1]["messages"][1]["tool_calls"] == [other]
    assert found[2]["tools"] == rows[2]["tools"]


def test_columns_that_say_nothing_may_be_anything(tmp_path):
    odd = {
        "when": datetime.datetime(2026, 1, 1),
        "blob": b"\xff\x00",
        "price": decimal.Decimal("1.50"),
        "span": datetime.timedelta(seconds=1),
        "lists": [[1], [2, 3]],
        "nan": float("nan"),
    }
    [(_, record)] = read(write_parquet(tmp_path / "a", [chat(1, **odd)]))
    assert record == chat(1)
    [(_, record)] = read(write_parquet(tmp_path / "b", [chat(1, images=[{"bytes": b"\xff" * 9}])]))
    with pytest.raises(RecordError, match="images is not read here"):
        parse_record(json.dumps(record).encode())
    [(_, record)] = read(write_parquet(tmp_path / "c", [chat(1, source=datetime.date(2026, 1, 1))]))
    assert parse_record(json.dumps(record).encode()).source == "2026-01-01"


def test_messages_may_be_a_table_of_columns_or_text(tmp_path):
    """As `datasets` stores a sequence of dictionaries, and as some write JSON into a column."""
    messages = chat(1)["messages"]
    columns = {key: [message[key] for message in messages] for key in ("role", "content")}
    assert read(write_parquet(tmp_path / "a", [{"messages": columns}])) == [(1, chat(1))]
    assert read(write_parquet(tmp_path / "b", [{"messages": json.dumps(messages)}])) == [(1, chat(1))]
    [(_, fault)] = read(write_parquet(tmp_path / "c", [{"messages": "hello"}]))
    assert "text that is no JSON list" in str(fault)


def test_a_row_is_named_by_its_number(tokenizer, tmp_path):
    rows = [chat(number) for number in range(30)]
    rows[16]["messages"] = rows[16]["messages"][:1]
    file = write_parquet(tmp_path / "chats.parquet", rows)
    with pytest.raises(DataError) as caught:
        prepare([file], tokenizer, tmp_path / "out", max_length=64)
    assert str(caught.value).startswith(f"{file}: row 17: no reply")
    assert "1 of 30 records are bad" in str(caught.value)
    prepare([file], tokenizer, tmp_path / "out", max_length=64, on_bad="skip")
    [reject] = map(json.loads, (tmp_path / "out/rejects.jsonl").read_text().splitlines())
    assert (reject["file"], reject["line"]) == ("chats.parquet", 17)
    assert len(PreparedData(tmp_path / "out")) == 29


def test_a_row_that_is_no_text_is_refused_alone(tmp_path):
    storage = pyarrow.array([b"a", b"\xff\xfe", b"c"], pyarrow.binary()).buffers()
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, storage)
    table = pyarrow.table({"prompt": text, "response": ["x", "y", "z"]})
    pyarrow.parquet.write_table(table, tmp_path / "a")
    (_, first), (number, fault), (_, third) = read(tmp_path / "a")
    assert (first["messages"][0]["content"], third["messages"][0]["content"]) == ("a", "c")
    assert number == 2
    assert "not UTF-8" in str(fault)


def fault_of(path, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("kept", [0.99, 0.5, 12])
def test_a_file_that_was_cut_is_refused(tmp_path, kind, kept):
    file = WRITERS[kind](tmp_path / "a", [chat(number) for number in range(200)])
    content = file.read_bytes()
    file.write_bytes(content[: kept if kept > 1 else int(len(content) * kept)])
    assert "damaged or cut short" in fault_of(file)


def test_a_stream_that_was_cut_between_two_batches_is_refused(tmp_path):
    file = WRITERS["stream"](tmp_path / "a", [chat(number) for number in range(20)])
    file.write_bytes(file.read_bytes()[: -len(tables._END_OF_STREAM)])
    assert "the mark at its end is missing" in fault_of(file)


def test_damage_inside_is_refused_with_its_row(tmp_path):
    rows = [chat(hashlib.sha256(b"%d" % number).hexdigest()) for number in range(600)]
    file = write_parquet(tmp_path / "a", rows, group=100)
    content = bytearray(file.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 800):
        content[place] ^= 0xFF
    file.write_bytes(bytes(content))
    assert "damaged or cut short, at row" in fault_of(file)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"messages": None}], "column 'messages' holds only nulls"),
        ([{"messages": [["a", "b"]]}], "column 'messages' is list<"),
        ([{"messages": [1, 2]}], "column 'messages' is list<"),
        ([{"messages": {"role": "user"}}], "column 'messages' is struct<"),
        ([{"prompt": 3, "response": "x"}], "column 'prompt' is int64: text or a list of messages"),
        ([{"prompt": "x", "response": None}], "column 'response' holds only nulls"),
        ([{"text": "x", "id": 1}], "no messages: columns id, text; known are messages"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "columns chosen, prompt, rejected"),
        ([{"instruction": "a", "output": "b", "prompt": "c", "response": "d"}], "choose a shape"),
        ([{"question": "a", "answer": "b", "response": "c"}], "answer and response can be one thing"),
    ],
)
def test_columns_of_another_kind_are_refused_at_once(tmp_path, rows, said):
    assert said in fault_of(write_parquet(tmp_path / "a", rows))


def test_a_changed_byte_is_noticed_where_the_file_has_checksums(tmp_path):
    table = pyarrow.Table.from_pylist([{"prompt": "ask", "response": "a certain reply"}])
    pyarrow.parquet.write_table(
        table,
        tmp_path / "a",
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content.replace(b"certain", b"curtain", 1))
    assert "damaged or cut short, at row 1" in fault_of(tmp_path / "a")


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["prompt", "response", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "a")
    assert "two columns are called 'prompt'" in fault_of(tmp_path / "a")


def test_a_table_without_rows_has_no_samples(tokenizer, tmp_path):
    schema = pyarrow.Table.from_pylist([chat(1)]).schema
    file = write_parquet(tmp_path / "empty.parquet", [], schema=schema)
    assert read(file) == []
    with pytest.raises(DataError, match=r"empty\.parquet: no samples"):
        prepare([file], tokenizer, tmp_path / "out", max_length=64)


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a", [chat(1)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs the package pyarrow: pip install 'tide-megatron[data]'" in fault_of(file)


def test_lines_need_no_library_of_tables(tmp_path):
    (tmp_path / "a").write_text(json.dumps(chat(1)))
    code = (
        "import sys; from pathlib import Path\n"
        "from tide_megatron.data.sources.opening import find_sources\n"
        f"[source] = find_sources([Path({str(tmp_path / 'a')!r})]).open()\n"
        "source.check(); print(len([*source.lines()]), sorted({'pyarrow', 'datasets'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=-1, text=True, timeout=60)
    assert done.stdout == "1 []\n"


@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    """Ten times as many rows, in ten times as many groups: the same most memory, within a factor of two."""
    peaks = []
    for groups in (2, 20):
        rows = [chat(str(number) * 2000) for number in range(groups * 100)]
        file = tmp_path / f"{kind}-{groups}"
        WRITERS[kind](file, rows)
        code = (
            "import pyarrow; from pathlib import Path\n"
            "from tide_megatron.data.sources.opening import find_sources\n"
            f"[source] = find_sources([Path({str(file)!r})]).open()\n"
            "for line in source.lines(): pass\n"
            "print(pyarrow.default_memory_pool().max_memory())"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=-1, text=True, timeout=60)
        peaks.append(int(done.stdout))
    assert peaks[1] < 2 * max(peaks[0], 2**20)
