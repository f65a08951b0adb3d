"""GradientMemory with an optimizer that steps in a subspace: who keeps what outside, what is seen in coordinates."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_helpers import ALL_OPTIMIZERS, Projected, basis, learn, matrices, projector, trainable
from guard_helpers import classifier, default_loss, fit, lora_bert, mlp, rows, tokens
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from growthring.errors import DataError, GuardError
from growthring.guards import PEGP, GradientMemory, Guard
from growthring.optim import GORP

pytestmark = pytest.mark.filterwarnings(
    "ignore:GORP.*have a gradient that is zero:UserWarning",  # LoRA's A while B is 0, and tensors that are held
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*lr_scheduler\\.step.*:UserWarning",
)

GORP_KINDS: dict[str, dict[str, Any]] = {
    "right": {"side": "right"},
    "left": {"side": "left"},
    "two-sided": {"side": "two-sided"},
    "momentum": {"rule": "momentum"},
    "adafactor": {"rule": "adafactor"},
    "shared": {"rule": "shared"},
}


def gorp(model: nn.Module, **settings: Any) -> GORP:
    return GORP(trainable(model), **{"lr": 3e-3, "rank": 4, "refresh": 5, "weight_decay": 0.1, **settings})


def tall(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.GELU(), nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)


# --- who keeps it outside ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.parametrize("kind", sorted(GORP_KINDS))
def test_gorp_takes_its_matrices_over_and_nothing_leaks(kind: str, side: str, dtype: torch.dtype) -> None:
    model, guard = tall(dtype), GradientMemory(0.8, side=side)
    learn(guard, model, rows(4, 20, 1, dtype), optimizer=gorp(model, **GORP_KINDS[kind]))
    before = matrices(model)
    guard.begin_task()
    optimizer = gorp(model, **GORP_KINDS[kind])
    guard.bind(optimizer)
    assert guard._task._taken == {
        "0.weight",
        "2.weight",
    }  # the last has three rows: plain AdamW, which the guard sweeps
    losses = fit(model, rows(8, 20, 2, dtype), guard, optimizer=optimizer, steps=40)
    for name, old in before.items():  # as the optimizer left it, without the guard's last sweep
        change = (dict(model.named_parameters())[name].detach() - old).double()
        for key, moved in ((name, change), (f"{name}[out]", change.mT)):
            if key in guard._spaces and float(change.norm()):
                leak = float((moved @ basis(guard, key)).norm() / change.norm())
                assert leak <= (1e-5 if dtype == torch.float32 else 1e-12)
    certificate = guard.end_task("second")
    assert certificate.kept
    assert certificate.leak <= (1e-6 if dtype == torch.float32 else 1e-13)
    assert losses[-1] < losses[0]
    assert not any("let through" in n for n in certificate.notes)


def test_the_published_rule_leaks_under_gorp_too() -> None:
    leaks = {}
    for project in ("update", "gradient"):
        model, guard = tall(), GradientMemory(0.8, side="output", project=project)
        for seed in (1, 2):
            certificate = learn(guard, model, rows(6, 20, seed), optimizer=gorp(model))
        leaks[project] = certificate.leak
        assert certificate.kept is (project == "update")
    assert leaks["gradient"] > 1e-2
    assert leaks["update"] < 1e-6


class Careless(Projected):
    """Says that it keeps its matrices outside, and does not."""

    def _outside(self, p: Tensor, x: Tensor) -> Tensor:
        return x


def test_what_a_careless_optimizer_lets_through_is_swept_out_and_told() -> None:
    model, guard = tall(), GradientMemory(0.8)
    learn(guard, model, rows(4, 20, 1), optimizer=Careless(trainable(model)))
    certificate = learn(guard, model, rows(8, 20, 2), optimizer=Careless(trainable(model)))
    assert certificate.kept
    assert certificate.leak < 1e-6
    assert any("the optimizer let through" in n for n in certificate.notes)


def test_rounding_does_not_add_up_over_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hundred steps the guard sweeps what the optimizer keeps outside."""
    from growthring.guards import gradient_task

    leaks = []
    for again in (5, 10**9):
        monkeypatch.setattr(gradient_task, "AGAIN", again)
        model, guard = tall(), GradientMemory(0.8)
        learn(guard, model, rows(4, 20, 1), optimizer=Careless(trainable(model)))
        guard.begin_task()
        optimizer = Careless(trainable(model))
        guard.bind(optimizer)
        fit(model, rows(8, 20, 2), guard, optimizer=optimizer, steps=20)
        leaks.append(max(leak.share for leak in guard._task.constraint.leaks().values()))
    assert leaks[0] < 1e-6
    assert leaks[1] > 1e-2


