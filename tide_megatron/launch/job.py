"""What a SLURM job of ours may be told, checked where it is said; no word of it reaches a shell as code.

Values come from a command line and end in a script that two programs read: sbatch its `#SBATCH` lines, bash
the rest. `directive` and `quoted` write them for the one and the other; what these cannot take is refused in
a sentence.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from tide_megatron.base.errors import ConfigError

Shape = Literal["node", "rank"]
Containers = Literal["auto", "pyxis", "apptainer"]

_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_OPTION = re.compile(r"--([a-z][a-z0-9-]*)(?:=(.*))?", re.DOTALL)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_LEAST_SECRET = 8
"""Characters of a value that is looked for; shorter ones stand in every text."""
_OURS = {
    "nodes": "--nodes",
    "ntasks-per-node": "--ranks-per-node",
    "partition": "--partition",
    "account": "--account",
    "time": "--time",
    "job-name": "--name",
    "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-rank",
    "signal": "--warning",
    "requeue": "--restarts",
    "no-requeue": "--restarts 0",
    "array": "--sweep",
    "dependency": "--chain",
    "output": "nothing: the log is beside the script",
    "error": "nothing: the log is beside the script",
    "open-mode": "nothing: the log is appended to",
    "wrap": "nothing: the script is ours",
}
"""sbatch options that we write, and what says them here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobOptions:
    """How a run is to stand on a cluster. Each field is an option of `tide submit`."""

    nodes: Annotated[int, "Nodes."] = 1
    ranks_per_node: Annotated[int, "Ranks on each node."] = 8
    shape: Annotated[
        Shape, "node: a task a node, whose ranks our launcher starts; rank: a task a rank, started by srun."
    ] = "node"
    partition: Annotated[str | None, "As sbatch's."] = None
    account: Annotated[str | None, "As sbatch's."] = None
    time: Annotated[str | None, "The job's limit, as sbatch's: MINUTES, HH:MM:SS or DAYS-HH:MM:SS."] = None
    name: Annotated[str | None, "The job's name; default: the run folder's."] = None
    gpus_per_node: Annotated[
        int | None, "Default: --ranks-per-node, or none with device=cpu; 0 asks for none."
    ] = None
    cpus_per_rank: Annotated[int | None, "Default: 8 with GPUs, 1 without."] = None
    container: Annotated[str | None, "An image to run in, of pyxis/enroot or apptainer."] = None
    containers: Annotated[Containers, "What runs images; auto: apptainer for a .sif, else pyxis."] = "auto"
    mount: Annotated[
        list[str], "Another folder that the container is to see, beside those of the recipe; repeatable."
    ] = dataclasses.field(default_factory=list)
    warning: Annotated[int, "Seconds before the limit at which SLURM asks the run to save."] = 180
    restarts: Annotated[int, "How often the job puts itself back into the queue at most; 0: never."] = 100
    chain: Annotated[int, "Submit so many jobs, each after the last (singleton), instead of requeueing."] = 1
    sweep: Annotated[Path | None, "A file of overrides, a run a line: an array of jobs."] = None
    env: Annotated[
        list[str], "NAME=VALUE for the job, no secrets: sbatch passes on what you exported; repeatable."
    ] = dataclasses.field(default_factory=list)
    sbatch: Annotated[list[str], "Another option of sbatch, such as --sbatch=--qos=high; repeatable."] = (
        dataclasses.field(default_factory=list)
    )
    python: Annotated[str | None, "The interpreter; default: this one; in a container python3."] = None
    preflight_only: Annotated[bool, "Let the ranks only compare and measure, as tide train does."] = False

    def __post_init__(self) -> None:
        """Refuse what cannot be, with the option's name.

        Raises:
            ConfigError: the first fault.
        """
        least = {"nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0, "cpus_per_rank": 1, "warning": 10}
        for field, smallest in (least | {"restarts": 0, "chain": 1}).items():
            value = getattr(self, field)
            if value is not None and value < smallest:
                raise ConfigError(
                    f"--{field.replace('_', '-')}: {value} is too small; use {smallest} or more"
                )
        for field in ("partition", "account", "name", "container", "python"):
            value = getattr(self, field)
            if value is not None:
                one_line(value, f"--{field}")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise ConfigError(f"--time: {self.time!r} is no time of SLURM's; write 90, 4:00:00 or 1-12:00:00")
        if self.time is not None and self.warning >= _seconds(self.time):
            raise ConfigError(
                f"--warning: {self.warning} s before a limit of --time {self.time} is before the job begins; "
                "give less, or more time"
            )
        if self.chain > 1 and self.sweep is not None:
            raise ConfigError(
                "--chain: an array cannot be chained; leave out --chain, each run requeues itself"
            )
        self.variables()
        self.further()

    def variables(self) -> dict[str, str]:
        """Return what `env` says.

        Raises:
            ConfigError: it is no NAME=VALUE, or a secret's name.
        """
        found = {}
        for word in self.env:
            name, equals, value = word.partition("=")
            if not equals or not _NAME.fullmatch(name):
                raise ConfigError(f"--env: {word!r} is no NAME=VALUE")
            if is_secret_name(name):
                raise ConfigError(
                    f"--env: {name} sounds like a secret, and would stand in the script; `export {name}=...` "
                    "in the shell that submits, sbatch hands it to the job"
                )
            found[name] = one_line(value, f"--env {name}", may_be_empty=True)
        return found

    def further(self) -> dict[str, str | None]:
        """Return what `sbatch` says: name -> value, None for a flag.

        Raises:
            ConfigError: it is no long option, or one that another option says.
        """
        found: dict[str, str | None] = {}
        for word in self.sbatch:
            option = _OPTION.fullmatch(word)
            if option is None:
                raise ConfigError(
                    f"--sbatch: {word!r} is no long option of sbatch; write --sbatch=--NAME=VALUE"
                )
            if option[1] in _OURS:
                raise ConfigError(f"--sbatch: --{option[1]} is written already; use {_OURS[option[1]]}")
            found[option[1]] = None if option[2] is None else one_line(option[2], f"--sbatch --{option[1]}")
        return found

    @property
    def world_size(self) -> int:
        """Ranks all in all."""
        return self.nodes * self.ranks_per_node

    @property
    def runs_images(self) -> Literal["pyxis", "apptainer"] | None:
        """What runs the image, if there is one."""
        if self.container is None:
            return None
        if self.containers == "auto":
            return "apptainer" if self.container.endswith(".sif") else "pyxis"
        return self.containers


def _seconds(time: str) -> int:
    """Return how long a limit of sbatch's is: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86_400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


def is_secret_name(name: str) -> bool:
    """Say whether a variable of this name may hold a secret."""
    return bool(_SECRET.search(name))


def refuse_secrets(texts: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Refuse to write a secret that stands in a variable of this process.

    Args:
        texts: what is to be written, by what it is.
        environment: this process's variables.

    Raises:
        ConfigError: the value of a variable whose name says that it is secret stands in one of the texts.
    """
    secrets = {
        name: value
        for name, value in environment.items()
        if is_secret_name(name) and len(value) >= _LEAST_SECRET
    }
    for what, text in texts.items():
        for name, value in secrets.items():
            if value in text:
                raise ConfigError(
                    f"{what}: would hold the value of {name} for everybody who may read it; take it out, "
                    "sbatch hands your exported variables to the job"
                )


def one_line(value: str, option: str, *, may_be_empty: bool = False) -> str:
    """Return a value that SLURM and a script can take as it is.

    Args:
        value: a user's.
        option: begins the message.
        may_be_empty: whether nothing is a value, too.

    Raises:
        ConfigError: it is empty, no UTF-8, or holds line breaks or other control characters.
    """
    if not value.strip() and not may_be_empty:
        raise ConfigError(f"{option}: {value!r} is empty; write a value, or leave it out")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in value):
        raise ConfigError(
            f"{option}: {value!a} holds a line break or another control character, which a job's script "
            "cannot hold; write it without"
        )
    return value


