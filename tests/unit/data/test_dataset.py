"""Opening prepared data: whatever was cut, changed or mixed up is found before a row is read."""

import dataclasses
import json
import shutil

import numpy
import pytest

from tests.small_tokenizer import write_chats
from tide_megatron.base.errors import DataError
from tide_megatron.data import dataset as module
from tide_megatron.data import manifest
from tide_megatron.data.columns import ColumnWriter
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.manifest import read_manifest
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.preparation.sample import COLUMNS


def edit(folder, change, *, sign=False):
    """Change the manifest; with `sign`, its digest too, as a fault of ours would."""
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    if sign:
        content.pop("digest")
        body = {key: value for key, value in content.items() if key not in ("format", "version")}
        content["digest"] = manifest._digest(body)
    file.write_text(json.dumps(content))


def refused(folder, **options):
    with pytest.raises(DataError) as caught:
        PreparedData(folder, **options)
    return str(caught.value)


def broken(folder, replies):
    """Make data of three samples; the second one's replies are the given ones."""
    writer = ColumnWriter(folder, COLUMNS, folder.parent)
    for sample in range(3):
        good = {"ids": [1, 2, 3], "replies": [1, 3], "reply_bytes": [4]}
        writer.add(good | {"replies": replies} if sample == 1 else good)
    values, files = writer.finish()
    edit(folder, lambda content: content.update(samples=3, columns=values, files=files), sign=True)


@pytest.mark.parametrize("file", ["ids.bin", "ids.idx", "replies.bin", "replies.idx", "reply_bytes.bin"])
def test_a_file_cut_in_the_middle_is_refused(prepared, file):
    content = (prepared / file).read_bytes()
    (prepared / file).write_bytes(content[: len(content) // 2])
    message = refused(prepared, compare_digests=False)
    assert f"{file}: {len(content) // 2} bytes, the manifest says {len(content)}: it was cut" in message


def test_a_file_that_grew_is_refused(prepared):
    with (prepared / "ids.bin").open("ab") as stream:
        stream.write(b"more")
    assert "it was changed after preparation" in refused(prepared)


def test_changed_content_of_equal_size_is_refused(prepared):
    content = bytearray((prepared / "ids.bin").read_bytes())
    content[40] ^= 1
    (prepared / "ids.bin").write_bytes(content)
    assert "ids.bin: its content changed" in refused(prepared)
    assert "ids.bin: its content changed" in refused(prepared, compare_digests=True)


def test_large_data_is_hashed_only_on_demand(prepared, monkeypatch):
    monkeypatch.setattr(module, "HASHED_AT_OPEN_BYTES", 100)
    monkeypatch.setattr(module, "digest_file", lambda file: pytest.fail(f"hashed {file}"))
    PreparedData(prepared)
    monkeypatch.setattr(module, "digest_file", lambda file: "other")
    assert "its content changed" in refused(prepared, compare_digests=True)


@pytest.mark.parametrize("file", ["ids.bin", "replies.idx"])
def test_a_missing_file_is_named(prepared, file):
    (prepared / file).unlink()
    assert f"{file}: missing" in refused(prepared)


def test_an_edited_manifest_is_refused(prepared):
    edit(prepared, lambda content: content.update(max_length=7))
    assert "manifest.json: was edited after preparation" in refused(prepared)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "as JSON"), ("[]", "not a manifest"), ('{"format": "other"}', "not a manifest")],
)
def test_other_manifests_are_refused(prepared, text, message):
    (prepared / "manifest.json").write_text(text)
    assert message in refused(prepared)


def test_a_later_format_is_refused(prepared):
    edit(prepared, lambda content: content.update(version=99))
    assert "format version 99" in refused(prepared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(packed=True), "packed: Unexpected keyword argument (True)"),
        (lambda content: content["tokenizer"].pop("eos_id"), "tokenizer.eos_id: Field required: prepare"),
        (lambda content: content["statistics"].update(longest="far"), "statistics.longest: Input should be"),
    ],
)
def test_a_manifest_of_another_shape_names_file_key_and_value(prepared, change, message):
    edit(prepared, change, sign=True)
    assert f"manifest.json: {message}" in refused(prepared)


