"""One whole training step at a bench's sizes: models with random weights, text, what each way starts from.

Bodies are as deep as the quickstart's and wide enough to hold a head of 152k ids: a student of 2 layers,
teachers of 4, all 256 wide, 4 heads of 64 over 2 groups. Two pipelines, both CompDemo:

- `shared`: a dense block-diffusion teacher reads the student's tokens; cross-entropy and TIDAL;
- `cross`: a mixture of 4 experts, 2 a token, reads tokens of its own in both directions, chunks are masked
  whole; cross-entropy and Reverse CALM.

Texts are random ids of full length, of which 424 in 512 may be masked; chunks are runs of 1 to 3 student and
1 to 4 teacher tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.plain_head import ChunkLikelihoods, Microbatch, MovingTarget
from bench.plain_step import Given
from tide_megatron.base.clock import Clock
from tide_megatron.base.device import Device
from tide_megatron.base.phases import Phases
from tide_megatron.diffusion.alignment import TeacherTokens
from tide_megatron.diffusion.batch import IGNORED, Batch
from tide_megatron.diffusion.mask import Context
from tide_megatron.diffusion.noise import Noiser
from tide_megatron.diffusion.views import Complementary
from tide_megatron.head.loss import HeadLoss
from tide_megatron.losses.base import Loss
from tide_megatron.losses.calm import ReverseCalm
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.tidal import Tidal
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.build import TideModel, build_model
from tide_megatron.models.engine import Engine
from tide_megatron.models.fp8_engine import fp8_engine
from tide_megatron.models.precision import Fp8Options, Precision
from tide_megatron.models.quantized import QuantizedLinear
from tide_megatron.models.spec import ModelOptions
from tide_megatron.models.weights import draw_weights
from tide_megatron.parallel.groups import make_groups
from tide_megatron.parallel.layout import Layout
from tide_megatron.parallel.vocab_group import make_across, make_vocab_group
from tide_megatron.teachers.exchange import Route
from tide_megatron.teachers.teacher import Teacher, ViewBuilder
from tide_megatron.train.recipe import Optimizer
from tide_megatron.train.step import Run
from tide_megatron.train.student import Student

TEACHER = "teacher"
CLOCK = Clock(step=37, total_steps=100)
MASKABLE_SHARE = 424 / 512
MASK = 1
OPTIMIZER = Optimizer(name="sgd", learning_rate=1e-2, warmup=0.0, schedule="constant", distributed=False)
BLOCKS = Context(kind="block_diffusion", block_size=32)
BODY = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6}
STUDENT = BODY | {"model_type": "a2d-qwen3", "num_hidden_layers": 2, "tie_word_embeddings": True}
DENSE = BODY | {"model_type": "a2d-qwen3", "num_hidden_layers": 4, "tie_word_embeddings": False}
MIXTURE = BODY | {
    "model_type": "llada2_moe",
    "partial_rotary_factor": 1.0,
    "num_hidden_layers": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes; ids that TIDAL compares are all but the last 290, as in the paper's pair of dense models."""

    pipeline: Literal["shared", "cross"]
    precision: Literal["bf16", "fp32"] = "bf16"
    samples: int = 2
    length: int = 512
    hidden: int = 256
    vocabulary: int = 151_936
    teacher_vocabulary: int = 157_184
    """Of the mixture; the dense teacher has the student's."""
    seed: int = 0
    """Of noise and views."""
    initial_deviation: float = 0.02
    """Of every drawn matrix."""
    shapes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """`student` or `teacher` -> config.json of a model of another size than the bench's."""
    optimizer: Optimizer = OPTIMIZER
    is_drawn_there: bool = False
    """Draw weights on the device, any numbers: billions take a while on a host."""
    fp8: Fp8Options | None = None
    """How the teacher's matrices are held; None: in `precision`."""
    experts: str = "auto"
    """Form of the teacher's experts."""

    def config(self, name: str, body: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
        """Return config.json of the student or the teacher: the bench's own body, or what `shapes` says."""
        width = {
            "hidden_size": self.hidden,
            "head_dim": self.hidden // 4,
            "intermediate_size": 3 * self.hidden,
            "vocab_size": vocabulary,
            "initializer_range": self.initial_deviation,
        }
        config = {**body, **width, **self.shapes.get(name, {})}
        if "num_experts" in config:
            config.setdefault("moe_intermediate_size", self.hidden * 5 // 4)
        return config

    @property
    def teacher_ids(self) -> int:
        """Return how many ids the teacher knows."""
        return self.vocabulary if self.pipeline == "shared" else self.teacher_vocabulary

    def teacher_config(self) -> dict[str, Any]:
        """Return config.json of the teacher."""
        return self.config("teacher", DENSE if self.pipeline == "shared" else MIXTURE, self.teacher_ids)

    def student_config(self) -> dict[str, Any]:
        """Return config.json of the student."""
        return self.config("student", STUDENT, self.vocabulary)

    @property
    def first_maskable(self) -> int:
        """Where the reply begins."""
        return self.length - round(MASKABLE_SHARE * self.length)


def make_run(setting: Setting, device: Device, head_ranks: int = 1) -> Run:
    """Build our side of a world whose ranks are all data-parallel. All ranks call it together.

    Args:
        setting: what it is.
        device: where.
        head_ranks: over how many ranks heads are cut.
    """
    is_shared, size = setting.pipeline == "shared", setting.teacher_ids
    group, layout = make_vocab_group([setting.vocabulary, size], head_ranks), Layout()
    model = make_teacher_model(setting, device, head=group.columns(size))
    route = Route(
        layout=layout, replica=model.groups.mp, across=make_across(layout, group.size), rank=group.rank
    )
    losses: dict[str, Loss] = {"cross_entropy": CrossEntropy()}
    phases = Phases(device.torch_device)
    if is_shared:
        losses["tidal"] = Tidal(teacher=TEACHER, shared_vocab_size=setting.vocabulary - 290)
    else:
        losses["reverse_calm"] = ReverseCalm(teacher=TEACHER, temperature=5.0)
    return Run(
        student=make_student(setting, device),
        teachers={TEACHER: Teacher(TEACHER, model, view_builder_of(setting), route, phases=phases)},
        head=HeadLoss(losses, group, phases=phases),
        noiser=Noiser(seed=setting.seed, whole_chunks_of=() if is_shared else (TEACHER,)),
        phases=phases,
        device=device.torch_device,
    )


def make_student(setting: Setting, device: Device) -> Student:
    """Build a student with its optimizer; equal settings give equal weights."""
    model = _model(setting.student_config(), setting, device, trainable=True)
    return Student(model, BLOCKS, MASK, setting.optimizer)


def make_teacher_model(setting: Setting, device: Device, head: tuple[int, int] | None = None) -> TideModel:
    """Build the teacher's model; `head`: the ids whose rows of its output head this rank holds."""
    precision, fp8 = Precision(setting.precision), setting.fp8
    engine = Engine() if fp8 is None else fp8_engine("auto", fp8, precision, device)
    config = setting.teacher_config()
    return _model(config, setting, device, head=head, fp8=fp8, engine=engine, experts=setting.experts)


def view_builder_of(setting: Setting) -> ViewBuilder:
    """Say how the teacher reads: both pipelines have complementary views."""
    return ViewBuilder(
        context=BLOCKS if setting.pipeline == "shared" else Context(kind="bidirectional"),
        mask_id=MASK,
        complementary=Complementary(seed=setting.seed),
    )


def _model(config: dict[str, Any], setting: Setting, device: Device, **options: Any) -> TideModel:
    architecture = ARCHITECTURES[config["model_type"]].from_hf(config)
    how = ModelOptions(device=device, precision=Precision(setting.precision), **options)
    model = build_model(architecture, make_groups(Layout()), how)
    seed = 1 if options.get("trainable") else 2
    if setting.is_drawn_there:
        draw_there(model, seed, setting.initial_deviation)
    else:
        draw_weights(model, seed)
    return model


@torch.no_grad()
def draw_there(model: TideModel, seed: int, deviation: float) -> None:
    """Fill a model on its device, tensor by tensor; the same numbers, whether they are quantised or not."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, QuantizedLinear) and name.endswith(".weight"):
            drawn = torch.empty(parameter.shape, dtype=model.config.params_dtype, device=parameter.device)
            layer.store(drawn.normal_(0, deviation))
        elif parameter.dim() > 1:
            parameter.data.normal_(0, deviation)
        else:
            parameter.data.fill_(1)


def batch_of(setting: Setting, number: int, epoch: int = 0) -> Batch:
    """Draw a microbatch of full length; epochs hide other tokens of the same text."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(2, setting.vocabulary, (setting.samples, setting.length), generator=generator)
    labels = ids.clone()
    labels[:, : setting.first_maskable] = IGNORED
    sample = torch.arange(setting.samples) + number * setting.samples
    sides = {} if setting.pipeline == "shared" else {TEACHER: _side(setting, generator)}
    return Batch(
        sample_ids=sample,
        epochs=torch.full_like(sample, epoch),
        ids=ids,
        labels=labels,
        reply_bytes=sample + 1,
        sides=sides,
    )


def _side(setting: Setting, generator: torch.Generator) -> TeacherTokens:
    """Cut each reply into chunks in both models' tokens."""
    spans, sample, number, texts = [], [], [], []
    for row in range(setting.samples):
        start = teacher_start = setting.first_maskable
        while start < setting.length:
            size, more = (int(torch.randint(3, (), generator=generator)) for _ in range(2))
            end = min(start + size + 1, setting.length)
            teacher_end = teacher_start + max(1, end - start + more - 1)  # 1 to 4
            number.append(0 if not sample or sample[-1] != row else number[-1] + 1)
            spans.append([start, end, teacher_start, teacher_end])
            sample.append(row)
            start, teacher_start = end, teacher_end
        texts.append(torch.randint(2, setting.teacher_vocabulary, (teacher_start,), generator=generator))
    return TeacherTokens(
        ids=pad_sequence(texts, batch_first=True),
        lengths=torch.tensor([len(text) for text in texts]),
        spans=torch.tensor(spans),
        sample=torch.tensor(sample),
        number=torch.tensor(number),
    )


def given_of(run: Run, batch: Batch) -> Given:
    """Say what the plain way starts from: the same draws, chunks as the collator's matrices."""
    noised, teacher = run.noiser(batch), run.teachers[TEACHER]
    reading, loss = noised.reading(TEACHER), [*run.head.losses.values()][-1]
    assert teacher.view_builder.complementary is not None, "both pipelines have complementary views"
    weight = 1 / (noised.time + 1e-6) / batch.maskable.sum()  # the linear schedule's
    term: MovingTarget | ChunkLikelihoods
    if isinstance(loss, Tidal):
        term = MovingTarget(
            temperature=loss.temperature,
            columns=loss.shared_vocab_size,
            share=loss.teacher_share(noised.time, CLOCK),
            timestep_weight=torch.ones_like(noised.time),
            weight=loss.weight,
        )
    else:
        assert isinstance(loss, ReverseCalm), f"the plain way has no {loss}"
        mine, theirs, active = _matrices(batch, noised.masked)
        term = ChunkLikelihoods(
            temperature=loss.temperature,
            teacher_ids=reading.ids,
            members=(mine, theirs),
            active=active,
            weight=loss.weight,
        )
    return Given(
        batch=Microbatch(
            ids=batch.ids, masked=noised.masked, token_weight=weight[:, None].expand(batch.ids.shape)
        ),
        student_mask=run.student.mask_id,
        student_context=run.student.context,
        teacher_ids=reading.ids,
        teacher_masked=reading.masked,
        shown=teacher.view_builder.complementary.shown(batch, reading),
        teacher_lengths=reading.lengths if teacher.view_builder.context.kind == "bidirectional" else None,
        teacher_mask=teacher.view_builder.mask_id,
        teacher_context=teacher.view_builder.context,
        term=term,
    )


def _matrices(batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return every chunk as a column of both sides' matrices, and which columns are masked whole."""
    side = batch.sides[TEACHER]
    most = int(side.number.max()) + 1
    mine, theirs = (torch.zeros(*ids.shape, most, dtype=torch.bool) for ids in (batch.ids, side.ids))
    active = torch.zeros(len(batch.ids), most, dtype=torch.bool)
    rows = zip(side.sample.tolist(), side.number.tolist(), side.spans.tolist(), strict=True)
    for sample, column, (start, end, teacher_start, teacher_end) in rows:
        mine[sample, start:end, column] = True
        theirs[sample, teacher_start:teacher_end, column] = True
        active[sample, column] = bool(hidden[sample, start:end].all())
    return mine, theirs, active


def own_batches(setting: Setting, microbatches: int, epoch: int) -> list[Batch]:
    """Return this rank's share of an update's microbatches, which are the same for any number of ranks."""
    own = microbatches // dist.get_world_size()
    return [batch_of(setting, dist.get_rank() * own + number, epoch) for number in range(own)]
