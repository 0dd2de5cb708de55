"""The script of a SLURM job: what sbatch reads, what bash does, and what comes back into the queue.

Read it from the top of `render` down; docs/slurm.md says what each line is for. Three things are done here
that a script by hand gets wrong: the batch shell hears signals without ending before its tasks, and gives
them SLURM's warning; only a job that is still running is put back into the queue (one that was cancelled has
also stopped in order, and `scontrol requeue` would bring it back); and a rank that has ended does not end the
others, which may still be saving.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from tide_megatron.launch.job import JobOptions, directive, log_pattern, mounts, one_line, quoted
from tide_megatron.launch.lost_hosts import VARIABLE as LOST_HOSTS
from tide_megatron.launch.signals import LOST_CODE, STOPPED_CODE

SCRIPT, CODE, RECIPE, RECIPES = "job.sbatch", "code", "recipe.yaml", "recipes"
WAIT_SECONDS = 60
"""After the first task has ended: how long the others may take, before srun ends them."""
_LEFT_OVER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "NNODES", "NODE_RANK")
"""Variables that a shell in a job, or under torchrun, may pass on by mistake."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submission:
    """One job that is to be written down."""

    options: JobOptions
    folder: Path
    """Of the job; absolute."""
    directory: Path
    """Where the run is to be started, for paths of the recipe that are relative."""
    name: str
    gpus_per_node: int
    cpus_per_rank: int
    python: str
    runs: int = 0
    """Of a sweep."""
    seen: tuple[str, ...] = ()
    """Folders that a container must see."""

    @property
    def log(self) -> str:
        """The log's path in SLURM's signs."""
        return log_pattern(self.folder, "%A_%a.log" if self.runs else "%j.log")

    @property
    def tasks_per_node(self) -> int:
        """Tasks that srun starts on each node."""
        return 1 if self.options.shape == "node" else self.options.ranks_per_node

    @property
    def cpus_per_task(self) -> int:
        """Cores of each task."""
        return self.cpus_per_rank * (self.options.ranks_per_node // self.tasks_per_node)

    @property
    def requeues(self) -> bool:
        """Whether the job puts itself back into the queue."""
        return self.options.restarts > 0 and self.options.chain == 1


def render(job: Submission) -> str:
    """Return the script.

    Raises:
        ConfigError: a value that sbatch cannot take.
    """
    lines = [
        "#!/bin/bash",
        "# Written by `tide submit`. What runs is the code beside this file, as it was then.",
        *_directives(job),
        "",
        "set -u",
        f"cd -- {quoted(job.directory)}",
        *_environment(job),
        "",
        *_step(job),
        "",
        *_requeue(job),
    ]
    return "\n".join(lines) + "\n"


def _directives(job: Submission) -> Iterator[str]:
    """Yield the lines for sbatch."""
    options = job.options
    yield directive("job-name", one_line(job.name, "--name"))
    for name in ("partition", "account", "time"):
        if (value := getattr(options, name)) is not None:
            yield directive(name, value)
    yield directive("nodes", options.nodes)
    yield directive("ntasks-per-node", job.tasks_per_node)
    yield directive("cpus-per-task", job.cpus_per_task)
    if job.gpus_per_node:
        yield directive("gpus-per-node", job.gpus_per_node)
    yield directive("output", job.log)
    yield directive("open-mode", "append")
    yield directive("signal", f"B:USR1@{options.warning}")
    yield directive("requeue" if job.requeues else "no-requeue")
    if options.chain > 1:
        yield directive("dependency", "singleton")
    if job.runs:
        yield directive("array", f"0-{job.runs - 1}")
    for name, value in options.further().items():
        yield directive(name, value)


def _environment(job: Submission) -> Iterator[str]:
    """Yield the variables, each with its reason."""
    yield f"unset {' '.join(_LEFT_OVER)}  # of the shell that submitted; ranks read the node list"
    yield "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # jobs that share a node do not meet"
    number = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.runs else "$SLURM_JOB_ID"
    yield f'job="{number}"'
    if _leaves_out(job):
        yield f'export {LOST_HOSTS}={quoted(job.folder)}/"$job".lost_hosts'
    yield "# The run saves before it; a container may have no squeue to ask."
    yield (
        "export SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(date +%s "
        '--date="$(squeue --noheader --jobs="$job" --format=%e)" 2>/dev/null)}'
    )
    if job.gpus_per_node:
        yield "export CUDA_DEVICE_MAX_CONNECTIONS=1  # megatron-core asks for it under tensor parallelism"
        yield "export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # says which network failed, and nothing else"
    for name, value in job.options.variables().items():
        yield f"export {name}={quoted(value)}"


def _step(job: Submission) -> Iterator[str]:
    """Yield what starts the ranks, waits for them, and hands them SLURM's warning."""
    recipe = quoted(job.folder / RECIPE)
    if job.runs:
        recipe = f'{quoted(job.folder / RECIPES)}/"$SLURM_ARRAY_TASK_ID".yaml'
    ranks = f" --ranks-per-node {job.options.ranks_per_node}" if job.options.shape == "node" else ""
    only = " --preflight-only" if job.options.preflight_only else ""
    start = f"{quoted(job.python)} -m tide_megatron.commands train {recipe}{ranks}{only}"
    yield "step= heard="
    yield "# SLURM's warning, which srun hands to all tasks."
    yield """trap 'heard=1; [ -z "$step" ] || kill -USR1 "$step"' USR1"""
    yield "trap 'heard=1' TERM  # the tasks have got it from SLURM themselves"
    yield "# A task that ends does not end the others, which may be saving; after a minute nobody waits."
    yield (
        f"srun --kill-on-bad-exit=0 --wait={WAIT_SECONDS} --ntasks-per-node={job.tasks_per_node} "
        f"--cpus-per-task={job.cpus_per_task} {_image(job)}\\"
    )
    yield f"  env PYTHONPATH={quoted(job.folder / CODE)} {start} &"
    yield "step=$!"
    yield "# A signal ends bash's wait, not the step."
    yield 'while wait "$step"; code=$?; [ -n "$heard" ]; do heard=; done'


def _leaves_out(job: Submission) -> bool:
    """Say whether the job leaves hosts out that fail again: our launchers tell them, and it starts again."""
    return job.requeues and job.options.shape == "node"


def _image(job: Submission) -> str:
    """Return the words that put a task into its container, with a blank behind them."""
    kind, image = job.options.runs_images, job.options.container
    if kind is None or image is None:
        return ""
    seen = ",".join(mounts([*job.seen, *job.options.mount, str(job.folder), str(job.directory)]))
    if kind == "pyxis":
        pairs = ",".join(f"{folder}:{folder}" for folder in seen.split(","))
        words = [f"--container-image={image}", f"--container-mounts={pairs}"]
        return quoted(*words, f"--container-workdir={job.directory}") + " "
    gpus = ["--nv"] if job.gpus_per_node else []
    return quoted("apptainer", "exec", *gpus, "--bind", seen, "--pwd", str(job.directory), image) + " "


def _requeue(job: Submission) -> Iterator[str]:
    """Yield the end: back into the queue where there is something left to do."""
    if not job.requeues:
        yield 'exit "$code"'
        return
    yield "# Stopped in order, or ranks were killed or stood still: the same command goes on."
    yield f'if [ "$code" -eq {STOPPED_CODE} ] || [ "$code" -eq {LOST_CODE} ]; then'
    yield '  state=$(squeue --noheader --jobs="$job" --format=%T)'
    yield '  if [ "$state" != RUNNING ]; then'
    yield '    echo "job $job is ${state:-unknown to squeue}, so it does not put itself back"'
    yield f'  elif [ "${{SLURM_RESTART_COUNT:-0}}" -ge {job.options.restarts} ]; then'
    yield f'    echo "job $job has used up its {job.options.restarts} restarts (--restarts)"'
    yield "  else"
    if _leaves_out(job):
        yield "    # Asked before the requeue, which ends with SIGTERM whatever this shell runs then."
        yield f'    lost=$(sort -u "${LOST_HOSTS}" 2>/dev/null | cut -d" " -f2)'
        yield '    hosts=$(echo "$lost" | sort | uniq -d | paste -sd,)'
        yield "    trap '' TERM  # what this shell starts ignores it, too; SIGKILL comes KillWait later"
    yield '    echo "job $job puts itself back into the queue"'
    yield '    scontrol requeue "$job"'
    if _leaves_out(job):
        yield '    if [ -n "$hosts" ]; then'
        yield '      echo "ranks were lost on $hosts in two starts or more: the next ones leave it out"'
        yield "      # SLURM takes it only of a job that waits."
        yield "      for try in 1 2 3 4 5; do"
        yield '        scontrol update JobId="$job" ExcNodeList="$hosts" 2>/dev/null && break'
        yield "        sleep 1"
        yield "      done"
        yield "    fi"
    yield "  fi"
    yield "fi"
    yield 'exit "$code"'
