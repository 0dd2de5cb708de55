"""Which node a launcher is, and what launchers tell each other through the store."""

import os
import re
import threading
import time

import pytest
from torch.distributed import HashStore

from tide_megatron.base.device import Ranks
from tide_megatron.base.errors import ConfigError, RanksFailed, RanksLost, TideError
from tide_megatron.base.stop import Stopped
from tide_megatron.launch import nodes as nodes_module
from tide_megatron.launch.nodes import LEAVE_SECONDS, Nodes, read_node
from tide_megatron.launch.ranks import planned_ranks


@pytest.fixture
def machine(monkeypatch):
    """Give a function that sets exactly these variables."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")

    def shows(**variables):
        for name in (*ours, *(name for name in os.environ if name.startswith("SLURM_"))):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    shows()
    return shows


def task(node, nodes, tasks="1(x{})", **more):
    return {
        "SLURM_STEP_ID": 0,
        "SLURM_PROCID": node,
        "SLURM_LOCALID": 0,
        "SLURM_STEP_NUM_TASKS": nodes,
        "SLURM_STEP_NUM_NODES": nodes,
        "SLURM_NNODES": nodes,
        "SLURM_STEP_TASKS_PER_NODE": tasks.format(nodes),
        "SLURM_STEP_NODELIST": "gpu[07-09,12]",
        **more,
    }


def test_a_task_of_srun_a_node_is_a_launcher(machine):
    machine(**task(2, 4), MASTER_PORT=23456)
    wanted = Ranks(rank=2, local_rank=0, world_size=4, address="gpu07", port=23456)
    assert read_node() == wanted
    assert planned_ranks(None, 8) == 32
    assert planned_ranks(32, 8) == 32
    with pytest.raises(ConfigError, match=r"^--ranks 8, but 4 node\(s\) of --ranks-per-node 8 have 32"):
        planned_ranks(8, 8)


@pytest.mark.parametrize(
    "variables",
    [{}, task(0, 1), {"SLURM_JOB_ID": 3, "SLURM_NNODES": 1}, {"NNODES": 1}, {"NNODES": 1, "NODE_RANK": 0}],
)
def test_one_node_needs_nobody(machine, variables):
    machine(**variables)
    assert read_node() is None
    assert planned_ranks(None, 8) == 8


def test_nodes_that_are_numbered_by_hand(machine):
    machine(NNODES=2, NODE_RANK=1, MASTER_ADDR="a", MASTER_PORT=2000)
    assert read_node() == Ranks(rank=1, local_rank=0, world_size=2, address="a", port=2000)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            task(0, 8, "4(x2)"),
            r"^--ranks-per-node .* srun started several tasks on one; .* --ntasks-per-node=1",
        ),
        (task(1, 8, "", SLURM_LOCALID=1), r"^--ranks-per-node .* several tasks on one"),
        (
            {"RANK": 0, "WORLD_SIZE": 2},
            r"^--ranks-per-node is for our own launcher, .* leave it out under torchrun",
        ),
        ({"NNODES": 2}, r"^NNODES='2' NODE_RANK='' MASTER_ADDR='' MASTER_PORT='' do not say which node"),
        ({"NNODES": 2, "NODE_RANK": 2, "MASTER_ADDR": "a", "MASTER_PORT": 1}, r"NODE_RANK='2' .* do not say"),
        ({"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "a", "MASTER_PORT": 0}, r"MASTER_PORT='0' do not say"),
        ({"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "", "MASTER_PORT": 1}, r"MASTER_ADDR='' .* do not say"),
        ({"NODE_RANK": "one"}, r"NODE_RANK='one' .* do not say"),
        (task(0, 2, SLURM_STEP_NODELIST="gpu[07-"), r"^SLURM_STEP_NODELIST='gpu\[07-' is no list of nodes"),
    ],
)
def test_what_is_no_launchers_place_is_named(machine, variables, said):
    machine(**variables)
    with pytest.raises(ConfigError, match=said):
        read_node()


@pytest.fixture
def three_nodes():
    store = HashStore()
    nodes = [Nodes(place(node, 3), store) for node in range(3)]
    yield nodes
    leave_all(nodes)


def place(node, count):
    return Ranks(rank=node, local_rank=0, world_size=count)


@pytest.fixture(autouse=True)
def short_farewells(monkeypatch):
    monkeypatch.setattr(nodes_module, "LEAVE_SECONDS", 0.3)


def leave_all(nodes):
    """Leave together, as launchers do; node 0 waits for the others."""
    for each in reversed(nodes):
        each.leave()


def test_the_first_end_of_a_node_is_heard_by_the_others_alone(three_nodes):
    first, second, third = three_nodes
    second.tell_end("fault", "rank 5: steps: 0 is not valid")
    third.tell_end("failed", "rank 9 lost its peers")
    for nodes in (first, second, third):
        nodes.look(at_once=True)
    assert second.end() is None
    for nodes in (first, third):
        error = nodes.end().error
        assert type(error) is TideError
        assert str(error) == "node 1 failed first: rank 5: steps: 0 is not valid"
        assert nodes.stop() is None


@pytest.mark.parametrize(
    ("kind", "error"), [("failed", RanksFailed), ("lost", RanksLost), ("halted", Stopped)]
)
def test_an_end_is_raised_as_what_it_was(three_nodes, kind, error):
    first, second, _ = three_nodes
    second.tell_end(kind, "SIGTERM")
    first.look(at_once=True)
    assert type(first.end().error) is error


def test_a_request_and_an_end_do_not_hide_each_other(three_nodes):
    first, second, _ = three_nodes
    second.tell_stop("SIGUSR1")
    first.look(at_once=True)
    assert (first.stop().text, first.stop().node, first.end()) == ("SIGUSR1", 1, None)
    second.tell_end("failed", "rank 2: it was killed")
    first.look(at_once=True)
    assert first.end().text == "rank 2: it was killed"


class Gone:
    """A store whose node has gone."""

    def check(self, *arguments):
        raise RuntimeError("Connection reset by peer")

    compare_set = add = check


class Silent:
    """A store behind a network that was cut: its answers never come."""

    def check(self, *arguments):
        threading.Event().wait()

    compare_set = add = check


def test_a_store_that_has_gone_is_the_end_of_node_0():
    nodes = Nodes(place(1, 2), Gone())
    nodes.tell_stop("SIGTERM")
    nodes.look()
    assert isinstance(nodes.end().error, RanksLost)
    assert str(nodes.end().error).startswith("node 0 failed first: its launcher has gone")
    nodes.leave()


def until_an_end(nodes, seconds=30):
    """Look as a launcher does, until an end is known."""
    started = time.monotonic()
    while nodes.end() is None:
        assert time.monotonic() - started < seconds, "nothing was noticed"
        time.sleep(0.05)
        nodes.look()
    assert isinstance(nodes.end().error, RanksLost)
    return str(nodes.end().error), time.monotonic() - started


def test_a_store_that_never_answers_is_the_end_of_node_0():
    nodes = Nodes(place(1, 2), Silent(), silence_seconds=2.0)
    said, seconds = until_an_end(nodes)
    assert re.fullmatch(
        r"node 0 failed first: no sign of life for \d+ s: its machine or its network is down", said
    )
    assert seconds >= 2
    started = time.monotonic()
    nodes.leave()
    assert time.monotonic() - started < LEAVE_SECONDS / 2, "nobody is left to say farewell to"


def test_a_node_without_signs_of_life_is_missed_by_node_0_and_told_to_the_others():
    store = HashStore()
    first, second, third = (Nodes(place(node, 3), store, silence_seconds=2.0) for node in range(3))
    second._tasks.put(None)  # its thread ends as in a process that was killed
    said, _ = until_an_end(first)
    assert re.match(r"node 1 failed first: no sign of life for \d+ s", said)
    third.look(at_once=True)
    assert str(third.end().error) == said
    leave_all((first, second, third))


def test_where_ranks_have_lost_their_peers_a_silent_node_is_found_sooner(three_nodes):
    first, second, third = three_nodes
    second._tasks.put(None)
    first.miss_peers()
    assert first.end() is None, "it has just given a sign"
    time.sleep(2.8)
    first.miss_peers()
    assert first.end().node == 1
    third.look(at_once=True)
    assert third.end().node == 1


def test_nodes_that_live_or_have_left_are_not_missed():
    store = HashStore()
    first, second, third = (Nodes(place(node, 3), store, silence_seconds=3.0) for node in range(3))
    second.leave()
    time.sleep(3.5)
    for nodes in (first, third):
        nodes.look(at_once=True)
        assert nodes.end() is None
    leave_all((first, third))
