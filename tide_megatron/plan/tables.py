"""A plan in tables for people: one line a layout; what one rank holds and sends, phase by phase."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from tide_megatron.base.units import in_bytes
from tide_megatron.plan.planning import Answer, SteppedCandidate, leaving, link_of


def options_table(answers: Sequence[Answer]) -> Table:
    """Return one line for each recorded layout."""
    table = Table(
        *("GPUs", "layout", "fits", "peak", "in", "headroom", "by owner", "sent in node", "over network"),
        box=None,
        title="plan: the fullest rank's tensors in its second step",
        title_justify="left",
    )
    for answer in answers:
        for option in answer.options:
            table.add_row(str(answer.gpus), *_line(option))
        if not answer.options:
            table.add_row(str(answer.gpus), f"none of {answer.looked_at} layouts", "no: weights alone")
    return table


def _line(option: SteppedCandidate) -> list[str]:
    phase, peak = option.record.peak
    sent = option.sent()
    return [
        " ".join(option.candidate.words),
        "yes" if option.headroom >= 0 else f"no: {in_bytes(-option.headroom)} too much",
        in_bytes(peak.num_bytes),
        phase,
        in_bytes(max(0, option.headroom)),
        ", ".join(f"{owner} {in_bytes(size)}" for owner, size in option.by_owner().items()),
        in_bytes(sent["node"]),
        in_bytes(sent["network"]),
    ]


def memory_table(option: SteppedCandidate) -> Table:
    """Return what the rank holds at the peak of each phase, by owner and use."""
    peaks = option.record.peaks
    labels = sorted({label for peak in peaks.values() for label in peak.by_label})
    title = f"rank {option.rank} of {option.candidate.world}: held at each phase's peak"
    table = Table("whose", "for what", *peaks, box=None, title=title, title_justify="left")
    for label in labels:
        held = [peak.by_label.get(label, 0) for peak in peaks.values()]
        table.add_row(label.owner, label.use, *(in_bytes(size) if size else "" for size in held))
    table.add_row("all", "", *(in_bytes(peak.num_bytes) for peak in peaks.values()))
    return table


def sent_table(option: SteppedCandidate) -> Table:
    """Return what the rank sends in a step."""
    table = Table(
        *("phase", "whose", "collective", "ranks", "over", "calls", "handed in", "leaving"),
        box=None,
        title="sent in a step",
        title_justify="left",
    )
    for what, calls in sorted(option.record.calls.items()):
        if len(what.ranks) < 2:
            continue
        size = option.record.num_bytes[what]
        table.add_row(
            *(what.phase, what.owner, what.kind, str(len(what.ranks))),
            link_of(what.ranks, option.machine.per_node),
            str(calls),
            in_bytes(size),
            in_bytes(leaving(what, size)),
        )
    return table
