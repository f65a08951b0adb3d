"""From a model to groups: what a factory projects, with which rate and which decay."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from growthring.errors import ConfigError
from growthring.optim import GORP, GaLore, GORPFactory


class Net(nn.Module):
    """One of each kind of parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 16)
        self.down = nn.Linear(16, 12)
        self.conv = nn.Conv1d(12, 8, 3)

    def forward(self, ids):
        h = self.norm(self.embed(ids))
        return self.conv((h + self.down(torch.relu(self.up(h)))).mT).mean((1, 2))


def plans(optimizer):
    return {plan.name: plan for plan in optimizer.explain()}


def group_of(optimizer, name):
    return next(group for group in optimizer.param_groups if name in group["param_names"])


def test_what_modules_are_decides_what_is_projected():
    optimizer = GORPFactory()(Net(), lr=0.1, rank=4, weight_decay=0.5)
    found = {name: plan.treatment for name, plan in plans(optimizer).items()}
    projected = {name for name, treatment in found.items() if treatment == "projected"}
    assert projected == {"up.weight", "down.weight", "conv.weight"}
    assert set(found.values()) == {"projected", "adamw"}
    assert found["embed.weight"] == "adamw"


def test_biases_and_norms_are_spared_weight_decay():
    optimizer = GORPFactory()(Net(), lr=0.1, rank=4, weight_decay=0.5)
    for name in ("up.bias", "norm.weight", "norm.bias", "conv.bias"):
        assert group_of(optimizer, name)["weight_decay"] == 0.0
    for name in ("up.weight", "embed.weight", "conv.weight"):
        assert group_of(optimizer, name)["weight_decay"] == 0.5


def test_a_tied_embedding_is_no_matrix_to_project():
    net = nn.ModuleDict(
        {"embed": nn.Embedding(20, 12), "up": nn.Linear(12, 12), "head": nn.Linear(12, 20, bias=False)}
    )
    net["head"].weight = net["embed"].weight
    found = plans(GORPFactory()(net, rank=4))
    assert found["embed.weight"].treatment == "adamw"
    assert found["up.weight"].treatment == "projected"


@pytest.mark.parametrize("targets", [["up"], "u.", ["up", "up"]])
def test_targets_choose_among_layers(targets):
    found = plans(GORPFactory()(Net(), rank=4, targets=targets))
    assert [name for name, plan in found.items() if plan.treatment == "projected"] == ["up.weight"]


@pytest.mark.parametrize("targets", [["up", "embed"], ["nothing"], "nothing", ["norm"]])
def test_a_target_that_is_no_such_layer_is_named(targets):
    wrong = targets if isinstance(targets, str) else targets[-1]
    with pytest.raises(ConfigError, match=f"{wrong!r} names none of the 3 trainable linear and convolution layers"):
        GORPFactory()(Net(), rank=4, targets=targets)


def adapted():
    model = get_peft_model(
        nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 16)}), LoraConfig(r=4, target_modules=["a"])
    )
    model.base_model.model["b"].weight.requires_grad_(True)
    return model


def test_lora_goes_to_adamw_at_its_own_rate():
    optimizer = GORPFactory()(adapted(), lr=0.1, full_rank_lr=0.001, rank=4)
    for name, plan in plans(optimizer).items():
        lora = ".lora_" in name
        assert plan.treatment == ("adamw" if lora else "projected")
        assert group_of(optimizer, name)["lr"] == (0.1 if lora else 0.001)
    assert len(optimizer.param_groups) == 2


def test_lora_is_projected_where_it_is_named():
    found = plans(GORPFactory()(adapted(), rank=3, targets=[".lora_A.default".lstrip(".")]))
    assert [name for name, plan in found.items() if plan.treatment == "projected"] == [
        "base_model.model.a.lora_A.default.weight"
    ]


def test_nothing_to_train_and_nothing_to_project():
    frozen = Net().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        GORPFactory()(frozen)
    frozen.norm.requires_grad_(True)
    with pytest.raises(ConfigError, match="nothing would be projected"):
        GORPFactory()(frozen)


def test_frozen_parameters_are_left_out():
    net = Net()
    net.up.weight.requires_grad_(False)
    assert "up.weight" not in plans(GORPFactory()(net, rank=4))


@pytest.mark.parametrize("kind", [GORP, GaLore])
def test_it_trains(kind):
    torch.manual_seed(0)
    net, ids = Net(), torch.randint(20, (6, 9))
    optimizer = GORPFactory()(net, lr=0.02, rank=4, optimizer=kind, weight_decay=0.01)
    assert type(optimizer) is kind
    before = net(ids).square().mean().item()
    for _ in range(30):
        optimizer.zero_grad()
        net(ids).square().mean().backward()
        optimizer.step()
    assert net(ids).square().mean().item() < 0.5 * before


def test_the_layer_that_lora_is_around_has_its_own_name():
    model = adapted()
    model.base_model.model["a"].base_layer.weight.requires_grad_(True)
    found = plans(GORPFactory()(model, rank=4, targets=["a"]))
    assert [name for name, plan in found.items() if plan.treatment == "projected"] == [
        "base_model.model.a.base_layer.weight"
    ]


@pytest.mark.parametrize("kind", [GORP, GaLore])
def test_an_unknown_option_names_the_near_one(kind):
    with pytest.raises(ConfigError, match=rf"{kind.__name__} has no option 'raank'; did you mean 'rank'"):
        GORPFactory()(Net(), optimizer=kind, raank=3)
