"""What is predicted of a rank's memory is what a student and its optimizer then hold."""

import json

from bench.predicted_bytes import main, predict
from bench.step_case import CLOCK, Setting, batch_of, make_run
from tide_megatron.base.device import choose_device
from tide_megatron.head.budget import MIB
from tide_megatron.train.recipe import Optimizer
from tide_megatron.train.resolve import build_recipe
from tide_megatron.train.step import train_step

SMALL = Setting(pipeline="shared", length=64, hidden=64, vocabulary=512, optimizer=Optimizer())


def held(setting):
    """Make a step; return bytes of weights, gradient sums and optimizer states, and the student's config."""
    run = make_run(setting, choose_device("cpu"))
    assert train_step(run, run.read([batch_of(setting, 0)]), CLOCK).update.applied
    student = run.student
    states = [
        tensor
        for inner in student.optimizer.chained_optimizers
        for state in inner.optimizer.state.values()
        for tensor in state.values()
        if tensor.numel() > 1
    ]
    masters = [
        tensor
        for inner in student.optimizer.chained_optimizers
        for group in inner.optimizer.param_groups
        for tensor in group["params"]
    ]
    return {
        "weights": sum(parameter.nbytes for parameter in student.model.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in student.wrapped.buffers),
        "optimizer": sum(tensor.nbytes for tensor in (*states, *masters)),
        "config": student.model.architecture.to_hf(),
    }


def test_a_student_holds_what_is_predicted(pool, tmp_path, capsys):
    ((found),) = pool(1).run(held, SMALL)
    (tmp_path / "config.json").write_text(json.dumps(found["config"]))
    tree = {
        "folder": str(tmp_path / "run"),
        "steps": 1,
        "student": {
            "folder": str(tmp_path),
            "context": {"kind": "block_diffusion", "block_size": 32},
            "precision": "bf16",
        },
        "losses": {"ce": {"kind": "cross_entropy"}},
        "data": {"train": "none"},
        "head": {"budget_mib": 64},
    }
    recipe, _ = build_recipe(tree)
    predicted = predict(recipe, 1)
    assert predicted.weights == {"student": found["weights"]}
    # Buffers are filled up to a multiple of some hundred numbers.
    assert 0 <= found["gradients"] - predicted.gradients < 4096
    assert 0 <= found["optimizer"] - predicted.optimizer < 3 * 4096
    assert (predicted.slab, predicted.slab_rows) == (64 * MIB, 64 * MIB // (2 * 512))
    shared = predict(recipe, 4)
    assert shared.optimizer * 4 == predicted.optimizer
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    main([str(tmp_path / "run.yaml"), "--ranks", "2"])
    assert "together" in capsys.readouterr().out
