"""The recorded student, exported in every form: each one's folder still gives the recorded logits."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from goldens.models import Replayed, one_rank_world, replay_models
from goldens.row import Golden
from tests.unit.models.shapes import CPU
from tide_megatron.base.stop import StopFlag
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import write_context
from tide_megatron.export.export import ExportOptions, export_student
from tide_megatron.export.formats import FORMATS

SPECIAL = ["<|end|>", "<|mask|>"]


@pytest.fixture
def student(goldens, tmp_path):
    """Copy the recorded folder and give it a tokenizer and a context, which it lacks."""
    folder = tmp_path / "student"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(goldens / "student_a2d_qwen3" / name, folder / name)
    words = {word: number for number, word in enumerate(["unknown", "def", "return", "sum", "(", ")"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[0]}))
    write_context(folder, Context(kind="block_diffusion", block_size=8))
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_gives_the_recorded_logits(goldens, student, tmp_path, name):
    out = tmp_path / "out"
    with one_rank_world():
        export_student(student, out, ExportOptions(formats=(name,)), device=CPU, stop=StopFlag())
        for file in ("io.npz", "shapes.json"):
            shutil.copyfile(goldens / "student_a2d_qwen3" / file, out / file)
        rows = replay_untied(out) if FORMATS[name].unties else replay_models(out)
    assert not [row for row in rows if row.status != "replayed"]
    assert {"logits_bd3lm", "logits_nomask", "logits_mask2d", "bd3lm_mask"} <= {row.label for row in rows}


def replay_untied(folder):
    """Replay logits alone: recorded gradients are those of one matrix that is embedding and head."""
    golden = Golden(folder / "io.npz", name=folder.name)
    replayed = Replayed(folder, golden)
    assert not replayed.model.architecture.tied
    replayed.block_diffusion()
    replayed.single_parts()
    return [row for row in golden.rows() if not row.note.startswith("unknown key")]
