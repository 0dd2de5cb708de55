"""Recipes from YAML: precedence, what is refused and how it is said, the digest of the mathematics."""

import copy
import re

import pytest
import yaml

from tests.tiny_run import recipe_tree
from tide_megatron.base.errors import ConfigError
from tide_megatron.losses.kl import Kl
from tide_megatron.train.resolve import build_recipe, difference, digest, load_recipe, mathematics

GONE = object()


def changed(tree, **changes):
    """Return a copy with values set (or GONE) at keys written as `student__context__kind`."""
    tree = copy.deepcopy(tree)
    for key, value in changes.items():
        *path, last = key.split("__")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        if value is GONE:
            del node[last]
        else:
            node[last] = value
    return tree


@pytest.fixture
def tree(tmp_path):
    return recipe_tree(tmp_path)


@pytest.fixture
def file(tmp_path, tree):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


def test_a_good_recipe_becomes_objects_and_every_default_is_written_out(file, tmp_path):
    recipe, resolved = load_recipe(file)
    assert recipe.folder == str(tmp_path / "run")
    assert recipe.student.context.block_size == 8
    assert recipe.teachers["moe"].layout.expert == 1
    assert recipe.terms["kl"] == Kl(teacher="moe")
    assert resolved["losses"]["kl"]["temperature"] == 2.0
    assert resolved["optimizer"]["betas"] == [0.9, 0.999]
    assert build_recipe(yaml.safe_load(yaml.safe_dump(resolved))) == (recipe, resolved)


def test_the_command_line_beats_the_file_which_beats_fragments_in_their_order(file, tree, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/a.yaml").write_text(
        "seed: 101\nbatch: {samples: 16, microbatch: 4}\nnoise: {time_epsilon: 0.5}\n"
    )
    (tmp_path / "parts/b.yaml").write_text(
        "noise: {time_epsilon: 0.25, schedule: linear}\nattention: dense\n"
    )
    file.write_text(yaml.safe_dump({"include": ["parts/a.yaml", "parts/b.yaml"], **tree}))
    recipe, _ = load_recipe(file, ["optimizer.learning_rate=3e-4", "seed=7", "teachers.moe.layout.expert=2"])
    assert (recipe.seed, recipe.optimizer.learning_rate, recipe.teachers["moe"].layout.expert) == (7, 3e-4, 2)
    assert (recipe.batch.samples, recipe.batch.microbatch) == (8, 4)  # the file's 8, the fragment's 4
    assert (recipe.noise.time_epsilon, recipe.attention) == (0.25, "dense")
    assert load_recipe(file)[0].seed == tree["seed"]


MISSPELT = [
    ("stepz", "stepz: unknown key; did you mean 'steps'?"),
    ("deadlines__evaluation", "deadlines.evaluation: unknown key; did you mean 'evaluate'?"),
    ("student__contxt", "student.contxt: unknown key; did you mean 'context'?"),
    ("student__context__block", "student.context.block: unknown key; did you mean 'block_size'?"),
    ("teachers__moe__mas", "teachers.moe.mas: unknown key; did you mean 'mask'?"),
    ("teachers__moe__layout__exprt", "teachers.moe.layout.exprt: unknown key; did you mean 'expert'?"),
    ("losses__kl__temprature", "losses.kl.temprature: unknown key; did you mean 'temperature'?"),
    ("data__trian", "data.trian: unknown key; did you mean 'train'?"),
    ("batch__micro", "batch.micro: unknown key; did you mean 'microbatch'?"),
    ("optimizer__lr", "optimizer.lr: unknown key; choose one of: betas, "),
    ("metrics__evry", "metrics.evry: unknown key; did you mean 'every'?"),
]


