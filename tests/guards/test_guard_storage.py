"""Memories on disk and states in the middle: bit for bit, whole or refused, nothing executable."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from guard_helpers import OPTIMIZERS, bert, fit, lora_bert, lora_mlp, mlp, rows, tokens, trainable
from safetensors import safe_open
from safetensors.torch import save_file

from growthring.errors import DataError, GuardError
from growthring.guards import PEGP, LinearSchedule


def learned(build: Any = lora_mlp, **settings: Any) -> tuple[torch.nn.Module, PEGP]:
    model = build()
    guard = PEGP(**{"energy": 0.95, **settings})
    guard.attach(model)
    guard.begin_task()
    fit(model, rows(5, 20, 1), guard, steps=5)
    guard.end_task("first", [rows(5, 20, 1)])
    return model, guard


@pytest.mark.parametrize("build", [lora_mlp, mlp], ids=["lora", "linear"])
def test_the_next_task_goes_on_as_if_nothing_had_happened(build: Any, tmp_path: Path) -> None:
    model, guard = learned(build, energy={"lora_A": LinearSchedule(0.9, 1.0, 4), "lora_B": 0.8}, samples=100, probes=3)
    guard.save_pretrained(tmp_path / "memory")
    twin = build()
    twin.load_state_dict(model.state_dict())
    again = PEGP.load_pretrained(tmp_path / "memory")
    assert again.settings() == guard.settings()
    assert again.tasks == guard.tasks
    certificates = []
    for one, keeper in ((model, guard), (twin, again)):
        keeper.attach(one)
        keeper.begin_task()
        fit(one, rows(6, 20, 2), keeper, steps=20)
        certificates.append(keeper.end_task("second", [rows(6, 20, 2)]))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert certificates[0] == certificates[1]


def test_probes_that_are_mappings_come_back(tmp_path: Path) -> None:
    model = lora_bert()
    guard = PEGP(0.9)
    guard.consolidate(model, [{**tokens(3, 5, 1), "return_dict": True}])
    again = PEGP.load_pretrained(guard.save_pretrained(tmp_path), model)
    change = [g.consolidate(model, [tokens(3, 5, 2)]).output_change for g in (guard, again)]
    assert change == [0.0, 0.0]


def test_saving_again_replaces(tmp_path: Path) -> None:
    _, guard = learned()
    guard.save_pretrained(tmp_path)
    guard.begin_task()
    guard.end_task("second", [rows(4, 20, 2)])
    guard.save_pretrained(tmp_path)
    assert PEGP.load_pretrained(tmp_path).tasks == ["first", "second"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["guard.json", "memory.safetensors", "probes.safetensors"]


def test_nothing_executable_is_written(tmp_path: Path) -> None:
    _, guard = learned()
    guard.save_pretrained(tmp_path)
    json.loads((tmp_path / "guard.json").read_text(encoding="utf-8"))
    for name in ("memory.safetensors", "probes.safetensors"):
        with safe_open(tmp_path / name, framework="pt") as file:
            assert file.metadata()["format"] == "growthring.memory"
    with safe_open(tmp_path / "memory.safetensors", framework="pt") as file:
        assert not any("probes" in key for key in file.keys())  # noqa: SIM118


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return learned()[1].save_pretrained(tmp_path / "memory")


def edit(folder: Path, change: Any) -> None:
    path = folder / "guard.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_no_memory_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no guard memory.*save_pretrained"):
        PEGP.load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["memory.safetensors", "probes.safetensors"])
def test_a_missing_file(memory: Path, name: str) -> None:
    (memory / name).unlink()
    with pytest.raises(DataError, match="is not whole"):
        PEGP.load_pretrained(memory)


@pytest.mark.parametrize("name", ["memory.safetensors", "probes.safetensors", "guard.json"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_a_torn_file(memory: Path, name: str, keep: float) -> None:
    path = memory / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep or 0])
    if name == "guard.json" and keep == -1:  # only the newline at its end is missing
        assert PEGP.load_pretrained(memory).tasks == ["first"]
        return
    with pytest.raises(DataError, match=r"not whole|not a growthring memory"):
        PEGP.load_pretrained(memory)


def test_files_of_two_saves_are_not_mixed(memory: Path, tmp_path: Path) -> None:
    """As a kill between two files leaves them."""
    old = tmp_path / "old"
    shutil.copytree(memory, old)
    guard = PEGP.load_pretrained(memory)
    guard.save_pretrained(memory)
    shutil.copy(old / "guard.json", memory / "guard.json")
    with pytest.raises(DataError, match="not written together"):
        PEGP.load_pretrained(memory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(guard="ewc"), "memory of the guard 'ewc', not of 'pegp'"),
        (lambda d: d.update(format_version=2), "format version 2; this growthring reads up to 1"),
        (lambda d: d.update(format="other"), "not a growthring memory: it says it is 'other'"),
        (lambda d: d.pop("format"), "not a growthring memory"),
        (lambda d: d.update(format_version="new"), "not a growthring memory"),
        (lambda d: d.pop("state"), "not whole"),
        (lambda d: d["state"]["map"].pop("memory"), "not whole"),
        (lambda d: d["state"].update(map=[1]), "not whole"),
        (lambda d: d["state"]["map"].update(tasks=3), "not whole"),
        (lambda d: d["settings"].update(power=2), "not whole"),
        (lambda d: d["settings"].update(samples=0), "not whole"),
        (lambda d: d.update(settings=None), "not whole"),
    ],
)
def test_an_edited_document(memory: Path, change: Any, message: str) -> None:
    edit(memory, change)
    with pytest.raises(DataError, match=message):
        PEGP.load_pretrained(memory)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "guard.json", "", None, ["x"], 3])
def test_a_document_that_points_elsewhere(memory: Path, name: Any) -> None:
    save_file({"x": torch.zeros(1)}, memory.parent / "outside.safetensors")

    def change(node: Any) -> None:
        if isinstance(node, dict):
            if "tensor" in node:
                node.update(file=name)
            for value in node.values():
                change(value)
        elif isinstance(node, list):
            for value in node:
                change(value)

    edit(memory, lambda d: change(d["state"]))
    with pytest.raises(DataError, match="unknown file"):
        PEGP.load_pretrained(memory)


def test_a_list_is_no_document(memory: Path) -> None:
    (memory / "guard.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="not a growthring memory"):
        PEGP.load_pretrained(memory)


def test_a_memory_of_another_model(memory: Path) -> None:
    guard = PEGP.load_pretrained(memory)
    with pytest.raises(GuardError, match=r"memory protects 6 tensors, and 6 of them are not in this model"):
        guard.attach(mlp())
    with pytest.raises(
        GuardError, match=r"lora_B\.default\.weight sees 4 features, but the memory holds a basis of R\^8"
    ):
        guard.attach(lora_mlp(r=4))
    with pytest.raises(GuardError, match="not in this model"):
        PEGP.load_pretrained(memory, mlp())


def test_the_same_names_with_other_weights_are_noticed(memory: Path) -> None:
    guard = PEGP.load_pretrained(memory)
    guard.attach(lora_mlp(seed=5))
    with pytest.warns(UserWarning, match="changed between consolidation and this task"):
        guard.begin_task()


# --- in the middle ----------------------------------------------------------------------------------------------


def walk(value: Any, path: str = "") -> None:
    if isinstance(value, dict):
        assert all(isinstance(k, str) for k in value), path
        for key, inner in value.items():
            walk(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            walk(inner, f"{path}/{index}")
    else:
        assert value is None or type(value) in (torch.Tensor, str, int, float, bool), f"{path}: {type(value)}"


@pytest.mark.parametrize("first", [True, False], ids=["first task", "second task"])
@pytest.mark.parametrize("build", [lora_mlp, mlp], ids=["lora", "linear"])
def test_going_on_in_the_middle_of_a_task(build: Any, first: bool, tmp_path: Path) -> None:
    def start() -> tuple[torch.nn.Module, PEGP]:
        if first:
            model, guard = build(), PEGP(0.9)
            guard.attach(model)
        else:
            model, guard = learned(build)
        guard.begin_task()
        return model, guard

    new = rows(6, 20, 2)
    straight, guard = start()
    optimizer = OPTIMIZERS["adamw"](trainable(straight))
    fit(straight, new, guard, optimizer=optimizer, steps=8)
    expected = guard.end_task(None, [new])

    broken, guard = start()
    optimizer = OPTIMIZERS["adamw"](trainable(broken))
    fit(broken, new, guard, optimizer=optimizer, steps=4)
    state = guard.state_dict()
    walk(state)
    buffer = io.BytesIO()
    torch.save({"guard": state, "model": broken.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    guard.save_pretrained(tmp_path)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    for door in ("state", "folder"):
        fresh = copy.deepcopy(saved)  # optimizers keep the tensors that they load
        model = build()
        model.load_state_dict(fresh["model"])
        optimizer = OPTIMIZERS["adamw"](trainable(model))
        optimizer.load_state_dict(fresh["optimizer"])
        if door == "state":
            other = PEGP(0.9 if first else 0.95)
            other.attach(model)
            other.load_state_dict(fresh["guard"])
        else:
            other = PEGP.load_pretrained(tmp_path, model)
        other.attach(model)  # as the callback does at the start of every train()
        other.begin_task()
        fit(model, new, other, optimizer=optimizer, steps=4)
        assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), model.parameters(), strict=True))
        assert other.end_task(None, [new]) == expected


def test_a_state_is_a_copy() -> None:
    model, guard = learned()
    guard.begin_task()
    state = guard.state_dict()
    before = {n: v.clone() for n, v in state["under_way"]["anchors"].items()}
    fit(model, rows(6, 20, 2), guard, steps=5)
    assert all(torch.equal(v, before[n]) for n, v in state["under_way"]["anchors"].items())
    guard.end_task(None, [rows(6, 20, 2)])
    other = PEGP(0.95)
    other.attach(model)
    other.load_state_dict(state)
    assert other.tasks == ["first"]


def test_a_state_taken_between_tasks_ends_the_one_under_way() -> None:
    model, guard = learned()
    state = guard.state_dict()
    guard.begin_task()
    guard.load_state_dict(state)
    with pytest.raises(GuardError, match="outside a task"):
        guard.before_step()
    assert guard._survey is not None
    assert model is guard._survey.model


def test_states_that_need_the_model() -> None:
    _, guard = learned()
    guard.begin_task()
    with pytest.raises(GuardError, match=r"attach\(model\) first"):
        PEGP(0.95).load_state_dict(guard.state_dict())


def test_a_state_of_other_trainable_tensors_is_refused() -> None:
    model, guard = learned(mlp)
    guard.begin_task()
    state = guard.state_dict()
    other = PEGP(0.95)
    model[2].requires_grad_(False)
    other.attach(model)
    with pytest.raises(GuardError, match="other tensors were trained"):
        other.load_state_dict(state)


def test_large_models_keep_bit_exact_memories(tmp_path: Path) -> None:
    model = bert()
    guard = PEGP(0.99)
    guard.consolidate(model, [tokens(8, 12, 1, padded=3)])
    again = PEGP.load_pretrained(guard.save_pretrained(tmp_path))
    assert guard._memory.site_space == again._memory.site_space
    for name, space in guard._memory.spaces.items():
        assert torch.equal(space.stored, again._memory.spaces[name].stored)
        assert space.stores_complement == again._memory.spaces[name].stores_complement
