"""``PEGP.explain``: every trainable tensor once, with what then really happens to it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from guard_helpers import answer, classifier, fit, lora_bert, lora_mlp, mlp, rows, tokens
from paradigm_helpers import (
    adapter_bert,
    adapter_mlp,
    gpt2,
    half,
    ia3_mlp,
    images,
    llama,
    prefix,
    prefix_vit,
    prompt,
    prompt_vit,
    snapshot,
    vit,
)
from peft import IA3Config, LoraConfig, PromptEncoderConfig, get_peft_model
from torch import Tensor, nn

from growthring.adapters import BottleneckConfig
from growthring.errors import GuardError
from growthring.guards import PEGP, TensorPlan
from growthring.guards.energy import KINDS
from growthring.guards.plan import CONDITIONS, PAPER

pytestmark = pytest.mark.filterwarnings("ignore:.*modify a model with PEFT:UserWarning")


class Tied(nn.Module):
    """An embedding tied to the output, a convolution, a norm, and one plain layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(30, 16), nn.LayerNorm(16)
        self.mix = nn.Conv1d(16, 16, 3, padding=1)
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(torch.tanh(self.body(self.norm(x + self.mix(x.mT).mT))))


def headed() -> nn.Module:
    model = lora_bert(model=classifier(), task_type="SEQ_CLS", target_modules=["query"], bias="lora_only")
    assert any("modules_to_save" in n for n, _ in model.named_parameters())
    return model


def mixed() -> nn.Module:
    """Three tuners and a norm, all training."""
    model = prefix(get_peft_model(llama(num_key_value_heads=4), LoraConfig(r=4, target_modules=["q_proj"])))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "norm" in name:
            parameter.requires_grad_(True)
    return model


def words(seed: int) -> Any:
    return tokens(1, 3, seed)


def vectors(seed: int) -> Any:
    return rows(2, 20, seed)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "plain": (mlp, vectors),
    "lora": (lambda: lora_mlp(bias="all"), vectors),
    "adapter": (adapter_mlp, vectors),
    "ia3": (ia3_mlp, lambda seed: half(2, seed)),
    "head": (headed, words),
    "adapter bert": (lambda: adapter_bert(modules_to_save=["encoder.layer.1.output.LayerNorm"]), words),
    "conv1d": (gpt2, words),
    "gpt2 ia3": (
        lambda: get_peft_model(
            gpt2(), IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
        ),
        words,
    ),
    "prefix": (prefix, words),
    "prefix vit": (prefix_vit, lambda seed: images(1, seed)),
    "prompt": (lambda: prompt(tokens=5), words),
    "prompt vit": (lambda: prompt_vit(tokens=8), lambda seed: images(1, seed)),
    "vit adapter": (lambda: get_peft_model(vit(), BottleneckConfig(r=8)), lambda seed: images(1, seed)),
    "tied": (Tied, lambda seed: {"input_ids": tokens(2, 3, seed)["input_ids"] % 30}),
    "mixed": (mixed, words),
}


def names(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad]


def check(plan: tuple[TensorPlan, ...], model: nn.Module, expected: list[str], mode: str) -> None:
    assert [row.name for row in plan] == expected  # each once, in the order of the model
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for row in plan:
        assert row.shape == shapes[row.name]
        assert (row.treatment == "protected") == bool(row.kinds) == bool(row.condition)
        assert set(row.kinds) <= set(KINDS)
        table = PAPER if mode == "paper" else CONDITIONS
        assert row.condition == "; ".join(table[kind] for kind in row.kinds)
        assert bool(row.cost) != (row.treatment == "protected")
        assert row.why or row.treatment == "protected"
    assert json.loads(json.dumps([row.to_dict() for row in plan]))[0]["shape"] == list(plan[0].shape)


# --- every tensor once, in every mode ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_every_trainable_tensor_once_and_the_model_untouched(kind: str) -> None:
    model = MODELS[kind][0]()
    expected, before = names(model), snapshot(model)
    for mode, policy, project in itertools.product(
        ("strict", "paper"), ("hold", "allow", "freeze"), ("update", "gradient")
    ):
        plan = PEGP(mode=mode, unprotected=policy, project=project).explain(model)
        check(plan, model, expected, mode)
        allowed = {"hold": "held", "allow": "free", "freeze": "frozen"}[policy]
        assert {row.treatment for row in plan} <= {"protected", allowed, "free"}
        if mode == "strict" and policy != "allow":
            assert "free" not in {row.treatment for row in plan}
    assert names(model) == expected
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_kinds_left_out_are_free_and_say_why(kind: str) -> None:
    model = MODELS[kind][0]()
    whole = PEGP().explain(model)
    present = list(dict.fromkeys(k for row in whole for k in row.kinds))
    for chosen in present:
        plan = PEGP(kinds=[chosen]).explain(model)
        check(plan, model, [row.name for row in whole], "strict")
        for row, full in zip(plan, whole, strict=True):
            if chosen in full.kinds:
                assert row.kinds == (chosen,)
                others = [k for k in full.kinds if k != chosen]
                assert all(other in row.why for other in others)
            elif full.kinds:
                assert row.treatment == "free"
                assert all(k in row.why for k in full.kinds)
            else:
                assert row == full


