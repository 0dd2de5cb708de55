"""The recipe: every value a run is made of, each declared once, frozen and validated.

A recipe is the whole truth about a run; the ranks it runs on are not part of it. The batch is therefore
given as samples per update (`batch.samples`), and accumulation follows from the number of ranks, so that the
same recipe means the same mathematics on 1 rank or 64. `train/resolve.py` builds a `Recipe` from YAML.

Options live with what they tune (`head.options`, `diffusion.noise`, ...); this file composes them. What is
marked `MACHINE` chooses machines or reports and does not enter the digest that a run folder is compared with
on resume (`base.options`). docs/recipe.md is made from all of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.deadlines import Deadlines
from tide_megatron.base.errors import ConfigError
from tide_megatron.base.options import ADDED, MACHINE, PLACE, STRICT, Folder, Off, Paper, Was
from tide_megatron.checkpoint.retention import Checkpoints
from tide_megatron.data.blend import BlendSource
from tide_megatron.data.loader import Deal
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import NoiseOptions
from tide_megatron.head.options import HeadOptions
from tide_megatron.losses.base import Loss
from tide_megatron.models.engine import EngineChoice
from tide_megatron.models.precision import NO_PRECISION, Fp8Options
from tide_megatron.parallel.layout import Layout
from tide_megatron.tasks.options import RunEvaluation
from tide_megatron.train.guard import GuardOptions


def _no_fp8(word: object) -> object:
    """Refuse FP8 as a precision by name."""
    if isinstance(word, str) and word.startswith("fp8"):
        raise ValueError(NO_PRECISION)
    return word


def _no_fp8_student(value: object) -> object:
    """Refuse an FP8 student by name."""
    if value is not None:
        raise ValueError("only frozen teachers are held in FP8 (teachers.NAME.fp8); leave it out")
    return value


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """A model folder in Hugging Face form (config.json, tokenizer, safetensors) and how it is read."""

    folder: Annotated[Folder, PLACE]
    """Local path. Weights are needed unless `initial` is `random`."""
    context: Context
    """What a token may attend to, with the block size."""
    initial: Literal["folder", "random"] = "folder"
    """Take weights from the folder, or draw them from the run's seed (then config.json alone is enough)."""
    mask: Annotated[str | None, Was("<|mask|>")] = Field(default=None, min_length=1)
    """The mask token that the model was trained with; null: the one that its folder names, or `<|mask|>`
    where the folder names none. Another one than the folder names is refused."""
    # Marked as no mathematics: these two name data prepared with the same template, whose own digest says so.
    template: Annotated[str | None, MACHINE] = None
    """A chat template of this package (`chatml`, `llada2`, `qwen3`) in the place of the folder's own. The
    data must be prepared with the same."""
    chat_template_kwargs: Annotated[dict[str, Any], MACHINE] = Field(default_factory=dict)
    """Options of the chat template, such as `enable_thinking: true`, over those that the folder keeps; null
    takes one out. The data must be prepared with the same."""
    precision: Annotated[Literal["auto", "fp32", "bf16"], BeforeValidator(_no_fp8), Paper("bf16")] = "auto"
    """`auto`: bf16 on CUDA, fp32 on CPU and on GPUs older than sm_80, which have no bf16."""
    engine: Annotated[EngineChoice, MACHINE] = "auto"
    """What computes the layers: `te` (Transformer Engine, on CUDA in bf16) or `local` (megatron-core's own,
    in torch); `auto`: local, until a GPU has proven te. Teachers with `fp8`: `scaled` (torch's FP8 products),
    `te` or `emulated` (casts and fp32 products, on a CPU or to test); `auto`: on CUDA the one that has the
    recipe, else emulated. One that is named runs or is refused; the log says which runs, and why. In one
    precision they differ in rounding alone."""
    verify: Annotated[bool, MACHINE] = True
    """Compare the weights with digests.json before they are used, where the folder has one."""
    layout: Annotated[Layout, MACHINE] = Field(default_factory=Layout)
    """How the model is cut over the ranks."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TeacherModel(Model):
    """A frozen model the student listens to."""

    fp8: Annotated[Fp8Options | None, ADDED] = None
    """Hold and multiply the matrices of its layers in FP8: about half of bf16's bytes; null: in `precision`.
    docs/precision.md says how far answers move."""
    sources: Annotated[tuple[str, ...] | None, ADDED] = Field(default=None, min_length=1)
    """Teach only samples of these sources of the training data (names in `data.blend`, or of the prepared
    folder's own sources); null: all. What is not taught it does not read."""
    sanity: Annotated[Literal["refuse", "warn", "off"], Off, MACHINE] = "refuse"
    """What to do when the teacher predicts held-out tokens no better than their frequencies would, or worse
    than the student does before its first step, or better with another mask token."""
    view: Annotated[Literal["plain", "complementary"], Paper("complementary")] = "plain"
    """`complementary` (CompDemo): show half of the masked tokens at a time, in two views."""
    shown_share: Annotated[float, Paper("0.5")] = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the masked tokens that the first complementary view shows."""
    forwards: Annotated[Literal["one", "two"], MACHINE, Paper("two")] = "one"
    """How complementary views are run: as one forward, or as two (slower and equal; to compare)."""
    shared_schedule: Annotated[int, MACHINE] = Field(default=4, ge=1)
    """Microbatches of an update that a pipeline teacher reads in one schedule, at most: more of them shrink
    the bubble and hold more hidden rows."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StudentModel(Model):
    """The model that is trained."""

    fp8: Annotated[None, BeforeValidator(_no_fp8_student), ADDED] = None
    """Always null: a student in FP8 is refused, only frozen teachers are quantised."""
    sanity: Annotated[Literal["refuse", "warn", "off"], Off, MACHINE] = "refuse"
    """What to do when its folder names no mask token and it predicts better with another one than `mask`."""
    recompute: Annotated[bool | Literal["selective"], MACHINE] = False
    """Run again in the backward pass, with equal numbers, what was not kept for it. `true`: whole layers, of
    which only the input is kept: a fraction of the activations' memory for one more forward pass of the body;
    `selective`: core attention and feed-forward layers, about half of it for less than that."""
    add_mask: Annotated[bool, MACHINE] = False
    """Add the mask token to the tokenizer where it has none, for a model that has a spare row to learn it in;
    `tide model add-mask` does so for good."""
    router_bias_rate: float = Field(default=0.0, ge=0.0)
    """Step of the load-balancing router bias after each update (MoE students only; 0 leaves it)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """Prepared data folders (`tide prepare`)."""

    train: Annotated[Folder | None, PLACE] = None
    """What is learned from; null: `blend` says so."""
    blend: Annotated[dict[str, BlendSource], ADDED] = Field(default_factory=dict)
    """In place of `train`: name of each source -> its folder and its share. The names are the metrics'."""
    held_out: Annotated[Folder | None, PLACE] = None
    """What scores are made on; None: there are none."""
    fixed_length: int | None = Field(default=None, ge=1)
    """Pad every sample to this many tokens (spec section 1 item 10); None: to the microbatch's longest."""

    def __post_init__(self) -> None:
        """Refuse a run that learns from nothing, or from two things."""
        if (self.train is None) != bool(self.blend):
            missing = "is required, or data.blend in its place"
            fault = "give it or data.blend, not both" if self.blend else missing
            raise ConfigError(f"data.train: {fault}; set one of the two in the recipe")

    @property
    def folders(self) -> dict[str, str]:
        """What is learned from, by recipe key."""
        if self.train is not None:
            return {"data.train": self.train}
        return {f"data.blend.{name}": source.folder for name, source in self.blend.items()}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Branch:
    """Begin where another run stood, under this recipe; its clock, data and schedules start anew."""

    folder: Annotated[Folder, PLACE]
    """The other run's folder (its newest checkpoint counts), or one of its `step-*` folders."""
    optimizer: bool = True
    """Take the optimizer's moments along with the weights; `false`: begin without."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BatchOptions:
    """How many samples make an update, and how many of them a rank reads at a time."""

    samples: int = Field(default=64, ge=1)
    """Samples per update, over all ranks and accumulation."""
    microbatch: Annotated[int | None, MACHINE] = Field(default=None, ge=1)
    """Samples per rank and forward pass; None: everything at once, or what `tokens` has room for."""
    tokens: Annotated[int | None, MACHINE] = Field(default=None, ge=1)
    """In place of `microbatch`: most positions of a forward pass, pads among them, of the student and of any
    teacher's own tokens. Few long samples are read together, or many short ones, padded to at most eight
    lengths, and every rank has equally many microbatches."""
    deal: Annotated[Deal, MACHINE] = "length"
    """How an update's samples are shared out to ranks and microbatches: `length`: like beside like, so that
    few positions are pads and ranks have even work; `order`: as they come. The update is the same."""
    pack: Annotated[bool, MACHINE] = False
    """Put several samples behind each other into one row of what a model reads, each seeing itself only. Rows
    are as long as the longest sample read with them, `data.fixed_length`, or the longest of all under
    `tokens`. The update is the same."""

    def accumulation(self, world: int) -> tuple[int, int]:
        """Return (samples per microbatch, microbatches per update) on `world` ranks.

        With `tokens` it is one microbatch, which the loader cuts.

        Raises:
            ConfigError: when the update cannot be cut evenly; names the nearest size that can.
        """
        if self.tokens is not None and self.microbatch is not None:
            raise ConfigError("batch.tokens: give it or batch.microbatch, not both")
        if self.samples % world:
            good = max(world, round(self.samples / world) * world)
            raise ConfigError(
                f"batch.samples: {self.samples} samples per update cannot be shared by {world} ranks; "
                f"use {good}, or another number of ranks"
            )
        share = self.samples // world
        size = share if self.microbatch is None else min(self.microbatch, share)
        if share % size:
            good = max(divisor for divisor in range(1, size + 1) if share % divisor == 0)
            raise ConfigError(
                f"batch.microbatch: {self.microbatch} does not divide the {share} samples that each of "
                f"{world} ranks has per update; use {good}"
            )
        return size, share // size


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Optimizer:
    """AdamW (or plain SGD, for tests of scale) with a learning-rate schedule over applied updates."""

    name: Literal["adamw", "sgd"] = "adamw"
    """`sgd` has no state and no decay; it is for tests of scale."""
    learning_rate: Annotated[float, Paper("5e-5")] = Field(default=5e-5, gt=0.0)
    """The highest rate, after the warm-up."""
    schedule: Annotated[Literal["cosine", "constant"], Paper("cosine")] = "cosine"
    """What the rate does after the warm-up."""
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the run with a linearly growing rate (reference: 0.1)."""
    minimum: float = Field(default=0.0, ge=0.0, le=1.0)
    """Where the cosine ends, as a share of `learning_rate`."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    epsilon: float = Field(default=1e-8, gt=0.0)
    """Added to the root of AdamW's second moment."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW's decay of matrices; norms and biases have none."""
    clip_norm: float | None = Field(default=1.0, gt=0.0)
    """Largest global gradient norm; None: no clipping."""
    distributed: Annotated[bool, MACHINE] = True
    """Shard masters and moments over data-parallel ranks (AdamW only)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MetricsOptions:
    """Where a run reports to, and how often."""

    every: int = Field(default=10, ge=1)
    """Attempted updates per record; the first and the last update always make one."""
    tensorboard: bool = True
    """Write event files to `tensorboard/` in the run folder."""
    wandb: Annotated[Literal["off", "offline", "online"], Off] = "off"
    """Weights & Biases; its failures are logged once and never end a run."""
    project: str = "tide-megatron"
    """wandb project."""
    gradients_every: int = Field(default=0, ge=0)
    """Attempted updates between measurements of each term's gradient at the head's input: its norm, and its
    cosine with the cross-entropy's (docs/metrics.md); 0: none. Takes the head's products once more a term."""
    profile: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """First and last update that torch's profiler watches on rank 0 (and slows down), such as [10, 12]; the
    trace goes into the run folder (profile-steps-10-12.json.gz)."""
    peak_tflops: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """What one device could do at most, in TFLOP/s of dense products in the student's dtype, which `mfu` is
    held against; None: from a table of GPUs (`base.peak`), and on others no `mfu`."""

    def __post_init__(self) -> None:
        """Refuse a range that ends before it begins."""
        if self.profile is not None and self.profile[0] > self.profile[1]:
            raise ConfigError(
                f"metrics.profile: {list(self.profile)} ends before it begins; give first and last update"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreflightOptions:
    """What ranks measure before the first step; what they must have alike is always compared."""

    links: bool = True
    """Measure latency and rate of every kind of group, about a second, and compare them."""
    slow: float = Field(default=4.0, gt=1.0)
    """Warn of a group or a rank whose transfers take so many times the median, on GPUs or several hosts."""
    clock_seconds: float = Field(default=2.0, gt=0.0)
    """Warn of a host whose clock is so far from rank 0's."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """One run."""

    folder: Annotated[Folder, MACHINE]
    """Run folder: checkpoints, metrics, resolved recipe, exported model."""
    student: StudentModel
    data: Data
    losses: dict[str, Any]
    """Name of each term -> its `kind` and that kind's options; after validation, the loss objects."""
    steps: int = Field(ge=1)
    """Updates to apply; schedules reach over all of them. Given by `epochs` instead, or here."""
    epochs: Annotated[float | None, MACHINE] = Field(default=None, gt=0.0)
    """In place of `steps`: how often the training data is read. It becomes `steps`, which is what counts."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Of noise, sample order, views and drawn weights."""
    teachers: dict[str, TeacherModel] = Field(default_factory=dict)
    """Name of each teacher -> how it is read; losses name the one they listen to."""
    branch: Annotated[Branch | None, ADDED] = None
    """Begin where another run stood (`tide train --branch`); null: with the student as its folder has it."""
    batch: BatchOptions = Field(default_factory=BatchOptions)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    noise: NoiseOptions = Field(default_factory=NoiseOptions)
    evaluation: Annotated[RunEvaluation, MACHINE] = Field(default_factory=RunEvaluation)
    guard: Annotated[GuardOptions, MACHINE] = Field(default_factory=GuardOptions)
    checkpoints: Annotated[Checkpoints, MACHINE] = Field(default_factory=Checkpoints)
    metrics: Annotated[MetricsOptions, MACHINE] = Field(default_factory=MetricsOptions)
    preflight: Annotated[PreflightOptions, MACHINE] = Field(default_factory=PreflightOptions)
    device: Annotated[Literal["auto", "cpu", "cuda"], MACHINE] = "auto"
    """`auto`: CUDA where there is a GPU. `cpu` works on a GPU machine too."""
    attention: Annotated[Literal["auto", "dense", "structured", "flex"], MACHINE, Paper("flex")] = "auto"
    """Attention kernel: `dense` masks, `structured` products without the masked blocks, `flex` compiled
    FlexAttention (CUDA); `auto`: flex on CUDA, structured on CPU."""
    experts: Annotated[Literal["auto", "sequential", "loop", "grouped"], MACHINE] = "auto"
    """How mixture layers multiply: `sequential` is megatron-core's layer per expert, `loop` one product per
    expert, `grouped` one for all (`torch._grouped_mm`: bf16, sm_90 and sm_100); `auto`: grouped where it runs
    without a wait, else loop."""
    head: Annotated[HeadOptions, MACHINE] = Field(default_factory=HeadOptions)
    timeout_seconds: Annotated[float, MACHINE] = Field(default=600.0, ge=1.0, le=604_800.0)
    """How long any collective waits for a rank that never comes before the run fails."""
    hang_seconds: Annotated[float | None, MACHINE] = Field(default=None, ge=1.0, le=604_800.0)
    """How long a rank may stand still in a phase of a step before its launcher writes down what all ranks are
    at and ends them; saves, evaluations and the first update may take four times as long; null: half of
    `timeout_seconds`. Ranks of srun or torchrun look at themselves."""
    deadlines: Annotated[Deadlines, MACHINE] = Field(default_factory=Deadlines)

    @property
    def terms(self) -> dict[str, Loss]:
        """The losses by name, in the order of the recipe."""
        return dict(self.losses)
