"""`tide chat` on a terminal: Ctrl-C ends a reply, more than once, and the session goes on."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_run import student_config, write_model
from tide_megatron.diffusion.mask import Context
from tide_megatron.evaluate.model_folder import write_context

ROOT = Path(__file__).parents[3]


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, words):
        self._main, side = pty.openpty()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TERM": "dumb"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tide_megatron.commands", *words],
            **dict.fromkeys(("stdin", "stdout", "stderr"), side),
            env={**environment, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        os.close(side)
        self.text = ""

    def read(self, pattern, seconds=120.0):
        """Read until something new matches."""
        end, start = time.monotonic() + seconds, len(self.text)
        while not re.search(pattern, self.text[start:]):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text!r}"
            if select.select([self._main], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self._main, 4096).decode(errors="replace").replace("\r\n", "\n")
                except OSError:
                    break  # the other side is closed
        return self.text[start:]

    def type(self, text):
        os.write(self._main, text.encode())

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._main)


@pytest.fixture
def terminal(tmp_path):
    """A conversation with a random model that writes a long reply, four tokens a block."""
    folder = write_model(tmp_path / "student", student_config(320), seed=1)
    write_context(folder, Context(kind="block_causal", block_size=4))
    opened = Terminal(["chat", str(folder), "--new-tokens", "2000"])
    yield opened
    opened.close()


def test_ctrl_c_ends_replies_and_ctrl_d_the_session(terminal, tmp_path):
    terminal.read("> $")
    for text in ("first", "second"):
        terminal.type(f"{text}\n")
        terminal.read(rf"{text}\n.+")  # the reply has begun
        terminal.process.send_signal(signal.SIGINT)
        terminal.read(r"\[interrupted\]\n\n> $")
    terminal.type("half")
    terminal.read("half$")
    time.sleep(0.5)  # readline hears signals where it waits, and not while it takes a character
    terminal.process.send_signal(signal.SIGINT)
    terminal.read(r"\[Ctrl-D or /quit ends\]\n> $")
    terminal.type(f"/save {tmp_path}/chats.jsonl\x7f\n")  # a line can be edited
    terminal.read(r"\[4 messages appended to .*/chats.json\]\n> $")
    assert (tmp_path / "chats.json").read_text().count("first") == 1
    terminal.type("\x04")
    terminal.read("\n", seconds=60)
    assert terminal.process.wait(60) == 0
    assert "Traceback" not in terminal.text
