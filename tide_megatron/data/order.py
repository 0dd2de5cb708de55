"""In which order an epoch reads samples: a permutation, from (seed, epoch) alone.

Up to `SORTED` samples one 64-bit draw a sample is sorted. Beyond that, a position's sample is computed by
itself, so that a run over any number of samples starts, and goes on, without a table of them: a Feistel
network permutes the numbers of the next power of four, and what falls outside is sent through it again until
it falls inside (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

SORTED = 2**20
"""More samples than this are not sorted; it is part of what a seed means and never changes."""
_ROUNDS = 8
_WORD = 2**64 - 1
Numbers = NDArray[numpy.uint64]


def samples_at(seed: int, positions: Sequence[int], num_samples: int) -> list[tuple[int, int]]:
    """Return (sample, epoch) at each position of reading `num_samples` samples over and over.

    Args:
        seed: of the order.
        positions: from 0; position q lies in epoch q // num_samples.
        num_samples: how many there are.
    """
    found = dict.fromkeys(position // num_samples for position in positions)
    places = {epoch: [at % num_samples for at in positions if at // num_samples == epoch] for epoch in found}
    samples = {epoch: iter(_samples(seed, epoch, places[epoch], num_samples)) for epoch in found}
    return [(next(samples[at // num_samples]), at // num_samples) for at in positions]


def _samples(seed: int, epoch: int, places: Sequence[int], num_samples: int) -> list[int]:
    """Return the samples at places of one epoch."""
    if num_samples <= SORTED:
        return [int(sample) for sample in order_of_epoch(seed, epoch, num_samples)[list(places)]]
    return [int(sample) for sample in _permuted(seed, epoch, places, num_samples)]


@functools.lru_cache(maxsize=16)
def order_of_epoch(seed: int, epoch: int, num_samples: int) -> NDArray[numpy.int64]:
    """Return the whole order of an epoch, for up to `SORTED` samples.

    Sorts one 64-bit draw per sample of a counter-based generator keyed by (seed, epoch). The raw stream of
    a bit generator is the part of numpy.random that is promised to stay the same (NEP 19); `permutation` is
    not.
    """
    order = numpy.argsort(_draws(seed, epoch, num_samples), kind="stable")
    order.flags.writeable = False
    return order


def _draws(seed: int, epoch: int, number: int) -> Numbers:
    return numpy.random.Philox(key=[seed & _WORD, epoch]).random_raw(number)


def _permuted(seed: int, epoch: int, places: Sequence[int], num_samples: int) -> Numbers:
    """Return where a permutation of `num_samples` numbers sends some of them."""
    half = numpy.uint64((num_samples - 1).bit_length() + 1 >> 1)
    keys = _draws(seed, epoch, _ROUNDS)
    found = _feistel(numpy.asarray(places, dtype=numpy.uint64), keys, half)
    while (outside := found >= num_samples).any():
        found[outside] = _feistel(found[outside], keys, half)
    return found


def _feistel(numbers: Numbers, keys: Numbers, half: numpy.uint64) -> Numbers:
    """Permute numbers of twice `half` bits."""
    mask = numpy.uint64((1 << int(half)) - 1)
    left, right = numbers >> half, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half) | right


def _mixed(numbers: Numbers) -> Numbers:
    """Return numbers of which each bit depends on every bit of the given ones (SplitMix64's finalizer)."""
    numbers = (numbers ^ (numbers >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> numpy.uint64(31))
