from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from adapter_helpers import gpt2, llama
from largo_helpers import ALL, IDS, Kinds, kinds, layers, moved
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from growthring.adapters import BottleneckConfig, LargoConfig, adapter_as_lora, save_as_lora, start_from_activations
from growthring.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")  # a Conv1D beside linear layers


def as_lora(model, folder, how):
    """The model's adapter as a LoRA, from memory or from what it saved."""
    if how == "memory":
        return save_as_lora(model, folder / "lora")
    model.save_pretrained(folder / "own")
    return adapter_as_lora(folder / "own", folder / "lora")


@pytest.mark.parametrize("how", ["memory", "folder"])
@pytest.mark.parametrize(
    ("config", "rank"),
    [
        ({"target_modules": ALL, "alpha": 5}, 6),
        ({"target_modules": ALL, "init": "minor"}, 6),
        ({"form": "residual", "alpha": 1}, 6),
        ({"form": "product", "alpha": 7}, 3),
        ({"init": "activation"}, 3),
        ({"init": "activation", "form": "product"}, 3),
        ({"target_modules": r"wide|out", "exclude_modules": ["out"]}, 6),
    ],
)
def test_the_lora_gives_the_same_outputs(config, rank, how, tmp_path):
    model = kinds(**config)
    if config.get("init") == "activation":
        start_from_activations(model, [IDS])
    moved(model)
    folder = as_lora(model, tmp_path, how)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["peft_type"], written["r"]) == ("LORA", rank)
    lora = PeftModel.from_pretrained(Kinds(), folder)
    torch.testing.assert_close(lora(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(lora(IDS), Kinds()(IDS), atol=1e-3)
    torch.testing.assert_close(lora.merge_and_unload()(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    assert sum("lora_A" in key or "lora_embedding_A" in key for key in lora.state_dict()) == 0


def test_it_is_exact_in_double_precision():
    from growthring.adapters.largo.export import as_lora as convert

    model = moved(kinds(torch.float64, alpha=5))
    state = {key.replace(".default", ""): value for key, value in model.state_dict().items() if "largo" in key}
    config, factors = convert(model.peft_config["default"], state, {})
    for name, layer in layers(model).items():
        product = factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
        deviation = layer._base().oriented(layer.get_delta_weight("default"))
        torch.testing.assert_close(config.lora_alpha / config.r * product, deviation, atol=1e-12, rtol=1e-12)


def test_a_scale_that_was_set_is_kept(tmp_path):
    model = moved(kinds())
    for layer in layers(model).values():
        layer.scale_layer(0.25)
    lora = PeftModel.from_pretrained(Kinds(), save_as_lora(model, tmp_path))
    torch.testing.assert_close(lora(IDS), model(IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["memory", "folder"])
def test_whole_modules_are_carried_over(how, tmp_path):
    model = moved(kinds(target_modules=["conv"], modules_to_save=["wide", "emb"]))
    lora = PeftModel.from_pretrained(Kinds(), as_lora(model, tmp_path, how))
    torch.testing.assert_close(lora(IDS), model(IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["memory", "folder"])
def test_one_of_several_adapters(how, tmp_path):
    model = kinds()
    model.add_adapter("other", LargoConfig(r=2, form="product", target_modules=["wide"]))
    moved(model)
    model.set_adapter("other")
    model.save_pretrained(tmp_path / "own")
    folder = tmp_path / "lora"
    if how == "memory":
        save_as_lora(model, folder, "other")
    else:
        adapter_as_lora(tmp_path / "own" / "other", folder)
    assert not any("largo" in key for key in load_file(folder / "adapter_model.safetensors"))
    lora = PeftModel.from_pretrained(Kinds(), folder)
    torch.testing.assert_close(lora(IDS), model(IDS), atol=1e-5, rtol=1e-5)


def test_half_precision_adapters_are_exported_in_float32(tmp_path):
    model = moved(kinds(torch.bfloat16))
    folder = save_as_lora(model, tmp_path)
    assert {value.dtype for value in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    lora = PeftModel.from_pretrained(Kinds(torch.bfloat16), folder)
    torch.testing.assert_close(lora(IDS), model(IDS), atol=0.02, rtol=0.02)


def test_it_loads_where_growthring_is_not(tmp_path):
    cases = {}
    for make in (llama, gpt2):
        base, folder = make(), tmp_path / make.__name__
        base.save_pretrained(folder / "base")
        model = moved(get_peft_model(base, LargoConfig(r=4, target_modules="all-linear", alpha=2))).eval()
        prompt = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(1))
        save_as_lora(model, folder / "lora")
        save_file({"prompt": prompt, "wanted": model(input_ids=prompt)[0].detach()}, folder / "case")
        cases[str(folder)] = type(base).__name__
    script = f"""
import sys
sys.modules["growthring"] = None  # importing it is an error
import peft, torch, transformers
from peft import PeftModel
from safetensors.torch import load_file
for folder, name in {cases!r}.items():
    load = lambda: getattr(transformers, name).from_pretrained(folder + "/base").eval()
    case = load_file(folder + "/case")
    models = [PeftModel.from_pretrained(load(), folder + "/lora").eval()]
    if peft.__version__ >= "0.19":  # transformers 5 loads no adapter at all with older ones
        models.append(load())
        models[1].load_adapter(folder + "/lora")
    for model in models:
        torch.testing.assert_close(model(input_ids=case["prompt"])[0], case["wanted"], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(load()(input_ids=case["prompt"])[0], case["wanted"], atol=1e-3)
assert not any(name.startswith("growthring.") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_peft_s_own_conversion_agrees(tmp_path):
    peft = pytest.importorskip("peft", minversion="0.19")
    if not hasattr(peft, "save_as_lora"):
        pytest.skip("this version of peft has no conversion to LoRA")
    model = moved(kinds(form="product"))
    peft.save_as_lora(tmp_path, model, rank=3)
    lora = PeftModel.from_pretrained(Kinds(), tmp_path)
    torch.testing.assert_close(lora(IDS), model(IDS), atol=1e-5, rtol=1e-5)


def test_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs a PeftModel or a module that holds one; found 0"):
        save_as_lora(Kinds(), tmp_path)
    with pytest.raises(ConfigError, match=r"no LARGO-style adapter 'other'; it has \['default'\]"):
        save_as_lora(kinds(), tmp_path, "other")
    stock = get_peft_model(Kinds(), LoraConfig(r=2, target_modules=["wide"]))
    with pytest.raises(ConfigError, match=r"it has none\. Other adapters are saved with save_pretrained"):
        save_as_lora(stock, tmp_path)
    with pytest.raises(ConfigError, match="has seen no activations yet"):
        save_as_lora(kinds(init="activation"), tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"holds no adapter_model\.safetensors"):
        adapter_as_lora(tmp_path, tmp_path / "lora")
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ConfigError, match="holds a LoraConfig; only adapters of LargoConfig"):
        adapter_as_lora(tmp_path / "stock", tmp_path / "lora")
    holder = nn.ModuleDict({"model": moved(kinds())})
    save_as_lora(holder, tmp_path / "held")
    assert PeftModel.from_pretrained(Kinds(), tmp_path / "held")(IDS).shape == (5, 4, 6)


def test_a_folder_that_is_not_whole(tmp_path):
    moved(kinds()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    save_file({key: value for key, value in state.items() if "wide.largo_B.weight" not in key}, path)
    with pytest.raises(
        DataError, match=r"wide: the file holds \['A', 'A0', 'B0'\], .* made of \['A', 'A0', 'B', 'B0'\]"
    ):
        adapter_as_lora(tmp_path, tmp_path / "lora")
    save_file({key: value for key, value in state.items() if "largo_" not in key} | {"x": torch.ones(1)}, path)
    with pytest.raises(DataError, match="holds no layer of ours"):
        adapter_as_lora(tmp_path, tmp_path / "lora")
    path.write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be read"):
        adapter_as_lora(tmp_path, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def damaged(state, damage):
    """A state dict, of which one layer or all are not what they should be."""
    key = "base_model.model.wide.largo_"
    if damage == "no A0":  # the layer was left out of the LoRA, silently
        del state[key + "A0"]
    elif damage == "no B0":  # a LoRA of two ranks, which loads nowhere
        del state[key + "B0"]
    elif damage == "narrow":
        state[key + "A.weight"] = state[key + "A.weight"][:, :3]
    elif damage == "flat":
        state[key + "A0"] = state[key + "A0"].flatten()
    elif damage == "scalar":
        state[key + "B.weight"] = state[key + "B.weight"][0, 0]
    elif damage == "whole numbers":
        state[key + "A0"] = state[key + "A0"].int()
    else:
        state = {name: value[:2] if "largo_A" in name else value[:, :2] for name, value in state.items()}
    return {name: value.contiguous() for name, value in state.items()}


@pytest.mark.parametrize("damage", ["no A0", "no B0", "narrow", "flat", "scalar", "whole numbers", "all of rank 2"])
def test_factors_that_do_not_fit(damage, tmp_path):
    moved(kinds()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(damaged(load_file(path), damage), path)
    with pytest.raises(DataError, match="is the file whole, and of this config"):
        adapter_as_lora(tmp_path, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("written", "kind", "message"),
    [
        ({"form": "product"}, DataError, r"made of \['A0', 'B'\]"),
        ({"r": 10**9}, DataError, "where r=1000000000"),
        ({"r": "3"}, ConfigError, r"adapter_config\.json: LargoConfig\(r='3'\)"),
        ({"peft_type": "NOPE"}, DataError, r"adapter_config\.json is no adapter's config: KeyError: 'NOPE'"),
        ({"peft_type": ["LORA"]}, DataError, "is no adapter's config"),
        ({"task_type": "NOPE"}, DataError, "is no adapter's config"),
        ([], DataError, "is no adapter's config"),
        (None, DataError, r"holds no adapter_config\.json"),  # PEFT would ask a hub
    ],
)
def test_configs_that_do_not_fit(written, kind, message, tmp_path):
    moved(kinds()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    if isinstance(written, dict):
        written = json.loads(path.read_text()) | written
    path.unlink() if written is None else path.write_text(json.dumps(written))
    with pytest.raises(kind, match=message):
        adapter_as_lora(tmp_path, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_an_adapter_without_its_start_is_not_exported(tmp_path):
    kinds(init="activation").save_pretrained(tmp_path)
    with pytest.raises(DataError, match="was saved before it had a start"):
        adapter_as_lora(tmp_path, tmp_path / "lora")


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # peft before 0.19
def test_other_tuners_may_not_be_exported_by_it(tmp_path):
    from adapter_helpers import vit

    get_peft_model(vit(), BottleneckConfig(r=4)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="BottleneckConfig; only adapters of LargoConfig"):
        adapter_as_lora(tmp_path, tmp_path / "lora")
