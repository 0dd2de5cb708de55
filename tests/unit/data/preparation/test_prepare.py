"""Preparing: what is written, what long records do, and that nothing half-written stays behind."""

import dataclasses
import hashlib
import json

import pytest

from tests.small_tokenizer import write_chats, write_tokenizer
from tests.unit.data.conftest import PAIRS
from tide_megatron.base import unfinished
from tide_megatron.base.errors import ConfigError, DataError
from tide_megatron.data import columns
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.manifest import Manifest
from tide_megatron.data.preparation import origins
from tide_megatron.data.preparation import sample as sampling
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.sources.record import Reading
from tide_megatron.text.chat import encode_chat
from tide_megatron.text.tokenizer import Tokenizer


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def sources(columns):
    """Return the sources' names, and the number of every sample's own."""
    return columns.sources_of(columns.spread(len(columns)))


def run(sources, tokenizer, out, **options):
    return prepare(sources, tokenizer, out, **({"max_length": 128} | options))


def test_columns_hold_every_record_in_order(prepared, tokenizer):
    data = PreparedData(prepared)
    assert len(data) == len(PAIRS)
    for sample, (ask, reply) in enumerate(PAIRS):
        row = data.row(sample)
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
        "encode": (sampling, "encode_chats"),
        "finish": (columns, "digest_of"),
        "rename": (unfinished, "commit_folder"),
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


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
EMPTY = json.dumps(GOOD | {"messages": [{"role": "system", "content": ""}, *GOOD["messages"]]})
BAD = [
    ("the system's content is empty", EMPTY),
    ("not JSON", "{"),
    ("the system's content is empty", EMPTY),
    ("text with the mask token", json.dumps(GOOD).replace('"b"', '"<|mask|>"')),
    ("a doubled key", json.dumps(GOOD).replace('"b"', '"b", "content": "c"')),
    ("no reply", json.dumps({"messages": GOOD["messages"][:1]})),
    ("tools that the template does not show", json.dumps(GOOD | {"tools": [{"name": "f"}]})),
]


def write_bad(file):
    """Write a good record before and after each bad one; the bad ones are lines 2, 4, ..."""
    good = json.dumps(GOOD)
    file.write_text("\n".join([good, *(line for _, bad in BAD for line in (bad, good))]) + "\n")
    return file


def test_all_faults_are_counted_before_the_first_one_ends_it(tokenizer, tmp_path):
    file = write_bad(tmp_path / "bad.jsonl")
    with pytest.raises(DataError) as caught:
        run([file], tokenizer, tmp_path / "out")
    said = str(caught.value)
    assert said.startswith(
        f"{file}:2: message 1: the system's content is empty: fill it or remove the record"
    )
    assert "7 of 15 records are bad: 2 the system's content is empty (first " in said
    assert f"1 a doubled key (first {file}:10)" in said
    assert "--on-bad skip" in said
    assert "\n" not in said
    assert entries(tmp_path) == ["bad.jsonl"]


def test_bad_records_can_be_left_out_and_are_listed(tokenizer, tmp_path, caplog):
    file = write_bad(tmp_path / "bad.jsonl")
    manifest = run([file, file], tokenizer, tmp_path / "out", on_bad="skip")
    assert manifest.samples == 2 * (len(BAD) + 1)
    assert manifest.rejected == {"the system's content is empty": 4} | {
        kind: 2 for kind, _ in BAD if "empty" not in kind
    }
    assert [source["records"] for source in manifest.sources] == [15, 15]
    listed = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"], entry["kind"]) for entry in listed] == 2 * [
        ("bad.jsonl", 2 * number, kind) for number, (kind, _) in enumerate(BAD, 1)
    ]
    assert listed[0]["reason"] == "message 1: the system's content is empty: fill it or remove the record"
    assert "14 bad records were left out (4 the system's content is empty, 2 not JSON" in caplog.text
    assert PreparedData(tmp_path / "out").manifest == manifest


def test_long_records_are_no_bad_ones(tokenizer, tmp_path):
    file = write_chats(tmp_path / "long.jsonl", [*LONG, ("a", "<|mask|>")])
    with pytest.raises(DataError) as caught:
        run([file], tokenizer, tmp_path / "out", max_length=40, on_bad="skip")
    assert str(caught.value).startswith(f"{file}:2: ")
    assert "2 longer than max_length" in str(caught.value)
    manifest = run([file], tokenizer, tmp_path / "out", max_length=40, on_bad="skip", on_long="skip")
    assert (manifest.statistics.skipped, manifest.rejected) == (
        {"longer than max_length": 2},
        {"text with the mask token": 1},
    )