@pytest.mark.parametrize("shape", ["right", "left", "two-sided"])
def test_a_bound_optimizer_learns_what_the_guard_alone_would_make_it_learn(shape: str) -> None:
    """The door in use, or the guard's own sweeps with the door shut: the same weights up to rounding."""
    ends = []
    for bound in (True, False):
        model, guard = tall(torch.float64), GradientMemory(0.8, side="both")
        for seed in (1, 2):
            guard.attach(model)
            guard.begin_task()
            optimizer = Projected(trainable(model), side=shape, refresh=1000)
            if bound:
                guard.bind(optimizer)
            fit(model, rows(6, 20, seed, torch.float64), guard, optimizer=optimizer, steps=12)
            if seed == 1:  # one memory for both, as coordinates show less than whole gradients
                guard.end_task(None)
                if bound:
                    shared = guard._spaces
                guard._spaces = copy.deepcopy(shared)
                guard._marks = {}
        ends.append(matrices(model))
    for name, a in ends[0].items():
        torch.testing.assert_close(a, ends[1][name], rtol=0, atol=1e-10)


# --- what is seen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["right", "left", "two-sided"])
@pytest.mark.parametrize("source", ["gradient", "momentum"])
def test_coordinates_add_up_to_the_lifted_gradients(shape: str, source: str) -> None:
    model, guard = tall(torch.float64), GradientMemory(0.95, side="both", source=source)
    model[4].requires_grad_(False)  # too small for this optimizer to project, and it keeps no first moment of it
    optimizer = Projected(trainable(model), side=shape)
    guard.attach(model)
    guard.begin_task()
    guard.bind(optimizer)
    lifted: dict[str, list[Tensor]] = {"0.weight": [], "2.weight": []}
    shown = guard._task._watch._observe

    def listen(p: Any, low: Tensor, inside: Tensor | None, outside: Tensor | None, first: Tensor) -> None:
        back = low if source == "gradient" else first
        back = back if outside is None else outside @ back
        name = next(n for n, q in model.named_parameters() if q is p)
        lifted[name].append(back if inside is None else back @ inside.mT)
        shown(p, low, inside, outside, first)

    optimizer.observe(listen)
    fit(model, rows(4, 20, 1, torch.float64), guard, optimizer=optimizer, steps=13)
    moments = guard._task.finish()
    for name, gradients in lifted.items():
        inside, outside = sum(g.mT @ g for g in gradients), sum(g @ g.mT for g in gradients)
        torch.testing.assert_close(moments[name].matrix(), inside, rtol=1e-6, atol=1e-8 * float(inside.trace()))
        torch.testing.assert_close(
            moments[f"{name}[out]"].matrix(), outside, rtol=1e-6, atol=1e-8 * float(outside.trace())
        )


def test_nothing_of_the_size_of_a_wide_matrix_is_kept() -> None:
    """A side wider than twice ``rows`` is sketched when only coordinates are seen."""
    model, guard = nn.Linear(300, 310, bias=False), GradientMemory(0.9, rows=16, side="both")
    guard.attach(model)
    guard.begin_task()
    optimizer = gorp(model, refresh=2, rank=4)
    guard.bind(optimizer)
    fit(model, rows(5, 300, 1), guard, optimizer=optimizer, steps=40)
    state = guard._task.statistics.state_dict()
    numbers = sum(t.numel() for moment in state["moments"].values() for t in moment.values())
    numbers += sum(t.numel() for w in state["windows"].values() for t in (w["basis"], w["gram"]))
    assert 0 < numbers < 2 * (2 * 16) * 310 + 4 * 310 + 100
    certificate = guard.end_task(None)
    assert all(0 < s.rank <= 16 for s in certificate.sites)
    assert all(s.energy >= 0.9 for s in certificate.sites)


