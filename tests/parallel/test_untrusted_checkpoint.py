"""A checkpoint from elsewhere runs nothing, whichever of its files holds a program and whoever reads it."""

import builtins
import functools
import importlib
import io
import json
import operator
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from typer.testing import CliRunner

from tests.parallel.test_old_checkpoint import CONFIG, OLD, make_student, state_of
from tests.unit.models.shapes import CPU
from tide_megatron.base.errors import CheckpointError
from tide_megatron.base.files import write_digests
from tide_megatron.base.stop import StopFlag
from tide_megatron.checkpoint.load import load_checkpoint
from tide_megatron.checkpoint.reading import read_table, read_values
from tide_megatron.commands import app
from tide_megatron.convert.megatron_to_hf import Written, megatron_to_hf


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


PROGRAMS = {
    "a command": lambda mark: Calls(os.system, f"touch {mark}"),
    "an expression": lambda mark: Calls(builtins.eval, f"open({str(mark)!r}, 'w')"),
    "a process": lambda mark: Calls(subprocess.Popen, ["touch", str(mark)]),
    "an import": lambda mark: Calls(importlib.import_module, "this"),
    "a call to come": lambda mark: Calls(functools.partial, os.system, f"touch {mark}"),
    "an attribute": lambda mark: Calls(operator.attrgetter, "system"),
    "a file": lambda mark: Calls(open, str(mark), "w"),
    "a reader without limits": lambda mark: Calls(torch.load, str(mark)),
    "deep inside": lambda mark: {"a": [({"b": Calls(os.mkdir, str(mark))},)]},
}
IN_TABLES = {
    **PROGRAMS,
    "a class that does things": lambda mark: Calls(FileSystemWriter, str(mark)),
    "a path behind a class": lambda mark: Named("torch.distributed.checkpoint.metadata", "os.system"),
    "another module's class": lambda mark: Named("torch.distributed.checkpoint.filesystem", "Path"),
}


class Named:
    """Pickles as whatever a module calls so."""

    def __init__(self, module, name):
        self.module, self.name = module, name


def pickled(value):
    """Pickle a value; a `Named` writes its words unchecked."""
    if isinstance(value, Named):
        words = b"".join(
            pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() for word in vars(value).values()
        )
        return pickle.PROTO + b"\x04" + words + pickle.STACK_GLOBAL + pickle.STOP
    return pickle.dumps(value)


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def copied(folder):
    shutil.copytree(OLD, folder)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(CONFIG))
    return folder


def with_table(folder, value):
    (copied(folder) / ".metadata").write_bytes(pickled(value))
    write_digests(folder, {})
    return folder


def with_common(folder, value):
    old = torch.load(copied(folder) / "common.pt", weights_only=True)
    (folder / "common.pt").write_bytes(saved({**old, "more": value}))
    write_digests(folder, {})
    return folder


def with_bytes(folder, value, *, instead_of_tensor=False):
    """Put a value into a byte entry, or turn a tensor into one."""
    table = read_table(copied(folder))
    index = next(
        index
        for index in table.storage_data
        if instead_of_tensor == (index.offset is not None) and not index.fqn.startswith("optimizer.")
    )
    place, content = table.storage_data[index], saved([value])
    (folder / "more.distcp").write_bytes(content)
    place.relative_path, place.offset, place.length = "more.distcp", 0, len(content)
    if instead_of_tensor:
        table.state_dict_metadata[index.fqn] = BytesStorageMetadata()
        table.storage_data = {
            (type(index)(key.fqn) if key.fqn == index.fqn else key): value
            for key, value in table.storage_data.items()
        }
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    write_digests(folder, {})
    return folder


def with_bytes_for_a_tensor(folder, value):
    return with_bytes(folder, value, instead_of_tensor=True)


def resumed(folders):
    """Load each; return what is said, None where it is loaded (rank function)."""
    student, said = make_student(2), []
    for folder in folders:
        try:
            load_checkpoint(folder, student.model, student.optimizer)
        except CheckpointError as fault:
            said.append(str(fault))
        else:
            said.append(None)
    return said, state_of(student)