@pytest.mark.parametrize(("key", "said"), MISSPELT)
def test_a_misspelt_key_is_named_with_the_nearest_one(tree, key, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        build_recipe(changed(tree, **{key: {}}))


@pytest.mark.parametrize(("key", "said"), MISSPELT)
def test_a_misspelt_override_is_named_with_the_nearest_key(file, key, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        load_recipe(file, [f"{key.replace('__', '.')}=3"])


def test_a_misspelling_is_told_before_what_it_leaves_out(tree):
    with pytest.raises(ConfigError) as caught:
        build_recipe(changed(tree, steps=GONE, stepz=3))
    assert str(caught.value).splitlines() == [
        "stepz: unknown key; did you mean 'steps'?",
        "steps: is required; set it in the recipe",
    ]


WRONG = [
    *({"steps": value} for value in ("4", "many", 4.5, 4.0, True, None, 0, [4], {"x": 3})),
    *({"seed": value} for value in (None, -1, 2**63)),
    *({"student": value} for value in (None, 3, "models/student")),
    *({"student__context": value} for value in (None, "bidirectional")),
    *({"student__context__block_size": value} for value in (0, None, "8")),
    {"student__context__kind": "blok"},
    *({"student__folder": value} for value in ("", 3, None)),
    {"student__precision": "fp8"},
    {"student__initial": "rand"},
    {"student__mask": ""},
    *({"teachers__moe__layout__expert": value} for value in ("two", True, 2.0)),
    {"teachers__moe__sanity": "maybe"},
    *({"teachers": value} for value in (None, [1])),
    *({"data__train": value} for value in (3, "", ["a", "b"])),
    {"data__fixed_length": 0},
    *({"batch__samples": value} for value in (0, "8")),
    *({"losses": value} for value in (None, [1], {})),
    *({"losses__kl__weight": value} for value in ("a lot", "1.0", float("nan"), -1, True)),
    {"losses__ce__timestep_weight": "x"},
    *({"losses__kl__kind": value} for value in ("kll", 3, ["kl"], None)),
    *({"optimizer__learning_rate": value} for value in (-1, 0, float("inf"), "fast")),
    {"optimizer__betas": [0.9]},
    {"optimizer__betas": [0.9, 2.0]},
    {"optimizer__warmup": 1},
    {"optimizer__name": "adam"},
    {"noise__schedule": "lin"},
    *({"evaluation__times": value} for value in ([0.3, 2], [0.3, 0], [], 0.3)),
    *({"metrics__wandb": value} for value in (3, True)),
    *({"folder": value} for value in (3, "")),
    *({"metrics__profile": value} for value in ([1], [0, 2], "all", [1, 2, 3])),
    {"checkpoints__keep_best": "loss"},
    {"device": "gpu"},
]


@pytest.mark.parametrize("changes", WRONG, ids=str)
def test_a_wrong_value_is_refused_with_key_and_value(tree, changes):
    ((key, value),) = changes.items()
    with pytest.raises(ConfigError) as caught:
        build_recipe(changed(tree, **changes))
    (line,) = {line for line in str(caught.value).splitlines() if line.startswith(key.replace("__", "."))}
    told = [value, *value] if isinstance(value, list) else [value]  # a list, or the item that is wrong
    assert (
        any(repr(one) in line for one in told)
        or value == {}
        or "is required" in line
        or "needs a kind" in line
    )


@pytest.mark.parametrize("key", ["steps", "folder", "student", "data", "losses", "student__folder"])
def test_a_missing_key_is_named(tree, key):
    with pytest.raises(ConfigError, match=f"^{key.replace('__', '.')}: is required; set it in the recipe$"):
        build_recipe(changed(tree, **{key: GONE}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"losses__kl__teacher": "mo"}, "losses.kl.teacher: 'mo' is not under teachers; did you mean 'moe'?"),
        ({"teachers": {}}, "losses.kl.teacher: 'moe' is not under teachers; the recipe has no teachers"),
        (
            {"losses__kl": GONE},
            "teachers.moe: no loss listens to it; remove it or add a loss with teacher: moe",
        ),
        ({"losses__kl__kind": GONE}, "losses.kl: needs a kind; did you mean 'kl'?"),
        ({"losses__kl": 3}, "losses.kl: needs a kind; did you mean 'kl'?"),
        (
            {"losses__kl__kind": "revers_kl"},
            "losses.kl.kind: 'revers_kl' is unknown; did you mean 'reverse_kl'?",
        ),
        ({"losses": {}}, "losses: name at least one term"),
    ],
)
def test_losses_and_teachers_must_belong_together(tree, changes, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        build_recipe(changed(tree, **changes))


def test_the_bare_word_off_is_a_choice_although_yaml_reads_it_as_false(file):
    assert yaml.safe_load("off") is False
    file.write_text(file.read_text().replace("sanity: 'off'", "sanity: off"))
    assert "sanity: off" in file.read_text()
    recipe, _ = load_recipe(file, ["metrics.wandb=off"])
    assert (recipe.teachers["moe"].sanity, recipe.metrics.wandb) == ("off", "off")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["steps"], "override 'steps': write key=value, for example optimizer.learning_rate=1e-4"),
        (["=3"], "override '=3': write key=value"),
        (["steps=[1"], r"override 'steps=\[1': line 2: .*; fix or quote the value"),
        (
            ["steps=${x}"],
            ".*run.yaml: steps: Interpolation key 'x' not found; fix it there, or in the overrides",
        ),
        (["evaluation.times.0=0.2"], ".*run.yaml: .*merge.*; fix it there, or in the overrides"),
        (["steps=4", "steps=four"], "steps: 'four' is not valid: .*integer"),
        (["steps="], "steps: None is not valid: .*integer"),
        (["teachers={}"], "losses.kl.teacher: 'moe' is not under teachers; the recipe has no teachers"),
        (["teachers=null"], "losses.kl.teacher: 'moe' is not under teachers"),
        (["losses.kl=null"], "teachers.moe: no loss listens to it"),
        (["losses={}"], "losses: name at least one term"),
        (["teachers.mo=null"], "teachers.mo: null removes it, but it is not there; did you mean 'moe'"),
        (["teachers={}", "teachers.moe=null"], "teachers.moe: null removes it, .*; there are none"),
        (["losses.ce={}"], "losses.ce: needs a kind"),
        (["student.context=null"], "student.context: None is not valid"),
        (["optimizer.learning_rate=null"], "optimizer.learning_rate: None is not valid"),
        (["include=[a.yaml]"], "override 'include=.*': fragments are listed in a run file"),
        (["metrics.profile=[3,2]"], r"metrics.profile: \[3, 2\] ends before it begins"),
        (["folder=runs/x #1"], "override 'folder=runs/x #1': ' #' begins a comment"),
        (["~losses.kl"], "override '~losses.kl': write key=value, .* losses.NAME=null to remove"),
        (["folder=~nobody-here/x"], "folder: '~nobody-here/x' is not valid: .*nobody's home"),
        (["data.train=$HOME/x"], "data.train: .* variables of the shell are not expanded"),
        (["teachers.moe.folder=s3://b/x"], "teachers.moe.folder: .* is a URL"),
    ],
)
def test_overrides_that_cannot_be(file, words, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        load_recipe(file, words)


OTHER = "teachers.b={folder: x, context: {kind: bidirectional}}"


@pytest.mark.parametrize(
    ("words", "teachers", "losses"),
    [
        ([], ["moe"], ["ce", "kl"]),
        (["teachers={}", "losses.kl=null"], [], ["ce"]),
        (["losses.kl=null", "teachers.moe=null"], [], ["ce"]),
        (["losses.kl=", "teachers="], [], ["ce"]),
        (["losses={}", "losses.x.kind=kl", "losses.x.teacher=moe"], ["moe"], ["x"]),
        (["losses=null", "losses.x={kind: kl, teacher: moe}"], ["moe"], ["x"]),
        (["losses.x={kind: kl, teacher: moe}"], ["moe"], ["ce", "kl", "x"]),  # a section is merged
        (["teachers.moe=null", OTHER, "losses.kl.teacher=b"], ["b"], ["ce", "kl"]),
        ([OTHER, "losses.kl.teacher=b", "teachers={moe: null}"], ["b"], ["ce", "kl"]),
    ],
    ids=str,
)
def test_an_empty_section_empties_and_null_removes_teachers_and_terms(file, words, teachers, losses):
    recipe, resolved = load_recipe(file, words)
    assert (list(recipe.teachers), list(recipe.losses)) == (teachers, losses)
    assert build_recipe(resolved) == (recipe, resolved)


def test_files_empty_and_remove_what_their_fragments_say_too(file, tree, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**tree, "optimizer": {"clip_norm": 3.0}}))
    own = {"include": ["base.yaml"], "teachers": {}, "losses": {"kl": None}, "optimizer": {}}
    file.write_text(yaml.safe_dump(own))
    recipe, _ = load_recipe(file)
    assert (recipe.teachers, list(recipe.losses), recipe.optimizer.clip_norm) == ({}, ["ce"], 1.0)
    assert load_recipe(file, ["optimizer.clip_norm=null"])[0].optimizer.clip_norm is None
    file.write_text(yaml.safe_dump(own | {"losses": {"k": None}}))
    with pytest.raises(ConfigError, match=r"^losses\.k: null removes it, but it is not there; did you mean"):
        load_recipe(file)


