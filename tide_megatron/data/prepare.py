"""Prepare data: JSONL chats -> tokens and reply ranges -> columns on disk.

All or nothing: everything is written into a hidden folder beside the target, flushed, and renamed into place
at the end. An error or Ctrl-C removes it; the target is either the old state or the whole new one.

A record that is longer than `max_length` is an error by default, because losing data should be a decision:
`skip` leaves it out, `truncate` cuts it, and a prompt that leaves no room for its reply is then left out
(spec section 4.1). What was left out is counted in the manifest.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import rich.progress

from tide_megatron.base.errors import ConfigError, DataError, nearest
from tide_megatron.data.columns import ColumnWriter, digest_file, flush
from tide_megatron.data.manifest import MANIFEST_FILE, Manifest, Statistics, TokenizerFacts
from tide_megatron.data.record import Record, read_records
from tide_megatron.text.chat import Encoded, encode_chat
from tide_megatron.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class OnLong(str, enum.Enum):
    """What to do with a record of more than `max_length` tokens."""

    ERROR = "error"
    SKIP = "skip"
    TRUNCATE = "truncate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """How long a sample may be, and what happens to longer ones."""

    max_length: int
    on_long: OnLong = OnLong.ERROR

    @classmethod
    def of(cls, max_length: int, on_long: str) -> Window:
        """Check the two options.

        Raises:
            ConfigError: an unknown word or a length below 2.
        """
        if max_length < 2:
            raise ConfigError(
                f"max_length: {max_length} leaves no room for a prompt and a reply; use at least 2"
            )
        words = [word.value for word in OnLong]
        if on_long not in words:
            raise ConfigError(f"on_long: {on_long!r} is unknown: {nearest(on_long, words)}")
        return cls(max_length=max_length, on_long=OnLong(on_long))


def prepare(
    sources: Sequence[Path],
    tokenizer: Tokenizer,
    out: Path,
    *,
    max_length: int,
    on_long: str = OnLong.ERROR,
    replace: bool = False,
    show_progress: bool = True,
) -> Manifest:
    """Prepare a data folder from chats.

    Args:
        sources: JSONL files (see `data.record`), read in this order; sample ids follow it.
        tokenizer: the student's, with a chat template.
        out: the folder to make.
        max_length: most tokens a sample may have.
        on_long: a word of `OnLong`.
        replace: put the new data in the place of a data folder that is already there.
        show_progress: draw a progress bar.

    Raises:
        ConfigError: an option that cannot be.
        DataError: a bad record (with file and line), no records, or a target that may not be replaced.
    """
    window = Window.of(max_length, on_long)
    out, sources = Path(out), [Path(source) for source in sources]
    _check_target(out, replace=replace)
    missing = [source for source in sources if not source.is_file()]
    if missing or not sources:
        raise DataError(f"{missing[0] if missing else 'sources'}: no such file: name at least one JSONL file")
    with _unfinished_folder(out) as folder:
        manifest = _write(folder, sources, tokenizer, window, show_progress=show_progress)
        manifest.write(folder)
        flush(folder / MANIFEST_FILE)
        flush(folder)
        _move(folder, out)
    kept = manifest.statistics
    logger.info(
        "%s: %d samples, %d tokens (%d to learn, %d bytes), %d cut, %d left out",
        *(out, manifest.samples, kept.tokens, kept.reply_tokens, kept.reply_bytes),
        *(kept.truncated, sum(kept.skipped.values())),
    )
    return manifest


def _check_target(out: Path, *, replace: bool) -> None:
    """Refuse a target that exists, unless it is prepared data and may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST_FILE).is_file():
        raise DataError(
            f"{out}: exists and is no prepared data, so it is never replaced: choose another folder"
        )
    if not replace:
        raise DataError(f"{out}: exists: choose another folder, or ask for it to be replaced (--replace)")