def test_the_same_before_and_after_attaching_and_learning() -> None:
    for build, batch in MODELS.values():
        for policy in ("hold", "freeze"):
            model = build()
            guard = PEGP(0.9, unprotected=policy)
            before = guard.explain(model)
            guard.attach(model)
            assert guard.explain() == guard.explain(model) == before
            guard.begin_task()
            fit(model, batch(1), guard, steps=2)
            guard.end_task(None, [batch(1)])
            assert guard.explain() == before


# --- and this is what happens -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*no free direction:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"unprotected": "allow"},
        {"unprotected": "freeze"},
        {"mode": "paper"},
        {"mode": "paper", "unprotected": "allow"},
        {"kinds": ["adapter_up", "lora_B", "prefix_key", "prompt_value", "linear", "ia3"]},
    ],
    ids=lambda s: " ".join(str(v) for v in s.values())[:20] or "default",
)
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_said_is_what_happens(kind: str, settings: dict[str, Any]) -> None:
    """A random step of every tensor: held ones go back, free ones keep it, protected ones keep a part of it."""
    build, batch = MODELS[kind]
    model = build()
    guard = PEGP(0.6, **settings)
    rows_ = {row.name: row for row in guard.explain(model)}
    guard.attach(model)
    assert {n for n, row in rows_.items() if row.treatment == "frozen"} == rows_.keys() - set(names(model))
    for task in (1, 2):
        guard.begin_task()
        start, step = snapshot(model), {}
        with torch.no_grad():
            for number, (name, parameter) in enumerate(model.named_parameters()):
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(100 * task + number)
                    step[name] = torch.randn(parameter.shape, generator=generator)
                    parameter += step[name]
        guard.after_step()
        for name, parameter in model.named_parameters():
            if name not in rows_:
                assert torch.equal(parameter, start[name])
                continue
            treatment, kept = rows_[name].treatment, (parameter - start[name]).detach()
            if treatment == "frozen":
                assert torch.equal(parameter, start[name])
            elif task == 1 or treatment == "free":
                torch.testing.assert_close(kept, step[name], rtol=0, atol=1e-5)
            elif treatment == "held":
                assert torch.equal(parameter, start[name]), name
            else:
                assert float((kept - step[name]).norm()) > 1e-3, name
                if not name.endswith("bias"):  # of a folded pair the weight and the bias shrink together
                    assert float(kept.norm()) < float(step[name].norm()), name
        guard.end_task(None, [batch(task)])


def test_a_tensor_whose_features_never_came_is_held_and_the_plan_says_so() -> None:
    """Protected by intention, held in fact: ``out_proj`` multiplies outside its module, where nothing is seen."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    model, name = Attention(), "attention.out_proj.weight"
    x = rows(4, 16, 1).reshape(1, 4, 16)
    guard = PEGP(0.9)
    assert {row.name: row.treatment for row in guard.explain(model)}[name] == "protected"
    guard.consolidate(model, [x])
    after = {row.name: row for row in guard.explain()}
    assert after[name].treatment == "held"
    assert "never" in after[name].why
    guard.begin_task()
    before = model.attention.out_proj.weight.detach().clone()
    fit(model, x, guard, steps=3)
    assert torch.equal(model.attention.out_proj.weight, before)
    allowed = PEGP(0.9, unprotected="allow")
    allowed.consolidate(model, [x])
    assert {row.name: row.treatment for row in allowed.explain()}[name] == "free"


def test_reasons() -> None:
    adapter = {row.name.rsplit(".", 3)[1]: row for row in PEGP().explain(adapter_mlp())}
    assert set(adapter) == {"adapter_down", "adapter_up"}
    assert "[x; 1]" in adapter["adapter_down"].condition
    assert "[x; 1]" not in PEGP(mode="paper").explain(adapter_mlp())[0].condition
    (prompts,) = PEGP().explain(prompt())
    assert prompts.kinds == ("prompt_key", "prompt_value")
    assert "output_change" in prompts.why
    (prefixes,) = PEGP().explain(prefix())
    assert prefixes.why == ""  # exact: nothing is left open
    (prefixes,) = PEGP(mode="paper").explain(prefix())
    assert "drift" in prefixes.why
    values = [row for row in PEGP(mode="paper").explain(prefix_vit()) if "prefix_values" in row.name]
    assert [row.treatment for row in values] == ["free", "free"]
    norm = next(row for row in PEGP().explain(Tied()) if row.name == "norm.weight")
    assert norm.treatment == "held"
    assert norm.cost


def test_a_frozen_base_is_not_listed_and_an_empty_model_has_no_plan() -> None:
    model = lora_mlp()
    assert all("lora_" in row.name for row in PEGP().explain(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert PEGP().explain(model) == ()
    with pytest.raises(GuardError, match="not attached"):
        PEGP().explain()


def test_what_cannot_be_protected_is_said_before_training() -> None:
    for model in (
        prefix(prefix_projection=True, encoder_hidden_size=8),
        lora_mlp(use_dora=True),
        get_peft_model(
            gpt2(), PromptEncoderConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4, encoder_hidden_size=8)
        ),
    ):
        with pytest.raises(GuardError):
            PEGP().explain(model)


def test_explaining_one_model_while_attached_to_another() -> None:
    guard, other = PEGP(0.9), adapter_mlp()
    model = lora_mlp()
    guard.attach(model)
    before = answer(other, rows(2, 20, 1))
    assert {k for row in guard.explain(other) for k in row.kinds} == {"adapter_down", "adapter_up"}
    assert {k for row in guard.explain() for k in row.kinds} == {"lora_A", "lora_B"}
    assert torch.equal(answer(other, rows(2, 20, 1)), before)
