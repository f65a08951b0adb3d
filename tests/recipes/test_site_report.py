from __future__ import annotations

import logging

import pytest
import torch

from growthring.errors import GuardError
from growthring.recipes import METHODS, build, explain_sites, group_sites, load_config, run, sites_line
from growthring.recipes.sites import TREATMENTS
from growthring.report import optimizer_line

PEGP = [name for name, method in METHODS.items() if method.guard == "pegp"]


@pytest.mark.parametrize("name", METHODS)
def test_every_trainable_tensor_is_in_the_report_once(name, tiny_stream):
    method = METHODS[name]
    trainer = build(load_config(tiny_stream(name, **({"optimizer": {"rank": 4}} if method.optimizer else {}))))
    everything = explain_sites(trainer)
    trainable = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert sorted(row["name"] for row in everything) == sorted(trainable), "each once, whatever guards there are"
    assert {row["guard"] for row in everything} == {method.guard}
    for row in everything:
        assert row["treatment"] in TREATMENTS
        assert bool(row["condition"]) == (row["treatment"] == "protected") or method.guard == "inflora"
        if row["treatment"] == "free" and name != "joint":
            assert row["why"]
            assert row["cost"] or method.guard == "gradient-memory"


@pytest.mark.filterwarnings("ignore:PEGP.*no free direction:UserWarning")  # three rows fill a prompt of width 32
@pytest.mark.parametrize("name", PEGP)
def test_the_report_says_what_training_then_does(name, tiny_stream, tmp_path):
    trainer = build(load_config(tiny_stream(name)))
    rows = explain_sites(trainer)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    result = trainer.fit()
    assert result.sites == rows, "asking changes nothing"
    protected = {kind for row in rows if row["treatment"] == "protected" for kind in row["kinds"]}
    assert protected == {site.kind for site in result.certificates[-1].sites}
    assert any((p != before[n]).any() for n, p in trainer.model.named_parameters())


def test_asking_first_does_not_change_a_run(tiny_stream):
    config = load_config(tiny_stream("pegp", head="linear"))
    asked, plain = build(config), build(config)
    explain_sites(asked)
    assert asked.fit().matrix.to_list() == plain.fit().matrix.to_list()


@pytest.mark.parametrize(("policy", "treatment"), [("hold", "held"), ("freeze", "frozen"), ("allow", "free")])
def test_what_no_condition_protects_is_told_with_its_cost(policy, treatment, tiny_stream):
    config = load_config(tiny_stream("pegp-linear", guard={"unprotected": policy}))
    trainer = build(config)
    loose = [n for n, p in trainer.model.named_parameters() if n.endswith("LayerNorm.bias")]
    for name in loose:
        trainer.model.get_parameter(name).requires_grad_(True)
    told = {row["name"]: row for row in explain_sites(trainer) if row["treatment"] != "protected"}
    assert sorted(told) == sorted(loose)
    assert {row["treatment"] for row in told.values()} == {treatment}
    assert all(row["why"] and row["cost"] for row in told.values())


def test_rows_that_differ_in_a_number_only_are_one(tiny_stream):
    rows = explain_sites(build(load_config(tiny_stream("pegp"))))
    groups = group_sites(rows)
    assert sum(group["count"] for group in groups) == len(rows) == 24
    assert len(groups) == 12, "two layers of the encoder"
    assert {group["count"] for group in groups} == {2}
    assert all(".layer.*." in group["pattern"] for group in groups)
    named = [{**rows[0], "name": "a.1.b2"}, {**rows[0], "name": "a.2.b2"}, {**rows[0], "name": "a.2.b3"}]
    assert [(g["pattern"], g["count"]) for g in group_sites(named)] == [("a.*.b2", 2), ("a.*.b3", 1)]
    apart = [rows[0], {**rows[0], "shape": [1, 1]}, {**rows[0], "treatment": "held"}]
    assert len(group_sites(apart)) == 3


def test_rows_of_an_optimizer_are_grouped_and_summed_too(tiny_stream, tmp_path, caplog):
    trainer = build(load_config(tiny_stream("gorp", optimizer={"rank": 4}, head="linear")))
    explain_sites(trainer)
    before = torch.random.get_rng_state()
    plans = trainer.explain_optimizer()
    assert torch.equal(torch.random.get_rng_state(), before)
    treated = {row["name"].split(".")[-3]: row["treatment"] for row in plans if "lora_" in row["name"]}
    assert treated == {"lora_A": "adamw", "lora_B": "adamw"}
    treated = {row["name"]: (row["treatment"], row["rank"]) for row in plans if "lora_" not in row["name"]}
    assert treated == {
        **{f"encoder.base_model.model.encoder.layer.{i}.intermediate.dense.weight": ("projected", 4) for i in (0, 1)},
        "head.blocks.0.weight": ("adamw", None),
    }
    groups = group_sites(plans)
    assert sum(group["count"] for group in groups) == len(plans) == 11
    assert {group["count"] for group in groups} == {1, 2}
    assert optimizer_line(plans) == "optimizer: 2 projected (rank 4), 9 as AdamW"
    assert optimizer_line([]) == ""
    with caplog.at_level(logging.INFO, logger="growthring"):
        result = run(load_config(tiny_stream("gorp", optimizer={"rank": 4}, head="linear")), tmp_path / "out")
    assert optimizer_line(plans) in caplog.messages
    assert result.optimizer == plans
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Optimizer: 2 projected (rank 4), 9 as AdamW" in page


def test_a_run_says_it_in_one_line(tiny_stream, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="growthring"):
        result = run(load_config(tiny_stream("pegp")), tmp_path / "out")
    line = "sites of 24 trainable tensors: pegp: 24 protected (lora_A, lora_B)"
    assert line in caplog.messages
    assert sites_line(result.sites) == line
    assert sites_line([]) == "sites: the guard does not say what it does with each tensor"


def test_a_guard_without_a_site_says_so_before_training(tiny_stream):
    config = load_config(tiny_stream("pegp", head="linear", guard={"kinds": ["lora_A"]}))
    trainer = build(config)
    for name, parameter in trainer.model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    with pytest.raises(GuardError, match="found no site of the kinds lora_A"):
        explain_sites(trainer)
