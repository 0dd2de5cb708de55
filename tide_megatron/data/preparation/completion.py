"""The end of every way to make a data folder: source column, indices, digests, manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tide_megatron.base.errors import DataError
from tide_megatron.data.columns import SOURCE, ColumnWriter
from tide_megatron.data.manifest import DataStatistics, Manifest, SideMetadata, TokenizerMetadata
from tide_megatron.data.preparation.origins import Origins
from tide_megatron.data.preparation.tally import Tally


def sealed(
    description: Mapping[str, Any],
    writer: ColumnWriter,
    origins: Origins,
    tally: Tally,
    *,
    rejected: dict[str, int],
    sources: Sequence[dict[str, Any]],
    places: Sequence[str],
) -> Manifest:
    """Finish the columns; return the manifest (not written yet).

    Args:
        description: what does not depend on the records (`Plan.description`).
        writer: with all rows.
        origins: of all rows.
        tally: of all records.
        rejected: kind of fault -> records.
        sources: every source file, as `Source.describe` does it.
        places: of the source files, for messages.

    Raises:
        DataError: no samples, or a side without chunks.
    """
    check_enough(description, writer.samples, tally, rejected, places)
    names, column = origins.resolved([str(source["name"]) for source in sources])
    if names:
        writer.add_column(SOURCE, column)
    columns, files = writer.finish()
    described, counts = dict(description), dict(tally.counts)
    unprompted = counts.pop("unprompted", 0)
    sides = {
        name: SideMetadata(
            tokenizer=TokenizerMetadata(**side["tokenizer"]),
            max_length=side["max_length"],
            longest=tally.longest.get(name, 0),
            **tally.side_counts[name],
        )
        for name, side in described.pop("sides").items()
    }
    return Manifest(
        samples=writer.samples,
        columns=columns,
        files=files,
        tokenizer=TokenizerMetadata(**described.pop("tokenizer")),
        sources=list(sources),
        statistics=DataStatistics(**counts, longest=tally.longest.get("", 0), skipped=tally.skipped_counts()),
        sides=sides,
        source_names=names,
        rejected=rejected,
        unprompted=unprompted,
        **described,
    )


def check_enough(
    description: Mapping[str, Any],
    samples: int,
    tally: Tally,
    rejected: Mapping[str, int],
    places: Sequence[str],
) -> None:
    """Refuse data without samples, and sides without chunks.

    Args:
        description: of the data.
        samples: how many there are.
        tally: of all records.
        rejected: kind of fault -> records.
        places: of the sources, for the message.

    Raises:
        DataError: says what is missing.
    """
    if not samples:
        left_out = listed({**tally.skipped_counts(), **rejected}) or "the files are empty"
        raise DataError(f"{', '.join(places)}: no samples ({left_out}): give records, or raise max_length")
    for name, found in tally.side_counts.items():
        if not found["chunks"]:
            raise DataError(
                f"teacher {name}: no chunk of any reply is spelled by both sides within its window: raise "
                f"its max_length above {description['sides'][name]['max_length']}, or look at both templates"
            )


def listed(counts: Mapping[str, int]) -> str:
    """Return counts for a message."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
