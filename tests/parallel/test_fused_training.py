"""A run with the fused head loss is the run with the plain one: losses, norms, one SGD step's weights.

Also where the student's head is no embedding: its weight then never meets autograd, and DDP's buffer is all
that it has.
"""

import pytest

from tests.parallel.test_invariance import STEPS, compare_losses, compare_weights, cut, run_steps
from tests.tiny_run import student_config, write_model, write_pair_run

SGD = ["optimizer.name=sgd", "optimizer.warmup=0", "optimizer.learning_rate=0.5"]


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request, tmp_path_factory):
    file = write_pair_run(tmp_path_factory.mktemp("pair"))
    if request.param == "untied":
        write_model(file.parent / "student", student_config(320) | {"tie_word_embeddings": False}, seed=1)
    return file


@pytest.fixture(scope="module")
def plain(pool, pair):
    """Return losses of some AdamW steps, and losses and weights of one SGD step."""
    return [
        pool(1).run(run_steps, pair, pair.parent / "plain", [], 8, ["head.form=plain", *words], steps)[0]
        for words, steps in (([], STEPS), (SGD, 1))
    ]


@pytest.mark.parametrize("ranks", [1, 4])
def test_fused_is_plain(pool, pair, plain, tmp_path, ranks):
    layouts = cut("dense", tensor=2, pipeline=2) if ranks == 4 else []
    for (losses, wanted, _), words, steps in zip(plain, ([], SGD), (STEPS, 1), strict=True):
        for seen, weights, _ in pool(ranks).run(run_steps, pair, tmp_path, layouts, 2, words, steps):
            compare_losses(seen, losses)
            if words:
                compare_weights(weights, wanted)
