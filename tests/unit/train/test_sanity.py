"""A model must predict masked tokens with the mask token that it is shown, a teacher better than others."""

import copy
import json
import logging
import math
import re
from types import SimpleNamespace

import pytest
import torch

from tests.small_tokenizer import write_chats, write_other, write_tokenizer
from tests.tiny_run import student_config, write_folder
from tide_megatron.base.errors import TideError
from tide_megatron.data.dataset import PreparedData
from tide_megatron.data.loader import Loader
from tide_megatron.data.preparation.prepare import prepare
from tide_megatron.data.preparation.sample import SideChoice
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import write_context
from tide_megatron.launch.ranks import run_ranks
from tide_megatron.models import ARCHITECTURES
from tide_megatron.models.params import param_mappings
from tide_megatron.parallel.layout import Layout
from tide_megatron.text.tokenizer import Tokenizer
from tide_megatron.train.data import _check_mask_of_side
from tide_megatron.train.models import read_plan
from tide_megatron.train.recipe import StudentModel, TeacherModel
from tide_megatron.train.resolve import build_recipe
from tide_megatron.train.sanity import check_student, check_teachers, frequency_nll
from tide_megatron.train.setup import set_up


class Samples:
    """Stands for a loader over a few samples of one batch."""

    def __init__(self, ids, maskable):
        self.batch = SimpleNamespace(ids=torch.tensor(ids), maskable=torch.tensor(maskable))
        self.main = None
        self.columns = SimpleNamespace(spread=lambda most, side: torch.arange(len(ids)))
        self.asked = None

    def batch_of(self, rows):
        self.asked = list(rows)
        return self.batch


CHANCE = 0.9260030
"""By hand, of 1 1 2 1 2 among 4 ids: one more of each id makes 1, 4, 3, 1 of 9, so it is log 9 (2.1972246)
less three fifths of log 4 (0.8317766) and two fifths of log 3 (0.4394449)."""


def test_frequencies_are_those_of_maskable_tokens():
    samples = Samples([[0, 1, 1, 2], [3, 1, 2, 0]], [[False, True, True, True], [False, True, True, False]])
    assert frequency_nll(samples, 4) == pytest.approx(CHANCE, abs=1e-6)
    assert samples.asked == [0, 1]


def test_frequencies_that_say_nothing_cost_the_logarithm_of_the_vocabulary():
    assert frequency_nll(Samples([[2, 0, 3, 1]], [[True] * 4]), 4) == pytest.approx(math.log(4))
    assert frequency_nll(Samples([[2, 2, 2, 2]], [[True] * 4]), 4) < math.log(4)


SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<|mdm_mask|>", "<m>")
CONTEXT = {"kind": "block_diffusion", "block_size": 8}
ROWS = 320
PAIRS = [(f"add {n}", f"def f{n}():\n" + "    pass\n" * (n % 3) + f"    return {n}") for n in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with data for two masks and a model that predicts by its mask token alone.

    Shown <|mask|> it predicts every token with its frequency, shown <m> half of that and half of anything,
    and shown <|mdm_mask|> anything: about 2.8, 3.4 and 5.8 nats, where smoothed frequencies cost 3.7.
    """
    folder = tmp_path_factory.mktemp("sanity")
    write_tokenizer(folder / "model", special=SPECIAL)
    chats = write_chats(folder / "chats.jsonl", PAIRS)
    for name, mask in (("data", None), ("other", "<|mdm_mask|>")):
        prepare([chats], Tokenizer.load(folder / "model", mask=mask), folder / name, max_length=128)
    batch = Loader(columns=PreparedData(folder / "data"), samples=12, block_size=8).batch_of(range(12))
    counts = torch.bincount(batch.ids[batch.maskable], minlength=ROWS).double()
    share = counts.clamp_min(1e-3) / counts.clamp_min(1e-3).sum()
    config = student_config(ROWS) | {"tie_word_embeddings": False}
    tensors = {
        name: torch.zeros(shape) if piece.fill is None else torch.full(shape, piece.fill)
        for piece in param_mappings(ARCHITECTURES[config["model_type"]].from_hf(config))
        for name, shape in piece.sources.items()
    }
    width = config["hidden_size"]
    tensors["model.embed_tokens.weight"][:, 3] = 1.0
    for axis, token in enumerate((3, 5, 4)):
        tensors["model.embed_tokens.weight"][token] = torch.eye(width)[axis]
    tensors["lm_head.weight"][:, 0] = (share.log() / width**0.5).float()
    tensors["lm_head.weight"][:, 1] = ((share / 2 + 0.5 / ROWS).log() / width**0.5).float()
    files = [folder / "model" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    texts = {file: file.read_text() for file in files}
    write_folder(folder / "model", config, tensors)
    for file, text in texts.items():
        file.write_text(text)
    for mask in ("<|mask|>", "<m>", "<|mdm_mask|>"):  # folders that name it
        named = folder / mask.strip("<|>")
        write_folder(named, config, tensors)
        for file, text in texts.items():
            content = json.loads(text) | ({"mask_token": mask} if "config" in file.name else {})
            (named / file.name).write_text(json.dumps(content))
    return folder


def tree_of(folder, teacher="model", data="data", student=None, **choice):
    model = {"context": dict(CONTEXT), "precision": "fp32"}
    return {
        "folder": str(folder / "run"),
        "steps": 1,
        "device": "cpu",
        "student": model | {"folder": str(folder / "model")} | (student or {}),
        "teachers": {"big": model | {"folder": str(folder / teacher)} | choice},
        "losses": {"kl": {"kind": "kl", "teacher": "big"}},
        "data": {"train": str(folder / data)},
        "batch": {"samples": 4},
    }


def checked(trees, *, device, stop):
    """Check each recipe's models; return reports, or what is said."""
    found = []
    for tree in trees:
        recipe, _ = build_recipe(copy.deepcopy(tree))
        try:
            setup = set_up(recipe, device)
            check_student(recipe, setup)
            found.append(check_teachers(recipe, setup))
        except TideError as fault:
            found.append(str(fault))
    return found


WARN = r"; check its mask token, .*, or set teachers\.big\.sanity=warn$"
WRONG_STUDENT = {"mask": "<|mdm_mask|>"}
CASES = {
    "the folder's own, the same as the student's": ({}, None),
    "named by folder and recipe": ({"teacher": "mask", "mask": "<|mask|>"}, None),
    "a wrong one, and another is right": (
        {"mask": "<|mdm_mask|>"},
        r"^teachers\.big: predicts masked tokens at 5\.\d+ nats with the mask token '<\|mdm_mask\|>', and at "
        r"2\.\d+ with '<\|mask\|>': set teachers\.big\.mask=<\|mask\|> if it was trained with that" + WARN,
    ),
    "a worse one that beats frequencies": (
        {"teacher": "m"},
        r"^teachers\.big: predicts masked text at \d\.\d+ nats a byte, the student that it is to teach at "
        r"\d\.\d+ before its first step" + WARN,
    ),
    "one that its folder names wrongly": (
        {"teacher": "mdm_mask"},
        r"^teachers\.big: predicts masked tokens at 5\.\d+ nats, token frequencies alone give 3\.\d+" + WARN,
    ),
    "nobody looks": ({"teacher": "mdm_mask", "sanity": "off"}, None),
    "one that is only warned of": ({"teacher": "m", "sanity": "warn"}, None),
    "one that would have to be added": (
        {"mask": "[NEW]"},
        r"^teachers\.big: .*the mask token '\[NEW\]' is not in the vocabulary",
    ),
    "another one than the folder names": (
        {"teacher": "m", "mask": "<|mask|>"},
        r"^teachers\.big: .*'<\|mask\|>' \(id 3\) was asked for, but .*says '<m>' \(id 5\)",
    ),
    "data of another one": (
        {"data": "other"},
        r"/other: .*its mask token has id 4 \(<\|mdm_mask\|>\), this model's has 3 \(<\|mask\|>\)\): prepare",
    ),
    "a student's wrong one": (
        {"data": "other", "student": WRONG_STUDENT},
        r"^student: predicts masked tokens at 5\.\d+ nats .*: set student\.mask=<\|mask\|> if",
    ),
    "a student that is warned of, a teacher that is right": (
        {"data": "other", "student": WRONG_STUDENT | {"sanity": "warn"}, "mask": "<|mask|>"},
        None,
    ),
    "a student without weights": (
        {"data": "other", "student": WRONG_STUDENT | {"initial": "random"}, "mask": "<|mask|>"},
        None,
    ),
}
"""What a recipe says beside the model's folder, and what the check says."""


def test_each_mask_token_is_judged_by_what_a_model_predicts_with_it(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="tide_megatron"):
        found = run_ranks(checked, ([tree_of(folder, **case) for case, _ in CASES.values()],), 1, "cpu")
    for (name, (case, complaint)), said in zip(CASES.items(), found, strict=True):
        if complaint:
            assert isinstance(said, str), (name, said)
            assert re.search(complaint, said), (name, said)
            assert "\n" not in said
        else:
            assert isinstance(said, list), (name, said)
            assert len(said) == (case.get("sanity") != "off")
    (entry,) = found[0]
    assert entry["nll_per_byte"] == entry["student_nll_per_byte"]
    assert 2 < entry["nll_per_token"] < entry["frequency_nll_per_token"] < math.log(ROWS)
    assert (entry["name"], entry["layout"], entry["time"]) == ("big", str(Layout()), 0.3)
    assert found[-1][0]["student_nll_per_byte"] is None
    assert "teachers.big: predicts masked text at" in caplog.text
    assert "student: predicts masked tokens at" in caplog.text


def bare(folder, rows):
    """Write a config of so many rows, and a tokenizer of 311 ids without a mask token."""
    write_tokenizer(folder, special=SPECIAL[:3])
    (folder / "config.json").write_text(json.dumps(student_config(rows)))
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "rows", "options", "message"),
    [
        (StudentModel, 320, {"add_mask": True}, None),
        (StudentModel, 312, {"add_mask": True, "mask": "[M]"}, None),
        (
            StudentModel,
            311,
            {"add_mask": True},
            r"^one\.folder: .* 312 ids .* only 311 rows; .*tide model add-mask ",
        ),
        (StudentModel, 320, {}, "^one: .*no file names a mask token, .*tide model add-mask "),
        (StudentModel, 320, {"mask": "[M]"}, r"^one: .*the mask token '\[M\]' is not in the vocabulary"),
        (TeacherModel, 320, {}, "^one: .*no file names a mask token"),
        (TeacherModel, 320, {"mask": "[M]"}, r"^one: .*the mask token '\[M\]' is not in the vocabulary"),
    ],
)
def test_a_mask_token_is_added_for_a_student_that_asks_and_has_a_row(tmp_path, kind, rows, options, message):
    choice = kind(folder=bare(tmp_path, rows), context=Context(**CONTEXT), **options)
    if message is None:
        assert read_plan(choice, "one").tokenizer.mask_id == 311
    else:
        with pytest.raises(TideError, match=message):
            read_plan(choice, "one")


