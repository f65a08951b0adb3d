"""The projected optimizer where people use it: accumulation, clipping, schedules, averages, accelerate, Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from optim_helpers import assert_same_state, snapshot, tiny_batch, tiny_net, train
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from growthring.optim import GORP, GaLore


def made(seed=0, dtype=torch.float32, **settings):
    model = tiny_net(seed, dtype)
    return model, GORP(model.parameters(), **{"lr": 0.02, "rank": 3, "refresh": 3, **settings})


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_it_learns():
    model, optimizer = made()
    x, y = tiny_batch(64)
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.5 * first


def test_invariant_12_accumulation_is_one_big_batch():
    """Four backward passes over quarters, one step: the step of the whole batch."""
    ends = []
    for pieces in (1, 4):
        model, optimizer = made(dtype=torch.float64)
        for k in range(8):
            x, y = tiny_batch(32, seed=k, dtype=torch.float64)
            optimizer.zero_grad()
            for part in range(pieces):
                rows = slice(part * 32 // pieces, (part + 1) * 32 // pieces)
                (nn.functional.cross_entropy(model(x[rows]), y[rows]) / pieces).backward()
            optimizer.step()
        assert all(int(s["step"]) == 8 for s in optimizer.state.values())
        ends.append(snapshot(model.parameters()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_invariant_13_averaged_gradients_of_two_replicas_are_one_big_batch():
    """What data parallelism does: two replicas, the mean of their gradients in both, the same weights in both."""
    whole, one_optimizer = made(dtype=torch.float64)
    replicas = [made(dtype=torch.float64) for _ in range(2)]
    for k in range(6):
        x, y = tiny_batch(32, seed=k, dtype=torch.float64)
        one_optimizer.zero_grad()
        nn.functional.cross_entropy(whole(x), y).backward()
        one_optimizer.step()
        for rank, (model, optimizer) in enumerate(replicas):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rank::2]), y[rank::2]).backward()
        for pair in zip(*(m.parameters() for m, _ in replicas), strict=True):
            mean = (pair[0].grad + pair[1].grad) / 2
            for p in pair:
                p.grad = mean.clone()
        for _, optimizer in replicas:
            optimizer.step()
    assert same(replicas[0][0], replicas[1][0])
    for a, b in zip(whole.parameters(), replicas[0][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_the_gradient_is_left_as_it_was():
    """Gradients are read by whoever comes after: norms, logs, guards."""
    model, optimizer = made()
    x, y = tiny_batch(16)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_clipping_by_global_norm():
    """Clipped gradients enter the basis, the moments and the step; momentum scales with them, Adam does not."""
    ends = []
    for factor in (1.0, 0.25):
        model, optimizer = made(rule="momentum", lr=0.1, dtype=torch.float64)
        start = snapshot(model.parameters())
        x, y = tiny_batch(16, dtype=torch.float64)
        nn.functional.cross_entropy(model(x), y).backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1e9))
        nn.utils.clip_grad_norm_(model.parameters(), factor * norm)
        optimizer.step()
        ends.append([p.detach() - s for p, s in zip(model.parameters(), start, strict=True)])
    for a, b in zip(*ends, strict=True):
        if a.ndim > 1:
            torch.testing.assert_close(b, 0.25 * a, rtol=1e-5, atol=1e-9)


def test_grad_scaler_skips_a_step_with_infinite_gradients():
    """A step that the scaler skips is no step: neither counted nor warned of."""
    model, optimizer = made(refresh=2)
    twin, other = made(refresh=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for k in range(6):
        x, y = tiny_batch(16, seed=k)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if k == 3:
            next(model.parameters()).grad[0, 0] = float("inf")
        before = snapshot(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        if k == 3:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            continue
        other.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        other.step()
    assert same(model, twin)
    assert_same_state(optimizer, other)
    assert all(int(s["skipped"]) == 0 for s in optimizer.state.values() if "skipped" in s)


@pytest.mark.parametrize("kind", [GORP, GaLore])
def test_schedulers_steer_the_learning_rate(kind):
    model = tiny_net()
    optimizer = kind(model.parameters(), 0.02, rank=3, refresh=3)
    scheduler = LambdaLR(optimizer, lambda k: 1.0 if k < 4 else 0.0)
    train_with(model, optimizer, scheduler, 4)
    assert optimizer.param_groups[0]["lr"] == 0.0
    before = snapshot(model.parameters())
    train_with(model, optimizer, scheduler, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_one_cycle_moves_the_first_beta_too():
    model, optimizer = made()
    scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=8, cycle_momentum=True)
    assert optimizer.param_groups[0]["betas"][0] == pytest.approx(0.95)
    train_with(model, optimizer, scheduler, 7)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = tiny_net()
    fresh.load_state_dict(model.state_dict())
    other = GORP(fresh.parameters(), lr=0.02, rank=3, refresh=3)
    other.load_state_dict(saved)  # a scheduler's own entries travel in the groups
    assert other.param_groups[0]["max_lr"] == 0.05
    train(model, optimizer, 3, start=7)
    train(fresh, other, 3, start=7)
    assert same(model, fresh)


def test_plateau_scheduler_and_a_tensor_learning_rate():
    model, optimizer = made()
    ReduceLROnPlateau(optimizer, patience=0).step(1.0)
    twin, other = made(lr=torch.tensor(0.02))
    train(model, optimizer, 4)
    train(twin, other, 4)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def train_with(model, optimizer, scheduler, steps):
    for k in range(steps):
        x, y = tiny_batch(16, seed=k)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()


def test_an_exponential_moving_average_beside_it():
    model, optimizer = made()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = None
    for k in range(5):
        train(model, optimizer, 1, start=k)
        average.update_parameters(model)
        now = snapshot(model.parameters())
        expected = now if expected is None else [0.5 * e + 0.5 * w for e, w in zip(expected, now, strict=True)]
    for a, b in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_step_hooks_run_on_the_optimizer():
    model, optimizer = made()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 2)
    assert calls == ["before", "after"] * 2


def test_step_as_a_post_accumulate_hook_with_one_optimizer_a_parameter():
    """torch's own recipe for stepping inside backward; one optimizer for each parameter."""
    model, optimizer = made(stagger=False)
    twin = tiny_net()
    single = {p: GORP([p], lr=0.02, rank=3 if p.ndim > 1 else None, refresh=3) for p in twin.parameters()}

    def step(p):
        single[p].step()
        single[p].zero_grad()

    for p in twin.parameters():
        p.register_post_accumulate_grad_hook(step)
    for k in range(4):
        train(model, optimizer, 1, start=k)
        x, y = tiny_batch(16, seed=k)
        nn.functional.cross_entropy(twin(x), y).backward()
    first = next(p for p in model.parameters() if p.ndim > 1)
    twin_first = next(p for p in twin.parameters() if p.ndim > 1)
    torch.testing.assert_close(first, twin_first, rtol=1e-4, atol=1e-5)


