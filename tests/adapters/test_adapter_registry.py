"""Our tuners among PEFT's."""

from __future__ import annotations

import copy
import importlib
import json
import pickle

import pytest
import torch
from adapter_helpers import bert, fill, hidden, tokens
from peft import PeftConfig, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from transformers import BertConfig, BertModel

import growthring.adapters
from growthring.adapters import BottleneckConfig, PrefixTokensConfig, PromptTokensConfig
from growthring.adapters._registry import register

SMALL = {BottleneckConfig: {"r": 4}, PrefixTokensConfig: {"num_tokens": 3}, PromptTokensConfig: {"num_tokens": 3}}
OURS = list(SMALL)


@pytest.mark.parametrize("config_cls", OURS)
def test_the_type_is_a_member_like_any_other(config_cls):
    kind = config_cls().peft_type
    assert kind in list(PeftType)
    assert PeftType(kind.value) is PeftType[kind.value] is kind
    assert pickle.loads(pickle.dumps(kind)) is kind
    assert copy.deepcopy(kind) is kind
    assert isinstance(kind, str)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind] is config_cls
    assert kind.value.startswith("GROWTHRING_")  # so that who lacks this package sees what is missing


def test_registering_twice_changes_nothing():
    before = list(PeftType)
    importlib.reload(growthring.adapters)
    register("growthring_bottleneck", BottleneckConfig, object, "adapter_")
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("GROWTHRING_BOTTLENECK")] is BottleneckConfig


@pytest.mark.parametrize("config_cls", OURS)
def test_configs_go_to_json_and_back(config_cls, tmp_path):
    config = config_cls(exclude_modules=["pooler"])
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == config.peft_type.value
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, config_cls)
    assert loaded.exclude_modules == {"pooler"}


@pytest.mark.parametrize("config_cls", OURS)
def test_adapters_can_be_injected_without_a_wrapper(config_cls):
    model = bert()
    before = hidden(model, tokens())
    fill(inject_adapter_in_model(config_cls(**SMALL[config_cls]), model))
    assert not torch.allclose(hidden(model, tokens()), before)


@pytest.mark.filterwarnings("ignore:.*peft_config.* attribute")
@pytest.mark.parametrize("config_cls", OURS)
def test_transformers_loads_them(config_cls, tmp_path):
    folder = tmp_path / "base"
    bert().save_pretrained(folder)
    adapted = fill(get_peft_model(BertModel.from_pretrained(folder), config_cls(**SMALL[config_cls])))
    adapted.save_pretrained(tmp_path / "adapter")
    model = BertModel.from_pretrained(folder)
    try:
        model.load_adapter(str(tmp_path / "adapter"))
    except ImportError as error:
        pytest.skip(f"transformers and PEFT of these versions do not go together: {error}")
    torch.testing.assert_close(hidden(model, tokens()), hidden(adapted, tokens()))


def test_a_base_weight_whose_name_holds_our_prefix_stays_frozen():
    class Named(BertModel):
        def __init__(self, config):
            super().__init__(config)
            self.adapter_gate = torch.nn.Linear(4, 4)

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    adapted = get_peft_model(Named(BertConfig(vocab_size=50, **size)), BottleneckConfig())
    trains = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trains
    assert not any("gate" in n for n in trains)
