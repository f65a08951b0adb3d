"""What can deviate, from where, and how far it is, against dense matrices; and Adam on hyper-parameters."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from deviation_helpers import KINDS, TARGETS, farthest, net, trainable, values
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import growthring as gr
from growthring.adapters import LargoConfig
from growthring.errors import ConfigError, GuardError, NumericalError
from growthring.guards.deviation import HEADS, anchors_of, find_deviations, inner
from growthring.guards.hyper import HyperAdam


def shake(model, seed=5, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return model


class Zoo(nn.Module):
    """A layer of each shape that adapters come on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 6)
        self.turned = Conv1D(7, 6)
        self.look = nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(7, 2)


# --- what is found ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_those_of_the_dense_deviation(kind):
    model = net(kind, dtype=torch.float32 if kind == "pissa" else torch.float64)
    start = {n: m.get_delta_weight("default").detach() for n, m in layers(model)}
    found = find_deviations(model)
    assert all(d.frobenius() == pytest.approx(0.0, abs=1e-6) for d in found)
    before = values(model)
    shake(model)
    dense = [m.get_delta_weight("default").detach() - start[n] for n, m in layers(model)]
    dense = dense or [p.detach() - before[n] for n, p in trainable(model).items()]
    tolerance = 1e-5 if kind == "pissa" else 1e-10
    for d, wanted in zip(found, dense, strict=True):
        spectral = torch.linalg.matrix_norm(wanted, 2) if wanted.ndim > 1 else wanted.norm()
        assert d.frobenius() == pytest.approx(float(wanted.norm()), rel=tolerance)
        assert d.spectral() == pytest.approx(float(spectral), rel=tolerance)
        assert float(d.energy().detach()) == pytest.approx(float(wanted.square().sum()), rel=2 * tolerance)


def layers(model):
    return [(n, m) for n, m in model.named_modules() if hasattr(m, "get_delta_weight")]