def test_a_context_that_the_folder_was_not_trained_in_is_warned_of(folder, tmp_path, caplog):
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(student_config(ROWS)))
    write_context(tmp_path, Context(kind="block_causal", block_size=16))
    with caplog.at_level(logging.WARNING, logger="tide_megatron"):
        read_plan(TeacherModel(folder=str(tmp_path), context=Context(**CONTEXT)), "teachers.big")
    said = f"({tmp_path}): check that this is meant"
    assert f"teachers.big.context.kind is block_diffusion, it was trained block_causal {said}" in caplog.text
    assert f"teachers.big.context.block_size is 8, it was trained with 16 {said}" in caplog.text


@pytest.mark.parametrize(
    ("name", "mask", "is_refused"),
    [("own", "<role>", True), ("own", None, False), ("another", "<role>", False)],
)
def test_a_side_of_a_teachers_name_with_another_mask_is_refused(folder, tmp_path, name, mask, is_refused):
    own = tmp_path / "own"
    write_other(own)
    (own / "config.json").write_text(json.dumps(student_config(ROWS)))
    student, teacher = Tokenizer.load(folder / "model"), SideChoice(tokenizer=Tokenizer.load(own))
    chats = folder / "chats.jsonl"
    prepare([chats], student, tmp_path / "data", max_length=128, sides={"own": teacher})
    columns = PreparedData(tmp_path / "data")
    plan = read_plan(TeacherModel(folder=str(own), context=Context(**CONTEXT), mask=mask), f"teachers.{name}")
    if is_refused:
        with pytest.raises(
            TideError, match=r"side 'own': its mask token has id 4 .*, this model's has 1 \(<role>\);"
        ):
            _check_mask_of_side(columns, name, plan)
    else:
        _check_mask_of_side(columns, name, plan)
