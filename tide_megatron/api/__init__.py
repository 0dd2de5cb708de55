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

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tide_megatron.api.data import Place, inspect_data, merge_data, split_data
from tide_megatron.base.files import local_path

if TYPE_CHECKING:
    from tide_megatron.base.device import Wanted
    from tide_megatron.data.manifest import Manifest
    from tide_megatron.evaluate.options import Arithmetic
    from tide_megatron.export.checks import Check

__all__ = [
    "evaluate",
    "export",
    "inspect_data",
    "merge_data",
    "preflight",
    "prepare",
    "sample",
    "split_data",
    "train",
]

Options = TypeVar("Options")

_LONGEST_WAIT_SECONDS = 24 * 3600.0
"""For the rank whose questions take longest; one that is killed ends the others at once."""


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
    """Turn chats into tokens on disk, all or nothing.

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


def sample(
    model: Place,
    prompts: Sequence[str],
    *,
    mask: str | None = None,
    new_tokens: int = 256,
    steps: int | None = None,
    context: Literal["bidirectional", "block_causal", "block_diffusion"] | None = None,
    block_size: int | None = None,
    device: Wanted = "auto",
    precision: str = "auto",
    engine: str = "auto",
    fp8: str | None = None,
) -> list[str]:
    """Answer prompts with a block sampler.

    Args:
        model: a run's folder, or a model folder with config.json, weights and tokenizer.
        prompts: each is one user message in the model's chat template.
        mask: the mask token that it was trained with; None: the one its folder names.
        new_tokens: longest reply, in tokens.
        steps: denoising steps of a reply; None: one a token.
        context: the kind of context that the model was trained in; None: its folder's.
        block_size: tokens of a block that it was trained with; None: its folder's.
        device: where to compute; `auto` takes CUDA where it works.
        precision: `fp32`, `bf16` or `auto` (bf16 on CUDA, fp32 on CPU).
        engine: what computes the layers, as a teacher's `engine` in a recipe.
        fp8: hold and multiply the layers' matrices in FP8 by this recipe (docs/precision.md); None: do not.

    Returns:
        A reply to each prompt; fewer when a signal stopped it.

    Raises:
        TideError: a model that cannot be read, or whose context or mask token nobody says; a prompt that
            holds the mask token or is no text.
    """
    from tide_megatron.base.errors import DataError
    from tide_megatron.base.read import is_text
    from tide_megatron.evaluate.generate import Sampler, answer_prompts
    from tide_megatron.evaluate.model_folder import model_of, trained_context
    from tide_megatron.launch.ranks import run_ranks

    for number, prompt in enumerate(prompts, start=1):
        if not is_text(prompt):
            raise DataError(f"prompts: number {number} is no UTF-8 text: {prompt!a}")
    folder = model_of(local_path(model))
    reading = trained_context(folder, context, block_size)
    sampler = Sampler(new_tokens=new_tokens, steps=new_tokens if steps is None else steps)
    numbers = _arithmetic(precision, engine, fp8)
    replies: list[str] = run_ranks(
        answer_prompts, (folder, list(prompts), reading, sampler, mask, numbers), 1, device
    )
    return replies


def evaluate(
    model: Place,
    data: Place | None = None,
    *,
    tasks: Sequence[str] = (),
    out: Place | None = None,
    against: Place | None = None,
    limit: int | None = None,
    decoding: Mapping[str, Any] | None = None,
    think: Literal["auto", "always", "never"] = "auto",
    draws: int = 32,
    include: Place | None = None,
    unsandboxed: Sequence[str] = (),
    samples: int = 256,
    times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    microbatch: int = 16,
    context: Literal["bidirectional", "block_causal", "block_diffusion"] | None = None,
    block_size: int | None = None,
    ranks: int | None = None,
    device: Wanted = "auto",
    precision: str = "auto",
    engine: str = "auto",
    fp8: str | None = None,
) -> dict[str, Any]:
    """Score any model: on held-out data with the noise of every run's evaluations, on tasks, or on both.

    An evaluation on tasks writes every answer down as it comes: the same call goes on where one ended.

    Args:
        model: a run's folder, or a model folder with config.json, weights and tokenizer; for tasks also a
            checkpoint of a run.
        data: prepared with its tokenizer and template; None: no held-out data.
        tasks: names of tasks, of lm-evaluation-harness's tasks, or of suites (docs/evaluation.md).
        out: folder of results of this model's tasks; None: evaluations/NAME, by the name of its folder.
        against: another such folder, to compare with question by question.
        limit: most questions of a task, a fixed draw; None: all.
        decoding: options of `decode.options.Decoding`, in the place of the tasks' own.
        think: end prompts in an empty thinking block and cut thoughts out: always, never, or for models whose
            tokenizer knows `</think>`.
        draws: maskings of each continuation whose likelihood is estimated.
        include: folder of tasks in lm-evaluation-harness's own form.
        unsandboxed: tasks of lm-evaluation-harness whose generated code may run in this very process.
        samples: how many samples of the data are scored.
        times: noise levels at which each is masked.
        microbatch: samples per forward pass and rank.
        context: the kind of context that the model was trained in; None: its folder's.
        block_size: tokens of a block that it was trained with; None: its folder's.
        ranks: processes to start here, each with the whole model; None: what torchrun or srun started.
        device: where to compute; `auto` takes CUDA where it works.
        precision: `fp32`, `bf16` or `auto` (bf16 on CUDA, fp32 on CPU).
        engine: what computes the layers, as a teacher's `engine` in a recipe.
        fp8: hold and multiply the layers' matrices in FP8 by this recipe (docs/precision.md); None: do not.

    Returns:
        Of data the scores, as result.json has them (docs/metrics.md); of tasks `tasks`, each one's result,
        `compared`, the differences to `against`, and `out`.

    Raises:
        TideError: neither data nor tasks; a model, data or tasks that cannot be read or do not fit; a context
            that nobody says; a folder of other answers.
    """
    from tide_megatron.base.errors import ConfigError
    from tide_megatron.evaluate.model_folder import model_of, trained_context
    from tide_megatron.launch.ranks import run_ranks

    if data is None and not tasks:
        raise ConfigError("evaluate: give held-out data (--data FOLDER), tasks (--tasks humaneval), or both")
    place, numbers, scores = local_path(model), _arithmetic(precision, engine, fp8), {}
    if data is not None:
        from tide_megatron.evaluate.likelihood import score_folder
        from tide_megatron.evaluate.options import Evaluation

        options = _checked(Evaluation, samples=samples, times=tuple(times), microbatch=microbatch)
        folder = model_of(place)
        reading = trained_context(folder, context, block_size)
        scores = run_ranks(score_folder, (folder, local_path(data), reading, options, numbers), ranks, device)
    if tasks:
        from tide_megatron.tasks.evaluation import TaskEvaluation, evaluate_tasks
        from tide_megatron.tasks.suite import chosen_entries

        if limit is not None and limit < 1:
            raise ConfigError(f"--limit: {limit} is no number of questions; use 1 or more")
        if draws < 1:
            raise ConfigError(f"--draws: {draws} is no number of maskings; use 1 or more")
        named = Path("evaluations") / (place.parent.name if place.name == "model" else place.resolve().name)
        wanted = TaskEvaluation(
            suite=chosen_entries(tasks),
            out=named if out is None else local_path(out),
            against=None if against is None else local_path(against),
            limit=limit,
            decoding=dict(decoding or {}),
            think=think,
            draws=draws,
            include=None if include is None else local_path(include),
            unsandboxed=tuple(unsandboxed),
        )
        is_said = context is not None or block_size is not None
        asked = trained_context(model_of(place), context, block_size) if is_said else None
        found = run_ranks(
            evaluate_tasks,
            (place, wanted, asked, numbers),
            ranks,
            device,
            timeout_seconds=_LONGEST_WAIT_SECONDS,
        )
        scores = {**scores, **found, "out": str(wanted.out)}
    return scores


def _arithmetic(precision: str, engine: str, fp8: str | None) -> Arithmetic:
    """Read how a model's answers are to be computed.

    Raises:
        ConfigError: a word that is not known, naming its option.
    """
    from tide_megatron.evaluate.options import Arithmetic

    return _checked(Arithmetic, precision=precision, engine=engine, fp8=fp8 and {"recipe": fp8})


def _checked(kind: Callable[..., Options], **words: Any) -> Options:
    """Make an options object of what a caller gave.

    Raises:
        ConfigError: a value that cannot be, naming its option.
    """
    from pydantic import ValidationError

    from tide_megatron.base.errors import ConfigError

    try:
        return kind(**words)
    except ValidationError as fault:
        first = fault.errors()[0]
        raise ConfigError(f"--{first['loc'][0]}: {first['input']!r} is not valid: {first['msg']}") from None


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
