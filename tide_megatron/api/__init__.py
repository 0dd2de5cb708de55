"""The public functions, from data to export; the verbs of `tide` call the same ones.

    from tide_megatron import api as tide

Importing this module is instant: torch and megatron-core are imported by the first call. Every fault of the
caller's is a `TideError` (`tide_megatron.base.errors`) whose message names the option and the remedy.

`train` with several ranks starts processes, and each imports the calling script again, so a script must guard
its entry with `if __name__ == "__main__":`; so do `preflight` and `evaluate`. The others run in the calling
process; those that `prepare` starts import nothing of the script. Under torchrun or srun every process calls
`train` alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tide_megatron.api.data import Place, inspect_data, merge_data, split_data
from tide_megatron.api.replies import ReplyOptions as ReplyOptions
from tide_megatron.api.replies import SampleOptions as SampleOptions
from tide_megatron.api.replies import chat, sample
from tide_megatron.api.report import report
from tide_megatron.api.scores import TaskOptions as TaskOptions
from tide_megatron.api.scores import evaluate
from tide_megatron.base.files import local_path

if TYPE_CHECKING:
    from tide_megatron.data.manifest import Manifest
    from tide_megatron.export.checks import Check

__all__ = [
    "chat",
    "evaluate",
    "export",
    "inspect_data",
    "merge_data",
    "preflight",
    "prepare",
    "report",
    "sample",
    "split_data",
    "train",
]


def prepare(
    out: Place,
    sources: Sequence[Place] = (),
    *,
    config: Place | None = None,
    tokenizer: Place | None = None,
    max_length: int | None = None,
    on_long: str | None = None,
    on_bad: str | None = None,
    normalize: bool = False,
    learn: str | None = None,
    teachers: Mapping[str, str] | None = None,
    add_mask: bool = False,
    shape: str = "auto",
    dedup: bool = False,
    portion: tuple[float, float] | None = None,
    replace: bool = False,
    workers: int | None = None,
    part: str | None = None,
) -> Manifest | None:
    """Said chats into tokens on disk, all or nothing.

    Args:
        out: data folder to make.
        sources: files of chats, folders, globs, "hub:OWNER/NAME", pipes, "-" for stdin, read in this order.
        config: a data file in YAML, in the place of `sources`; what is given beside it goes before it.
        tokenizer: the student's, as FOLDER[,mask=TOKEN][,template=NAME][,chat_template_kwargs.KEY=VALUE].
        max_length: most tokens a sample may have.
        on_long: what happens to longer samples: `error` (the default), `skip` or `truncate`.
        on_bad: what happens to records that cannot be used: `stop` (the default) or `skip`.
        normalize: put all text into NFC, for tokenizers that do so themselves.
        learn: replies of a chat that are learnt: `last` (the default), or `all` but those of weight 0.
        teachers: name -> a place as for `tokenizer`, also with [,max_length=N], of each teacher that reads
            tokens of its own; twice `max_length` tokens unless said otherwise.
        add_mask: add the mask token to the student's tokenizer where it has none (as `student.add_mask`).
        shape: how rows of `sources` become conversations; `auto`: their columns tell.
        dedup: leave out conversations that were there before.
        portion: keep conversations whose digest, read as a number of [0, 1), lies between these two.
        replace: put the new data in the place of a data folder that is there.
        workers: processes that encode, once there are more than a thousand records; None: one a core.
        part: "K/N": only blocks of records that belong to this task of several, into OUT.parts; the last
            task puts all together. None: all records.

    Returns:
        What was written: `samples`, `statistics`, and `sides` by teacher. None: a part alone.

    Raises:
        ConfigError: an option that cannot be.
        DataError: bad records (with the first's line), no tokenizer, or a folder that may not be replaced.
    """
    from tide_megatron.data.preparation.mixture_preparation import prepare_mixture
    from tide_megatron.data.sources.mixture import chosen_mixture

    file = None if config is None else local_path(config)
    given: dict[str, Any] = {"tokenizer": tokenizer and str(tokenizer), "max_length": max_length}
    given |= {"on_long": on_long, "on_bad": on_bad, "normalize": normalize or None}
    given |= {"add_mask": add_mask or None, "teachers": dict(teachers or {}) or None}
    given |= {"learn": learn, "dedup": dedup or None, "portion": portion}
    mixture = chosen_mixture([str(source) for source in sources], file, shape, given)
    return prepare_mixture(mixture, local_path(out), replace=replace, workers=workers, part=part)


def train(
    recipe: Place,
    overrides: Sequence[str] = (),
    *,
    ranks: int | None = None,
    ranks_per_node: int | None = None,
    resume: bool = True,
) -> dict[str, Any]:
    """Train a student, with teachers or without, as a recipe says.

    A signal to stop (Ctrl-C, SIGTERM) saves and ends the run; the same call goes on with it.

    Args:
        recipe: YAML run file; `docs/recipe.md` has its keys.
        overrides: `key=value` with dotted keys; they have the last word.
        ranks: processes to start here; None takes what torchrun or srun started, else one, in this process.
        ranks_per_node: processes to start on this node, where this call is made once on each of several
            (under srun with a task a node, or with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set).
        resume: go on from the run folder's newest checkpoint; False discards what is there.

    Returns:
        Held-out scores and costs, as in the run folder's result.json (docs/metrics.md); `finished` is false
        for a run that was stopped. The student is in the run folder, under `model`.

    Raises:
        TideError: a recipe, data or model folder that cannot be used; too many updates that were not finite.
        RanksFailed: a rank had a bug (its traceback is in the message), or never came.
        RanksLost: (a RanksFailed) a rank was killed or stood still, after this call had saved something: the
            same call goes on.
        Stopped: (a KeyboardInterrupt) a signal to stop before the first step; nothing was written.
        KeyboardInterrupt: a second signal.
    """
    from tide_megatron.base.errors import RanksFailed, RanksLost, TideError
    from tide_megatron.launch.ranks import run_ranks
    from tide_megatron.train.history import has_saved, note_failure
    from tide_megatron.train.loop import train as run
    from tide_megatron.train.resolve import load_recipe

    resolved, tree = load_recipe(local_path(recipe), overrides)
    try:
        result: dict[str, Any] = run_ranks(
            run,
            (resolved, tree, resume),
            ranks,
            resolved.device,
            ranks_per_node=ranks_per_node,
            timeout_seconds=resolved.timeout_seconds,
            hang_seconds=resolved.hang_seconds or resolved.timeout_seconds / 2,
            deadlines=resolved.deadlines,
        )
    except (RanksFailed, TideError) as fault:
        folder = Path(resolved.folder)
        host = fault.host if isinstance(fault, RanksLost) else ""
        note_failure(folder, str(fault), host)  # of ranks that could not
        if isinstance(fault, RanksLost) and not has_saved(folder):
            raise RanksFailed(f"{fault}\nthis start saved nothing, so another one may end alike") from None
        raise
    return result


def preflight(
    recipe: Place,
    overrides: Sequence[str] = (),
    *,
    ranks: int | None = None,
    ranks_per_node: int | None = None,
    resume: bool = True,
) -> dict[str, Any]:
    """Do everything that `train` does before its first step, but resuming, on the real ranks.

    The run folder is left as it was.

    Args:
        recipe: YAML run file.
        overrides: `key=value` with dotted keys; they have the last word.
        ranks: as for `train`.
        ranks_per_node: as for `train`.
        resume: the run would go on from the run folder's newest checkpoint; False: discard what is there.

    Returns:
        What ranks compared and measured, as a run's preflight.json has it (docs/launch.md).

    Raises:
        TideError: a recipe, data or model folder that cannot be used; ranks that differ where they must not.
        RanksFailed: a rank had a bug, or never came.
        Stopped: (a KeyboardInterrupt) a signal to stop.
    """
    from tide_megatron.base.errors import RanksFailed, RanksLost
    from tide_megatron.launch.ranks import run_ranks
    from tide_megatron.train.preflight import check_only
    from tide_megatron.train.resolve import load_recipe

    resolved, tree = load_recipe(local_path(recipe), overrides)
    try:
        found: dict[str, Any] = run_ranks(
            check_only,
            (resolved, tree, resume),
            ranks,
            resolved.device,
            ranks_per_node=ranks_per_node,
            timeout_seconds=resolved.timeout_seconds,
        )
    except RanksLost as fault:
        raise RanksFailed(str(fault)) from None  # nothing was begun that another start could go on with
    return found


def export(
    model: Place,
    out: Place,
    *,
    formats: Sequence[str] | None = None,
    shard_size: str = "5GB",
    dtype: Literal["bf16", "fp32", "stored"] = "stored",
    force: bool = False,
    verify: bool = True,
) -> list[Check]:
    """Write a student with tokenizer, chat template, generation config and model card, and load it back.

    Args:
        model: a run's folder, or a model folder.
        out: folder to write; of several formats it holds a folder for each.
        formats: of `a2d-qwen3`, `sdar` and `qwen3` (docs/export.md); None: all.
        shard_size: largest file of weights, such as 5GB.
        dtype: of the weights.
        force: replace an export that stands there.
        verify: load every form again and compare.

    Returns:
        What was compared, and what was found; empty without `verify`.

    Raises:
        ConfigError: an option that cannot be, or a form that this student cannot have.
        CheckpointError: a damaged student, a full disk, or an export that reads back different.
    """
    from tide_megatron.base.errors import ConfigError, nearest
    from tide_megatron.base.units import read_bytes
    from tide_megatron.export.export import ExportOptions, export_student
    from tide_megatron.export.formats import FORMATS
    from tide_megatron.launch.ranks import run_ranks

    names = tuple(FORMATS) if formats is None else tuple(formats)
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"--format: {name!r} is unknown; {nearest(name, FORMATS)}")
    options = ExportOptions(
        formats=names,
        shard_bytes=read_bytes(shard_size, "--shard-size"),
        dtype=dtype,
        force=force,
        verify=verify,
    )
    checks: list[Check] = run_ranks(export_student, (local_path(model), local_path(out), options), 1)
    return checks
