"""`tide prepare`: JSONL chats to a prepared data folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tide_megatron.data.manifest import Manifest

AddMask = Annotated[
    bool, typer.Option("--add-mask", help="Add the mask token to the student's tokenizer where it has none.")
]
TeacherOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FOLDER[,mask=TOKEN][,max_length=N]...",
        help="Also prepare for a teacher's own tokenizer and template; repeat for several. "
        "Its samples may have twice --max-length tokens unless said otherwise.",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processes that encode, above a thousand records; default: one a core. Same bytes."
    ),
]


def prepare(
    out: Annotated[Path, typer.Argument(help="Data folder to make.")],
    sources: Annotated[
        list[Path],
        typer.Argument(help="JSONL files of chats (also .gz, .zst, pipes; - is stdin), read in this order."),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="FOLDER[,mask=TOKEN][,template=NAME][,chat_template_kwargs.KEY=VALUE]",
            help="The student's tokenizer: folder, or tokenizer.json; its mask token is the folder's own.",
        ),
    ],
    max_length: Annotated[int, typer.Option(min=2, help="Most tokens a sample may have.")],
    on_long: Annotated[str, typer.Option(help="Longer samples: error, skip or truncate.")] = "error",
    on_bad: Annotated[
        str, typer.Option(help="Bad records: stop, or skip (rejects.jsonl lists them).")
    ] = "stop",
    normalize: Annotated[bool, typer.Option("--normalize", help="Put all text into NFC.")] = False,
    learn: Annotated[
        str, typer.Option(help="Replies to learn: the last, or all but those of weight 0.")
    ] = "last",
    teacher: TeacherOption = None,
    add_mask: AddMask = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a data folder that is there.")] = False,
    workers: WorkersOption = None,
) -> None:
    """Turn chats into tokens on disk, all or nothing.

    Each line is {"messages": [{"role": ..., "content": ...}, ...]}; the last message is a reply to learn.
    What a record says is used (tools, documents, tool_calls, reasoning_content, chat_template_kwargs, source)
    or refused by name. All faults are counted before the first one ends it.

    A teacher with another tokenizer or template than the student's reads its own tokens; the chunks of bytes
    that both spell are found here, once.

    Example: tide prepare data/train chats.jsonl --tokenizer models/student --max-length 512
    --teacher llada=models/llada2
    """
    from tide_megatron import api
    from tide_megatron.data.sample import SideChoice

    manifest = api.prepare(
        out,
        sources,
        tokenizer=tokenizer,
        max_length=max_length,
        on_long=on_long,
        on_bad=on_bad,
        normalize=normalize,
        learn=learn,
        teachers=dict(SideChoice.split(word) for word in teacher or []),
        add_mask=add_mask,
        replace=replace,
        workers=workers,
    )
    _print(out, manifest)


def _print(out: Path, manifest: Manifest) -> None:
    """Say what was written."""
    import rich
    from rich.markup import escape

    counts = manifest.statistics
    left_out = sum(counts.skipped.values()) + sum(manifest.rejected.values())
    rich.print(
        f"{escape(str(out))}: {manifest.samples} samples, {counts.tokens} tokens, {counts.reply_tokens} of "
        f"them to learn; "
        f"{counts.truncated} cut, {left_out} left out"
    )
    for name, side in manifest.sides.items():
        share = side.aligned_bytes / max(1, counts.reply_bytes)
        rich.print(
            f"teacher {name}: {side.tokens} tokens, {side.chunks} chunks ({side.pairs} of one equal token) "
            f"over {share:.1%} of the reply bytes; {side.cut} cut, {side.without_chunks} without chunks"
        )
