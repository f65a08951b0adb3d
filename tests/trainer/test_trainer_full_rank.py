"""Base weights that train beside LoRA: which ones, at which rate, and what the run folder then holds."""

from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from test_trainer_folder import TEXTS, embeddings
from torch import nn
from trainer_helpers import arguments, differing, stream_of, weights
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import growthring as gr
from growthring.backbones import map_modules
from growthring.errors import ConfigError
from growthring.optim import GORP, GaLore, GORPFactory
from growthring.trainer.full_rank import unfreeze
from growthring.trainer.optimizing import explain_optimizer, resolve, separate

UP = tuple(f"encoder.layer.{i}.intermediate.dense" for i in range(2))
QUERY = tuple(f"encoder.layer.{i}.attention.self.query" for i in range(2))
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 20}


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZE))


def with_lora(model=None, targets=("query", "value"), **settings):
    return get_peft_model(model or bert(), LoraConfig(r=2, target_modules=list(targets), **settings))


def trained_base_weights(model):
    found = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    return [n.removeprefix("base_model.model.").replace(".base_layer", "").removesuffix(".weight") for n in found]


# ------------------------------------------------------------------------------------------ which weights


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("mlp_up", UP),
        ("intermediate.dense", UP),
        (["encoder.layer.1.intermediate.dense"], UP[1:]),
        (["layer.0.intermediate.dense", "encoder.layer.1.intermediate.dense"], UP),
        (["query"], QUERY),
        (["query", "intermediate.dense"], (*QUERY, *UP)),
    ],
)
def test_weights_are_found_by_name_and_role(wanted, expected):
    model = with_lora()
    found = unfreeze(model, wanted)
    assert set(found) == set(expected)
    assert sorted(trained_base_weights(model)) == sorted(expected)
    for name, weight in found.items():
        assert weight is model.get_base_model().get_submodule(name).weight
    assert any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_a_role_and_all_linear_leave_out_what_lora_adapts():
    roles = map_modules(bert())
    adapted = {*roles.linears("query"), *roles.linears("value")}
    assert set(unfreeze(with_lora(), "all-linear")) == set(roles.linears("all")) - adapted, "and the unused pooler"
    assert set(unfreeze(with_lora(), "attention_input")) == set(roles.linears("key"))
    with pytest.raises(ConfigError, match="full_rank='query': LoRA adapts every one of these 2 layers"):
        unfreeze(with_lora(), "query")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["qeury"], "full_rank: the model has no linear layer 'qeury'; did you mean 'query'"),
        ("mlp_pu", "full_rank: the model has no linear layer 'mlp_pu'; did you mean 'mlp_up'"),
        ("mlp_gate", "no linear layers of role 'mlp_gate'"),
        (["query", "word_embeddings"], "no linear layer 'word_embeddings'"),
        (["lora_A.default"], "no linear layer 'lora_A.default'"),
        (["uery"], "no linear layer 'uery'"),
        ([], "full_rank names no layer"),
        ([3], "names of linear layers are needed, not 3"),
        (["pooler.dense"], "no loss reaches pooler.dense"),
    ],
)
def test_names_that_cannot_train_are_refused(wanted, said):
    with pytest.raises(ConfigError, match=said):
        unfreeze(with_lora(), wanted)


def test_a_tied_weight_is_refused_and_nothing_trains():
    model = bert()
    model.encoder.layer[1].intermediate.dense.weight = model.encoder.layer[0].intermediate.dense.weight
    wrapped = with_lora(model)
    with pytest.raises(ConfigError, match=r"layer.0.intermediate.dense is tied to encoder.layer.1.*Untie it"):
        unfreeze(wrapped, "mlp_up")
    assert trained_base_weights(wrapped) == []


def test_a_quantised_weight_is_refused():
    model = bert()
    dense = model.encoder.layer[0].intermediate.dense
    dense.weight = nn.Parameter(dense.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="is quantised and cannot train"):
        unfreeze(with_lora(model), [UP[0]])


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ("linear", "beside a LoRA adapter, and there is none"),
        (None, "beside a LoRA adapter, and there is none"),
        (IA3Config(target_modules=["key"], feedforward_modules=[]), "and this one is IA3"),
    ],
)
def test_without_lora_it_is_refused(build, adapter, said):
    with pytest.raises(ConfigError, match=said):
        build(adapter=adapter, full_rank="mlp_up")


