"""The bench of opening data: its sparse columns are ones that a loader reads."""

from bench import open_data


def test_its_columns_open_and_are_read(tmp_path):
    open_data.write(tmp_path / "data", 5000)
    for part in open_data.PARTS:
        found = open_data.measure(tmp_path / "data", part)
        assert found["seconds"] < 10
