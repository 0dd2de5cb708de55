"""A folder takes another one's place as a whole, or not at all."""

import pytest

from tide_megatron.base.errors import CheckpointError
from tide_megatron.models.writing import replaced_folder


def fill(folder, text):
    (folder / "inner").mkdir()
    (folder / "inner" / "x").write_text(text)


def test_folders_inside_travel_along(tmp_path):
    with replaced_folder(tmp_path / "m") as partial:
        fill(partial, "new")
    assert (tmp_path / "m" / "inner" / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("fault", "seen"),
    [(OSError(28, "No space left"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_whatever_goes_wrong_the_old_one_stays(tmp_path, fault, seen):
    with replaced_folder(tmp_path / "m") as partial:
        fill(partial, "old")

    def fail(partial):
        fill(partial, "new")
        raise fault

    with pytest.raises(seen), replaced_folder(tmp_path / "m") as partial:
        fail(partial)
    assert (tmp_path / "m" / "inner" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_lost_between_two_renames_is_put_back_first(tmp_path):
    with replaced_folder(tmp_path / "m") as partial:
        fill(partial, "old")
    (tmp_path / "m").rename(tmp_path / ".m.old")
    with replaced_folder(tmp_path / "m"):
        assert (tmp_path / "m" / "inner" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