def test_a_rate_needs_weights_and_must_be_one(build):
    with pytest.raises(ConfigError, match=r"full_rank_lr=0\.1 has no effect without full_rank"):
        build(full_rank_lr=0.1)
    for rate in (0.0, -1.0, float("nan"), True, "fast"):
        with pytest.raises(ConfigError, match=r"full_rank_lr=.*a number above 0 is needed"):
            build(full_rank=["intermediate.dense"], full_rank_lr=rate)


# --------------------------------------------------------------------------------------------- at which rate


def adapter():
    return LoraConfig(r=4, target_modules=["query", "value"])


def movement(trainer):
    before = weights(trainer)
    trainer.fit()
    after = weights(trainer)
    return before, after, differing(before, after)


def test_they_train_and_nothing_else_does(build):
    _, _, moved = movement(build(adapter=adapter(), full_rank="mlp_up", head="label-text"))
    base = [n for n in moved if "lora_" not in n]
    assert sorted(base) == sorted(f"encoder.base_model.model.{name}.weight" for name in UP)
    assert any("lora_A" in n for n in moved)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_rate_of_their_own_scales_their_steps(build, optim):
    steps = {}
    for rate in (None, 1e-2, 1e-4):
        before, after, _ = movement(
            build(
                stream_of(1), adapter=adapter(), full_rank="mlp_up", full_rank_lr=rate,
                args={"max_steps": 1, "optim": optim, "max_grad_norm": 0.0},
            )
        )  # fmt: skip
        name = f"encoder.base_model.model.{UP[0]}.weight"
        steps[rate] = (after[name] - before[name], {n: after[n] for n in after if "lora_" in n})
    assert torch.equal(steps[None][0], steps[1e-2][0]), "the same rate is the same step"
    assert torch.allclose(steps[1e-2][0], steps[1e-4][0] * 100, rtol=0.01, atol=2e-6)
    assert steps[1e-2][0].abs().max() > 5e-5
    assert all(torch.equal(steps[1e-2][1][n], steps[1e-4][1][n]) for n in steps[1e-2][1]), "LoRA keeps its own"


