"""Formulas on masked rows. A new loss is one file and one line of `LOSSES`."""

from __future__ import annotations

from tide_megatron.losses.base import Loss
from tide_megatron.losses.calm import Calm, CalmTidal, ReverseCalm, ReverseCalmTidal
from tide_megatron.losses.cross_entropy import CrossEntropy
from tide_megatron.losses.jensen_shannon import JensenShannon
from tide_megatron.losses.kl import Kl, ReverseKl
from tide_megatron.losses.tidal import Tidal

LOSSES: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropy,
    "kl": Kl,
    "reverse_kl": ReverseKl,
    "tidal": Tidal,
    "jensen_shannon": JensenShannon,
    "calm": Calm,
    "reverse_calm": ReverseCalm,
    "calm_tidal": CalmTidal,
    "reverse_calm_tidal": ReverseCalmTidal,
}
"""Losses by the name a recipe gives under `losses.<term>.kind`."""
