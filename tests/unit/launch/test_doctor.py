"""The doctor's judgement: what is a fault, what is only worth a note."""

import importlib.metadata
import importlib.util
from types import SimpleNamespace

import pytest
import torch

from tide_megatron.base.device import choose_device
from tide_megatron.base.errors import ConfigError, RanksFailed
from tide_megatron.base.transformer_engine import TransformerEngine
from tide_megatron.launch import doctor
from tide_megatron.launch.doctor import check_ranks, examine, judge
from tide_megatron.parallel.layout import Layout

GOOD = {"sum": 3.0, "difference": 2e-7, "alltoall_bytes": 4288, "backend": "gloo"}


@pytest.mark.parametrize(
    ("change", "verdicts"),
    [
        ({}, ["ok", "ok"]),
        ({"sum": 2.0}, ["fault", "ok"]),
        ({"difference": 1e-3}, ["ok", "fault"]),
        ({"difference": float("nan")}, ["ok", "fault"]),
        ({"alltoall_bytes": 0}, ["ok", "fault"]),  # equal, but nothing was parallel
    ],
)
def test_measurements_are_judged(change, verdicts):
    assert [finding.verdict for finding in judge({**GOOD, **change})] == verdicts


@pytest.mark.parametrize("error", [ConfigError("no port"), RanksFailed("rank 1 of 2 failed first: x")])
def test_ranks_that_fail_are_a_fault_with_the_message(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(doctor, "run_ranks", fail)
    (finding,) = check_ranks(choose_device("cpu"))
    assert (finding.verdict, finding.value) == ("fault", str(error))


def test_one_gpu_is_a_note(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (finding,) = check_ranks(SimpleNamespace(type="cuda"))
    assert finding.verdict == "note"


def test_the_check_asks_for_attention_that_runs_and_is_counted_on_every_device(monkeypatch):
    class Built(Exception):
        pass

    def build_model(architecture, groups, options):
        assert architecture.head_dim >= 16  # Inductor compiles no smaller one
        assert options.attention == "dense"  # on CUDA `auto` is flex, for which `Traffic` has no rule
        raise Built

    monkeypatch.setattr(doctor, "build_model", build_model)
    monkeypatch.setattr(doctor, "make_groups", lambda layout: None)
    with pytest.raises(Built):
        doctor._hidden(None, Layout(), choose_device("cpu"))


def test_packages_and_engines_are_found_or_not(monkeypatch):
    monkeypatch.setattr(doctor, "check_ranks", lambda device: [])
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    findings = {finding.topic: finding for finding in examine("cpu")}
    assert findings["torch"].value == importlib.metadata.version("torch")
    assert (findings["no-such-package"].value, findings["no-such-package"].verdict) == ("missing", "fault")
    assert findings["device"].value == "cpu"
    assert findings["attention"].value.startswith("structured")
    assert all(
        finding.verdict != "fault" for topic, finding in findings.items() if topic != "no-such-package"
    )


def test_the_apex_of_pypi_is_not_nvidias(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.9.10")
    finding = doctor._apex()
    assert finding.verdict == "note"
    assert "not NVIDIA's" in finding.value


def test_a_transformer_engine_that_does_not_import_is_a_note(monkeypatch):
    broken = TransformerEngine(version="2.17.1", fault="is installed, but does not import (OSError: libcuda)")
    monkeypatch.setattr(doctor, "find_transformer_engine", lambda: broken)
    finding = doctor._transformer_engine()
    assert finding.verdict == "note"
    assert finding.value == "2.17.1 is installed, but does not import (OSError: libcuda)"