def test_a_new_entry_has_nothing_of_the_one_that_was_removed(file):
    words = ["teachers.moe=null", "teachers.moe.folder=x", "teachers.moe.context.kind=bidirectional"]
    teacher = load_recipe(file, words)[0].teachers["moe"]
    assert (teacher.folder, teacher.precision, teacher.sanity) == ("x", "auto", "refuse")
    assert load_recipe(file, ["teachers.moe.context={}", *words[1:]])[0].teachers["moe"].precision == "fp32"


@pytest.mark.parametrize(
    "key", ["folder", "student.folder", "teachers.moe.folder", "data.train", "data.held_out"]
)
def test_every_path_of_a_recipe_knows_the_home(file, tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for word, meant in {"~/x": f"{tmp_path}/me/x", "./~x": "./~x", "runs/x/": "runs/x/"}.items():
        _, resolved = load_recipe(file, [f"{key}={word}"])
        *path, last = key.split(".")
        node = resolved
        for part in path:
            node = node[part]
        assert node[last] == meant
        assert build_recipe(resolved)[1] == resolved, "what is written is read as the same"


def test_fragments_may_lie_at_home(file, tree, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "me").mkdir()
    (tmp_path / "me/part.yaml").write_text("attention: dense\n")
    file.write_text(yaml.safe_dump({"include": ["~/part.yaml"], **tree}))
    assert load_recipe(file)[0].attention == "dense"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "steps: is required"),
        (b"- 1\n", "{file}: a recipe file is a mapping"),
        (b"3\n", "{file}: a recipe file is a mapping"),
        (b"steps: [1\n", "{file}: not readable as YAML: line 2: .*; fix the file"),
        (b"a:\n\tb: 1", "{file}: not readable as YAML: line 2: .*; fix the file"),
        (b"\xff\xfe\x00", "{file}: not readable as YAML: .*; fix the file"),
        (b"\x00\x01", "{file}: not readable as YAML: .*; fix the file"),
        (b"steps: 3\nsteps: 4\n", "{file}: not readable as YAML: line 2: found duplicate key steps"),
        (b"a: !!python/object:os.system {}\n", "{file}: not readable as YAML: line 1: .*constructor"),
        (b"a: &a [*a]\n", "{file}: not readable as YAML: line 1: .*recursive"),
        (b"a: !!set {x}\n", "{file}: not readable as YAML: a: "),
        (b"null: 3\n", "{file}: not readable as YAML: "),
        (b"folder: '${'\n", "{file}: not readable as YAML: folder: "),
        (b"folder: ???\n", "{file}: folder: Missing mandatory value"),
        (b"include: a.yaml\n", "{file}: include must be a list of YAML files, not 'a.yaml'"),
        (b"include: [nowhere.yaml]\n", "{folder}/nowhere.yaml: no such recipe file; check the path"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, content, said):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{said.format(file=file, folder=tmp_path)}"):
        load_recipe(file)


