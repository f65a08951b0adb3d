from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from growthring.adapters import LargoConfig


def base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def run_with(folder, config):
    model = get_peft_model(base(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("form", ["delta", "product"])
@pytest.mark.parametrize("place", ["run", "run/adapter"])
def test_a_largo_run_becomes_a_stock_lora(place, form, cli, tmp_path):
    model = run_with(tmp_path / "run", LargoConfig(r=2, form=form, target_modules=["0", "2"]))
    result = cli("export", place, "--to", "lora", "--out", "lora")
    assert result.exit_code == 0, result.stderr
    assert f"A LoRA of rank {4 if form == 'delta' else 2}: " in result.stdout
    x = torch.randn(5, 6)
    lora = PeftModel.from_pretrained(base(), tmp_path / "lora")
    torch.testing.assert_close(lora(x), model(x), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_lora_run_is_copied(cli, tmp_path):
    run_with(tmp_path / "run", LoraConfig(r=2, target_modules=["0"]))
    assert cli("export", "run", "--out", "lora").exit_code == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "lora" / name).read_bytes() == (tmp_path / "run/adapter" / name).read_bytes()


def test_refused(refused, tmp_path):
    from peft import IA3Config

    run_with(tmp_path / "run", LargoConfig(r=2, target_modules=["0"]))
    assert "there is no such folder; did you mean 'run'?" in refused("export", "rum", "--out", "x")
    assert "--to lorra: did you mean 'lora'?" in refused("export", "run", "--to", "lorra", "--out", "x")
    assert "--out run: this is no empty folder" in refused("export", "run", "--out", "run")
    (tmp_path / "full/model").mkdir(parents=True)
    assert "holds no adapter: this run trained the model's own weights" in refused("export", "full", "--out", "x")
    (tmp_path / "empty").mkdir()
    assert "it is no run folder, or its run did not end" in refused("export", "empty", "--out", "x")
    run_with(tmp_path / "ia3", IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert "an adapter of type IA3" in refused("export", "ia3", "--out", "x")
    (tmp_path / "run/adapter/adapter_config.json").write_text("{")
    assert "cannot be read as JSON" in refused("export", "run", "--out", "x")
    assert not (tmp_path / "x").exists()


def test_folders_that_are_not_whole(refused, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from growthring.adapters.largo import export

    run_with(tmp_path / "run", LargoConfig(r=2, target_modules=["0"]))
    file = tmp_path / "run/adapter/adapter_config.json"
    good = json.loads(file.read_text())
    for wrong, message in (
        ({"peft_type": "NOPE"}, "an adapter of type NOPE; LARGO-style adapters (GROWTHRING_LARGO) and LoRA (LORA)"),
        ({"r": 3}, "is the file whole, and of this config?"),
        ({"target_modules": 3}, "LargoConfig(target_modules=3): give a list of names"),
        ({"task_type": "NOPE"}, "is no adapter's config: ValueError: Invalid task type"),
    ):
        file.write_text(json.dumps(good | wrong))
        assert message in refused("export", "run", "--out", "x")
    file.write_text('{"a":' * 5000)
    assert "cannot be read as JSON" in refused("export", "run", "--out", "x")
    assert not (tmp_path / "x").exists()
    file.write_text(json.dumps(good))

    def full(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", full)
    assert "x cannot be written: No space left on device" in refused("export", "run", "--out", "x")


def test_a_lora_whose_config_names_no_rank(cli, tmp_path):
    run_with(tmp_path / "run", LoraConfig(target_modules=["0"]))
    file = tmp_path / "run/adapter/adapter_config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "r"}))
    assert f"A LoRA of rank {LoraConfig().r}: " in cli("export", "run", "--out", "lora").stdout


def test_an_adapter_without_weights(refused, tmp_path):
    run_with(tmp_path / "run", LargoConfig(r=2, target_modules=["0"]))
    (tmp_path / "run/adapter/adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in refused("export", "run", "--out", "x")
    assert not (tmp_path / "x").exists()
