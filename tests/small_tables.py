"""Small Parquet and Arrow files for tests."""

import pyarrow
import pyarrow.parquet


def chat(number, **keys):
    messages = [
        {"role": "user", "content": f"ask {number}"},
        {"role": "assistant", "content": f"reply {number}"},
    ]
    return {"messages": messages, **keys}


def write_parquet(path, rows, *, schema=None, group=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def write_arrow(path, rows, *, is_stream=False, batch=5):
    """Write an Arrow file, or a stream as `datasets` does."""
    table = pyarrow.Table.from_pylist(rows)
    begin = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with begin(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path