def converted(folders):
    """Convert each (rank function)."""
    said = []
    for folder in folders:
        try:
            megatron_to_hf(folder, folder.parent / "hf", None, Written(), device=CPU, stop=StopFlag())
        except CheckpointError as fault:
            said.append(str(fault))
        else:
            said.append(None)
    return said


@pytest.fixture
def mark(tmp_path):
    """Return what a program would make; nothing has when the test ends."""
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists(), "it ran"


def name_in(program):
    """Return what a refusal must name."""
    found = program
    while not isinstance(found, Calls | Named):
        found = next(iter(found.values() if isinstance(found, dict) else found))
    if isinstance(found, Named):
        return found.name
    return getattr(found.function, "__name__", type(found.function).__name__)


def test_a_table_that_is_a_program_is_refused_by_every_reader(pool, tmp_path, mark):
    programs = [make(mark) for make in IN_TABLES.values()]
    folders = [
        with_table(tmp_path / str(number) / OLD.name, program) for number, program in enumerate(programs)
    ]
    ways = [said for said, _ in pool(2).run(resumed, folders)] + pool(2).run(converted, folders)
    for verb in (["inspect"], ["diff", str(OLD)]):
        told = [CliRunner().invoke(app, ["checkpoint", *verb, str(folder)]) for folder in folders]
        assert all(isinstance(one.exception, CheckpointError) for one in told)
        ways.append([str(one.exception) for one in told])
    assert len(ways) == 6
    for said in ways:
        for folder, program, line in zip(folders, programs, said, strict=True):
            assert line.startswith(f"{folder / '.metadata'}: cannot be read (")
            assert line.endswith(f".{name_in(program)} does not belong there); choose another checkpoint")


@pytest.mark.parametrize("write", [with_common, with_bytes, with_bytes_for_a_tensor])
def test_values_that_are_programs_are_refused_on_every_rank_or_not_read(pool, tmp_path, mark, write):
    programs = [make(mark) for make in PROGRAMS.values()]
    folders = [write(tmp_path / str(number), program) for number, program in enumerate(programs)]
    for said, _ in pool(2).run(resumed, folders):
        if write is with_bytes:  # what layers keep beside their weights
            assert said == [None] * len(programs)
            continue
        for program, line in zip(programs, said, strict=True):
            assert "\n" not in line
            if write is not with_bytes_for_a_tensor:  # that is refused before it is read
                assert f"{name_in(program)} does not belong there" in line


def test_what_a_checkpoint_holds_of_plain_values_is_still_read(pool, tmp_path):
    values = [1, 2.5, "text", b"bytes", None, True, [1, (2, 3)], {"a": {1, 2}}, torch.ones(2)]
    folders = [with_common(tmp_path / f"common{number}", value) for number, value in enumerate(values)]
    folders += [with_bytes(tmp_path / "bytes", None), OLD]
    for said, state in pool(2).run(resumed, folders):
        assert said == [None] * len(folders)
        assert state[1] == [3]
    assert read_values(io.BytesIO(saved({"more": values[:-1]}))) == {"more": values[:-1]}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (".metadata", b"", "Ran out of input"),
        (".metadata", pickle.dumps({"a": 1}), "it holds a dict"),
        (".metadata", pickle.dumps([]), "it holds a list"),
        ("metadata.json", b'{"sharded_backend": "zarr"}', "format zarr with torch is not read"),
        ("metadata.json", b'{"sharded_backend": "torch_dist", "common_backend": "x"}', "torch_dist with x"),
        ("metadata.json", b"[]", "cannot be read"),
        ("common.pt", b"no archive", "cannot be read"),
    ],
)
def test_files_of_another_kind_are_one_line(pool, tmp_path, name, content, said):
    (copied(tmp_path / "c") / name).write_bytes(content)
    for lines, _ in pool(2).run(resumed, [tmp_path / "c"]):
        assert lines[0].startswith(f"{tmp_path / 'c' / name}: ")
        assert said in lines[0]
        assert lines[0].endswith("choose another checkpoint")
        assert "\n" not in lines[0]


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_a_table_that_names_files_elsewhere_is_refused(tmp_path, path):
    table = read_table(copied(tmp_path / "c"))
    next(iter(table.storage_data.values())).relative_path = path
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(CheckpointError, match=r"names '.*', which is no file of the checkpoint"):
        read_table(Path(tmp_path / "c"))