@pytest.mark.parametrize("kind", ["delta", "product", "lora", "weight"])
def test_the_energy_has_the_gradient_of_the_dense_one(kind):
    model = shake(net(kind)) if kind != "weight" else net(kind)
    found = find_deviations(model)
    if kind == "weight":
        shake(model)
    energy = sum(d.energy() for d in found)
    gradients = torch.autograd.grad(energy, list(trainable(model).values()), allow_unused=True)
    for p, gradient in zip(trainable(model).values(), gradients, strict=True):
        with torch.no_grad():
            where = (0,) * p.ndim
            ends = []
            for sign in (1, -1):
                p[where] += sign * 1e-5
                ends.append(float(sum(d.energy() for d in found)))
                p[where] -= sign * 1e-5
        assert float(gradient[where]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("targets", [["first", "turned"], ["words"], ["look"], ["words", "first", "turned", "look"]])
def test_lora_on_layers_of_every_shape(targets):
    model = get_peft_model(Zoo(), LoraConfig(r=3, lora_alpha=5, target_modules=targets)).double()
    found = find_deviations(model)
    assert [d.kind for d in found] == ["lora"] * len(targets)
    shake(model)
    for d, (name, layer) in zip(found, layers(model), strict=True):
        dense = layer.get_delta_weight("default").detach()
        assert d.name == f"{name}.default"
        assert d.frobenius() == pytest.approx(float(dense.norm()), rel=1e-10)
        assert d.spectral() == pytest.approx(float(torch.linalg.matrix_norm(dense.flatten(1), 2)), rel=1e-9)


@pytest.mark.parametrize("form", ["delta", "product"])
def test_largo_on_layers_of_every_shape(form):
    targets = ["words", "first", "turned"][form == "product" :]  # a product is not made on an embedding
    model = get_peft_model(Zoo(), LargoConfig(r=3, form=form, target_modules=targets)).double()
    found = find_deviations(model)
    assert [len(d.tensors) for d in found] == [2 if form == "delta" else 1] * len(targets)
    shake(model)
    for d, (_, layer) in zip(found, layers(model), strict=True):
        dense = layer.get_delta_weight("default").detach()
        assert d.frobenius() == pytest.approx(float(dense.norm()), rel=1e-10)


def test_anchors_are_copies_of_what_does_not_start_at_zero():
    lora = find_deviations(net("lora"))
    assert [[t.anchor is None for t in d.tensors] for d in lora] == [[False, True]] * 3
    assert all(anchor is None for anchor in anchors_of(find_deviations(net("delta"))).values())
    model = net("weight")
    found = find_deviations(model)
    shake(model)
    assert farthest(values(net("weight")), {t.name: t.anchor for d in found for t in d.tensors}) == 0.0


def test_known_anchors_are_kept_and_zero_is_one():
    model = net("lora")
    known = anchors_of(find_deviations(model))
    shake(model)
    again = find_deviations(model, anchors=known)
    assert [[t.anchor is None for t in d.tensors] for d in again] == [[False, True]] * 3
    fresh = find_deviations(model)
    assert not any(t.anchor is None for d in fresh for t in d.tensors)
    with pytest.raises(GuardError, match=r"has shape \(10, 12\) now, and its start was kept as \(9, 12\)"):
        find_deviations(net("weight"), anchors={"0.weight": torch.zeros(9, 12)})


def test_heads_are_left_out_by_name():
    model = Zoo()
    names = {t.name for d in find_deviations(model) for t in d.tensors}
    assert "first.weight" in names
    assert not any(n.startswith("head.") for n in names)
    assert any(n.startswith("head.") for d in find_deviations(model, None) for n in (t.name for t in d.tensors))
    assert {t.name for d in find_deviations(model, r"^(words|look|turned|first\.bias|head)") for t in d.tensors} == {
        "first.weight"
    }
    peft = get_peft_model(Zoo(), LoraConfig(r=2, target_modules=["first"], modules_to_save=["turned", "head"]))
    assert all("lora_" in t.name for d in find_deviations(peft) for t in d.tensors)


@pytest.mark.parametrize(
    "name",
    ["head.weight", "model.lm_head.weight", "a.modules_to_save.default.x", "classifier.dense.weight", "score.bias"],
)
def test_names_of_heads(name):
    assert re.search(HEADS, name)


@pytest.mark.parametrize(
    "name", ["multihead_attn.weight", "layer.0.attention.head_proj.weight", "subheader.weight", "scores.weight"]
)
def test_names_that_only_look_like_heads(name):
    assert not re.search(HEADS, name)


def test_wrappers_do_not_change_names():
    model = net("delta")
    compiled = torch.compile(model, backend="eager")
    assert inner(compiled) is model
    names = [[t.name for d in find_deviations(m) for t in d.tensors] for m in (model, compiled)]
    assert names[0] == names[1]


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    assert [d.name for d in find_deviations(model)] == ["0.weight"]


def test_an_injected_adapter_that_moves_the_base_starts_at_no_distance():
    """PEFT without a PeftModel around: the start of PiSSA is known from the model's own configuration."""
    base = net("weight", dtype=torch.float32)
    found = []
    for start in (True, "pissa"):
        config = LoraConfig(r=3, lora_alpha=3, init_lora_weights=start, target_modules=TARGETS)
        found.append(find_deviations(inject_adapter_in_model(config, copy.deepcopy(base))))
    plain, moved = found
    assert all(d.b0 is None for d in plain)
    assert all(d.b0 is not None for d in moved)
    assert all(d.frobenius() == 0.0 for d in plain + moved)


@pytest.mark.parametrize("kind", ["delta", "product", "lora", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_has_no_distance(kind, value):
    model = net(kind)
    start = values(model)
    found = find_deviations(model)
    with torch.no_grad():
        list(trainable(model).values())[-1].flatten()[0] = value
    for measure in (found[-1].frobenius, found[-1].spectral, lambda: gr.deviation(model, start)):
        with pytest.raises(NumericalError, match="has NaN or infinity in it"):
            measure()


def test_frozen_factors_do_not_train_but_count():
    model = net("lora")
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    found = find_deviations(model)
    shake(model)
    assert all(len(d.tensors) == 1 for d in found)
    for d, (_, layer) in zip(found, layers(model), strict=True):
        assert d.frobenius() == pytest.approx(float(layer.get_delta_weight("default").detach().norm()))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: net("weight").requires_grad_(False), "no parameter of the model is trainable"),
        (lambda: nn.Linear(3, 2, device="meta"), "meta device"),
        (
            lambda: get_peft_model(Zoo(), LoraConfig(r=2, target_modules=["first"], use_dora=True)),
            r"first has LoRA with the variant Dora.*use_dora=False",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(make, said):
    with pytest.raises(GuardError, match=said):
        find_deviations(make())


def test_a_bad_expression():
    with pytest.raises(ConfigError, match=r"exclude='\(': no|exclude='\(' is no regular expression"):
        find_deviations(net("delta"), "(")
    with pytest.raises(ConfigError, match="exclude=3"):
        find_deviations(net("delta"), 3)


# --- the table ----------------------------------------------------------------------------------------------------


def test_several_active_adapters_are_added_up():
    model = net("delta")
    model.add_adapter("second", LargoConfig(r=2, init="minor", target_modules=TARGETS))
    model.base_model.set_adapter(["default", "second"])
    shake(model.double())
    table = gr.deviation(model)
    for row, (name, layer) in zip(table.layers, layers(model), strict=True):
        dense = sum(layer.get_delta_weight(a) for a in ("default", "second")).detach()
        assert row.name == name
        assert row.frobenius == pytest.approx(float(dense.norm()), rel=1e-9)
        assert row.spectral == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-9)
    assert table.total == pytest.approx(math.sqrt(sum(row.frobenius**2 for row in table.layers)))
    assert table.to_dict()["layers"][0]["name"] == table.layers[0].name
    model.set_adapter("second")
    alone = gr.deviation(model)
    assert alone.total < table.total


def test_adapters_need_not_train_and_count_as_they_are_scaled():
    model = shake(net("delta"))
    whole = gr.deviation(model).total
    for p in model.parameters():
        p.requires_grad_(False)
    assert gr.deviation(model).total == whole
    for _, layer in layers(model):
        layer.scale_layer(0.25)
    assert gr.deviation(model).total == pytest.approx(0.25 * whole)


def test_plain_weights_need_their_pretrained_values():
    model = Zoo()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    shake(model)
    with pytest.raises(
        GuardError, match=r"\d+ plain weights train \(the first: words.weight\).*pass \{name: tensor\}"
    ):
        gr.deviation(model)
    table = gr.deviation(model, base)
    assert {row.name for row in table.layers} == {n for n in base if not n.startswith("head.")}
    for row in table.layers:
        d = model.get_parameter(row.name).detach().double() - base[row.name].double()
        assert row.frobenius == pytest.approx(float(d.norm()), rel=1e-6)
        assert row.spectral == pytest.approx(
            float(torch.linalg.matrix_norm(d.flatten(1), 2) if d.ndim > 1 else d.norm()), rel=1e-6
        )
    assert gr.deviation(model, base, exclude=None).total > table.total
    with pytest.raises(GuardError, match=r"first.weight has shape .*\(1, 8\)"):
        gr.deviation(model, base | {"first.weight": torch.zeros(1, 8)})


def test_adapters_and_weights_together():
    model = get_peft_model(Zoo(), LargoConfig(r=2, target_modules=["first"], modules_to_save=["turned"]))
    base = dict(model.named_parameters())
    base = {n: p.detach().clone() for n, p in base.items()}
    shake(model)
    layer = next(m for _, m in layers(model))
    table = gr.deviation(model, base, exclude=r"head")
    moved = [row for row in table.layers if row.frobenius > 0]
    dense = layer.get_delta_weight("default").detach()
    assert moved[0].frobenius == pytest.approx(float(dense.norm()), rel=1e-5)
    assert len(moved) == 3
    assert all("modules_to_save" in row.name for row in moved[1:])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: net("weight").requires_grad_(False), "nothing to measure"),
        (lambda: shake(net("lora")).merge_and_unload().requires_grad_(False), "nothing to measure"),
        (lambda: net("pissa", dtype=torch.float32), "taken out of the base weight"),
    ],
)
def test_what_has_no_table(make, said):
    with pytest.raises(GuardError, match=said):
        gr.deviation(make())


