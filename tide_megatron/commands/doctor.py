"""`tide doctor`: say whether this machine has what a run needs, and whether parallel equals dense on it."""

from __future__ import annotations

import typer

from tide_megatron.commands.options import DeviceOption


def doctor(device: DeviceOption = "auto") -> None:
    """Show versions, device and engines; run a collective and a tiny parallel = dense check on two ranks.

    The exit code is 1 if something is at fault; a note is worth reading and stops nothing.

    Example: tide doctor --device cpu
    """
    import rich
    from rich.markup import escape
    from rich.table import Table

    from tide_megatron.launch.doctor import examine

    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fault": "[red]fault[/]"}
    table = Table("", "what", "found", box=None)
    with rich.get_console().status("examining; the last checks start two ranks"):
        findings = list(examine(device))
    for finding in findings:
        table.add_row(marks[finding.verdict], escape(finding.topic), escape(finding.value))
    rich.print(table)
    raise typer.Exit(code=int(any(finding.verdict == "fault" for finding in findings)))
