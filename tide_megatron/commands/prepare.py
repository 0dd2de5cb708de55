"""`tide prepare`: chats to a prepared data folder."""

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
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        help="Chats, read in this order: JSON lines (also .gz, .zst, pipes; - is stdin), Parquet, Arrow; "
        "folders and globs of them; hub:OWNER/NAME[,split=...][,config=...]; or one data file (.yaml)."
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(help="Data file with sources and options (docs/data.md); options here go before its."),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER[,mask=TOKEN][,template=NAME][,chat_template_kwargs.KEY=VALUE]",
        help="The student's tokenizer: folder, or tokenizer.json; its mask token is the folder's own.",
    ),
]
OnLongOption = Annotated[
    str | None, typer.Option(help="Longer samples: error (the default), skip or truncate.")
]
OnBadOption = Annotated[
    str | None, typer.Option(help="Bad records: stop (the default), or skip (rejects.jsonl lists them).")
]
ShapeOption = Annotated[
    str,
    typer.Option(
        help="How rows become chats: auto, messages, sharegpt, instruction, prompt_response, question_answer."
    ),
]
PortionOption = Annotated[
    str | None,
    typer.Option(metavar="FROM:TO", help="Keep a part of the chats, by digest: 0:0.95 and 0.95:1."),
]

LearnOption = Annotated[
    str | None, typer.Option(help="Replies to learn: last (the default), or all but those of weight 0.")
]
PartOption = Annotated[
    str | None,
    typer.Option(
        metavar="K/N",
        help="Only the K-th of N parts, into OUT.parts; the last to finish puts them together. slurm: of a "
        "job array or of srun's tasks.",
    ),
]


def prepare(
    out: Annotated[Path, typer.Argument(help="Data folder to make.")],
    sources: Sources = None,
    config: ConfigOption = None,
    tokenizer: TokenizerOption = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Most tokens a sample may have.")] = None,
    on_long: OnLongOption = None,
    on_bad: OnBadOption = None,
    shape: ShapeOption = "auto",
    dedup: Annotated[bool, typer.Option("--dedup", help="Leave out chats that were there before.")] = False,
    portion: PortionOption = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Put all text into NFC.")] = False,
    learn: LearnOption = None,
    teacher: TeacherOption = None,
    add_mask: AddMask = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a data folder that is there.")] = False,
    workers: WorkersOption = None,
    part: PartOption = None,
) -> None:
    """Said chats into tokens on disk, all or nothing. After a kill the same command goes on.

    A chat is {"messages": [{"role": ..., "content": ...}, ...]}; the last message is a reply to learn. Rows
    of other shapes (prompt and response, instruction and output, ShareGPT) are told by their columns.
    What a record says is used (tools, documents, tool_calls, reasoning_content, chat_template_kwargs, source)
    or refused by name. All faults are counted before the first one ends it.

    A teacher with another tokenizer or template than the student's reads its own tokens; the chunks of bytes
    that both spell are found here, once.

    Example: tide prepare data/train chats.jsonl --tokenizer models/student --max-length 512
    --teacher llada=models/llada2
    Example: tide prepare data/train --config configs/data/paper.yaml --portion 0:0.95
    """
    from tide_megatron import api
    from tide_megatron.data.preparation.sample import SideChoice
    from tide_megatron.launch.array import read_part

    manifest = api.prepare(
        out,
        sources or (),
        config=config,
        tokenizer=tokenizer,
        max_length=max_length,
        on_long=on_long,
        on_bad=on_bad,
        normalize=normalize,
        learn=learn,
        teachers=dict(SideChoice.split(word) for word in teacher or []),
        add_mask=add_mask,
        shape=shape,
        dedup=dedup,
        portion=None if portion is None else _portion(portion),
        replace=replace,
        workers=workers,
        part=None if part is None else read_part(part),
    )
    if manifest is None:
        typer.echo(f"{out}: a part of it is done; the last one puts all together")
    else:
        print_manifest(out, manifest)


def _portion(word: str) -> tuple[float, float]:
    """Read FROM:TO."""
    try:
        first, last = map(float, word.split(":"))
    except ValueError:
        raise typer.BadParameter(
            f"{word!r} is not FROM:TO; write for example 0:0.95", param_hint="--portion"
        ) from None
    return first, last


def print_manifest(out: Path, manifest: Manifest) -> None:
    """Say what was written."""
    import rich
    from rich.markup import escape

    from tide_megatron.data.manifest import in_share

    counts = manifest.statistics
    left_out = sum(counts.skipped.values()) + sum(manifest.rejected.values())
    rich.print(
        f"{escape(str(out))}: {manifest.samples} samples, {counts.tokens} tokens, {counts.reply_tokens} of "
        f"them to learn; "
        f"{counts.truncated} cut, {left_out} left out"
    )
    for name, side in manifest.sides.items():
        share = in_share(side.share_of(counts.reply_bytes))
        rich.print(
            f"teacher {name}: {side.tokens} tokens, {side.chunks} chunks ({side.pairs} of one equal token) "
            f"over {share} of the reply bytes; {side.cut} cut, {side.without_chunks} without chunks"
        )
