"""SLURM's short forms are read as `scontrol show hostnames` reads them, and what is broken is named."""

import pytest

from tide_megatron.base.errors import ConfigError
from tide_megatron.base.nodes import expand_nodes, seconds_of, tasks_by_node

LISTS = {
    "node1": ["node1"],
    "node[1-4]": ["node1", "node2", "node3", "node4"],
    "n[001-004,7],m3": ["n001", "n002", "n003", "n004", "n7", "m3"],
    "n[098-101]": ["n098", "n099", "n100", "n101"],
    "n[9-10]": ["n9", "n10"],
    "a[1-2]b[03-04]": ["a1b03", "a1b04", "a2b03", "a2b04"],
    "rack[2-3]n[07,09-10],other": [
        "rack2n07",
        "rack2n09",
        "rack2n10",
        "rack3n07",
        "rack3n09",
        "rack3n10",
        "other",
    ],
    "gpu-[07-08,12].site,login": ["gpu-07.site", "gpu-08.site", "gpu-12.site", "login"],
    "a.b-c[010]": ["a.b-c010"],
    "x,y,x": ["x", "y", "x"],
    "127.0.0.[1-3]": ["127.0.0.1", "127.0.0.2", "127.0.0.3"],
    "[1-2]": ["1", "2"],
}


@pytest.mark.parametrize(("text", "names"), LISTS.items())
def test_a_list_of_nodes_is_written_out(text, names):
    assert expand_nodes(text, "NODES") == names


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it ends without a name"),
        ("n1,", "it ends without a name"),
        ("n[1-2", "'[1-2' cannot follow 'n'"),
        ("n[", "'[' cannot follow 'n'"),
        ("n]1", "']1' cannot follow 'n'"),
        ("n[3-1]", "the range 3-1 runs backwards"),
        ("n[]", "[] holds '', which is neither a number nor a range"),
        ("n[1,,2]", "[1,,2] holds ''"),
        ("n[a-b]", "[a-b] holds 'a-b'"),
        ("n[1-2-3]", "[1-2-3] holds '1-2-3'"),
        ("n[[1-2]]", "'[[1-2]]' cannot follow 'n'"),
        ("n[1-2],,b", "no node's name stands at ',b'"),
        ("n1 n2", "' n2' cannot follow 'n1'"),
        ("n1;rm", "';rm' cannot follow 'n1'"),
        ("(null)", "no node's name stands at '(null)'"),
        ("n[1-99999999999]", "the range 1-99999999999 holds more than 65536 nodes"),
        ("n[1-1000]m[1-1000]", "'n[1-1000]m[1-1000]' names more than 65536 nodes"),
        ("ñ1", "no node's name stands at 'ñ1'"),
    ],
)
def test_a_bad_list_is_named_with_what_is_wrong(text, why):
    with pytest.raises(ConfigError) as caught:
        expand_nodes(text, "SLURM_JOB_NODELIST")
    assert str(caught.value).startswith(f"SLURM_JOB_NODELIST={text!r} is no list of nodes ({why}")


@pytest.mark.parametrize(
    ("text", "counts"),
    [("4", [4]), ("4(x2),3", [4, 4, 3]), ("2,8(x1)", [2, 8]), ("", []), ("4(x)", []), ("four", [])],
)
def test_tasks_of_each_node_are_read(text, counts):
    assert tasks_by_node(text) == counts


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:00", 0.0),
        ("2:05\n", 125.0),
        ("1:00:01", 3601.0),
        ("2-01:00:00", 176_400.0),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
        ("90", None),
    ],
)
def test_a_span_of_time_is_read(text, seconds):
    assert seconds_of(text) == seconds
