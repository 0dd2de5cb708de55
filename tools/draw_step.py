"""Draw docs/step.svg: one step of a student and two teachers over four ranks.

    python tools/draw_step.py                 (writes docs/step.svg)
    python tools/draw_step.py --out step.png  (any format that matplotlib knows)

Who holds what is not typed here: the layouts and the vocabulary group are asked, for the models that the
quickstart ships.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import typer
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.architecture import Architecture
from tide_megatron.models.hf.config import read_config
from tide_megatron.models.shard import Shard
from tide_megatron.parallel.layout import Layout, RankList
from tide_megatron.parallel.vocab_group import VocabGroup, vocab_group_size, vocab_groups

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "examples/quickstart/models"
PICTURE = ROOT / "docs/step.svg"
WORLD = 4
WIDTH, HEIGHT = 10.0, 7.7
LEFT, COLUMN, GAP = 1.5, 2.0, 0.14
"""Where rank 0 begins, how wide a rank is, and how much of it stays free, in inches of the drawing."""
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and the same whatever fonts are installed here
    "svg.hashsalt": "step",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9.5,
}
INK, FAINT, SHARED = "#1f2430", "#6b7280", "#ebe7f5"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the picture."""

    title: str
    folder: str
    layout: Layout
    color: str

    @functools.cached_property
    def architecture(self) -> Architecture:
        """What the shipped folder holds."""
        config = read_config(MODELS / self.folder)
        return ARCHITECTURES[config["model_type"]].from_hf(config)


STUDENT = Model(title="student\ndata-parallel", folder="student", layout=Layout(), color="#cfe2ff")
MIXTURE = Model(title="MoE teacher\nEP4", folder="teacher", layout=Layout(expert=4), color="#ffdcae")
DENSE = Model(
    title="dense teacher\nTP2 x PP2", folder="dense", layout=Layout(tensor=2, pipeline=2), color="#c5ead0"
)
ALL = (STUDENT, MIXTURE, DENSE)


def held(model: Model, rank: int) -> str:
    """Say which part of a model's body a rank holds."""
    shard = Shard.of(model.layout, rank, WORLD, model.architecture.layers)
    words = []
    if model.layout.pipeline > 1:
        last = shard.first_layer + shard.num_layers - 1
        words.append(f"stage {model.layout.coordinates(rank).pipeline}: layers {shard.first_layer}-{last}")
    if model.layout.tensor > 1:
        words.append(f"shard {shard.tensor_rank + 1} of {shard.tensor_size}")
    if model.layout.expert > 1:
        share = model.architecture.num_experts // shard.expert_size
        first = shard.expert_rank * share
        words += [
            "attention whole",
            f"experts {first}-{first + share - 1}" if share > 1 else f"expert {first}",
        ]
    return "\n".join(words or ["whole copy", f"samples of rank {rank}"])


def link(model: Model, rank: int) -> str:
    """Return the arrow between a rank and the next one: `<->` where they share a layer, `->` to a stage."""
    lists, pair = model.layout.rank_lists(WORLD), {rank, rank + 1}

    def share(groups: Sequence[RankList]) -> bool:
        return any(pair <= set(ranks) for ranks in groups)

    if share(lists.tensor) or share(lists.expert):
        return "<->"
    here, there = (model.layout.coordinates(one).pipeline for one in (rank, rank + 1))
    return "->" if here < there else ""


class Drawing:
    """Boxes and arrows in inches, y downwards."""

    def __init__(self, axes: Axes) -> None:
        """Take empty axes."""
        self.axes = axes
        axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        axes.axis("off")

    def box(self, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
        """Draw a box with text in its middle; x and y are its upper left corner."""
        shape = FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.07", fc=color, ec=FAINT, lw=0.8
        )
        self.axes.add_patch(shape)
        self.text(x + width / 2, y + height / 2, text, ha="center")

    def text(
        self, x: float, y: float, text: str, *, ha: str = "left", color: str = INK, bold: bool = False
    ) -> None:
        """Write lines around a height."""
        weight = "bold" if bold else "normal"
        self.axes.text(x, y, text, ha=ha, va="center", color=color, weight=weight, linespacing=1.3)

    def arrow(self, points: Sequence[tuple[float, float]], style: str = "->") -> None:
        """Draw an arrow along straight pieces."""
        self.axes.plot(*zip(*points[:-1], strict=True), color=INK, lw=1.0)
        self.axes.add_patch(
            FancyArrowPatch(
                points[-2],
                points[-1],
                arrowstyle=style,
                mutation_scale=9,
                lw=1.0,
                color=INK,
                shrinkA=0,
                shrinkB=0,
            )
        )


def left(rank: int) -> float:
    """Return where a rank's boxes begin."""
    return LEFT + COLUMN * rank + GAP


