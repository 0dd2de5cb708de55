"""`tide data inspect|merge|split`: what is in prepared data, several of them as one, one as two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tide_megatron.commands.options import print_whole

if TYPE_CHECKING:
    from rich.text import Text

    from tide_megatron.data.sets.inspection import DataFacts, ShownSample, Token

Data = Annotated[Path, typer.Argument(help="A data folder of `tide prepare`.")]

Replace = Annotated[bool, typer.Option("--replace", help="Replace a data folder that is there.")]

app = typer.Typer(help="Look into prepared data, put it together, take it apart.", no_args_is_help=True)
_COLOURS = ("blue", "yellow", "green", "magenta", "red", "cyan")


@app.command()
def inspect(
    data: Data,
    sample: Annotated[int, typer.Option(min=0, help="Which sample is shown.")] = 0,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write one HTML page.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER[,template=NAME]...",
            help="The student's tokenizer, as `tide prepare` had it; without it ids are shown.",
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER[,template=NAME]...", help="A teacher's tokenizer; repeat."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show what prepared data holds: lengths, alignment, sources, what was left out, and a sample by chunks.

    Example: tide data inspect data/train --tokenizer models/student --teacher llada=models/llada2
    --html data.html
    """
    from tide_megatron import api

    facts, shown = api.inspect_data(
        data,
        sample=sample,
        page=page,
        tokenizer=tokenizer,
        teachers=dict(_split(word) for word in teacher or []),
    )
    if as_json:
        typer.echo(json.dumps(facts.values(), indent=1))
        return
    _print(data, facts, shown)
    if page is not None:
        typer.echo(f"{page}: written")


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Data folder to make.")],
    folders: Annotated[
        list[Path], typer.Argument(help="All parts of one preparation, or data folders of one tokenizer.")
    ],
    replace: Replace = False,
) -> None:
    """Put prepared data together, by bytes; what it is made of stays.

    Parts (`tide prepare --part`) become what one process would have written. Data folders with the same
    tokenizer, window and teachers follow one another; their samples keep the names of their sources.

    Example: tide data merge data/all data/code data/chats

    Example: tide data merge data/train data/train.parts/*
    """
    from tide_megatron import api
    from tide_megatron.commands.prepare import print_manifest

    print_manifest(out, api.merge_data(out, folders, replace=replace))


@app.command()
def split(
    data: Data,
    first: Annotated[Path, typer.Argument(help="Data folder to make.")],
    second: Annotated[Path, typer.Argument(help="Data folder to make of the rest.")],
    share: Annotated[float | None, typer.Option(help="The first gets so many of all: 0.9.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="The first gets so many.")] = None,
    held_out: Annotated[int | None, typer.Option(min=1, help="The second gets so many.")] = None,
    source: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="The first gets this source; repeat.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw; equal seeds draw alike.")] = 0,
    replace: Replace = False,
) -> None:
    """Divide prepared data among two new folders: by a draw, or by source. What is divided stays.

    Example: tide data split data/all data/train data/held-out --held-out 2000
    """
    from tide_megatron import api
    from tide_megatron.commands.prepare import print_manifest

    manifests = api.split_data(
        data,
        first,
        second,
        share=share,
        samples=samples,
        held_out=held_out,
        sources=source or (),
        seed=seed,
        replace=replace,
    )
    for folder, manifest in zip((first, second), manifests, strict=True):
        print_manifest(folder, manifest)


def _split(word: str) -> tuple[str, str]:
    from tide_megatron.data.preparation.sample import SideChoice

    return SideChoice.split(word)


def _print(data: Path, facts: DataFacts, shown: ShownSample) -> None:
    """Show facts and a sample."""
    import rich
    from rich.markup import escape
    from rich.table import Table

    from tide_megatron.data.manifest import in_share
    from tide_megatron.data.sets.inspection import shares

    counts = facts.manifest.statistics
    rich.print(
        f"{escape(str(data))}: {facts.manifest.samples} samples, {counts.tokens} tokens, "
        f"{counts.reply_tokens} of them to learn"
    )
    lengths = Table("lengths", "median", "9 of 10 up to", "longest", "", box=None)
    for side, found in facts.lengths.items():
        numbers = (str(found.median), str(found.nine_of_ten), str(found.longest))
        lengths.add_row(escape(side or "student"), *numbers, _bars(found.counts))
    print_whole(lengths)
    if facts.coverage:
        table = Table("teacher", "reply bytes in chunks", "chunks", "single-token", "equal id", box=None)
        for name, covered in facts.coverage.items():
            numbers = (str(covered.chunks), str(covered.single), str(covered.equal))
            table.add_row(escape(name), in_share(covered.share_of_bytes), *numbers)
        print_whole(table)
    for title, rows in (("records", shares(facts)), ("samples by source", list(facts.sources.items()))):
        if rows:
            table = Table(title, "", box=None)
            for name, count in rows:
                table.add_row(escape(name), str(count))
            print_whole(table)
    _print_sample(shown)


def _print_sample(shown: ShownSample) -> None:
    import rich
    from rich.markup import escape

    console = rich.get_console()
    source = f" from {escape(shown.source)}" if shown.source else ""
    console.print(f"\nsample {shown.number}{source}", style="bold")
    for name, (student, teacher) in (shown.sides or {"": (shown.student, [])}).items():
        console.print(f"student, {len(student)} tokens", style="dim")
        console.print(_coloured(student))
        if name:
            console.print(f"{escape(name)}, {len(teacher)} tokens", style="dim")
            console.print(_coloured(teacher))


def _coloured(tokens: list[Token]) -> Text:
    """Return tokens with a bar between them, chunks in colours that both sides share."""
    from rich.text import Text

    text = Text()
    for token in tokens:
        if token.chunk is not None:
            style = f"black on {_COLOURS[token.chunk % len(_COLOURS)]}"
        else:
            style = "underline" if token.is_learnt else "dim"
        text.append(token.text.replace("\n", "⏎\n"), style)
        text.append("|", "dim")
    return text


def _bars(counts: list[int]) -> str:
    """Draw a histogram in one line."""
    most = max(counts, default=0) or 1
    return "".join(" ▁▂▃▄▅▆▇█"[-(-count * 8 // most)] for count in counts)