def test_a_sketch_that_is_too_small_is_told() -> None:
    model, guard = nn.Linear(60, 64, bias=False), GradientMemory(0.99, rows=2)
    guard.attach(model)
    guard.begin_task()
    optimizer = gorp(model, refresh=1, rank=4, lr=0.1)
    guard.bind(optimizer)
    for seed in range(12):
        model.weight.grad = rows(64, 60, seed)
        guard.before_step()
        optimizer.step()
        guard.after_step()
    certificate = guard.end_task(None)
    assert certificate.energy < 0.99
    assert any("raise rows" in n for n in certificate.notes)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", ["adamw", "momentum", "nadam"])
@pytest.mark.parametrize("source", ["momentum", "exp_avg"])
def test_first_moments_of_stock_optimizers(name: str, source: str, side: str) -> None:
    model, guard = mlp(torch.float64, bias=False), GradientMemory(0.9, source=source, side=side)
    guard.attach(model)
    guard.begin_task()
    optimizer = ALL_OPTIMIZERS[name](trainable(model))
    guard.bind(optimizer)
    seen: dict[str, list[Tensor]] = {n: [] for n, _ in model.named_parameters()}
    for _ in range(7):
        fit(model, rows(3, 20, 1, torch.float64), guard, optimizer=optimizer, steps=1)
        for n, p in model.named_parameters():
            state = optimizer.state[p]
            seen[n].append(state["exp_avg" if "exp_avg" in state else "momentum_buffer"].clone())
    guard.end_task(None)
    for n, firsts in seen.items():
        used = firsts if source == "momentum" else firsts[-1:]
        moment = sum(m.mT @ m if side == "input" else m @ m.mT for m in used)
        key = n if side == "input" else f"{n}[out]"
        values, vectors = torch.linalg.eigh(moment)
        rank = int((values.flip(0).cumsum(0) / values.sum() < 0.9).sum()) + 1
        top = vectors.flip(1)[:, :rank]
        torch.testing.assert_close(projector(guard, key), top @ top.mT, rtol=0, atol=1e-9)


