"""Scores of a model: on held-out data, and of what it can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tide_megatron.api.checks import LONGEST_WAIT_SECONDS, arithmetic_of, checked
from tide_megatron.api.data import Place
from tide_megatron.base.files import local_path

if TYPE_CHECKING:
    from tide_megatron.base.device import Wanted
    from tide_megatron.diffusion.mask import Context
    from tide_megatron.evaluate.options import Arithmetic, Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How a model is evaluated on tasks; the command line has an option of each field."""

    out: Annotated[Path | None, "Folder of results; default: evaluations/NAME."] = None
    against: Annotated[Path | None, "Another such folder, to compare with question by question."] = None
    limit: Annotated[int | None, "Most questions of a task, a fixed draw; default: all."] = None
    decoding: Annotated[list[str], "KEY=VALUE: decode otherwise than the task says, as new_tokens=64."] = (
        dataclasses.field(default_factory=list)
    )
    think: Annotated[
        Literal["auto", "always", "never"],
        "End prompts in an empty thinking block; auto: where the tokenizer has one.",
    ] = "auto"
    draws: Annotated[int, "Maskings for the likelihood of each choice."] = 32
    include: Annotated[Path | None, "Folder of tasks in lm-evaluation-harness's own form."] = None
    unsandboxed: Annotated[
        list[str],
        "Let this task run generated code outside the sandbox (lm-evaluation-harness's: in this process).",
    ] = dataclasses.field(default_factory=list)


def evaluate(
    model: Place,
    data: Place | None = None,
    *,
    tasks: Sequence[str] = (),
    on_tasks: TaskOptions | None = None,
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

    Answers to tasks are written as they come: the same call goes on where one ended.

    Args:
        model: a run's folder, or a model folder; for tasks also a checkpoint of a run.
        data: prepared with its tokenizer and template; None: no held-out data.
        tasks: names of tasks, of lm-evaluation-harness's tasks, or of suites (docs/evaluation.md).
        on_tasks: how, and where to write; None: as its defaults say.
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
        `compared`, the differences to another folder, and `out`.

    Raises:
        TideError: neither data nor tasks; a model, data or tasks that cannot be read or do not fit; a context
            that nobody says; a folder of other answers.
    """
    _refuse_nothing(data, tasks)
    place, numbers = local_path(model), arithmetic_of(precision, engine, fp8)
    started = _Started(place, numbers, context, block_size, ranks, device)
    scores: dict[str, Any] = {}
    if data is not None:
        from tide_megatron.evaluate.options import Evaluation

        words = {"samples": samples, "times": tuple(times), "microbatch": microbatch}
        options = checked(Evaluation, words)
        scores |= started.on_data(local_path(data), options)
    return scores | (started.on_tasks(tasks, on_tasks or TaskOptions()) if tasks else {})


def _refuse_nothing(data: Place | None, tasks: Sequence[str]) -> None:
    from tide_megatron.base.errors import ConfigError

    if data is None and not tasks:
        raise ConfigError("evaluate: give held-out data (--data FOLDER), tasks (--tasks humaneval), or both")


@dataclasses.dataclass(frozen=True)
class _Started:
    """A model that ranks are started for."""

    place: Path
    arithmetic: Arithmetic
    context: str | None
    block_size: int | None
    ranks: int | None
    device: Wanted

    def _read_in(self) -> Context:
        from tide_megatron.evaluate.model_folder import model_of, trained_context

        return trained_context(model_of(self.place), self.context, self.block_size)

    def on_data(self, data: Path, options: Evaluation) -> dict[str, Any]:
        """Score held-out data."""
        from tide_megatron.evaluate.likelihood import score_folder
        from tide_megatron.evaluate.model_folder import model_of
        from tide_megatron.launch.ranks import run_ranks

        args = (model_of(self.place), data, self._read_in(), options, self.arithmetic)
        scores: dict[str, Any] = run_ranks(score_folder, args, self.ranks, self.device)
        return scores

    def on_tasks(self, words: Sequence[str], options: TaskOptions) -> dict[str, Any]:
        """Evaluate tasks."""
        from tide_megatron.base.errors import ConfigError
        from tide_megatron.launch.ranks import run_ranks
        from tide_megatron.tasks.evaluation import TaskEvaluation, evaluate_tasks
        from tide_megatron.tasks.suite import chosen_entries, decoding_words

        for name, number in (("limit", options.limit), ("draws", options.draws)):
            if number is not None and number < 1:
                raise ConfigError(f"--{name}: {number} is too few; use 1 or more")
        named = self.place.resolve()
        wanted = TaskEvaluation(
            suite=chosen_entries(words),
            out=local_path(
                options.out or Path("evaluations", (named.parent if _is_run(named) else named).name)
            ),
            against=options.against and local_path(options.against),
            limit=options.limit,
            decoding=decoding_words(options.decoding),
            think=options.think,
            draws=options.draws,
            include=options.include and local_path(options.include),
            unsandboxed=tuple(options.unsandboxed),
        )
        is_said = self.context is not None or self.block_size is not None
        args = (self.place, wanted, self._read_in() if is_said else None, self.arithmetic)
        found: dict[str, Any] = run_ranks(
            evaluate_tasks, args, self.ranks, self.device, timeout_seconds=LONGEST_WAIT_SECONDS
        )
        return {**found, "out": str(wanted.out)}


def _is_run(place: Path) -> bool:
    """Say whether a folder is the model of a run, which is called after the run."""
    return place.name == "model" and (place.parent / "recipe.yaml").is_file()
