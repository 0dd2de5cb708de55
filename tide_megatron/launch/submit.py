"""Hand a run to SLURM: freeze what runs into a folder of its own, write the script, submit it.

Under the run folder each submission has `jobs/NNN`: the package as it is now, the resolved recipe, the
script, and later SLURM's log. A queued job therefore runs what was submitted, whatever happens to the
checkout, and another submission leaves it alone.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

import tide_megatron
from tide_megatron.base.device import Device
from tide_megatron.base.disk import disk_faults
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.files import write_text
from tide_megatron.base.read import text_of
from tide_megatron.launch.job import JobOptions, refuse_secrets
from tide_megatron.launch.job_script import CODE, RECIPE, RECIPES, SCRIPT, Submission, render
from tide_megatron.launch.status import JOB_IDS, JOBS
from tide_megatron.train.folder import check_folder
from tide_megatron.train.recipe import Recipe
from tide_megatron.train.resolve import Tree, load_recipe
from tide_megatron.train.setup import examine

_GPU_CORES = 8
Run = tuple[Recipe, Tree]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submitted:
    """What was submitted."""

    numbers: tuple[str, ...]
    """Of the jobs, as sbatch says them; none: it was a rehearsal."""
    job: Submission
    script: str

    @property
    def log(self) -> str:
        """Where the first job's log will be, with SLURM's sign where there is no number yet."""
        number = self.numbers[0].partition(";")[0] if self.numbers else "%j"
        name = f"{number}_0.log" if self.job.runs else f"{number}.log"
        return str(self.job.folder / name)


def submit(
    recipe: Path,
    overrides: Sequence[str],
    options: JobOptions,
    *,
    check: bool = True,
    dry_run: bool = False,
) -> Submitted:
    """Freeze a run, write its script and submit it.

    Args:
        recipe: YAML run file.
        overrides: `key=value` for it.
        options: how it is to stand on the cluster.
        check: also look at all that a start would look at before it reads weights, from here.
        dry_run: write and submit nothing.

    Raises:
        TideError: a recipe or option that cannot be; a secret that would be written; sbatch refused.
    """
    base = load_recipe(recipe, overrides)
    runs = [base] if options.sweep is None else list(_sweep(recipe, overrides, options.sweep))
    job = _submission(base[0], [run for run, _ in runs], options)
    script = render(job)
    texts = {RECIPE: yaml.safe_dump(base[1], sort_keys=False), SCRIPT: script}
    if options.sweep is not None:
        trees = (yaml.safe_dump(tree, sort_keys=False) for _, tree in runs)
        texts |= {f"{RECIPES}/{number}.yaml": text for number, text in enumerate(trees)}
    refuse_secrets(texts, os.environ)
    for run, tree in runs:
        check_folder(Path(run.folder), tree, resume=True)
        if check:
            _check(run, options, has_gpus=job.gpus_per_node > 0)
    if dry_run:
        return Submitted(numbers=(), job=job, script=script)
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "tide submit: there is no sbatch here; run it on a login node, or look with --dry-run"
        )
    job = _freeze(job, texts)
    return Submitted(numbers=_sbatch(job), job=job, script=script)


def _submission(recipe: Recipe, runs: Sequence[Recipe], options: JobOptions) -> Submission:
    """Fill in what an option leaves open."""
    gpus = options.gpus_per_node
    if gpus is None:
        gpus = 0 if recipe.device == "cpu" else options.ranks_per_node
    folder = Path(recipe.folder).absolute()
    seen: set[str] = set()
    for run in runs:
        models = {"student": run.student, **run.teachers}.values()
        named = [model.folder for model in models] + [*run.data.folders.values()]
        named += [run.data.held_out] if run.data.held_out is not None else []
        named += [run.branch.folder] if run.branch is not None else []
        seen |= {run.folder, *named}
    python = options.python or ("python3" if options.container else sys.executable)
    return Submission(
        options=options,
        folder=_next(folder / JOBS),
        directory=Path.cwd(),
        name=options.name or folder.name,
        gpus_per_node=gpus,
        cpus_per_rank=options.cpus_per_rank or (_GPU_CORES if gpus else 1),
        python=python,
        runs=len(runs) if options.sweep is not None else 0,
        seen=tuple(sorted(seen)),
    )


def _next(jobs: Path) -> Path:
    """Return the folder of the next submission."""
    taken = [int(path.name) for path in jobs.glob("[0-9]*") if path.name.isdecimal()]
    return jobs / f"{max(taken, default=0) + 1:03d}"


def _sweep(recipe: Path, overrides: Sequence[str], file: Path) -> Iterator[Run]:
    """Yield the runs of a sweep: each line's overrides, in a folder of its own unless it names one."""
    try:
        lines = [shlex.split(line, comments=True) for line in text_of(file).splitlines()]
    except (OSError, ValueError) as fault:
        raise ConfigError(f"--sweep: {file} cannot be read as overrides, a run a line ({fault})") from None
    folders: set[str] = set()
    for number, words in enumerate(line for line in lines if line):
        run, tree = load_recipe(recipe, [*overrides, *words])
        if not any(word.startswith("folder=") for word in words):
            run, tree = load_recipe(recipe, [*overrides, *words, f"folder={run.folder}/sweep-{number:03d}"])
        if run.folder in folders:
            raise ConfigError(f"--sweep: {file} gives two runs the folder {run.folder}; each needs its own")
        folders.add(run.folder)
        yield run, tree
    if not folders:
        raise ConfigError(f"--sweep: {file} holds no run; write overrides such as `seed=1`, a run a line")


