"""What a model would write at masked positions: its head on their hidden states, a bounded part at a time.

The greedy token's probability is 1 / sum(exp(logit - greatest logit)), so nothing of the size [positions,
vocabulary] is kept beside one part's logits. A draw is the argmax of logits / temperature + Gumbel noise,
and the noise is a hash of (seed, prompt's number, position, forward, token): it depends on no batch, rank or
device, and there is no generator to save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from tide_megatron.decode.options import Decoding
from tide_megatron.diffusion.noise import uniforms

_LOGIT_BYTES = 64 << 20  # of one part's logits in fp32
_STREAM = "decode"
_TOKEN_BITS = 32  # of a draw's index: below them the token, above them the position


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Masked positions of all replies of a pass, on the host; every list is [positions]."""

    numbers: Sequence[int]
    """The prompt's number in the whole work."""
    positions: Sequence[int]
    """Counted from the prompt's first token."""
    forwards: Sequence[int]
    """Forwards of the reply before this one."""

    def part(self, start: int, stop: int) -> Asked:
        """Return some of them."""
        return Asked(
            numbers=self.numbers[start:stop],
            positions=self.positions[start:stop],
            forwards=self.forwards[start:stop],
        )


class Picker:
    """The head of one model under one call's options."""

    def __init__(self, weight: Tensor, never: Sequence[int], options: Decoding) -> None:
        """Remember the head.

        Args:
            weight: [vocabulary, hidden].
            never: ids that are never written.
            options: temperature, top-p, guidance and seed.
        """
        self._weight, self._options = weight, options
        self._never = torch.tensor(list(never), dtype=torch.int64, device=weight.device)
        self._part = max(1, _LOGIT_BYTES // (4 * len(weight)))
        self._wants_entropy = options.schedule == "entropy"

    def __call__(
        self, hidden: Tensor, blind: Tensor | None, asked: Asked
    ) -> tuple[list[int], list[float], list[float]]:
        """Return the token, its probability and, if the schedule asks, the entropy at each position.

        Args:
            hidden: [positions, hidden].
            blind: the same of the pass that has not seen the prompt; None without guidance.
            asked: what the draws depend on.
        """
        tokens, confidence, entropy = [], [], []
        for start in range(0, len(hidden), self._part):
            stop = min(start + self._part, len(hidden))
            logits = self._logits(hidden[start:stop], None if blind is None else blind[start:stop])
            found = self._pick(logits, asked.part(start, stop))
            tokens.append(found[0])
            confidence.append(found[1])
            entropy.append(found[2])
        return torch.cat(tokens).tolist(), torch.cat(confidence).tolist(), torch.cat(entropy).tolist()

    def _logits(self, hidden: Tensor, blind: Tensor | None) -> Tensor:
        """Return fp32 logits [positions, vocabulary] that may be written over."""
        logits = (hidden @ self._weight.T).float()
        if blind is not None:
            unseen = (blind @ self._weight.T).float()
            logits = unseen + (self._options.guidance + 1.0) * (logits - unseen)
        return logits.index_fill_(1, self._never, -torch.inf)

    def _pick(self, logits: Tensor, asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
        """Return token, probability and entropy (empty unless wanted) of each position; spoils the logits."""
        greatest, token = logits.max(dim=-1)
        chosen = greatest
        if self._options.temperature > 0.0:
            token = self._drawn(logits, asked)
            chosen = logits.gather(1, token[:, None])[:, 0]
        logits.sub_(greatest[:, None])
        weights = logits.exp() if self._wants_entropy else logits.exp_()
        total = weights.sum(dim=-1)
        confidence = (chosen - greatest).exp() / total
        if not self._wants_entropy:
            return token, confidence, confidence[:0]
        # A banned token has weight 0 and logit -inf, whose product is no number.
        mean = (weights * logits.masked_fill_(weights == 0, 0.0)).sum(dim=-1) / total
        return token, confidence, total.log() - mean

    def _drawn(self, logits: Tensor, asked: Asked) -> Tensor:
        """Draw a token at each position."""
        options, device = self._options, logits.device
        scaled = logits / options.temperature
        if options.top_p < 1.0:
            scaled.masked_fill_(~_nucleus(scaled, options.top_p), -torch.inf)
        number, position, forward = (
            torch.tensor(list(words), dtype=torch.int64, device=device)[:, None]
            for words in (asked.numbers, asked.positions, asked.forwards)
        )
        index = (position << _TOKEN_BITS) + torch.arange(logits.shape[1], device=device)
        # Half a step of the grid keeps the draw off 0, whose logarithm is none.
        draws = uniforms(options.seed, forward, number, _STREAM, index) + 2.0**-25
        return (scaled - (-draws.log()).log()).argmax(dim=-1)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Say which tokens stay, [rows, vocabulary]: those likelier than one have less than `top_p` together."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    shares = torch.softmax(ordered, dim=-1)
    kept = shares.cumsum(dim=-1) - shares < top_p
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter(1, order, kept)
