"""The placement picture: who holds what, counted from the weights that `build_model` would allocate."""

import pytest
import torch

from tests.tiny_run import student_config, teacher_config
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.precision import Fp8Options
from tide_megatron.parallel.layout import Layout
from tide_megatron.train.placement import MOST_RANKS, Placed, drawn, placement_table


def placed(config, layout=Layout(), dtype=torch.float32, **facts):  # noqa: B008 - frozen
    architecture = ARCHITECTURES[config["model_type"]].from_hf(config)
    return Placed(architecture=architecture, layout=layout, dtype=dtype, **facts)


def picture(world, head_ranks, **teachers):
    models = {"student": placed(student_config(320), is_student=True), **teachers}
    return drawn(placement_table(models, world, head_ranks)).splitlines()


def test_every_rank_has_its_stage_shard_experts_and_ids():
    dense = placed(
        student_config(333) | {"num_hidden_layers": 3}, Layout(tensor=2, pipeline=2), torch.bfloat16
    )
    moe = placed(teacher_config(320, 8), Layout(expert=4))
    title, header, *lines = picture(4, 4, dense=dense, moe=moe)
    assert title.strip() == "placement"
    assert header.split() == ["rank", "student", "dense", "moe", "head", "ids"]
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3"]
    for rank, line in enumerate(lines):
        stage, layers = divmod(rank, 2)[0], ("0-1", "2-2")[rank // 2]
        assert f"stage {stage} (layers {layers}), shard {rank % 2 + 1}/2: " in line
        assert f"experts {2 * rank}-{2 * rank + 1}: " in line
        assert "whole: " in line
    assert [line.split()[-1] for line in lines] == ["0-83", "84-167", "168-251", "252-332"]


def test_bytes_are_those_of_the_weights():
    table = picture(2, 2, dense=placed(student_config(320), Layout(tensor=2), torch.bfloat16))
    # A layer: norms 2 x 32 and 2 x 16, attention 2 x (64 + 32) x 32, feed-forward 3 x 48 x 32.
    norms, matrices = 2 * 32 + 2 * 16, 2 * (64 + 32) * 32 + 3 * 48 * 32
    whole = 4 * (2 * (norms + matrices) + 32 + 320 * 32)
    # Tied and cut alike: this rank's slice of the head is its part of the embedding, held once.
    half = 2 * (2 * (norms + matrices // 2) + 32 + 160 * 32)
    for rank, line in enumerate(table[2:]):
        assert f"whole: {whole / 1000:.3g} kB" in line
        assert f"shard {rank + 1}/2: {half / 1000:.3g} kB" in line


def test_bytes_of_a_quantised_teacher_are_those_that_its_model_holds():
    fp8, layers = Fp8Options(first_layers=1), [48 * 32 * 3 + 2 * (64 + 32) * 32] * 2
    table = picture(1, 1, dense=placed(student_config(320), dtype=torch.bfloat16, fp8=fp8))
    rest = 2 * (2 * (2 * 32 + 2 * 16) + 32 + 320 * 32 + layers[0])
    scales = 4 * ((64 + 2 * 32) + 32 + 2 * 48 + 32)  # a scale a row
    assert table[2].split("whole: ")[2].startswith(f"{(rest + layers[1] + scales) / 1000:.3g} kB")


@pytest.mark.parametrize(("world", "shown"), [(64, 4), (1024, 4)])
def test_a_pattern_that_repeats_is_drawn_once(world, shown):
    lines = picture(world, 4, dense=placed(student_config(320), Layout(tensor=2, pipeline=2)))
    assert len(lines) == 2 + shown + 1
    assert lines[-1].split()[0] == f"{shown}..{world - 1}"
    assert "repeat this pattern" in lines[-1]


def test_a_long_pattern_is_cut():
    lines = picture(128, 1, moe=placed(teacher_config(320, 128), Layout(expert=128)))
    assert len(lines) == 2 + MOST_RANKS + 1
    assert "are not drawn" in lines[-1]


def test_ranks_without_ids_say_so():
    small = student_config(312)
    models = {"student": placed(small, is_student=True), "dense": placed(small, Layout(tensor=2))}
    lines = drawn(placement_table(models, 64, 64)).splitlines()
    # 312 ids over 64 ranks: 5 each, the 63rd has two, the last none.
    assert lines[-2].split()[-1] == "310-311"
    assert lines[-1].split()[-1] == "none"