def _check(recipe: Recipe, options: JobOptions, *, has_gpus: bool) -> None:
    """Refuse a run that would be refused at its start, seen from this machine."""
    kind, backend = ("cuda", "nccl") if has_gpus else ("cpu", "gloo")
    device = Device(type=kind, index=0, backend=backend, threads=1)  # type: ignore[arg-type]
    examine(recipe, device, (0, options.world_size), headers=True).refuse_faults()


def _freeze(job: Submission, texts: dict[str, str]) -> Submission:
    """Make the job's folder with code, recipes and script; the number is ours alone.

    Raises:
        ConfigError: the disk refuses.
    """
    with disk_faults(job.folder, ConfigError):
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            job.folder.mkdir()
        except FileExistsError:
            raise ConfigError(f"{job.folder}: another submission took it just now; submit again") from None
        source = Path(tide_megatron.__file__).parent
        shutil.copytree(
            source,
            job.folder / CODE / source.name,
            ignore=shutil.ignore_patterns("__pycache__", "*.pyc"),
            copy_function=shutil.copyfile,
        )
        write_text(job.folder / CODE / "VERSION", f"{tide_megatron.__version__} {_commit(source)}\n")
        if job.runs:
            (job.folder / RECIPES).mkdir()
        for name, text in texts.items():
            write_text(job.folder / name, text)
    return job


def _commit(source: Path) -> str:
    """Return which commit the code is, or that none is known."""
    git = ["git", "-C", str(source)]
    try:
        found = [
            subprocess.run(
                [*git, *words], capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", "."))
        ]
    except (OSError, subprocess.SubprocessError):
        return "of no known commit"
    return f"commit {found[0]}" + (" with changes" if found[1] else "")


def _sbatch(job: Submission) -> tuple[str, ...]:
    """Submit the script, as often as it is chained.

    Raises:
        ConfigError: sbatch's own words.
    """
    numbers = []
    for _ in range(job.options.chain):
        words = ["sbatch", "--parsable", str(job.folder / SCRIPT)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())
            raise ConfigError(f"{job.folder / SCRIPT}: sbatch refused it: {said}")
        numbers.append(done.stdout.strip())
        write_text(job.folder / JOB_IDS, "".join(f"{number}\n" for number in numbers))  # `tide status` asks
    return tuple(numbers)