def test_the_last_moment_of_gorp_is_the_published_rule_in_fixed_coordinates() -> None:
    model, guard = tall(torch.float64), GradientMemory(0.9, source="exp_avg", side="output")
    optimizer = gorp(model, side="right")
    learn(guard, model, rows(4, 20, 1, torch.float64), optimizer=optimizer, steps=17)
    for name in ("0.weight", "2.weight"):
        first = optimizer.state[dict(model.named_parameters())[name]]["exp_avg"].double()
        u, sigma, _ = torch.linalg.svd(first.reshape(-1, 4), full_matrices=False)
        rank = int((sigma.square().cumsum(0) / sigma.square().sum() < 0.9).sum()) + 1
        torch.testing.assert_close(projector(guard, f"{name}[out]"), u[:, :rank] @ u[:, :rank].mT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("source", ["momentum", "exp_avg"])
def test_optimizers_without_a_first_moment_are_refused(source: str) -> None:
    for name in ("sgd", "adafactor", "adagrad", "rmsprop"):
        model, guard = mlp(), GradientMemory(source=source)
        guard.attach(model)
        guard.begin_task()
        optimizer = ALL_OPTIMIZERS[name](trainable(model))
        guard.bind(optimizer)
        with pytest.raises(GuardError, match=f"{type(optimizer).__name__} keeps none of 0.weight.*source='gradient'"):
            fit(model, rows(4, 20, 1), guard, optimizer=optimizer, steps=1)
    model, guard = mlp(), GradientMemory(source=source)
    guard.attach(model)
    guard.begin_task()
    with pytest.raises(GuardError, match=r"guard\.bind\(optimizer\)"):
        fit(model, rows(4, 20, 1), guard, steps=1)


def test_gradients_of_what_gorp_treats_as_adamw_are_seen() -> None:
    model, guard = tall(), GradientMemory(0.9)
    certificate = learn(guard, model, rows(4, 20, 1), optimizer=gorp(model))
    assert {s.name for s in certificate.sites} == {"0.weight", "2.weight", "4.weight"}
    assert all(s.rank for s in certificate.sites)


@pytest.mark.parametrize("bound", [True, False])
def test_rounding_of_a_wholly_protected_gradient_is_not_remembered(bound: bool) -> None:
    """The same task again: what is left of its gradients is 1e-8 of them, and no direction of it is taken."""
    model, guard = nn.Sequential(nn.Linear(24, 16, bias=False)), GradientMemory(1.0)
    old = rows(3, 24, 1)
    ranks = []
    for _ in range(3):
        guard.attach(model)
        guard.begin_task()
        optimizer = gorp(model, weight_decay=0.0)
        if bound:
            guard.bind(optimizer)
        for _ in range(12):
            optimizer.zero_grad()
            default_loss(model, old).backward()
            guard.before_step()
            if bound or not ranks:
                optimizer.step()
            guard.after_step()
        ranks.append(guard.end_task(None).sites[0].rank)
    assert ranks == [3, 3, 3]


def test_nan_in_coordinates_is_left_out() -> None:
    model, guard = tall(), GradientMemory(0.9, side="both")
    guard.attach(model)
    guard.begin_task()
    optimizer = Projected(trainable(model))
    guard.bind(optimizer)
    fit(model, rows(4, 20, 1), guard, optimizer=optimizer, steps=5)
    weight, state = model[0].weight, optimizer.state[model[0].weight]
    optimizer.observer(weight, torch.full((12, 4), float("nan")), state["in"], None, state["first"])
    certificate = guard.end_task(None)
    assert any(n.startswith("2 gradients held NaN") for n in certificate.notes)
    assert all(bool(space.stored.isfinite().all()) for space in guard._spaces.values())


# --- binding ----------------------------------------------------------------------------------------------------


def test_binding_before_or_after_or_twice_is_the_same_and_the_end_lets_go() -> None:
    ends = []
    for order in ("before", "after", "twice", "again"):
        model, guard = tall(), GradientMemory(0.8)
        for seed in (1, 2):
            guard.attach(model)
            optimizer = gorp(model)
            if order == "before":
                guard.bind(optimizer)
            guard.begin_task()
            if order != "before":
                guard.bind(None)
                guard.bind(optimizer)
            if order == "twice":
                guard.bind(gorp(model))
                guard.bind(optimizer)
            if order == "again":
                guard.begin_task()
            fit(model, rows(6, 20, seed), guard, optimizer=optimizer, steps=10)
            guard.end_task(None)
            assert optimizer._observer is None
        ends.append(matrices(model))
    for other in ends[1:]:
        assert all(torch.equal(a, other[n]) for n, a in ends[0].items())


def test_a_released_optimizer_protects_nothing_and_the_guard_does() -> None:
    model, guard = tall(), GradientMemory(0.8)
    first = Projected(trainable(model))
    learn(guard, model, rows(6, 20, 1), optimizer=first)
    guard.begin_task()
    guard.bind(first)
    assert first.spaces
    second = ALL_OPTIMIZERS["adamw"](trainable(model))
    guard.bind(second)
    assert first.spaces == {}
    assert first.observer is None
    fit(model, rows(6, 20, 2), guard, optimizer=second, steps=20)
    assert guard.end_task(None).leak < 1e-6


class Seen(Guard):
    """Remembers what it was bound to."""

    def __init__(self) -> None:
        self.bound: list[Any] = []

    def attach(self, model: nn.Module) -> None: ...
    def begin_task(self, task: str | None = None) -> None:
        self.bound.append("begin")

    def bind(self, optimizer: Any) -> None:
        self.bound.append(optimizer)

    def end_task(self, task: Any, batches: Any) -> Any: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


class Sentences(Dataset):
    def __init__(self, count: int, length: int, seed: int) -> None:
        self.batch = tokens(count, length, seed)
        self.labels = self.batch["input_ids"][:, 0] % 3

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**{k: v[index] for k, v in self.batch.items()}, "labels": self.labels[index]}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3, "weight_decay": 0.1, "max_steps": 12, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False, **changes,
    }  # fmt: skip
    return TrainingArguments(**settings)


