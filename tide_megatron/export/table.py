"""What was verified about exports, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from tide_megatron.export.checks import Check


def checks_table(checks: Sequence[Check]) -> Table:
    """Lay checks out, one a row; those that will keep somebody from using the export say `note`."""
    table = Table("form", "verified", "", "found", box=None)
    for check in checks:
        outcome = "[green]ok[/]" if check.is_fine else "[yellow]note[/]"
        table.add_row(check.flavour, check.what, outcome, escape(check.found))
    return table