def test_merged_adapters_are_refused():
    model = shake(net("lora"))
    model.merge_adapter()
    with pytest.raises(GuardError, match="merged into 3 layers"):
        gr.deviation(model)


# --- Adam on hyper-parameters -------------------------------------------------------------------------------------


def test_directions_are_those_of_torchs_adam():
    adam, p = HyperAdam(3, (0.8, 0.95)), nn.Parameter(torch.zeros(3, dtype=torch.float64))
    plain = torch.optim.Adam([p], lr=1.0, betas=(0.8, 0.95), eps=1e-30)
    generator, ours = torch.Generator().manual_seed(0), torch.zeros(3, dtype=torch.float64)
    for _ in range(20):
        p.grad = torch.randn(3, generator=generator, dtype=torch.float64)
        ours -= adam.direction(p.grad)
        plain.step()
    assert torch.allclose(ours, p.detach(), rtol=1e-12)


def test_tiny_hyper_gradients_count_in_full():
    adam = HyperAdam(2)
    assert adam.direction(torch.tensor([1e-22, -1e20])).tolist() == pytest.approx([1.0, -1.0])


def test_entries_that_rest_keep_their_state_whatever_comes():
    adam = HyperAdam(2)
    adam.direction(torch.tensor([1.0, 2.0]))
    before = adam.state_dict()
    ahead = adam.direction(torch.tensor([float("nan"), 1.0]), torch.tensor([False, True]))
    assert ahead[0] == 0.0
    assert all(adam.state_dict()[k][0] == before[k][0] for k in before)
    assert adam.count.tolist() == [1.0, 2.0]
    other = HyperAdam(2)
    other.load_state_dict(adam.state_dict())
    assert torch.equal(other.direction(torch.ones(2)), adam.direction(torch.ones(2)))
    assert HyperAdam(0).direction(torch.zeros(0)).numel() == 0
