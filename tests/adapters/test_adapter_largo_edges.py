from __future__ import annotations

import copy

import pytest
import torch
from largo_helpers import IDS, Kinds, kinds, moved
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from growthring.adapters import LargoConfig, start_from_activations
from growthring.errors import ConfigError, DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
    pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute"),
]
FORMS = ["delta", "residual", "product"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("form", FORMS)
def test_it_stands_on_another_tuner_s_layer(form):
    model = get_peft_model(Kinds(), LoraConfig(r=2, target_modules=["wide"], init_lora_weights=False))
    expected = model(IDS)
    assert not torch.allclose(expected, Kinds()(IDS), atol=1e-3)
    inject_adapter_in_model(LargoConfig(r=3, target_modules=["wide"], form=form), model)
    torch.testing.assert_close(model(IDS), expected, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_hooks_of_the_base_layer_are_called(form):
    model = moved(kinds(form=form))
    expected, calls = model(IDS), []
    handle = model.base_model.model.wide.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(IDS), expected, **CLOSE)
    handle.remove()
    assert calls == [1]
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_subclass_of_linear_does_is_done(form):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    base, x = nn.Sequential(Doubled(6, 5)), torch.randn(3, 6)
    expected = base(x)
    torch.testing.assert_close(get_peft_model(base, LargoConfig(r=2, form=form, target_modules=["0"]))(x), expected)


@pytest.mark.parametrize("how", ["in place", "trained"])
@pytest.mark.parametrize("form", FORMS)
def test_a_base_weight_that_is_written_to_counts_at_once(form, how):
    model = moved(kinds(form=form))
    model(IDS)
    weight = model.base_model.model.wide.base_layer.weight
    if how == "in place":
        with torch.no_grad():
            weight.mul_(2)
    else:
        weight.requires_grad_(True)
        model(IDS).sum().backward()
        torch.optim.SGD([weight], lr=1.0).step()
        weight.requires_grad_(False)
    fresh = moved(kinds(form=form))
    fresh.base_model.model.wide.base_layer.weight.data = weight.detach().clone()
    torch.testing.assert_close(model(IDS), fresh(IDS), **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_of_the_same_name_replaces_the_whole(form):
    base = Kinds()
    inject_adapter_in_model(LargoConfig(r=3, target_modules=["wide"], form="residual"), base)
    base(IDS)  # makes the residual weight
    inject_adapter_in_model(LargoConfig(r=2, target_modules=["wide"], form=form, init="minor"), base)
    torch.testing.assert_close(base(IDS), Kinds()(IDS), **CLOSE)
    moved(base)
    alone = moved(get_peft_model(Kinds(), LargoConfig(r=2, target_modules=["wide"], form=form, init="minor")))
    torch.testing.assert_close(base(IDS), alone(IDS), **CLOSE)


def test_low_memory_with_half_of_the_start_is_no_silent_start(tmp_path):
    model = moved(kinds())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "wide.largo_B0" not in key}, path)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(Kinds(), tmp_path, low_cpu_mem_usage=True)
    with pytest.raises(ConfigError, match=r"wide: .* its A0 and B0 were not loaded"):
        loaded(IDS)


def test_a_trained_adapter_keeps_its_start():
    model = kinds(init="activation")
    start_from_activations(model, [IDS])
    start_from_activations(model, [IDS[:3]])  # nothing was trained yet
    expected = moved(model)(IDS)
    with pytest.raises(ConfigError, match=r"'default' has its start and was trained from there \(layer conv\)"):
        start_from_activations(model, [IDS])
    assert torch.equal(model(IDS), expected)


def test_a_layer_that_no_batch_calls():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x):
            return self.used(x)

    model = get_peft_model(Idle(), LargoConfig(r=2, init="activation", target_modules=["used", "idle"]))
    with pytest.raises(DataError, match="idle was not called by any batch"):
        start_from_activations(model, [torch.randn(9, 6)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_adapters_merge_in_any_order_and_part_by_part(form, dtype):
    model = kinds(dtype, form=form)
    model.add_adapter("b", LargoConfig(r=2, target_modules=["wide", "out"], form="product", init="minor"))
    model.base_model.set_adapter(["default", "b"])
    moved(model).eval()
    before, expected = copy.deepcopy(model.state_dict()), model(IDS)
    outputs = []
    for steps in ([["default", "b"]], [["b", "default"]], [["default"], ["b"]], [["b"], ["default"]]):
        for names in steps:
            model.merge_adapter(names, safe_merge=True)
        outputs.append(model(IDS))
        model.unmerge_adapter()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert torch.equal(model(IDS), expected)
    close = CLOSE if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    for output in outputs:
        torch.testing.assert_close(output, expected, **close)


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_of_one_number(form):
    base = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 4))
    x = torch.randn(3, 1)
    for more in ({}, {"init": "minor"}, {"svd_iterations": 2}):
        config = LargoConfig(r=1, target_modules=["0", "1"], form=form, **more)
        torch.testing.assert_close(get_peft_model(copy.deepcopy(base), config)(x), base(x))
