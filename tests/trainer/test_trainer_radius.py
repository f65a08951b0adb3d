"""Radius and Directional in a stream: certificates of every task, beside PEGP, after a reference, and after trials."""

from __future__ import annotations

import json

import pytest
from trainer_helpers import differing, stream_of, weights

import growthring as gr
from growthring.adapters import LargoConfig
from growthring.errors import ConfigError
from growthring.guards import CANDIDATES
from growthring.report import promise_kept

LARGO = {form: LargoConfig(r=8, form=form, target_modules="all-linear") for form in ("delta", "product")}


@pytest.mark.parametrize("adapter", ["delta", "product", "lora", "linear"])
@pytest.mark.parametrize("guard", ["radius", "directional"])
def test_a_stream_has_a_certificate_for_every_task(build, adapter, guard, tmp_path):
    made = gr.Radius() if guard == "radius" else gr.Directional()
    run = build(stream_of(2), adapter=LARGO.get(adapter, adapter), guards=[made], output_dir=tmp_path / "run").fit()
    assert [c.task for c in run.certificates] == ["animals", "ways"]
    for certificate in run.certificates:
        assert certificate.kept is (True if guard == "radius" else None)
        assert any(d.frobenius > 0 for d in certificate.deviations)
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [promise_kept(c) for c in stored["certificates"]] == [c.kept for c in run.certificates]
    assert stored["certificates"][0]["deviations"][0]["name"] == run.certificates[0].deviations[0].name
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "certificate" in log
    assert "frobenius" not in log


@pytest.mark.parametrize("adapter", ["delta", "product"])
def test_it_goes_with_pegp(build, adapter):
    guards = [gr.PEGP(energy=0.9, samples=32), gr.Radius(mu=0.2)]
    run = build(stream_of(3), adapter=LARGO[adapter], guards=guards, args={"weight_decay": 0.1}).fit()
    later = [c for c in run.certificates if c.task_index]
    assert [c.kept for c in later] == [True] * 4
    assert max(c.leak for c in later if c.guard == "pegp") <= 1e-5
    assert {s.kind for s in run.certificates[0].sites} <= {"largo_A", "largo_B"}


def test_plain_weights_that_decay_are_refused(build):
    trainer = build(stream_of(2), adapter="linear", guards=[gr.Radius()], args={"weight_decay": 0.1})
    with pytest.raises(gr.errors.GuardError, match="Set weight_decay=0"):
        trainer.fit()


@pytest.mark.parametrize("guard", [gr.Radius, gr.Directional, gr.FTP])
def test_trials_of_an_energy_leave_no_trace(build, guard):
    """``auto`` ends where the same energy, given from the start, ends, whatever was tried before it."""
    stream, some = stream_of(2, validation=12), CANDIDATES[::3]
    auto = gr.PEGP(energy="auto", candidates=some, samples=32)
    trainer = build(stream, adapter=LARGO["delta"], guards=[auto, guard()])
    run = trainer.fit()
    other = build(stream, adapter=LARGO["delta"], guards=[gr.PEGP(energy=auto.energy, samples=32), guard()])
    other_run = other.fit()
    assert differing(weights(trainer), weights(other)) == []
    assert run.matrix == other_run.matrix
    assert run.certificates[-1].deviations == other_run.certificates[-1].deviations


@pytest.mark.parametrize("bound", [gr.Radius, gr.FTP])
def test_a_blend_with_a_free_training_is_refused_where_distances_are_bounded(build, bound):
    with pytest.raises(ConfigError, match="merge > 0"):
        build(stream_of(2), guards=[gr.PEGP(energy=0.9, merge=0.5), bound()])
    build(stream_of(2), guards=[gr.PEGP(energy=0.9), bound()])
