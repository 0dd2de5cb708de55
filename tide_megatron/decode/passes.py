"""Forward passes over the replies under way: what is fed, what may be seen, which hidden states come back.

A pass feeds each reply from where its remembered keys and values end up to the end of its current block, so
one rule makes them all: a prompt that is new, a finished block together with the next one, a block alone.
Without a cache nothing is remembered and every pass feeds the whole text. A token sees the visible slots of
its own block and of those before it (`may_attend`), whatever else a cache's row holds.

Replies with a finished block that is not remembered yet would make everybody's pass longer: where only some
have one, these go through a pass of their own first, and the pass over all reads the cache where it lies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from tide_megatron.decode.canvas import Canvas
from tide_megatron.diffusion.mask import Context, may_attend
from tide_megatron.diffusion.views import View
from tide_megatron.models.attention import Dense, PassAttention
from tide_megatron.models.build import TideModel
from tide_megatron.models.cache import KeyValueCache
from tide_megatron.models.lean import is_lean, lean_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fed:
    """What one reply gives to a pass."""

    canvas: Canvas
    row: int
    """Of the cache."""
    begin: int
    end: int
    """Slots that are fed."""
    wanted: Sequence[int]
    """Slots whose tokens are to be predicted."""


class Stream:
    """The passes of one model over replies as it sees them: with the prompt, or without it (guidance)."""

    def __init__(
        self, model: TideModel, context: Context, cache: KeyValueCache | None, *, blind: bool = False
    ) -> None:
        """Begin with nothing remembered.

        Args:
            model: of one stage.
            context: `block_causal`, or `bidirectional` and without a cache.
            cache: for keys and values; None: everything is read again in every pass.
            blind: mask the prompts.
        """
        assert cache is None or context.kind == "block_causal", "what is still to come changes the past"
        self.cache, self._model, self._context, self._blind = cache, model, context, blind
        self._is_lean = is_lean(model)
        self._shift = int(model.architecture.is_shifted)
        self._before: dict[Canvas, Tensor] = {}
        """State [hidden] of the slot before a reply's block, which in a shifted model predicts the first."""

    def hidden(self, canvases: Sequence[Canvas]) -> Tensor:
        """Return [masked, hidden]: what predicts the masked slots, reply by reply.

        Args:
            canvases: reply `i` has row `i` of the cache; each has masked slots.
        """
        begins = [canvas.encoded for canvas in canvases]
        late = [row for row, canvas in enumerate(canvases) if begins[row] < canvas.start]
        kinds = [[row for row in late if begins[row] == 0], [row for row in late if begins[row] > 0]]
        if self.cache is not None and max(map(len, kinds)) < len(canvases):
            for rows in filter(None, kinds):
                fed = [(row, canvases[row]) for row in rows]
                self._pass(
                    [
                        Fed(canvas=one, row=row, begin=begins[row], end=one.start, wanted=())
                        for row, one in fed
                    ]
                )
            begins = [canvas.start for canvas in canvases]
        return self._pass(
            [
                Fed(canvas=canvas, row=row, begin=begins[row], end=canvas.end, wanted=canvas.masked)
                for row, canvas in enumerate(canvases)
            ]
        )

    def forget(self, canvas: Canvas) -> None:
        """Drop what is kept of a reply beside the cache."""
        self._before.pop(canvas, None)

    def _pass(self, fed: Sequence[Fed]) -> Tensor:
        """Run the model once and return [wanted, hidden]."""
        width = max(one.end - one.begin for one in fed)
        rows = [
            place * width + slot - one.begin
            for place, one in enumerate(fed)
            for slot in self._read_slots(one)
        ]
        device = self._model.head_weight.device
        ids = [_filled(one.canvas.fed(one.begin, one.end, blind=self._blind), width) for one in fed]
        positions = [_filled(one.canvas.positions[one.begin : one.end], width) for one in fed]
        view = View(
            ids=torch.tensor(ids, device=device),
            positions=torch.tensor(positions, device=device),
            context=self._context,
            length=width,
            segments=None,
            rows=torch.tensor(rows, dtype=torch.int64, device=device),
        )
        reading = self._reading(fed, width, device)
        states = lean_rows(self._model, view, reading) if self._is_lean else self._model.rows(view, reading)
        return self._assembled(fed, states) if self._shift else states

    def _reading(self, fed: Sequence[Fed], width: int, device: torch.device) -> PassAttention:
        """Say what the tokens of a pass see, and where their keys and values go."""
        mask = pass_mask(self._context, fed)
        kernel = Dense(mask=None if mask is None else mask.to(device))
        if self.cache is None:
            return PassAttention(kernel=kernel)
        slots, ends = _slots(fed, width)
        window = self.cache.window(
            [one.row for one in fed], slots.where(slots < ends, self.cache.unread), int(ends.max())
        )
        return PassAttention(kernel=kernel, memory=window)

    def _source(self, canvas: Canvas, slot: int) -> int:
        """Return the slot whose state predicts a slot's token; the first of a text keeps its own."""
        return slot - self._shift if canvas.positions[slot] > 0 else slot

    def _remembers(self, one: Fed) -> bool:
        """Whether a pass feeds the slot before a reply's block, whose state later passes of it need."""
        return bool(self._shift) and one.begin < one.canvas.start

    def _read_slots(self, one: Fed) -> list[int]:
        """Return the slots of a reply whose states a pass gives, in order."""
        sources = [self._source(one.canvas, slot) for slot in one.wanted]
        before = [one.canvas.start - 1] if self._remembers(one) else []
        return before + [slot for slot in sources if slot >= one.canvas.start]

    def _assembled(self, fed: Sequence[Fed], states: Tensor) -> Tensor:
        """Put the states from before the blocks in their places (of a shifted model), and keep them."""
        parts, at = [states[:0]], 0
        for one in fed:
            if self._remembers(one):
                self._before[one.canvas] = states[at]
                at += 1
            sources = [self._source(one.canvas, slot) for slot in one.wanted]
            if sources and sources[0] < one.canvas.start:
                parts.append(self._before[one.canvas][None])
            own = sum(slot >= one.canvas.start for slot in sources)
            parts.append(states[at : at + own])
            at += own
        return torch.cat(parts)


