"""Prepare data: JSONL chats -> tokens and reply ranges -> columns on disk.

All or nothing: everything is written into a hidden folder beside the target, flushed, and renamed into place
at the end. An error or Ctrl-C removes it; the target is either the old state or the whole new one.

A record that cannot be used, or is longer than `max_length`, is an error by default, because losing data
should be a decision. Even then all records are looked at first, so that the message counts all faults by
kind. `on_bad: skip` leaves bad records out and lists them in rejects.jsonl; `on_long: skip` leaves long ones
out, `truncate` cuts them, and a prompt that leaves no room for its reply is then left out (spec section 4.1).
What was left out is counted in the manifest.

Each sample remembers its source, for scores by source: what the record's `source` says, else its file.
"""

from __future__ import annotations

import array
import collections
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import rich
import rich.progress

from tide_megatron.base.disk import disk_faults, place_of
from tide_megatron.base.errors import ConfigError, DataError, RecordError, nearest
from tide_megatron.base.files import replaced_folder
from tide_megatron.base.lease import lease_beside, leased
from tide_megatron.data.columns import SOURCE, ColumnWriter, numbered
from tide_megatron.data.manifest import (
    MANIFEST_FILE,
    DataStatistics,
    Manifest,
    SideMetadata,
    TokenizerMetadata,
)
from tide_megatron.data.parallel_encoder import ParallelEncoder
from tide_megatron.data.record import Reading
from tide_megatron.data.rejects import REJECTS_FILE, OnBad, Rejects
from tide_megatron.data.sample import Encoder, OnLong, Sample, SideChoice, Window
from tide_megatron.data.source import Source
from tide_megatron.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
_MOST_SOURCES = 1000
"""More different words in records' `source` name no sources (they are addresses): the files are."""


def prepare(
    sources: Sequence[Path],
    tokenizer: Tokenizer,
    out: Path,
    *,
    max_length: int,
    on_long: str = OnLong.ERROR,
    on_bad: str = OnBad.STOP,
    reading: Reading | None = None,
    sides: Mapping[str, SideChoice] | None = None,
    replace: bool = False,
    workers: int | None = None,
) -> Manifest:
    """Prepare a data folder from chats.

    Args:
        sources: JSONL files, plain or compressed, pipes, or `-` for stdin, read in this order (see
            `data.record`); sample ids follow it.
        tokenizer: the student's, with a chat template.
        out: the folder to make.
        max_length: most tokens a sample may have.
        on_long: a word of `OnLong`.
        on_bad: a word of `OnBad`.
        reading: how lines are read, and which replies are learnt.
        sides: name -> tokenizer of a teacher that reads its own tokens; its columns carry the name.
        replace: put the new data in the place of a data folder that is already there.
        workers: processes that encode, once there are many records; None: as many as there are cores. What is
            written does not depend on it.

    Raises:
        ConfigError: an option that cannot be.
        DataError: bad records (with file and line of the first), no records, or a target that may not be
            replaced.
    """
    encoder = Encoder(tokenizer, Window.of(max_length, on_long), sides or {}, reading)
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    if workers < 1:
        raise ConfigError(f"workers: {workers} is not a number of processes; use 1 or more")
    words = [word.value for word in OnBad]
    if on_bad not in words:
        raise ConfigError(f"on_bad: {on_bad!r} is unknown: {nearest(on_bad, words)}")
    out, inputs = place_of(out, DataError), [Source(Path(source)) for source in sources]
    with disk_faults(out, DataError), leased(lease_beside(out), str(out), DataError) as lease:
        _check_target(out, replace=replace)
        if not inputs:
            raise DataError("sources: no such file: name at least one JSONL file, or - for stdin")
        for source in inputs:
            source.check()
        with (
            replaced_folder(out, fault_kind=DataError) as folder,
            ParallelEncoder(encoder, number=workers) as processes,
        ):
            manifest = _Preparation(folder, encoder, OnBad(on_bad), processes).run(inputs)
            manifest.write(folder)
            lease.check()
    _report(out, manifest)
    return manifest


def _report(out: Path, manifest: Manifest) -> None:
    """Log what was written and what was left out."""
    for name, side in manifest.sides.items():
        logger.info(
            "%s: side %s: %d chunks (%d of one token on both sides) over %d tokens, %d cut, %d without any",
            *(out, name, side.chunks, side.pairs, side.tokens, side.cut, side.without_chunks),
        )
    if manifest.unprompted:
        logger.info(
            "%s: %d earlier replies are learnt without their generation prompt, which the template does not "
            "write in earlier turns",
            *(out, manifest.unprompted),
        )
    if manifest.rejected:
        logger.warning(
            "%s: %d bad records were left out (%s); %s has their lines",
            *(out, sum(manifest.rejected.values()), _listed(manifest.rejected), out / REJECTS_FILE),
        )
    kept = manifest.statistics
    logger.info(
        "%s: %d samples, %d tokens (%d to learn, %d bytes), %d cut, %d left out",
        *(out, manifest.samples, kept.tokens, kept.reply_tokens, kept.reply_bytes),
        *(kept.truncated, sum(kept.skipped.values()) + sum(manifest.rejected.values())),
    )


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