def middle(rank: int) -> float:
    """Return the middle of a rank's boxes."""
    return LEFT + COLUMN * rank + COLUMN / 2


def draw(axes: Axes) -> None:
    """Draw the whole picture."""
    drawing = Drawing(axes)
    for rank in range(WORLD):
        drawing.text(middle(rank), 0.25, f"rank {rank}", ha="center", bold=True)
    for top, model in zip((0.48, 1.32, 2.16), ALL, strict=True):
        draw_body(drawing, model, top)
    group = vocab_group_size([model.layout for model in ALL], WORLD)
    down(drawing, 2.84, 3.14)
    draw_shared(
        drawing,
        3.14,
        group,
        "hidden states of all masked rows, of the student and both teachers, on every rank",
    )
    down(drawing, 3.58, 3.88)
    draw_heads(drawing, 3.88, group)
    down(drawing, 5.12, 5.42)
    draw_shared(
        drawing, 5.42, group, "one packed exchange: row maxima, sums, gold logits; never a row of logits"
    )
    down(drawing, 5.86, 6.16)
    drawing.text(0.06, 6.38, "loss", bold=True)
    drawing.box(left(0), 6.16, COLUMN * WORLD - 2 * GAP, 0.44, "one scalar", "#f7f3c8")
    down(drawing, 6.6, 6.9)
    drawing.text(0.06, 7.2, "backward", bold=True)
    words = "gradients of the student's hidden states go back to the rank that has the sample;\n"
    words += "those of its weights are summed over all ranks: one update"
    drawing.box(left(0), 6.9, COLUMN * WORLD - 2 * GAP, 0.6, words, STUDENT.color)
    edge = left(WORLD - 1) + COLUMN - 2 * GAP
    drawing.arrow([(edge, 7.2), (edge + 0.3, 7.2), (edge + 0.3, 0.82), (edge, 0.82)])


def draw_body(drawing: Drawing, model: Model, top: float) -> None:
    """Draw which parts of a model's body the ranks hold, and who speaks to whom inside it."""
    drawing.text(0.06, top + 0.34, model.title, bold=True)
    for rank in range(WORLD):
        drawing.box(left(rank), top, COLUMN - 2 * GAP, 0.68, held(model, rank), model.color)
        style = link(model, rank) if rank + 1 < WORLD else ""
        if style:
            drawing.arrow([(left(rank + 1) - 2 * GAP, top + 0.34), (left(rank + 1), top + 0.34)], style)


def draw_shared(drawing: Drawing, top: float, group: int, text: str) -> None:
    """Draw what a vocabulary group does together, one box a group."""
    drawing.text(0.06, top + 0.22, "vocabulary\ngroup", bold=True)
    for ranks in vocab_groups(WORLD, group):
        drawing.box(left(ranks[0]), top, COLUMN * len(ranks) - 2 * GAP, 0.44, text, SHARED)


def draw_heads(drawing: Drawing, top: float, group: int) -> None:
    """Draw which ids of each head the ranks hold: a bar a head, as long as its vocabulary."""
    drawing.text(0.06, top + 0.62, "heads: each rank\nowns some ids", bold=True)
    vocabularies = [model.architecture.vocabulary for model in ALL]
    width = COLUMN - 2 * GAP - 0.3
    for rank in range(WORLD):
        own = VocabGroup.of(vocabularies, group, rank)
        drawing.box(left(rank), top, COLUMN - 2 * GAP, 1.24, "", "#ffffff")
        for number, model in enumerate(ALL):
            start, stop = own.columns(model.architecture.vocabulary)
            for first, last, color in (
                (0, model.architecture.vocabulary, "#f1f2f4"),
                (start, stop, model.color),
            ):
                x, y = (left(rank) + 0.15 + width * first / max(vocabularies), top + 0.13 + 0.2 * number)
                size = width * (last - first) / max(vocabularies)
                drawing.axes.add_patch(Rectangle((x, y), size, 0.14, fc=color, ec=FAINT, lw=0.6))
        start, stop = own.columns(max(vocabularies))
        drawing.text(middle(rank), top + 0.96, f"logits of all rows\non ids {start}-{stop - 1}", ha="center")


def down(drawing: Drawing, top: float, bottom: float) -> None:
    """Draw an arrow a rank from one row of boxes to the next."""
    for rank in range(WORLD):
        drawing.arrow([(middle(rank), top + 0.03), (middle(rank), bottom - 0.02)])


def main(out: Path = PICTURE) -> None:
    """Write the picture to OUT."""
    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH, HEIGHT), facecolor="white")
        draw(figure.add_axes((0.0, 0.0, 1.0, 1.0)))
        is_text = out.suffix == ".svg"
        figure.savefig(out, metadata={"Date": None, "Creator": None} if is_text else None, dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
