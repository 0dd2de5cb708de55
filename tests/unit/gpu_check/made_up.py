"""Checks that go wrong in every way a check can."""

import os
import time

from gpu_check.rows import NotMeasured, Row


def passes(place, word):
    print("a word for the log")
    return [Row(check="passes", text=f"{word} on {place.device}", figures={"scratch": str(place.scratch)})]


def raises(place):
    raise ValueError("no such thing")


def dies(place):
    print("the last words", flush=True)
    os._exit(7)


def hangs(place):
    time.sleep(60)


def cannot(place):
    raise NotMeasured("it needs a moon")