@pytest.mark.parametrize("named", [False, True])
def test_groups_are_split_with_all_their_settings(named):
    parts = {name: nn.Parameter(torch.zeros(2)) for name in "abcd"}
    one, two = (list(parts.items())[:3], list(parts.items())[3:])
    groups = [
        {"params": one if named else [p for _, p in one], "weight_decay": 0.5},
        {"params": two if named else [p for _, p in two], "lr": 3.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    separate(optimizer, [parts["b"], parts["d"]], 0.25)
    told = [([id(p) for p in g["params"]], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    ids = {name: id(p) for name, p in parts.items()}
    assert told == [([ids["a"], ids["c"]], 1.0, 0.5), ([ids["d"]], 0.25, 0.01), ([ids["b"]], 0.25, 0.5)]
    assert [g.get("param_names") for g in optimizer.param_groups] == (
        [["a", "c"], ["d"], ["b"]] if named else [None] * 3
    )


def test_schedules_act_on_both_rates(build):
    seen = []

    class Watch(gr.trainer.continual.TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append([group["lr"] for group in optimizer.param_groups if group["params"]])

    build(
        stream_of(1), adapter=adapter(), full_rank="mlp_up", full_rank_lr=1e-4, callbacks=[Watch()],
        args={"max_steps": 2, "lr_scheduler_type": "linear"},
    ).fit()  # fmt: skip
    assert sorted(set(seen[0])) == pytest.approx([1e-4, 1e-2])
    assert sorted(set(seen[1])) == pytest.approx([5e-5, 5e-3])


# -------------------------------------------------------------------------------------------- the run folder


@pytest.mark.parametrize("wanted", ["mlp_up", ["query", "output.dense"]])
def test_the_folder_loads_without_growthring(build, tmp_path, tiny_encoder, wanted):
    trainer = build(adapter=adapter(), full_rank=wanted, full_rank_lr=1e-3, output_dir=tmp_path / "run")
    trainer.fit()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "results.json", "log.jsonl", "model", "head.json", "head.safetensors",
    }  # fmt: skip
    plain = AutoModel.from_pretrained(str(tmp_path / "run" / "model"))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "run" / "model"))
    ours, theirs = embeddings(trainer.model.encoder, tokenizer), embeddings(plain, tokenizer)
    assert torch.allclose(ours, theirs, atol=1e-5)
    untouched = embeddings(AutoModel.from_pretrained(str(tiny_encoder)), tokenizer)
    assert not torch.allclose(ours, untouched, atol=1e-2), "and it is not what the run began with"
    assert len(TEXTS) > 1
    assert not any("lora" in key for key in plain.state_dict())
    assert any("lora_" in n for n, _ in trainer.model.named_parameters()), "the trainer's own model keeps its adapter"


def test_results_say_what_trained_whole(build, tmp_path):
    trainer = build(adapter=adapter(), full_rank="mlp_up", full_rank_lr=1e-3, output_dir=tmp_path / "run")
    result = trainer.fit()
    stored = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert stored["full_rank"] == list(UP) == result.full_rank
    assert stored["config"]["full_rank"] == {"layers": list(UP), "lr": 1e-3}
    assert stored["optimizer"] == []
    plain = build(adapter=adapter()).fit().to_dict()
    assert plain["full_rank"] == []
    assert plain["config"]["full_rank"] is None


# ------------------------------------------------------------------------------------------------- factories


class Factory:
    """What ``transformers.Trainer`` calls as ``Factory()(model, **kwargs)``."""

    def __call__(self, model, lr, *, weight_decay=0.0, momentum=0.0):
        return torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay, momentum=momentum
        )


class Bare:
    def __call__(self, model, **settings):
        assert settings == {}
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def test_a_factory_gets_rate_and_decay_of_the_arguments(build):
    args = arguments(learning_rate=0.5, weight_decay=0.25)
    assert resolve((Factory, {"momentum": 0.9}), args) == (
        Factory, {"lr": 0.5, "weight_decay": 0.25, "momentum": 0.9},
    )  # fmt: skip
    assert resolve((Factory, {"lr": 1.0, "weight_decay": 0.0}), args)[1] == {"lr": 1.0, "weight_decay": 0.0}
    assert resolve((torch.optim.SGD, {}), args)[1] == {"lr": 0.5}, "the Trainer gives a class its decay"
    assert resolve((Bare, {}), args)[1] == {}
    given = {"momentum": 0.5}
    build(optimizer=(Factory, given)).fit()
    assert given == {"momentum": 0.5}, "not changed"


def test_a_factory_trains_as_its_class_does(build):
    settings = {"args": {"weight_decay": 0.0}, "seed": 3}
    made = weights_after(build(optimizer=(Factory, {}), **settings))
    plain = weights_after(build(optimizer=(torch.optim.SGD, {}), **settings))
    assert differing(made, plain) == []
    assert differing(made, weights_after(build(optimizer=(Factory, {"momentum": 0.9}), **settings)))
    build(optimizer=(Bare, {}), **settings).fit()


def weights_after(trainer):
    trainer.fit()
    return weights(trainer)


def test_an_optimizer_that_does_not_explain_itself_has_no_plan(build):
    for optimizer in (None, (Factory, {}), (torch.optim.SGD, {})):
        assert build(optimizer=optimizer).explain_optimizer() == []
    assert explain_optimizer(nn.Linear(2, 2), None, arguments()) == []


@pytest.mark.parametrize(
    ("optimizer", "lora"),
    [((GORP, {"rank": 4}), "projected"), ((GORPFactory, {"rank": 4, "optimizer": GaLore, "targets": UP}), "adamw")],
)
@pytest.mark.filterwarnings("ignore:GORP. 4 matrices .* zero:UserWarning")  # A of a new LoRA in its first step
def test_an_optimizer_that_explains_itself_is_in_the_results(build, optimizer, lora):
    trainer = build(stream_of(1), adapter=adapter(), full_rank="mlp_up", full_rank_lr=1e-3, optimizer=optimizer)
    before = weights(trainer)
    plans = trainer.explain_optimizer()
    assert differing(before, weights(trainer)) == []
    assert {row["name"] for row in plans} == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {row["treatment"] for row in plans if "lora_" in row["name"]} == {lora}
    assert [(row["treatment"], row["rank"]) for row in plans if "lora_" not in row["name"]] == [("projected", 4)] * 2
    result = trainer.fit()
    assert result.to_dict()["optimizer"] == plans == json.loads(json.dumps(plans))
    assert result.config["train"]["optim"]["class"] == optimizer[0].__name__
    assert result.config["train"]["optim"].get("optimizer", "GaLore") == "GaLore"
    assert any("intermediate" in name for name in differing(before, weights(trainer)))


def test_something_that_is_no_optimizer_is_refused(build):
    with pytest.raises(ConfigError, match=r"give \(class, keyword arguments\)"):
        build(optimizer=("adamw", {}))
