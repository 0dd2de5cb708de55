"""Our launcher on several nodes, here two on one machine: one world, one request, one first failure."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from chaos_runs import network
from tests.parallel.test_launch import within

ROOT = Path(__file__).parents[2]
NAMED = ("unshare", "--uts", "sh", "-c")
"""Starts a command on a machine that has a name of its own: `NAMED, "hostname NAME; exec ...", ...`."""


@pytest.fixture
def hosts():
    """Give two hosts with a network between them, whose names lead to their addresses."""
    if reason := network.why_not():
        pytest.skip(reason)
    with network.Hosts() as both:
        yield [
            [*both.entering(node), *NAMED, f'hostname {address}; exec "$@"', "named"]
            for node, address in enumerate(network.ADDRESSES)
        ]


def on_hosts(hosts, case, folder, num_ranks, **place):
    """Start a launcher on each host that is given."""
    words = [sys.executable, "-m", "tests.parallel.launch_cases", case, str(num_ranks), str(folder)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return [
        subprocess.Popen(
            [*entering, *words],
            cwd=ROOT,
            env=clean | {"OMP_NUM_THREADS": "1", "NODE_RANK": str(node), **place},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node, entering in enumerate(hosts)
    ]


def test_a_run_on_one_machine_listens_to_that_machine_alone(hosts, tmp_path):
    """Though the machine's name leads to an address that others reach, where gloo would listen."""
    [(code, said, faults)] = ends(on_hosts(hosts[:1], "who_listens", tmp_path, 2))
    assert code == 0, faults
    assert said == "value ['127.0.0.1']\n"


@pytest.mark.slow
def test_a_run_on_several_machines_listens_at_their_own_addresses(hosts, tmp_path):
    place = {"NNODES": "2", "MASTER_ADDR": network.ADDRESSES[0], "MASTER_PORT": "29500"}
    ended = ends(on_hosts(hosts, "who_listens", tmp_path, 1, **place))
    assert [code for code, *_ in ended] == [0, 0], ended
    assert [said for _, said, _ in ended] == [f"value {[address]}\n" for address in network.ADDRESSES]


def start(case, folder, ranks_per_node, nodes=2):
    """Start the launchers of all nodes; their ranks meet at a port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {
        "NNODES": str(nodes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    words = [sys.executable, "-m", "tests.parallel.launch_cases", case, str(ranks_per_node), str(folder)]
    return [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env=clean | place | {"NODE_RANK": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(nodes)
    ]


def ends(launchers, seconds=60):
    """Wait for all; return (exit code, stdout, stderr) of each."""
    try:
        said = [each.communicate(timeout=seconds) for each in launchers]
    finally:
        for each in launchers:
            each.kill()
    return [(each.returncode, *words) for each, words in zip(launchers, said, strict=True)]


def test_a_request_to_one_node_lets_the_ranks_of_all_save(tmp_path):
    launchers = start("train_until_stopped", tmp_path, 2)
    running = [tmp_path / f"running-{rank}" for rank in range(4)]
    within(60, lambda: all(path.exists() for path in running), "four ranks step together")
    launchers[1].send_signal(signal.SIGUSR1)
    ended = ends(launchers)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert all((tmp_path / f"saved-{rank}").exists() for rank in range(4))
    steps = {out for _, out, _ in ended}
    assert len(steps) == 1, "every launcher has its first rank's value, and all stopped after the same step"
    # Its ranks may learn of it from their peers before their launcher does; if it hears, it says so.
    assert not ended[0][2] or "node 1 was asked to stop by SIGUSR1, so this one stops too" in ended[0][2]


@pytest.mark.slow
def test_a_failure_on_one_node_ends_the_others_with_its_words(tmp_path):
    ended = ends(start("one_bad_file_others_deaf", tmp_path, 1), seconds=40)
    fault = "data/train.jsonl line 7: no reply; remove the record"
    assert [code for code, *_ in ended] == [2, 2], ended
    assert f"{fault} (seen by rank 1 of 2)" in ended[1][2]
    assert f"node 1 failed first: rank 1: {fault}" in ended[0][2]