@contextlib.contextmanager
def _unfinished_folder(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` that does not outlive an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        folder.chmod(0o755)  # mkdtemp makes private folders; data sets are shared
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, out: Path) -> None:
    """Rename the finished folder into place; what was there stays until the new one is."""
    if not out.exists() or not any(out.iterdir()):
        folder.replace(out)
    else:
        old = folder.with_suffix(".old")
        out.rename(old)
        try:
            folder.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old)
    flush(out.parent)


def _write(
    folder: Path, sources: Sequence[Path], tokenizer: Tokenizer, window: Window, *, show_progress: bool
) -> Manifest:
    """Fill `folder` with the columns of all records; return the manifest (not written yet)."""
    writer = ColumnWriter(folder)
    counts: collections.Counter[str] = collections.Counter()
    skipped: collections.Counter[str] = collections.Counter()
    facts = []
    try:
        for source in sources:
            records = 0
            for record in _followed(source, show_progress=show_progress):
                records += 1
                encoded = _encode(record, tokenizer)
                reason = _reason_to_skip(record, encoded, window)
                if reason:
                    skipped[reason] += 1
                    continue
                if len(encoded.ids) > window.max_length:
                    counts["truncated"] += 1
                    encoded = encode_chat(tokenizer, record.messages, max_tokens=window.max_length)
                writer.add(
                    {"ids": encoded.ids, "replies": encoded.replies, "reply_bytes": [encoded.reply_bytes]}
                )
                counts.update(_counts(encoded))
                counts["longest"] = max(counts["longest"], len(encoded.ids))
            facts.append(_source_facts(source, records))
        if not writer.samples:
            names = ", ".join(str(source) for source in sources)
            raise DataError(f"{names}: no samples ({_told(skipped)}): give records, or raise max_length")
        columns, files = writer.finish()
    finally:
        writer.close()
    return Manifest(
        samples=writer.samples,
        columns=columns,
        files=files,
        tokenizer=_tokenizer_facts(tokenizer),
        max_length=window.max_length,
        on_long=window.on_long.value,
        sources=facts,
        statistics=Statistics(**counts, skipped=dict(skipped)),
    )


def _followed(source: Path, *, show_progress: bool) -> Iterator[Record]:
    """Yield a file's records under a progress bar over its bytes."""
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.DownloadColumn())
    with rich.progress.Progress(*columns, transient=True, disable=not show_progress) as bar:
        task = bar.add_task(source.name, total=source.stat().st_size)
        for record in read_records(source):
            yield record
            bar.advance(task, record.size_bytes)


def _encode(record: Record, tokenizer: Tokenizer) -> Encoded:
    """Encode one record, with its place in front of any complaint."""
    try:
        return encode_chat(tokenizer, record.messages)
    except DataError as error:
        raise DataError(f"{record.place}: {error}") from None


def _reason_to_skip(record: Record, encoded: Encoded, window: Window) -> str | None:
    """Say why a record is left out (None: it is not), or refuse it."""
    length = len(encoded.ids)
    if length <= window.max_length:
        return None
    if window.on_long is OnLong.ERROR:
        raise DataError(
            f"{record.place}: {length} tokens, max_length is {window.max_length}: "
            f"raise max_length to {length} or more, or leave such records out (skip) or cut them (truncate)"
        )
    if window.on_long is OnLong.SKIP:
        return "longer than max_length"
    return "prompt fills max_length" if encoded.prompt_tokens >= window.max_length else None


def _counts(encoded: Encoded) -> dict[str, int]:
    """Return what one sample adds to the statistics."""
    reply_tokens = sum(encoded.replies[1::2]) - sum(encoded.replies[::2])
    return {
        "tokens": len(encoded.ids),
        "prompt_tokens": len(encoded.ids) - reply_tokens,
        "reply_tokens": reply_tokens,
        "reply_bytes": encoded.reply_bytes,
    }


def _source_facts(source: Path, records: int) -> dict[str, object]:
    """Describe a source file; only its name, so that a data folder tells nothing about a machine."""
    return {
        "name": source.name,
        "bytes": os.path.getsize(source),
        "sha256": digest_file(source),
        "records": records,
    }


def _tokenizer_facts(tokenizer: Tokenizer) -> TokenizerFacts:
    assert tokenizer.chat is not None, "encoding needs a template and ran"
    return TokenizerFacts(
        name=Path(tokenizer.name).name,
        digest=tokenizer.digest,
        vocabulary_digest=tokenizer.vocabulary_digest,
        template_digest=tokenizer.chat.digest,
        vocabulary_size=tokenizer.vocabulary_size,
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )


def _told(skipped: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "the files are empty"
