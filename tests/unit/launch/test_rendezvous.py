"""Where ranks meet: all come or the missing ones are named; a port that is taken and a dead address too."""

import contextlib
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import PrefixStore, TCPStore

from tide_megatron.base.device import Ranks
from tide_megatron.base.errors import ConfigError, RanksFailed
from tide_megatron.launch import rendezvous
from tide_megatron.launch.rendezvous import meet


@pytest.fixture(autouse=True)
def no_agent(monkeypatch):
    for name in (
        "TORCHELASTIC_USE_AGENT_STORE",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_JOB_ID",
        "SLURM_RESTART_COUNT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", 0.1)


@pytest.fixture
def port():
    """Give a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def place(rank, port, world_size=3, address="127.0.0.1"):
    return Ranks(rank=rank, local_rank=rank, world_size=world_size, address=address, port=port)


def gather(places, timeout_seconds=20.0):
    """Let ranks meet, each in a thread; return what each got or raised."""
    found = {}

    def come(number, where):
        try:
            found[number] = meet(where, timeout_seconds)
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=come, args=each) for each in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(len(places))]


def test_all_ranks_meet_and_share_a_store(port):
    stores = gather([place(rank, port) for rank in (2, 1, 0)])
    stores[0].set("said", "by rank 2")
    assert [store.get("said") for store in stores] == [b"by rank 2"] * 3


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ((0,), "waiting for 3 ranks at 127.0.0.1:{port}: ranks 1, 2 have not come"),
        ((0, 2), "waiting for 3 ranks at 127.0.0.1:{port}: rank 1 has not come"),
        ((1,), "waiting for 3 ranks at 127.0.0.1:{port}: nobody answers there yet (Connection refused)"),
    ],
)
def test_who_has_not_come_is_said_and_is_the_error(port, here, said, monkeypatch):
    words = []
    monkeypatch.setattr(rendezvous.log, "warning", lambda text, *args: words.append(text % args))
    found = gather([place(rank, port) for rank in here], timeout_seconds=0.6)
    assert any(word.startswith(said.format(port=port)) for word in words), words
    assert all(isinstance(error, RanksFailed) for error in found)
    wanted = said.format(port=port).removeprefix("waiting for ")
    assert f"rank {here[0]} waited 0.6 s for {wanted}" in str(found[0])


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_a_taken_port_is_named(address):
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        said = f"port {taken} of this machine is taken by another program or run, .* MASTER_PORT= and a free"
        with pytest.raises(ConfigError, match=said):
            meet(place(0, taken, address=address), 5.0)


def test_a_name_that_no_machine_has_is_told(port):
    with pytest.raises(
        RanksFailed, match=re.escape(f"3 ranks at no-such-host.invalid:{port}: nobody answers")
    ):
        meet(place(1, port, address="no-such-host.invalid"), 0.3)


def test_two_processes_of_one_rank_are_refused(port):
    found = gather([place(0, port, world_size=2), place(1, port, world_size=2), place(1, port, world_size=2)])
    refused = [error for error in found if isinstance(error, ConfigError)]
    assert [str(error).split(" of ")[0] for error in refused] == [
        f"two processes came to 127.0.0.1:{port} as rank 1"
    ]


def test_ranks_of_another_job_are_not_counted(port, monkeypatch):
    host = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    with pytest.raises(RanksFailed, match=r"^rank 1 waited 0\.3 s"):
        meet(place(1, port, world_size=2), 0.3)
    came = {job: PrefixStore(f"tide/{job}.0.0.0", host).check(["here/1"]) for job in (8, 9)}
    assert came == {8: False, 9: True}


def test_a_rank_that_loses_the_meeting_place_says_so(port):
    found = []
    guest = threading.Thread(
        target=lambda: found.extend(gather([place(1, port, world_size=3)], timeout_seconds=20))
    )
    guest.start()
    with pytest.raises(RanksFailed):
        meet(place(0, port, world_size=3), 1.5)
    guest.join()
    assert str(found[0]).startswith(f"rank 1 of 3 lost 127.0.0.1:{port} while the ranks met there")


def listeners(port):
    """Return the addresses at which this machine listens at a port, as the kernel writes them."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            place, state = line.split()[1], line.split()[3]
            if state == "0A" and int(place.rpartition(":")[2], 16) == port:
                found.add(place.rpartition(":")[0])
    return found


LOOPBACK = {"127.0.0.1": "0100007F", "127.0.0.2": "0200007F"}


@pytest.mark.parametrize(
    ("address", "listens"),
    [("127.0.0.1", "0100007F"), ("127.0.0.2", "0200007F"), ("localhost", "0100007F")],
)
def test_the_store_listens_at_the_address_of_the_job_alone(port, address, listens):
    stores = gather([place(rank, port, world_size=2, address=address) for rank in (0, 1)])
    assert all(hasattr(store, "set") for store in stores), stores
    assert listeners(port) == {listens}


@pytest.mark.parametrize(
    ("address", "leads_to"),
    [("127.1", "127.0.0.1"), ("192.0.2.77", "192.0.2.77")],
    ids=["a name as Debian writes it into /etc/hosts", "an address of a gateway"],
)
def test_where_others_may_not_reach_the_address_the_port_is_open_everywhere_and_told(
    port, caplog, address, leads_to
):
    caplog.set_level("WARNING", "tide_megatron")
    server = rendezvous._listen(place(0, port, address=address), SimpleNamespace(kind="rank", where=""))
    with server:
        assert not listeners(port) & {"0100007F"}
        with socket.create_connection(("127.0.0.1", port), timeout=2):
            pass
    [told] = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"MASTER_ADDR: {address} leads to {leads_to} here, which is no address of this")
    assert f"so port {port} is open at all of its addresses" in told


def test_strangers_neither_hang_nor_end_the_store(port):
    """A port scanner, a browser, and some who only keep the line: the ranks meet and go on."""
    words = [b"GET / HTTP/1.1\r\n\r\n", bytes(100_000), bytes(range(256)) * 20, b"\x16\x03\x01\x02\x00", b""]
    lines, is_over = [], threading.Event()

    def call():
        while not is_over.is_set():
            for said in words:
                with contextlib.suppress(OSError):
                    line = socket.create_connection(("127.0.0.1", port), timeout=1)
                    lines.append(line)
                    line.sendall(said)
            time.sleep(0.01)

    stranger = threading.Thread(target=call)
    stranger.start()
    try:
        stores = gather([place(rank, port) for rank in (1, 2, 0)])
        while len(lines) < 300:
            time.sleep(0.01)
        stores[0].set("said", "by rank 1")
        assert [store.get("said") for store in stores] == [b"by rank 1"] * 3
    finally:
        is_over.set()
        stranger.join()
        for line in lines:
            line.close()