class _Preparation:
    """Fills a folder with the columns of all records."""

    def __init__(self, folder: Path, encoder: Encoder, on_bad: OnBad, workers: ParallelEncoder) -> None:
        self._encoder, self._workers = encoder, workers
        self._writer = ColumnWriter(folder, encoder.columns)
        self._rejects = Rejects(folder, on_bad)
        self._counts: collections.Counter[str] = collections.Counter()
        self._skipped: collections.Counter[str] = collections.Counter()
        self._side_counts = {name: collections.Counter[str]() for name in encoder.sides}
        self._longest: collections.Counter[str] = collections.Counter()
        self._named: dict[str | None, int] = {}
        self._files, self._words = array.array("i"), array.array("i")

    def run(self, sources: Sequence[Source]) -> Manifest:
        """Read all sources; return the manifest (not written yet)."""
        try:
            described = [source.describe(self._read(number, source)) for number, source in enumerate(sources)]
            self._rejects.raise_if_fatal(sum(int(str(source["records"])) for source in described))
            self._check_enough(sources)
            names = self._write_sources([source.name for source in sources])
            columns, files = self._writer.finish()
        finally:
            self._writer.close()
        encoder, sides = self._encoder, self._side_counts
        unprompted = self._counts.pop("unprompted", 0)
        return Manifest(
            samples=self._writer.samples,
            columns=columns,
            files=files,
            tokenizer=TokenizerMetadata.of(encoder.tokenizer),
            max_length=encoder.window.max_length,
            on_long=encoder.window.on_long.value,
            sources=described,
            statistics=DataStatistics(**self._counts, longest=self._longest[""], skipped=dict(self._skipped)),
            sides={
                name: SideMetadata(
                    tokenizer=TokenizerMetadata.of(side.tokenizer),
                    max_length=encoder.side_length(name),
                    longest=self._longest[name],
                    **sides[name],
                )
                for name, side in encoder.sides.items()
            },
            source_names=names,
            rejected=self._rejects.close(),
            normalized=encoder.reading.normalize,
            learn=encoder.reading.learn.value,
            unprompted=unprompted,
        )

    def _read(self, number: int, source: Source) -> int:
        """Encode one source's records; return how many it has."""
        records = 0
        for line_number, (found, said) in self._workers.encode(_with_progress(source)):
            records += 1
            if isinstance(found, RecordError):
                self._rejects.add(found, source.name, source.place, line_number)
            elif self._rejects.is_fatal:
                continue
            elif isinstance(found, str):
                self._skipped[found] += 1
            else:
                self._add(found, number, said)
        return records

    def _add(self, sample: Sample, file: int, source: str | None) -> None:
        self._writer.add(sample.row)
        self._counts.update(sample.counts)
        self._longest |= sample.longest
        for name, found in sample.side_counts.items():
            self._side_counts[name].update(found)
        if len(self._named) <= _MOST_SOURCES:
            self._named.setdefault(source, len(self._named))
        self._files.append(file)
        self._words.append(self._named.get(source, 0))

    def _check_enough(self, sources: Sequence[Source]) -> None:
        """Refuse data without samples, and sides without chunks."""
        if not self._writer.samples:
            names = ", ".join(source.place for source in sources)
            left_out = _listed({**self._skipped, **self._rejects.counts}) or "the files are empty"
            raise DataError(f"{names}: no samples ({left_out}): give records, or raise max_length")
        for name, found in self._side_counts.items():
            if not found["chunks"]:
                raise DataError(
                    f"teacher {name}: no chunk of any reply is spelled by both sides within its window: "
                    f"raise its max_length above {self._encoder.side_length(name)}, or look at both templates"
                )

    def _write_sources(self, files: Sequence[str]) -> list[str]:
        """Write which source each sample is from, if there are several; return their names."""
        files = numbered(files)
        is_said = len(self._named) <= _MOST_SOURCES
        if not is_said:
            logger.warning(
                "more than %d different words in the records' `source`: the files count as the sources",
                _MOST_SOURCES,
            )
        words = {number: word for word, number in self._named.items()} if is_said else {}
        numbers: dict[str, int] = {}
        column = [
            numbers.setdefault(words.get(word) or files[file], len(numbers))
            for file, word in zip(self._files, self._words, strict=True)
        ]
        if len(numbers) < 2 and not any(words.values()):
            return []
        self._writer.add_column(SOURCE, column)
        return list(numbers)


def _with_progress(source: Source) -> Iterator[tuple[int, bytes]]:
    """Yield a source's lines, on a terminal under a progress bar over its bytes."""
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.DownloadColumn())
    is_watched = rich.get_console().is_terminal
    with rich.progress.Progress(*columns, transient=True, disable=not is_watched) as bar:
        task = bar.add_task(source.name, total=source.total_bytes)
        for number, line in source.lines():
            yield number, line
            bar.update(task, completed=source.read_bytes)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