def test_a_missing_file_a_folder_and_a_fragment_that_includes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such recipe file; check the path"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"not readable as YAML: .*directory"):
        load_recipe(tmp_path)
    (tmp_path / "part.yaml").write_text("include: [other.yaml]\n")
    (tmp_path / "run.yaml").write_text("include: [part.yaml]\n")
    with pytest.raises(
        ConfigError, match=r"part\.yaml: a fragment cannot include another; list both in .*run"
    ):
        load_recipe(tmp_path / "run.yaml")


MACHINE = [
    {"folder": "elsewhere"},
    {"device": "auto"},
    {"attention": "dense"},
    {"timeout_seconds": 60.0},
    {"deadlines__data": 60.0},
    {"evaluation__every": 3},
    {"checkpoints__every": 3},
    {"metrics__every": 3},
    {"batch__microbatch": 2},
    {"optimizer__distributed": False},
    {"student__layout__expert": 2},
    {"teachers__moe__layout__expert": 2},
    {"teachers__moe__sanity": "warn"},
]
MATHEMATICS = [
    {"steps": 5},
    {"seed": 4},
    {"batch__samples": 16},
    {"student__folder": "elsewhere"},
    {"student__context__block_size": 4},
    {"student__precision": "bf16"},
    {"teachers__moe__context__kind": "bidirectional"},
    {"losses__kl__weight": 0.5},
    {"losses__kl__kind": "reverse_kl"},
    {"optimizer__learning_rate": 0.02},
    {"noise__time_epsilon": 0.01},
    {"data__train": "elsewhere"},
    {"branch": {"folder": "x", "optimizer": False}},
]


@pytest.mark.parametrize("changes", MACHINE, ids=str)
def test_machine_choices_are_not_part_of_the_digest(tree, changes):
    _, before = build_recipe(tree)
    _, after = build_recipe(changed(tree, **changes))
    assert before != after
    assert digest(before) == digest(after)
    assert difference(mathematics(before), mathematics(after)) == []


@pytest.mark.parametrize("changes", MATHEMATICS, ids=str)
def test_what_changes_the_mathematics_changes_the_digest_and_is_named(tree, changes):
    _, before = build_recipe(tree)
    _, after = build_recipe(changed(tree, **changes))
    assert digest(before) != digest(after)
    ((key, value),) = changes.items()
    (line,) = difference(mathematics(before), mathematics(after))
    assert line.startswith(f"{key.replace('__', '.')}: ")
    assert line.endswith(f" -> {value!r}")