def test_the_callback_binds_to_the_optimizer_itself(tmp_path: Path) -> None:
    guard, model = Seen(), classifier()
    Trainer(
        model, arguments(tmp_path, max_steps=1), train_dataset=Sentences(8, 4, 1), callbacks=[guard.callback()]
    ).train()
    assert guard.bound[0] == "begin"
    assert type(guard.bound[1]) is torch.optim.AdamW
    assert Guard.bind(guard, None) is None


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_two_tasks_in_a_plain_trainer_with_gorp(tmp_path: Path, project: str) -> None:
    model, guard = classifier(), GradientMemory(0.9, project=project)
    door = (GORP, {"lr": 3e-3, "rank": 4, "refresh": 5})
    for seed in (1, 2):
        trainer = Trainer(
            model,
            arguments(tmp_path),
            train_dataset=Sentences(16, 5, seed),
            callbacks=[guard.callback()],
            optimizer_cls_and_kwargs=copy.deepcopy(door),
        )
        trainer.train()
        assert guard._task._taken if seed == 2 else not guard._task._taken
        certificate = guard.end_task(None, [])
    assert certificate.kept is (project == "update")
    assert (certificate.leak <= 1e-6) is (project == "update")
    assert len(certificate.sites) == 14


# --- state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["gradient", "momentum", "exp_avg"])
@pytest.mark.parametrize("kind", ["adamw", "gorp", "gorp-left"])
def test_a_resume_in_the_middle_of_a_task_loses_nothing(kind: str, source: str) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        if kind == "adamw":
            return ALL_OPTIMIZERS["adamw"](trainable(model))
        return gorp(model, side="left" if kind == "gorp-left" else "auto")

    def steps(guard: GradientMemory, model: nn.Module, optimizer: Any, count: int) -> None:
        fit(model, rows(6, 20, 2), guard, optimizer=optimizer, steps=count)

    model, guard = tall(), GradientMemory(0.8, side="both", source=source, rows=4)
    learn(guard, model, rows(4, 20, 1), optimizer=make(model))
    guard.begin_task()
    optimizer = make(model)
    guard.bind(optimizer)
    steps(guard, model, optimizer, 7)
    weights, state, memory = copy.deepcopy((model.state_dict(), optimizer.state_dict(), guard.state_dict()))
    steps(guard, model, optimizer, 6)
    whole = guard.end_task("second")

    other, again = tall(), GradientMemory(0.8, side="both", source=source, rows=4)
    other.load_state_dict(weights)
    again.attach(other)
    again.load_state_dict(memory)
    resumed = make(other)
    resumed.load_state_dict(state)
    again.attach(other)
    again.begin_task()
    again.bind(resumed)
    steps(again, other, resumed, 6)
    assert again.end_task("second") == whole
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert guard._spaces.keys() == again._spaces.keys()
    assert all(torch.equal(space.stored, again._spaces[key].stored) for key, space in guard._spaces.items())


def test_memory_on_disk(tmp_path: Path) -> None:
    model, guard = tall(), GradientMemory({"linear": 0.85}, side="both", rows=64)
    learn(guard, model, rows(4, 20, 1))
    guard.save_pretrained(tmp_path / "memory")
    again = GradientMemory.load_pretrained(tmp_path / "memory", model)
    assert again.settings() == guard.settings()
    assert again.tasks == ["task-1"]
    twin = copy.deepcopy(model)
    other = GradientMemory.load_pretrained(tmp_path / "memory")
    a, b = learn(guard, model, rows(8, 20, 2)), learn(other, twin, rows(8, 20, 2))
    assert a == b
    assert a.kept
    guard.begin_task()
    guard.save_pretrained(tmp_path / "inside")
    with pytest.raises(GuardError, match="inside a task"):
        GradientMemory.load_pretrained(tmp_path / "inside")
    assert GradientMemory.load_pretrained(tmp_path / "inside", model)._task is not None
    with pytest.raises(GuardError, match="not in this model"):
        GradientMemory.load_pretrained(tmp_path / "memory", nn.Sequential(nn.Linear(20, 12)))
    with pytest.raises(GuardError, match="basis of R"):
        GradientMemory.load_pretrained(tmp_path / "memory", mlp())
    with pytest.raises(DataError, match="pegp"):
        PEGP.load_pretrained(tmp_path / "memory")
    (tmp_path / "memory" / "guard.json").write_text("{}")
    with pytest.raises(DataError):
        GradientMemory.load_pretrained(tmp_path / "memory")