def quoted(*words: str | Path) -> str:
    """Return words as bash reads them back, one for one."""
    return " ".join(shlex.quote(str(word)) for word in words)


def directive(option: str, value: str | int | None = None) -> str:
    """Return a line for sbatch, which takes double quotes and, inside, backslashes before these two."""
    if value is None:
        return f"#SBATCH --{option}"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{option}="{text}"' if isinstance(value, str) else f"#SBATCH --{option}={value}"


def log_pattern(folder: Path, pattern: str) -> str:
    """Return where SLURM writes a job's log: `%` in a folder's name is none of its signs.

    Args:
        folder: of the job.
        pattern: the file's name, in SLURM's signs.

    Raises:
        ConfigError: a backslash, with which SLURM takes no sign for one.
    """
    text = one_line(str(folder), "folder")
    if "\\" in text:
        raise ConfigError(
            f"folder: {text} holds a backslash, with which SLURM puts no number into a log's name; rename it"
        )
    return f"{text.replace('%', '%%')}/{pattern}"


def mounts(folders: Iterable[str]) -> list[str]:
    """Return folders for a container to see at their own places, without those that lie in another one.

    Raises:
        ConfigError: a name that holds `,` or `:`, which part mounts.
    """
    found: list[Path] = []
    for folder in sorted({Path(one_line(folder, "--mount")).absolute() for folder in folders}):
        if any(sign in str(folder) for sign in ",:"):
            raise ConfigError(
                f"{folder}: a container's mounts cannot hold ',' or ':'; rename it, or link to it"
            )
        if not any(folder.is_relative_to(other) for other in found):
            found.append(folder)
    return [str(folder) for folder in found]
