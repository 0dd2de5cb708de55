"""Random sides of a batch, and their chunks written out position by position."""

import torch

from tide_megatron.diffusion.alignment import TeacherTokens
from tide_megatron.diffusion.batch import IGNORED, Batch


def random_side(generator, samples, student_length, teacher_length, first=0):
    """Cut both texts of each sample into chunks of 1 to 3 tokens with gaps between them."""
    spans, sample, number = [], [], []
    for row in range(samples):
        left, right, count = first, 0, 0
        while True:
            gaps = torch.randint(0, 2, (2,), generator=generator).tolist()
            sizes = torch.randint(1, 4, (2,), generator=generator).tolist()
            left, right = left + gaps[0], right + gaps[1]
            if left + sizes[0] > student_length or right + sizes[1] > teacher_length:
                break
            spans.append([left, left + sizes[0], right, right + sizes[1]])
            sample.append(row)
            number.append(count)
            left, right, count = left + sizes[0], right + sizes[1], count + 1
    return TeacherTokens(
        ids=torch.randint(0, 40, (samples, teacher_length), generator=generator),
        lengths=torch.full((samples,), teacher_length),
        spans=torch.tensor(spans, dtype=torch.int64).view(-1, 4),
        sample=torch.tensor(sample, dtype=torch.int64),
        number=torch.tensor(number, dtype=torch.int64),
    )


def random_batch(seed, sides=1, samples=3, length=14, teacher_length=17, prompt=3):
    """Return a batch whose first `prompt` tokens are never hidden, with sides that may reach into them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (samples, length), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = IGNORED
    return Batch(
        sample_ids=torch.arange(samples) + 100,
        epochs=torch.zeros(samples, dtype=torch.int64),
        ids=ids,
        labels=labels,
        reply_bytes=torch.ones(samples, dtype=torch.int64),
        sides={f"t{n}": random_side(generator, samples, length, teacher_length) for n in range(sides)},
    )


def chunks_of(side):
    """List (sample, student positions, teacher positions) of every chunk."""
    return [
        (sample, list(range(span[0], span[1])), list(range(span[2], span[3])))
        for sample, span in zip(side.sample.tolist(), side.spans.tolist(), strict=True)
    ]
