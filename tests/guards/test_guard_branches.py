"""One LoRA branch a task on stock PEFT: making, merging, storing, and the three doors to a training loop."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from branch_helpers import branch, learn, training
from guard_helpers import (
    OPTIMIZERS,
    answer,
    change,
    classifier,
    fit,
    lora_bert,
    lora_mlp,
    mlp,
    rows,
    tokens,
    trainable,
)
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertModel, Trainer, TrainingArguments

from growthring.errors import ConfigError, DataError, GuardError
from growthring.guards import InfLoRA, OLoRA, merge_branches

GUARDS = {"inflora": InfLoRA, "olora": OLoRA}
OLD, NEW, PROBE = rows(6, 20, 1), rows(8, 20, 2), rows(32, 20, 3)

both = pytest.mark.parametrize("kind", sorted(GUARDS))


def two_tasks(kind: str, **config: Any) -> tuple[Any, Any]:
    model, guard = lora_mlp(**{"r": 4, **config}), GUARDS[kind]()
    learn(guard, model, "old", OLD)
    learn(guard, model, "new", NEW)
    return model, guard


# --- branches -------------------------------------------------------------------------------------------------------


@both
def test_one_branch_a_task(kind: str) -> None:
    model, guard = two_tasks(kind)
    assert list(model.peft_config) == ["task-000", "task-001"]  # what get_peft_model made did nothing, and is gone
    assert sorted(model.active_adapters) == ["task-000", "task-001"]
    assert all(model.peft_config[n].r == 4 for n in model.peft_config)
    assert guard.tasks == ["old", "new"]
    assert all("task-001" in n for n in training(model))
    x, root = PROBE, model.base_model.model
    for index, between in ((0, root[1]), (2, root[3]), (4, nn.Identity())):
        layer = root[index]
        y = x @ layer.base_layer.weight.T + layer.base_layer.bias
        for name in model.peft_config:
            y = y + layer.scaling[name] * (x @ layer.lora_A[name].weight.T) @ layer.lora_B[name].weight.T
        x = between(y)
    assert change(answer(model, PROBE), x.detach()) <= 1e-6


@both
def test_preparing_changes_no_answer(kind: str) -> None:
    model, guard = two_tasks(kind)
    before = answer(model, PROBE)
    guard.prepare("third", [PROBE[:4]])
    assert torch.equal(answer(model, PROBE), before)


@both
def test_preparing_again_starts_the_branch_anew(kind: str) -> None:
    model, guard = two_tasks(kind)
    before = answer(model, PROBE)
    guard.prepare("third", [PROBE[:4]])
    guard.begin_task()
    fit(model, PROBE[:4], guard, steps=5)
    assert change(answer(model, PROBE), before) > 1e-4
    guard.prepare("third", [PROBE[:4]])
    assert torch.equal(answer(model, PROBE), before)
    assert list(model.peft_config) == ["task-000", "task-001", "task-002"]
    assert all("task-002" in n for n in training(model))


@both
def test_training_flags_and_active_branches_come_back(kind: str) -> None:
    """A checkpoint that transformers loads leaves one adapter active; the next training puts that right."""
    model, guard = two_tasks(kind)
    guard.prepare("third", [PROBE[:4]])
    wanted, before = training(model), answer(model, PROBE)
    model.set_adapter("task-002")
    assert change(answer(model, PROBE), before) > 1e-4
    guard.attach(model)
    guard.begin_task()
    assert training(model) == wanted
    assert torch.equal(answer(model, PROBE), before)


@both
def test_ranks_and_scales_of_a_pattern_are_kept(kind: str) -> None:
    model, _ = two_tasks(kind, rank_pattern={"2": 3}, alpha_pattern={"4": 2}, use_rslora=True)
    layer = model.base_model.model[2]
    assert layer.lora_A["task-001"].weight.shape == (3, 24)
    assert layer.scaling["task-001"] == layer.scaling["task-000"]


def test_names_are_safe_in_every_peft(tmp_path: Path) -> None:
    """PEFT 0.18 saves an adapter together with every other one whose name contains its name."""
    model, guard = lora_mlp(r=2, target_modules=["0"]), OLoRA()
    for number in range(12):
        learn(guard, model, f"t{number}", rows(4, 20, number), steps=2)
    model.save_pretrained(tmp_path)
    for name in model.peft_config:
        assert len(load_file(tmp_path / name / "adapter_model.safetensors")) == 2


def test_a_name_that_is_taken() -> None:
    model, guard = lora_mlp(r=2), OLoRA()
    model.add_adapter("task-0001", model.peft_config["default"])
    learn(guard, model, "old", OLD)
    assert len(model.active_adapters) == 1
    assert not any(a != b and a in b for a in model.peft_config for b in model.peft_config)


@both
def test_two_adapted_models_in_one(kind: str) -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = lora_mlp(r=2), lora_mlp(r=3, seed=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) * self.right(x)

    model, guard = Towers(), GUARDS[kind]()
    learn(guard, model, "old", OLD)
    learn(guard, model, "new", NEW)
    assert {n.split(".")[0] for n in training(model)} == {"left", "right"}
    before = answer(model, PROBE)
    merge_branches(model)
    assert change(answer(model, PROBE), before) <= 1e-5
    assert model.left.peft_config["default"].r == 4
    assert model.right.peft_config["default"].r == 6


@both
def test_the_plan_before_training(kind: str) -> None:
    model, guard = lora_mlp(r=4, target_modules=["0", "2"]), GUARDS[kind]()
    model.base_model.model[4].weight.requires_grad_(True)
    before = training(model)
    plans = guard.explain(model)
    assert [p.name for p in plans] == before
    assert training(model) == before
    treatments = {p.kinds: p.treatment for p in plans}
    head = {(): "free"}
    if kind == "inflora":
        assert treatments == head | {("lora_A",): "frozen", ("lora_B",): "protected"}
        assert all(p.condition for p in plans if p.kinds)
    else:
        assert treatments == head | {("lora_A",): "free", ("lora_B",): "free"}
    assert all(p.cost for p in plans if p.treatment == "free")
    learn(guard, model, "old", OLD)
    guard.prepare("new", [NEW])
    later = guard.explain()
    assert [(p.shape, p.treatment) for p in later] == [(p.shape, p.treatment) for p in plans]
    assert all("task-001" in p.name for p in later if p.kinds)
    with pytest.raises(GuardError, match="not attached"):
        GUARDS[kind]().explain()


# --- merging --------------------------------------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"2": 6, "4": 2}, "alpha_pattern": {"0": 3}},
}


@both
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_merged_branches_are_one_stock_lora(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    model, _ = two_tasks(kind, **config)
    before = answer(model, PROBE)
    merge_branches(model)
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert change(answer(model, PROBE), before) <= 1e-5
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    assert change(answer(loaded, PROBE), before) <= 1e-5
    assert change(answer(loaded.merge_and_unload(), PROBE), before) <= 1e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_merging_one_branch(config: dict[str, Any], tmp_path: Path) -> None:
    model, guard = lora_mlp(**{"r": 4, **config}), OLoRA()
    learn(guard, model, "old", OLD)
    before = answer(model, PROBE)
    merge_branches(model)
    merge_branches(model)  # nothing to do
    model.save_pretrained(tmp_path)
    assert change(answer(PeftModel.from_pretrained(mlp(), tmp_path), PROBE), before) <= 1e-6


def test_merging_with_an_adapter_of_the_name_among_the_branches() -> None:
    model, guard = lora_mlp(r=4), OLoRA()
    fit(model, OLD, steps=10)
    learn(guard, model, "new", NEW)
    before = answer(model, PROBE)
    merge_branches(model)
    assert list(model.peft_config) == ["default"]
    assert change(answer(model, PROBE), before) <= 1e-5


def test_merging_under_a_name_that_something_else_has() -> None:
    model, _ = two_tasks("olora")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ConfigError, match="another name"):
        merge_branches(model, "other")


@both
def test_a_merged_model_goes_on(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    """Merging between tasks bounds the number of adapters; what was kept stays kept."""
    model, guard = lora_mlp(r=4), (InfLoRA(1.0) if kind == "inflora" else OLoRA())
    learn(guard, model, "old", OLD)
    merge_branches(model)
    before = answer(model, OLD)
    certificate = learn(guard, model, "new", NEW, steps=60)
    assert sorted(model.active_adapters) == ["default", "task-001"]
    assert not recwarn.list
    if kind == "inflora":
        assert certificate.kept is True
        assert change(answer(model, OLD), before) <= 1e-5
    else:
        assert certificate.sites[0].leak > 0.0


@both
def test_a_head_beside_the_adapter_goes_on_training(kind: str) -> None:
    """PEFT 0.18 freezes it whenever an adapter is added."""
    model, guard = lora_mlp(r=4, target_modules=["0", "2"]), GUARDS[kind]()
    head = model.base_model.model[4].weight.requires_grad_(True)
    learn(guard, model, "old", OLD)
    learn(guard, model, "new", NEW)
    assert head.requires_grad
    merge_branches(model)
    assert head.requires_grad


# --- storing --------------------------------------------------------------------------------------------------------


@both
def test_a_memory_on_a_fresh_model_goes_on_the_same(kind: str, tmp_path: Path) -> None:
    model, guard = two_tasks(kind)
    guard.save_pretrained(tmp_path)
    again = lora_mlp(r=4)
    loaded = GUARDS[kind].load_pretrained(tmp_path, again)
    assert torch.equal(answer(again, PROBE), answer(model, PROBE))
    assert loaded.settings() == guard.settings()
    for one, g in ((model, guard), (again, loaded)):
        torch.manual_seed(3)
        learn(g, one, "third", PROBE[:3], steps=10)
    assert torch.equal(answer(again, PROBE), answer(model, PROBE))
    assert list(again.peft_config) == list(model.peft_config)


@both
def test_a_memory_without_a_model_is_put_in_when_attached(kind: str, tmp_path: Path) -> None:
    model, guard = two_tasks(kind)
    guard.save_pretrained(tmp_path)
    loaded, again = GUARDS[kind].load_pretrained(tmp_path), lora_mlp(r=4)
    assert loaded.state_dict()["branches"].keys() == {"task-000", "task-001"}
    loaded.attach(again)
    assert torch.equal(answer(again, PROBE), answer(model, PROBE))


@both
def test_a_task_under_way_stays_under_way(kind: str, tmp_path: Path) -> None:
    model, guard = lora_mlp(r=4), GUARDS[kind]()
    learn(guard, model, "old", OLD)
    guard.prepare("new", [NEW])
    guard.begin_task()
    fit(model, NEW, guard, steps=5)
    guard.save_pretrained(tmp_path)
    again = lora_mlp(r=4)
    loaded = GUARDS[kind].load_pretrained(tmp_path, again)
    loaded.begin_task()
    assert training(again) == training(model)
    for one, g in ((model, guard), (again, loaded)):
        fit(one, NEW, g, steps=5)
    assert torch.equal(answer(again, PROBE), answer(model, PROBE))
    assert loaded.end_task("new", [NEW]) == guard.end_task("new", [NEW])


@both
def test_the_state_is_tensors_and_plain_values(kind: str) -> None:
    _, guard = two_tasks(kind)

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(isinstance(k, str) for k in value)
            for one in value.values():
                check(one)
        elif isinstance(value, list):
            for one in value:
                check(one)
        else:
            assert isinstance(value, Tensor | str | int | float)

    check(guard.state_dict())
    json.dumps(guard.settings())


@both
def test_a_torn_memory(kind: str, tmp_path: Path) -> None:
    _, guard = two_tasks(kind)
    guard.save_pretrained(tmp_path)
    file = tmp_path / "memory.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match="not whole"):
        GUARDS[kind].load_pretrained(tmp_path)


@both
def test_a_memory_of_another_model(kind: str, tmp_path: Path) -> None:
    _, guard = two_tasks(kind)
    guard.save_pretrained(tmp_path)
    with pytest.raises(GuardError, match="not in this model"):
        GUARDS[kind].load_pretrained(tmp_path, lora_mlp(r=4, target_modules=["0"]))
    with pytest.raises(GuardError, match=r"does not fit.*rank"):
        GUARDS[kind].load_pretrained(tmp_path, lora_mlp(r=5))


@both
def test_branches_that_changed_between_tasks_are_told(kind: str) -> None:
    model, guard = two_tasks(kind)
    with torch.no_grad():
        next(iter(branch(model, "task-000", "B").values())).mul_(1.5)
    with pytest.warns(UserWarning, match="compute something else"):
        guard.prepare("third", [PROBE[:4]])


@both
def test_a_model_without_its_branches_is_told(kind: str) -> None:
    _, guard = two_tasks(kind)
    guard.attach(lora_mlp(r=4))
    with pytest.warns(UserWarning, match="compute something else"):
        guard.prepare("third", [PROBE[:4]])


# --- refusals -------------------------------------------------------------------------------------------------------


def bad_models() -> dict[str, Any]:
    def conv() -> nn.Module:
        base = nn.Sequential(nn.Conv2d(3, 4, 3))
        return get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))

    def merged() -> nn.Module:
        model = lora_mlp()
        model.merge_adapter()
        return model

    head = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    return {
        "no LoRA": mlp,
        "modules_to_save": lambda: get_peft_model(classifier(), head),
        "is a Conv2d": conv,
        "is a Embedding": lambda: lora_bert(target_modules=["word_embeddings"]),
        "variant Dora": lambda: lora_mlp(use_dora=True),
        "trains biases": lambda: lora_mlp(bias="all"),
        "lora_bias": lambda: lora_mlp(lora_bias=True),
        "init_lora_weights": lambda: lora_mlp(init_lora_weights="pissa"),
        "works on LoRA": lambda: get_peft_model(mlp(), IA3Config(target_modules=["0"], feedforward_modules=[])),
        "unmerge_adapter": merged,
    }


@both
@pytest.mark.parametrize("message", sorted(bad_models()))
def test_what_cannot_be_branched(kind: str, message: str) -> None:
    with pytest.raises(GuardError, match="no LoRA" if message == "works on LoRA" else message):
        GUARDS[kind]().attach(bad_models()[message]())


@both
def test_calls_out_of_order(kind: str) -> None:
    guard, model = GUARDS[kind](), lora_mlp()
    for call in (lambda: guard.prepare("one", [OLD]), guard.begin_task, lambda: guard.end_task("one", [OLD])):
        with pytest.raises(GuardError, match="not attached"):
            call()
    guard.attach(model)
    with pytest.raises(GuardError, match="no branch yet"):
        guard.begin_task()


@both
def test_an_optimizer_made_before_the_branch(kind: str) -> None:
    model, guard = lora_mlp(), GUARDS[kind]()
    optimizer = OPTIMIZERS["adamw"](trainable(model))
    guard.attach(model)
    guard.prepare("one", [OLD])
    guard.begin_task()
    fit(model, OLD, guard, optimizer=optimizer, steps=3)
    with pytest.warns(UserWarning, match="still zero"):
        certificate = guard.end_task("one", [OLD])
    assert "nothing was learned" in certificate.notes[0]


# --- three doors ----------------------------------------------------------------------------------------------------


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    batch = tokens(count, 8, seed)
    return [{"input_ids": batch["input_ids"][i], "labels": i % 3} for i in range(count)]


def lora_classifier() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(classifier(), LoraConfig(r=4, target_modules=["query", "value"]))


@both
def test_a_plain_trainer(kind: str, tmp_path: Path) -> None:
    model, guard = lora_classifier(), (InfLoRA(1.0) if kind == "inflora" else OLoRA())
    args = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    first, second = examples(2, 1), examples(4, 2)
    old = {"input_ids": torch.stack([e["input_ids"] for e in first])}
    guard.attach(model)
    certificates = []
    for name, data in (("first", first), ("second", second)):
        trainer = Trainer(model, args, train_dataset=data, callbacks=[guard.callback()])
        guard.prepare(name, trainer.get_train_dataloader())
        before = answer(model, old)
        trainer.train()
        certificates.append(guard.consolidate(model, trainer.get_train_dataloader(), name))
        assert change(answer(model, old), before) > 1e-4 or name == "second"
    moved = change(answer(model, old), before)
    if kind == "inflora":
        assert certificates[1].kept is True
        assert moved <= 1e-5
    else:
        assert certificates[1].kept is None
        assert moved > 1e-3
    merged, now = copy.deepcopy(model), answer(model, old)
    merge_branches(merged)
    assert change(answer(merged, old), now) <= 1e-5


@both
def test_a_plain_trainer_without_preparing_says_what_to_do(kind: str, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
    guard = GUARDS[kind]()
    trainer = Trainer(lora_classifier(), args, train_dataset=examples(4, 1), callbacks=[guard.callback()])
    with pytest.raises(GuardError, match=r"guard.prepare\(task, batches\)"):
        trainer.train()


def test_the_penalty_reaches_a_plain_trainer(tmp_path: Path) -> None:
    left = {}
    for weight in (0.0, 5.0):
        model, guard = lora_classifier(), OLoRA(weight)
        args = TrainingArguments(
            str(tmp_path), max_steps=40, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
            save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        guard.attach(model)
        for seed in (1, 2):
            guard.prepare(None, [])
            Trainer(model, args, train_dataset=examples(4, seed), callbacks=[guard.callback()]).train()
            certificate = guard.end_task(None, [])
        left[weight] = max(s.leak for s in certificate.sites)
    assert left[5.0] < 0.5 * left[0.0]


@both
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_a_continual_trainer(kind: str, tiny_encoder: Path, tmp_path: Path) -> None:
    import growthring as gr

    words = (("good", "bad", "cat", "dog"), ("train", "ship", "north", "south"), ("red", "blue", "cold", "warm"))
    tasks = []
    for number, (a, b, c, d) in enumerate(words):
        pairs = ((a, (a, c)), (b, (b, d)))
        train, test = (
            [(f"{start} {x} {y}", label) for label, pair in pairs for x in pair for y in words[0]]
            for start in ("the", "see")
        )
        tasks.append(gr.Task(f"task {number}", train=train, test=test))
    guard = gr.InfLoRA(gr.LinearSchedule(0.95, 1.0, tasks=3)) if kind == "inflora" else gr.OLoRA()
    args = TrainingArguments(
        str(tmp_path / "args"), max_steps=10, learning_rate=1e-2, per_device_train_batch_size=8, report_to=[],
        use_cpu=True,
    )  # fmt: skip
    trainer = gr.ContinualTrainer(
        str(tiny_encoder),
        gr.TaskStream(tasks),
        adapter=LoraConfig(r=4, target_modules=["query", "value"]),
        guards=[guard],
        args=args,
        output_dir=tmp_path / "run",
    )
    result = trainer.fit()
    assert guard.tasks == ["task 0", "task 1", "task 2"]
    assert sorted(trainer.model.encoder.active_adapters) == ["task-000", "task-001", "task-002"]
    kept = [c.kept for c in result.certificates]
    assert kept == ([None, True, True] if kind == "inflora" else [None, None, None])
    fresh = gr.ContinualTrainer(
        str(tiny_encoder), gr.TaskStream(tasks), adapter=LoraConfig(r=4, target_modules=["query", "value"]), args=args
    )
    type(guard).load_pretrained(tmp_path / "run" / "memory", fresh.model)
    assert fresh.predict(2) == trainer.predict(2)
    stock = PeftModel.from_pretrained(BertModel.from_pretrained(tiny_encoder), tmp_path / "run" / "adapter")
    assert stock.peft_config["default"].r == 12
    batch = tokens(4, 8, 1)
    with torch.no_grad():
        trainer.model.encoder.eval()
        ours = trainer.model.encoder(**batch).last_hidden_state
        assert change(stock(**batch).last_hidden_state, ours) <= 1e-5
    before = {n: f.clone() for n, f in trainer.model.encoder.named_parameters() if "lora_B.task-001" in n}
    assert before
    assert all(bool(f.any()) for f in before.values())