def pass_mask(context: Context, fed: Sequence[Fed]) -> Tensor | None:
    """Say what the tokens of a pass see, on the host.

    Args:
        context: `block_causal` or `bidirectional`.
        fed: by each reply; shorter ones are filled up, with what nobody sees.

    Returns:
        [replies, 1, fed tokens or 1, slots] bool, over the slots up to the last that is fed; None: all true.
    """
    width = max(one.end - one.begin for one in fed)
    slots, ends = _slots(fed, width)
    keys = int(ends.max())
    key = torch.arange(keys)
    seen = key < ends  # [replies, keys]
    if any(one.canvas.visible is not None for one in fed):
        seen &= torch.stack([_visible(one.canvas, keys) for one in fed])
    if all(one.begin >= one.canvas.start for one in fed):  # all of a block see the same
        return None if bool(seen.all()) else seen[:, None, None]
    allowed = may_attend(context, keys + width, slots[:, :, None], key)
    # A pad in front of a prompt sees itself: nothing at all would give NaN.
    return (allowed & seen[:, None] | (key == slots[:, :, None]))[:, None]


def _slots(fed: Sequence[Fed], width: int) -> tuple[Tensor, Tensor]:
    """Return [replies, width] the slots of a pass, and [replies, 1] where those that are fed end."""
    begins, ends = (torch.tensor([getattr(one, word) for one in fed])[:, None] for word in ("begin", "end"))
    return begins + torch.arange(width), ends


def _filled(values: list[int], width: int) -> list[int]:
    """Return the values with zeros behind them: what is read there means nothing, and nobody sees it."""
    return values + [0] * (width - len(values))


def _visible(canvas: Canvas, keys: int) -> Tensor:
    """Return [keys] bool: which slots of a reply are seen by anybody."""
    assert canvas.visible is not None, "all replies of a call hide pads, or none does"
    return torch.nn.functional.pad(canvas.visible[:keys], (0, max(0, keys - canvas.length)))
