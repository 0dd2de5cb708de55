"""The recipe: every value a run is made of, each declared once, frozen and validated.

A recipe is the whole truth about a run; the ranks it runs on are not part of it. The batch is therefore
given as samples per update (`batch.samples`), and accumulation follows from the number of ranks, so that the
same recipe means the same mathematics on 1 rank or 64. `train/resolve.py` builds a `Recipe` from YAML.

Fields that choose machines (device, folder, metrics, layouts, microbatch, timeout) do not enter the digest
that a run folder is compared with on resume; fields that change the mathematics do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from tide_megatron.base.errors import ConfigError
from tide_megatron.checkpoint.retention import Checkpoints
from tide_megatron.diffusion.mask import Context
from tide_megatron.losses.rows import Loss
from tide_megatron.parallel.layout import Layout
from tide_megatron.train.metrics import MetricsOptions, Off

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

Folder = Annotated[str, Field(min_length=1)]
"""A folder; the empty string would silently be the current one."""
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Time = Annotated[float, Field(gt=0.0, le=1.0)]
"""A noise level; at 0 nothing is hidden."""


def _high_precision(value: object) -> object:
    """Refuse FP8 by name: softmaxes over a vocabulary do not survive it."""
    if isinstance(value, str) and value.startswith("fp8"):
        raise ValueError(
            f"{value} is refused for vocabulary heads (high precision only): use weights or fp32"
        )
    return value


HeadPrecision = Annotated[Literal["weights", "fp32"], BeforeValidator(_high_precision)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """A model folder in Hugging Face form (config.json, tokenizer, safetensors) and how it is read."""

    folder: Folder
    """Local path. Weights are needed unless `initial` is `random`."""
    context: Context
    """What a token may attend to, with the block size."""
    initial: Literal["folder", "random"] = "folder"
    """Take weights from the folder, or draw them from the run's seed (then config.json alone is enough)."""
    mask: str = Field(default="<|mask|>", min_length=1)
    """The tokenizer's mask token; added to the tokenizer when it has none."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 on CUDA, fp32 on CPU and on GPUs older than sm_80, which have no bf16."""
    verify: bool = True
    """Compare the weights with digests.json before they are used, where the folder has one."""
    layout: Layout = Field(default_factory=Layout)
    """How the model is cut over the ranks (machine choice: not part of the digest)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TeacherModel(Model):
    """A frozen model the student listens to."""

    sanity: Annotated[Literal["refuse", "warn", "off"], Off] = "refuse"
    """What to do when the teacher predicts held-out tokens no better than their frequencies would."""
    view: Literal["plain", "complementary"] = "plain"
    """`complementary` (CompDemo): show half of the hidden tokens at a time, in two views."""
    shown_share: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the hidden tokens that the first complementary view shows."""
    forwards: Literal["one", "two"] = "one"
    """How complementary views are run: as one forward, or as two (slower and equal; to compare)."""
    shared_schedule: int = Field(default=4, ge=1)
    """Microbatches of an update that a pipeline teacher reads in one schedule, at most: more of them shrink
    the bubble and hold more hidden rows (machine choice)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StudentModel(Model):
    """The model that is trained."""

    recompute: bool = False
    """Keep only each layer's input for the backward pass and run the layer again there: a fraction of the
    activations' memory for one more forward pass of the body (machine choice: equal numbers)."""
    router_bias_rate: float = Field(default=0.0, ge=0.0)
    """Step of the load-balancing router bias after each update (MoE students only; 0 leaves it)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """Prepared data folders (`tide prepare`)."""

    train: Folder
    held_out: Folder | None = None
    fixed_length: int | None = Field(default=None, ge=1)
    """Pad every sample to this many tokens (spec section 1 item 10); None: to the microbatch's longest."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Batch:
    """How many samples make an update, and how many of them a rank reads at a time."""

    samples: int = Field(default=64, ge=1)
    """Samples per update, over all ranks and accumulation."""
    microbatch: int | None = Field(default=None, ge=1)
    """Samples per rank and forward pass (machine choice); None: everything at once."""

    def accumulation(self, world: int) -> tuple[int, int]:
        """Return (samples per microbatch, microbatches per update) on `world` ranks.

        Raises:
            ConfigError: when the update cannot be cut evenly; names the nearest size that can.
        """
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
    learning_rate: float = Field(default=5e-5, gt=0.0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the run with a linearly growing rate (reference: 0.1)."""
    minimum: float = Field(default=0.0, ge=0.0, le=1.0)
    """Where the cosine ends, as a share of `learning_rate`."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    epsilon: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    clip_norm: float | None = Field(default=1.0, gt=0.0)
    """Largest global gradient norm; None: no clipping."""
    distributed: bool = True
    """Shard masters and moments over data-parallel ranks (AdamW only; machine choice)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Noise:
    """The forward process (spec section 1)."""

    schedule: Literal["linear", "cosine"] = "linear"
    time_epsilon: float = Field(default=1e-3, gt=0.0, lt=1.0)
    chunk_hiding: Literal["whole", "as_drawn"] = "whole"
    """Where a teacher has its own tokens: `whole` hides a chunk whole as soon as one of its tokens is drawn
    (the paper's rule, which hides more than the noise level says); `as_drawn` hides what was drawn, and only
    chunks that happen to be hidden whole enter a loss."""
    chunks_of: tuple[str, ...] | None = None
    """Sides of the data whose chunks `whole` keeps together; None: those that the teachers read."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Evaluation:
    """Held-out scores at fixed noises (machine choice: it never changes training)."""

    every: int = Field(default=0, ge=0)
    """Updates between evaluations; 0: only at the end."""
    samples: int = Field(default=256, ge=1)
    times: tuple[Time, ...] = Field(default=(0.1, 0.3, 0.5, 0.7, 0.9), min_length=1)
    microbatch: int = Field(default=16, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Head:
    """How vocabulary heads and losses are computed (machine choice: it never changes the mathematics)."""

    form: Literal["fused", "plain"] = "fused"
    """`fused`: values and gradients in one pass over slabs of rows; `plain`: by autograd, with several times
    the memory (the oracle)."""
    budget_mib: int | None = Field(default=None, ge=1)
    """What a slab may take beside weights, hidden rows and their gradients, in MiB; None: 256 on CPU, 6144 on
    CUDA, less where less is free. Smaller slabs read weights and gradients more often."""
    precision: HeadPrecision = "weights"
    """In which the heads' products run: `weights`, the dtype of each model, or `fp32`. Statistics, values and
    the head's gradient are fp32 always; FP8 is refused for heads."""
    compiled: bool | None = None
    """Let torch.compile fuse the elementwise part of each loss; None: on CUDA only (on CPU it takes tens of
    seconds to compile)."""
    ranks: int | None = Field(default=None, ge=1)
    """Ranks over which every head is cut by vocabulary; None: the least common multiple of the teachers'
    replicas. More hold less of each head, and send more."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """One run."""

    folder: Folder
    """Run folder: checkpoints, metrics, resolved recipe, exported model."""
    student: StudentModel
    data: Data
    losses: dict[str, Any]
    """Name of each term -> {kind: a row of LOSSES, its options...}; after validation, the loss objects."""
    steps: int = Field(ge=1)
    seed: int = Field(default=42, ge=0, lt=2**63)
    teachers: dict[str, TeacherModel] = Field(default_factory=dict)
    batch: Batch = Field(default_factory=Batch)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    noise: Noise = Field(default_factory=Noise)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    metrics: MetricsOptions = Field(default_factory=MetricsOptions)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "dense", "structured", "flex"] = "auto"
    head: Head = Field(default_factory=Head)
    timeout_seconds: float = Field(default=600.0, ge=1.0, le=604_800.0)
    """How long any collective waits for a rank that never comes before the run fails (machine choice)."""

    @property
    def terms(self) -> dict[str, Loss]:
        """The losses by name, in the order of the recipe."""
        return dict(self.losses)


MACHINE_KEYS = (
    *("folder", "evaluation", "checkpoints", "metrics"),
    *("device", "attention", "head", "timeout_seconds"),
)
"""Top-level fields that choose machines or reports, never mathematics."""
