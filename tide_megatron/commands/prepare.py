"""`tide prepare`: JSONL chats to a prepared data folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    out: Annotated[Path, typer.Argument(help="Data folder to make.")],
    sources: Annotated[list[Path], typer.Argument(help="JSONL files of chats, read in this order.")],
    tokenizer: Annotated[Path, typer.Option(help="The student's tokenizer: folder, or tokenizer.json.")],
    max_length: Annotated[int, typer.Option(min=2, help="Most tokens a sample may have.")],
    on_long: Annotated[str, typer.Option(help="Longer samples: error, skip or truncate.")] = "error",
    mask: Annotated[str, typer.Option(help="Mask token; added where the tokenizer has none.")] = "<|mask|>",
    replace: Annotated[bool, typer.Option("--replace", help="Replace a data folder that is there.")] = False,
) -> None:
    """Turn chats into tokens on disk, all or nothing.

    Each line is {"messages": [{"role": ..., "content": ...}, ...]}; the last message is the reply to learn.

    Example: tide prepare data/train chats.jsonl --tokenizer models/student --max-length 512
    """
    import rich

    from tide_megatron.data.prepare import prepare as make
    from tide_megatron.text.tokenizer import Tokenizer

    manifest = make(
        sources,
        Tokenizer.load(tokenizer, mask=mask),
        out,
        max_length=max_length,
        on_long=on_long,
        replace=replace,
    )
    counts = manifest.statistics
    left_out = sum(counts.skipped.values())
    rich.print(
        f"{out}: {manifest.samples} samples, {counts.tokens} tokens, {counts.reply_tokens} of them to learn; "
        f"{counts.truncated} cut, {left_out} left out"
    )