def test_a_folder_without_data_is_refused(tmp_path):
    assert "run `tide prepare`" in refused(tmp_path / "nothing")


def test_another_tokenizer_is_refused(prepared, tokenizer):
    PreparedData(prepared, tokenizer=tokenizer)
    message = refused(prepared, tokenizer=dataclasses.replace(tokenizer, vocabulary_digest="0" * 64))
    assert "prepared with another tokenizer or chat template (tokenizer, digest" in message
    assert "entries or template differ): prepare" in message
    message = refused(
        prepared, tokenizer=dataclasses.replace(tokenizer, mask_id=1, vocabulary_digest="0" * 64)
    )
    assert "its mask token has id 3 (<|mask|>), this model's has 1 (<|mask|>)): prepare" in message


def test_columns_with_different_samples_are_refused(prepared, tokenizer, tmp_path):
    other = write_chats(tmp_path / "other.jsonl", [("a", "b"), ("c", "d")])
    prepare([other], tokenizer, tmp_path / "two", max_length=64)
    facts = read_manifest(tmp_path / "two").files
    for file in ("replies.bin", "replies.idx"):
        shutil.copy(tmp_path / "two" / file, prepared / file)
        edit(prepared, lambda content, file=file: content["files"].update({file: facts[file]}), sign=True)
    message = refused(prepared)
    assert (
        "replies.idx: 2 samples with 4 values, the manifest says 23 with 46: the columns disagree" in message
    )


@pytest.mark.parametrize("replies", [[0, 9], [1], [], [0, 0], [2, 3, 4, 99], [2, 9, 1, 3], [3, 1]])
def test_replies_outside_the_tokens_are_refused(prepared, replies):
    broken(prepared, replies)
    assert "columns ids and replies disagree at sample 1 (3 tokens" in refused(prepared)


def test_an_index_that_is_none_is_refused(prepared):
    size = (prepared / "ids.idx").stat().st_size
    (prepared / "ids.idx").write_bytes(b"x" * size)
    facts = {"bytes": size, "sha256": module.digest_file(prepared / "ids.idx")}
    edit(prepared, lambda content: content["files"].update({"ids.idx": facts}), sign=True)
    assert "ids.idx: not an index" in refused(prepared)


def test_rows_outlive_the_columns(prepared):
    columns = PreparedData(prepared)
    row, again = columns.row(5), columns.row(5)
    row["ids"][0] = 77
    del columns
    assert again["ids"][0] != 77
    assert again["ids"].dtype == numpy.int32


def test_the_data_set_has_one_name(prepared, chats, tokenizer, tmp_path):
    prepare([chats], tokenizer, tmp_path / "other", max_length=127)
    first, second = PreparedData(prepared).manifest, PreparedData(tmp_path / "other").manifest
    assert first.digest == json.loads((prepared / "manifest.json").read_text())["digest"]
    assert first.digest != second.digest


@pytest.mark.parametrize("replies", [[0, 9], [1], [], [0, 0], [2, 3, 4, 99], [2, 9, 1, 3], [3, 1]])
def test_rows_of_large_data_are_checked_when_they_are_read(prepared, monkeypatch, replies):
    broken(prepared, replies)
    monkeypatch.setattr(module, "HASHED_AT_OPEN_BYTES", 0)
    columns = PreparedData(prepared)
    assert columns.row(0)["ids"].tolist() == [1, 2, 3] == columns.row(2)["ids"].tolist()
    with pytest.raises(DataError, match=r"columns ids and replies disagree at sample 1 \(3 tokens"):
        columns.row(1)


def test_opening_large_data_reads_no_values(prepared, monkeypatch):
    monkeypatch.setattr(module, "HASHED_AT_OPEN_BYTES", 0)
    monkeypatch.setattr(PreparedData, "_values", lambda self, column: pytest.fail(f"read {column}"))
    monkeypatch.setattr(PreparedData, "_check", lambda self, *given: pytest.fail("all rows checked"))
    assert len(PreparedData(prepared)) == 23
