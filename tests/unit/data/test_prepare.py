"""Preparing: what is written, what long records do, and that nothing half-written stays behind."""

import hashlib
import json

import pytest

from tests.small_tokenizer import write_chats, write_tokenizer
from tests.unit.data.conftest import PAIRS
from tide_megatron.base import files
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.data import prepare as module
from tide_megatron.data import sample as sampling
from tide_megatron.data.columns import PreparedData
from tide_megatron.data.prepare import prepare
from tide_megatron.text.chat import encode_chat
from tide_megatron.text.tokenizer import Tokenizer


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def run(sources, tokenizer, out, **options):
    return prepare(sources, tokenizer, out, **({"max_length": 128} | options))


def test_columns_hold_every_record_in_order(prepared, tokenizer):
    columns = PreparedData(prepared)
    assert len(columns) == len(PAIRS)
    for sample, (ask, reply) in enumerate(PAIRS):
        row = columns.row(sample)
        encoded = encode_chat(
            tokenizer, [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
        )
        assert row["ids"].tolist() == encoded.ids
        assert row["replies"].tolist() == encoded.replies
        assert row["reply_bytes"].tolist() == [len(reply.encode())]


def test_manifest_tells_what_was_done(prepared, chats, tokenizer):
    manifest = PreparedData(prepared).manifest
    rows = [PreparedData(prepared).row(sample) for sample in range(len(PAIRS))]
    assert manifest.samples == len(PAIRS)
    assert manifest.tokenizer.digest == tokenizer.digest
    assert manifest.tokenizer.template_digest == tokenizer.chat.digest
    assert manifest.tokenizer.mask_id == tokenizer.mask_id
    assert manifest.sources == [
        {
            "name": "chats.jsonl",
            "bytes": chats.stat().st_size,
            "sha256": hashlib.sha256(chats.read_bytes()).hexdigest(),
            "records": len(PAIRS),
        }
    ]
    counts = manifest.statistics
    assert counts.tokens == sum(len(row["ids"]) for row in rows) == counts.prompt_tokens + counts.reply_tokens
    assert counts.reply_bytes == sum(len(reply.encode()) for _, reply in PAIRS)
    assert counts.longest == max(len(row["ids"]) for row in rows)
    assert (counts.truncated, counts.skipped) == (0, {})
    files = {f"{column}.{end}" for column in ("ids", "replies", "reply_bytes") for end in ("bin", "idx")}
    assert set(entries(prepared)) == files | {"manifest.json"} == set(manifest.files) | {"manifest.json"}


def test_equal_sources_give_equal_bytes(prepared, chats, tokenizer, tmp_path):
    run([chats], tokenizer, tmp_path / "again")
    for file in prepared.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_several_sources_are_read_in_the_given_order(chats, tokenizer, tmp_path):
    other = write_chats(tmp_path / "other.jsonl", [("first", "of all")])
    manifest = run([other, chats], tokenizer, tmp_path / "out")
    assert [source["records"] for source in manifest.sources] == [1, len(PAIRS)]
    assert "of all" in tokenizer.decode(PreparedData(tmp_path / "out").row(0)["ids"].tolist())


LONG = [("short", "yes"), ("x", "word " * 40), ("long " * 60, "no")]


def test_a_long_record_is_an_error_unless_said_otherwise(tokenizer, tmp_path):
    file = write_chats(tmp_path / "long.jsonl", LONG)
    with pytest.raises(DataError) as caught:
        run([file], tokenizer, tmp_path / "out", max_length=40)
    length = len(
        encode_chat(
            tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": LONG[1][1]}]
        ).ids
    )
    assert str(caught.value).startswith(
        f"{file}:2: {length} tokens, max_length is 40: raise max_length to {length}"
    )
    assert entries(tmp_path) == ["long.jsonl"]
    assert run([file], tokenizer, tmp_path / "out", max_length=1000).statistics.longest > length


def test_long_records_can_be_left_out(tokenizer, tmp_path):
    file = write_chats(tmp_path / "long.jsonl", LONG)
    manifest = run([file], tokenizer, tmp_path / "out", max_length=40, on_long="skip")
    assert manifest.samples == 1
    assert manifest.statistics.skipped == {"longer than max_length": 2}
    assert manifest.sources[0]["records"] == 3


def test_long_records_can_be_cut_but_prompts_need_room(tokenizer, tmp_path):
    file = write_chats(tmp_path / "long.jsonl", LONG)
    manifest = run([file], tokenizer, tmp_path / "out", max_length=40, on_long="truncate")
    assert manifest.samples == 2
    assert manifest.statistics.truncated == 1
    assert manifest.statistics.skipped == {"prompt fills max_length": 1}
    row = PreparedData(tmp_path / "out").row(1)
    assert len(row["ids"]) == 40 == row["replies"][1]
    kept = tokenizer.decode(row["ids"][row["replies"][0] :].tolist())
    assert int(row["reply_bytes"][0]) == len(kept.encode()) < len(LONG[1][1])


def test_bad_records_are_placed_and_nothing_stays(tokenizer, tmp_path):
    file = write_chats(tmp_path / "bad.jsonl", [("a", "b"), ("a", "say <|mask|>")])
    with pytest.raises(DataError) as caught:
        run([file], tokenizer, tmp_path / "out")
    assert str(caught.value).startswith(f"{file}:2: the text contains the mask token")
    assert entries(tmp_path) == ["bad.jsonl"]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_data_is_refused(tokenizer, tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(DataError, match="no samples"):
        run([tmp_path / "empty.jsonl"], tokenizer, tmp_path / "out")
    assert entries(tmp_path) == ["empty.jsonl"]


def test_data_of_which_all_is_left_out_is_refused(tokenizer, tmp_path):
    file = write_chats(tmp_path / "long.jsonl", LONG[1:])
    with pytest.raises(DataError, match=r"no samples \(2 longer than max_length\)"):
        run([file], tokenizer, tmp_path / "out", max_length=40, on_long="skip")


@pytest.mark.parametrize("where", ["encode", "finish", "rename"])
def test_an_interrupt_leaves_nothing(monkeypatch, chats, tokenizer, tmp_path, where):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    place, name = {
        "encode": (sampling, "encode_chat"),
        "finish": (module, "digest_file"),
        "rename": (files, "commit_folder"),
    }[where]
    monkeypatch.setattr(place, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run([chats], tokenizer, tmp_path / "out")
    assert entries(tmp_path) == []


def test_existing_data_is_replaced_only_when_asked(prepared, tokenizer, tmp_path):
    other = write_chats(tmp_path / "other.jsonl", [("a", "b")])
    with pytest.raises(DataError, match="exists: choose another folder"):
        run([other], tokenizer, prepared)
    assert len(PreparedData(prepared)) == len(PAIRS)
    run([other], tokenizer, prepared, replace=True)
    assert len(PreparedData(prepared)) == 1
    assert entries(tmp_path) == ["other.jsonl", "prepared"]


def test_a_failed_replacement_leaves_the_old_data(prepared, tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        run([tmp_path / "bad.jsonl"], tokenizer, prepared, replace=True)
    assert len(PreparedData(prepared)) == len(PAIRS)
    assert entries(tmp_path) == ["bad.jsonl", "prepared"]


def test_a_folder_that_is_not_data_is_never_replaced(chats, tokenizer, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    with pytest.raises(DataError, match="never replaced"):
        run([chats], tokenizer, tmp_path / "thesis", replace=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "years of work"


def test_missing_sources_and_bad_options_are_named(chats, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file"):
        run([chats, tmp_path / "nothing.jsonl"], tokenizer, tmp_path / "out")
    with pytest.raises(DataError, match="no such file"):
        run([], tokenizer, tmp_path / "out")
    with pytest.raises(ConfigError, match="on_long: 'trunkate' is unknown: did you mean 'truncate'"):
        run([chats], tokenizer, tmp_path / "out", on_long="trunkate")
    with pytest.raises(ConfigError, match="max_length: 1 "):
        run([chats], tokenizer, tmp_path / "out", max_length=1)


def test_a_tokenizer_without_template_is_refused(chats, tmp_path):
    bare = Tokenizer.load(write_tokenizer(tmp_path / "bare", chat_template=None))
    with pytest.raises(DataError, match="no chat template"):
        run([chats], bare, tmp_path / "out")
    assert entries(tmp_path) == ["bare"]


def test_no_path_of_this_machine_is_written_down(prepared, chats):
    content = json.loads((prepared / "manifest.json").read_text())
    assert str(chats.parent) not in json.dumps(content)
    assert content["tokenizer"]["name"] == "tokenizer"