def test_another_model_starts_its_task_anew() -> None:
    guard, model = GradientMemory(0.9), tall()
    learn(guard, model, rows(4, 20, 1))
    guard.begin_task()
    optimizer = Projected(trainable(model))
    guard.bind(optimizer)
    guard.attach(copy.deepcopy(model))
    assert optimizer.observer is None
    with pytest.raises(GuardError, match="outside a task"):
        guard.before_step()


def test_lora_of_bert_under_gorp() -> None:
    model, guard = lora_bert(), GradientMemory(0.9)
    learn(guard, model, tokens(2, 4, 1), optimizer=gorp(model), steps=10)
    certificate = learn(guard, model, tokens(4, 6, 2), optimizer=gorp(model), steps=15)
    assert certificate.kept
    assert {s.kind for s in certificate.sites} == {"lora_A"}
    assert any("go on from an earlier task" in n for n in certificate.notes)


# --- what was seen, and what was not --------------------------------------------------------------------------------


def seen_after(optimizer: GORP | None, model: nn.Module, guard: GradientMemory, **settings: Any) -> tuple[str, ...]:
    guard.attach(model)
    guard.begin_task()
    if optimizer is not None:
        guard.bind(optimizer)
    stepping = optimizer or gorp(model, **settings)
    for _ in range(12):
        stepping.zero_grad()
        model(rows(4, 20, 1)).square().sum().backward()
        guard.before_step()
        stepping.step()
        guard.after_step()
    return guard.end_task("one").notes


def test_the_certificate_says_how_much_of_the_gradients_a_small_basis_showed() -> None:
    model = tall()
    notes = seen_after(gorp(model, rank=1), model, GradientMemory(0.9, unprotected="allow"))
    assert any("% of the gradients' energy when last found" in note for note in notes)
    model = tall()
    notes = seen_after(gorp(model, rank=3, refresh=1), model, GradientMemory(0.9, unprotected="allow"))
    assert not any("subspaces held" in note for note in notes), "four inputs; three directions hold nearly all"


def test_gradients_that_layer_wise_mode_frees_are_missed_aloud() -> None:
    from growthring.optim import LayerWise

    model = tall()
    optimizer = gorp(model, rank=3)
    guard = GradientMemory(0.9, unprotected="allow")
    guard.attach(model)
    guard.begin_task()
    with LayerWise(optimizer):
        for _ in range(12):
            optimizer.zero_grad()
            model(rows(4, 20, 1)).square().sum().backward()
            guard.before_step()
            optimizer.step()
            guard.after_step()
    assert any("were not there" in note for note in guard.end_task("one").notes)


def test_the_moment_of_a_skipped_matrix_is_not_read_as_a_whole_one() -> None:
    """With rank = n the projected moment has the shape of the weight, and other coordinates."""
    model = nn.Sequential(nn.Linear(4, 16, bias=False))
    optimizer = GORP(model.parameters(), lr=1e-3, rank=4, refresh=50)
    guard = GradientMemory(0.9, source="momentum")
    guard.attach(model)
    guard.begin_task()
    guard.bind(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        (model(torch.eye(4)[:1] + step).square().sum() * (float("nan") if step == 2 else 1.0)).backward()
        if step == 2:
            before = {n: w.gram.clone() for n, w in guard._task.statistics._windows.items()}  # type: ignore[union-attr]
        guard.before_step()
        with pytest.warns(UserWarning, match="skipped") if step == 2 else contextlib.nullcontext():
            optimizer.step()
        guard.after_step()
    after = guard._task.statistics  # type: ignore[union-attr]
    assert not after._moments
    assert all(torch.equal(before[n], w.gram) for n, w in after._windows.items())