# --- accelerate -----------------------------------------------------------------------------------------------------


def test_accelerate_prepares_accumulates_and_resumes(tmp_path):
    from accelerate import Accelerator

    straight, whole = made()
    for k in range(8):
        x, y = tiny_batch(32, seed=k)
        whole.zero_grad()
        sum(nn.functional.cross_entropy(straight(x[h]), y[h]) / 2 for h in (slice(0, 16), slice(16, 32))).backward()
        nn.utils.clip_grad_norm_(straight.parameters(), 1.0)
        whole.step()

    def steps(accelerator, model, optimizer, numbers):
        for k in numbers:
            x, y = tiny_batch(32, seed=k)
            for half in (slice(0, 16), slice(16, 32)):
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.cross_entropy(model(x[half]), y[half]))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(*made())
    steps(accelerator, model, optimizer, range(4))
    accelerator.save_state(str(tmp_path / "state"))
    fresh, other = made(seed=1)
    again = Accelerator(cpu=True, gradient_accumulation_steps=2)
    fresh, other = again.prepare(fresh, other)
    again.load_state(str(tmp_path / "state"))
    assert_same_state(optimizer.optimizer, other.optimizer)
    steps(accelerator, model, optimizer, range(4, 8))
    steps(again, fresh, other, range(4, 8))
    assert same(model, fresh)
    for a, b in zip(straight.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- transformers.Trainer -------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, count=24):
        self.x, self.y = tiny_batch(count)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


class WithLoss(nn.Module):
    """A model as the Trainer calls it."""

    def __init__(self):
        super().__init__()
        self.net = tiny_net()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer_of(folder, **changes):
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder), max_steps=9, save_steps=5, save_strategy="steps", report_to=[], use_cpu=True,
        learning_rate=0.02, per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1,
        disable_tqdm=True, weight_decay=0.1, seed=1, warmup_steps=2, lr_scheduler_type="linear",
        dataloader_pin_memory=False, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    settings = {"lr": 0.02, "rank": 3, "refresh": 3}
    return Trainer(WithLoss(), args, train_dataset=Rows(), optimizer_cls_and_kwargs=(GORP, settings))


def test_trainer_takes_it_by_the_factory_door_and_resumes_bit_for_bit(tmp_path):
    straight = trainer_of(tmp_path / "straight")
    straight.train()
    optimizer = straight.optimizer.optimizer
    assert isinstance(optimizer, GORP)
    decays = {g["weight_decay"] for g in optimizer.param_groups}
    assert decays == {0.1, 0.0}  # GaLore's integration loses both groups
    treatments = [plan.treatment for plan in optimizer.explain()]
    assert treatments.count("projected") == 2
    assert treatments.count("adamw") == len(treatments) - 2
    for p in straight.model.parameters():
        assert int(optimizer.state[p]["step"]) == 9
    losses = [row["loss"] for row in straight.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert all(row["grad_norm"] > 0 for row in straight.state.log_history if "grad_norm" in row)

    resumed = trainer_of(tmp_path / "straight")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-5"))
    assert resumed.state.global_step == 9
    assert same(straight.model, resumed.model)
    assert_same_state(optimizer, resumed.optimizer.optimizer)


def test_trainer_in_bfloat16_weights_resumes_bit_for_bit(tmp_path):
    def cast(trainer):
        trainer.model.to(torch.bfloat16)
        trainer.train_dataset.x = trainer.train_dataset.x.to(torch.bfloat16)
        return trainer

    straight = cast(trainer_of(tmp_path / "half"))
    straight.train()
    resumed = cast(trainer_of(tmp_path / "half"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-5"))
    assert same(straight.model, resumed.model)
    assert_same_state(straight.optimizer.optimizer, resumed.optimizer.optimizer)