def test_data_of_which_all_is_bad_is_refused(tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n[]\n")
    with pytest.raises(DataError, match=r"no samples \(1 not JSON, 1 no messages\)"):
        run([tmp_path / "bad.jsonl"], tokenizer, tmp_path / "out", on_bad="skip")
    with pytest.raises(ConfigError, match="on_bad: 'skipp' is unknown: did you mean 'skip'"):
        run([tmp_path / "bad.jsonl"], tokenizer, tmp_path / "out", on_bad="skipp")
    assert entries(tmp_path) == ["bad.jsonl"]


def test_text_is_put_into_the_form_of_a_tokenizer_with_nfc(tmp_path):
    folder = write_tokenizer(tmp_path / "nfc")
    content = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": {"type": "NFC"}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    loose = Tokenizer.load(folder)
    file = write_chats(tmp_path / "chats.jsonl", [("u\u0308", "\u1100\u1161 u\u0308")])
    with pytest.raises(
        DataError, match="normalises text to NFC: write the record in NFC, prepare with --norm"
    ):
        run([file], loose, tmp_path / "out")
    assert run([file], loose, tmp_path / "out", on_bad="skip", reading=Reading(normalize=True)).normalized
    row = PreparedData(tmp_path / "out").row(0)
    assert loose.decode(row["ids"][row["replies"][0] :].tolist()) == "\uac00 \u00fc\n"
    composed = write_chats(tmp_path / "composed.jsonl", [("\u00fc", "\uac00 \u00fc")])
    assert not run([composed], loose, tmp_path / "plain").normalized
    assert (tmp_path / "plain/ids.bin").read_bytes() == (tmp_path / "out/ids.bin").read_bytes()


def from_sources(*names):
    return [json.dumps(GOOD | ({"source": name} if name else {})) for name in names]


@pytest.mark.parametrize(
    ("files", "names", "column"),
    [
        ({"a": [None, None]}, ["a"], [0, 0]),
        ({"a": ["web", "code", "web"]}, ["web", "code"], [0, 1, 0]),
        ({"a": ["web", None]}, ["web", "a"], [0, 1]),
        ({"a": ["web", "web"]}, ["web"], [0, 0]),
        ({"a": [None], "b": [None, None]}, ["a", "b"], [0, 1, 1]),
        ({"a": ["x"], "b": ["x"]}, ["x"], [0, 0]),
        ({"1/a": [None], "2/a": [None], "3/a": ["a"]}, ["a", "a#2"], [0, 1, 0]),
    ],
)
def test_every_sample_remembers_its_source(tokenizer, tmp_path, files, names, column):
    for name, words in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(from_sources(*words)))
    run([tmp_path / name for name in files], tokenizer, tmp_path / "out")
    found, numbers = sources(PreparedData(tmp_path / "out"))
    assert list(found) == names
    assert numbers.tolist() == column


def test_data_of_one_source_is_what_it_always_was(prepared):
    content = json.loads((prepared / "manifest.json").read_text())
    assert not {"source_names", "rejected", "normalized", "sides", "learn", "unprompted"} & content.keys()
    assert PreparedData(prepared).manifest.digest == content["digest"]


def without_column(folder):
    """Make data of several sources what an earlier release wrote."""
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    for name in ("source_names", "rejected", "digest"):
        content.pop(name, None)
    content["columns"].pop("source")
    content["files"] = {name: facts for name, facts in content["files"].items() if "source" not in name}
    kept = {key: value for key, value in content.items() if key not in ("format", "version")}
    content["digest"] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(content))


def test_data_of_an_earlier_release_is_read_by_its_files(tokenizer, chats, tmp_path):
    other = write_chats(tmp_path / "other.jsonl", [("a", "b"), ("x", "long " * 60)])
    run([other, chats], tokenizer, tmp_path / "whole", max_length=400)
    run([other, chats], tokenizer, tmp_path / "cut", on_long="skip")
    for name in ("whole", "cut"):
        without_column(tmp_path / name)
    names, numbers = sources(PreparedData(tmp_path / "whole"))
    assert names == ("other.jsonl", "chats.jsonl")
    assert numbers.tolist() == [0, 0, *[1] * len(PAIRS)]
    names, numbers = sources(PreparedData(tmp_path / "cut"))  # nobody knows which record was left out
    assert names == ("other.jsonl + chats.jsonl",)
    assert not numbers.any()


def test_too_many_sources_are_none(tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(origins, "MOST", 3)
    for name in ("a", "b"):
        (tmp_path / name).write_text("\n".join(from_sources(*(f"https://{name}/{n}" for n in range(4)))))
    run([tmp_path / "a", tmp_path / "b"], tokenizer, tmp_path / "out")
    assert sources(PreparedData(tmp_path / "out"))[0] == ("a", "b")
    assert "more than 3 different words" in caplog.text


def test_a_source_column_that_points_nowhere_is_refused(tokenizer, tmp_path):
    (tmp_path / "a").write_text("\n".join(from_sources("x", "y", "z")))
    run([tmp_path / "a"], tokenizer, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    for name in ("digest", "format", "version"):
        manifest.pop(name)
    dataclasses.replace(Manifest(**manifest), source_names=["x", "y"]).write(tmp_path / "out")
    with pytest.raises(DataError, match="column source has numbers outside its 2 sources"):
        PreparedData(tmp_path / "out")
