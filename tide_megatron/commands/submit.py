"""`tide submit`: one run, or a sweep, as a job of SLURM's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tide_megatron.commands.options import with_fields_of
from tide_megatron.launch.job import JobOptions, quoted


@with_fields_of(JobOptions, "job")
def submit(
    recipe: Annotated[Path, typer.Argument(help="YAML run file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for tide train.")] = None,
    job: JobOptions = JobOptions(),  # noqa: B008 - frozen; becomes an option of each of its fields
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Look from here at all that a start would look at.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script, write and submit nothing.")
    ] = False,
) -> None:
    """Submit a run to SLURM: freeze code and recipe beside it, write the script, hand it over.

    The job saves before its limit and when it is preempted, and goes back into the queue until the run has
    finished. docs/slurm.md says what the script does and how to change it.

    Example: tide submit run.yaml --nodes 2 --ranks-per-node 8 --partition gpu --time 4:00:00 --dry-run

    Example: tide submit run.yaml --nodes 2 --container image.sif optimizer.learning_rate=1e-4
    """
    from tide_megatron.base.files import local_path
    from tide_megatron.launch.submit import submit as hand_over

    done = hand_over(local_path(recipe), overrides or [], job, check=check, dry_run=dry_run)
    if dry_run:
        typer.echo(done.script, nl=False)
        typer.echo(f"not submitted; it would stand in {done.job.folder}", err=True)
        return
    number = done.numbers[0].partition(";")[0]
    typer.echo(
        f"submitted as job {', '.join(done.numbers)}: {job.nodes} node(s) x {job.ranks_per_node} ranks"
    )
    typer.echo(f"code, recipe, script: {done.job.folder}")
    typer.echo(f"watch it:  tide status {quoted(str(done.job.folder.parents[1]))}")
    typer.echo(f"           tail -F {quoted(done.log)}")
    typer.echo(f"stop it:   scancel {number}    (it saves first, as far as the cluster's KillWait lets it)")
