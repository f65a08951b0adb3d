"""Classifiers that are computed in closed form: exact, and the same whatever the order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from growthring.errors import ConfigError, DataError, NumericalError
from growthring.trainer import PrototypeClassifier, RidgeClassifier
from growthring.trainer.analytic import RIDGES, check_classifiers, held_out

DIM, CLASSES, ROWS = 12, 6, 240


def problem(seed=0, noise=0.6):
    """Rows around one centre a class, with the flags of those that choose settings."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, DIM, generator=draw, dtype=torch.float64)
    labels = torch.randint(CLASSES, (ROWS,), generator=draw)
    rows = centres[labels] + noise * torch.randn(ROWS, DIM, generator=draw, dtype=torch.float64)
    return rows, labels, held_out([f"row {i}" for i in range(ROWS)])


def learned(rows, labels, held, *, batch=32, width=96, seed=3):
    ridge = RidgeClassifier(DIM, CLASSES, width=width, seed=seed)
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        ridge.update(rows[part], labels[part], held[part])
    return ridge


def difference(left, right):
    return float((left.weights - right.weights).abs().max() / right.weights.abs().max())


def test_weights_are_those_of_the_closed_form():
    rows, labels, held = problem()
    ridge = learned(rows, labels, held)
    lifted, targets = ridge.lift(rows).numpy(), np.eye(CLASSES)[labels.numpy()]
    system = lifted.T @ lifted + ridge.ridge * np.eye(ridge.width)
    expected = np.linalg.solve(system, lifted.T @ targets)
    assert np.abs(ridge.weights.numpy() - expected).max() < 1e-9 * np.abs(expected).max()
    wrong = np.linalg.solve(system + ridge.ridge * np.eye(ridge.width), lifted.T @ targets)  # the control
    assert np.abs(ridge.weights.numpy() - wrong).max() > 1e-3 * np.abs(expected).max()


def test_weights_are_those_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    rows, labels, held = problem(1)
    ridge = learned(rows, labels, held)
    other = linear_model.Ridge(alpha=ridge.ridge, fit_intercept=False, solver="cholesky")
    other.fit(ridge.lift(rows).numpy(), np.eye(CLASSES)[labels.numpy()])
    assert np.abs(ridge.weights.numpy().T - other.coef_).max() < 1e-9 * np.abs(other.coef_).max()
    assert (ridge.scores(rows).argmax(1).numpy() == other.predict(ridge.lift(rows).numpy()).argmax(1)).all()


def test_neither_tasks_nor_rows_need_an_order():
    rows, labels, held = problem(2)
    once = learned(rows, labels, held)
    mixed = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
    by_class = torch.argsort(labels, descending=True, stable=True)  # tasks of one class each, the last first
    for order, batch in ((mixed, 7), (by_class, ROWS), (mixed.flip(0), 1)):
        again = learned(rows[order], labels[order], held[order], batch=batch)
        assert difference(again, once) < 1e-9
        assert again.ridge == pytest.approx(once.ridge, rel=1e-12)
    other_side = learned(rows, labels, held.roll(1))  # who is held out decides the ridge alone: here it is the same
    assert other_side.ridge == pytest.approx(once.ridge, rel=1e-12)
    assert difference(other_side, once) < 1e-9
    forgotten = learned(rows[1:], labels[1:], held[1:])  # the control: one row less is seen
    assert difference(forgotten, once) > 1e-6


def test_looking_at_the_weights_in_between_changes_nothing():
    rows, labels, held = problem(3)
    plain, watched = learned(rows, labels, held), RidgeClassifier(DIM, CLASSES, width=96, seed=3)
    for start in range(0, ROWS, 32):
        part = slice(start, start + 32)
        watched.update(rows[part], labels[part], held[part])
        watched.scores(rows[:2])
    assert torch.equal(watched.weights, plain.weights)


def test_the_ridge_is_the_best_on_held_out_rows():
    """The error from moments is the error from rows, and no other ridge of the grid beside it has a smaller one."""
    chosen = set()
    for noise in (0.05, 0.6, 4.0):
        rows, labels, held = problem(4, noise)
        ridge = learned(rows, labels, held)
        lifted, targets = ridge.lift(rows), torch.eye(CLASSES, dtype=torch.float64)[labels]
        fitted, watched = lifted[~held], lifted[held]
        scale = float((fitted * fitted).sum()) / ridge.width
        errors = {}
        for place in RIDGES:
            system = fitted.T @ fitted + 10 ** (place / 2) * scale * torch.eye(ridge.width)
            found = watched @ torch.linalg.solve(system, fitted.T @ targets[~held])
            errors[place] = float((found - targets[held]).square().sum() / held.sum())
        best = min(errors, key=errors.get)
        assert ridge.describe()["held_out_error"] == pytest.approx(errors[best], rel=1e-9)
        total = float((lifted * lifted).sum()) / ridge.width
        assert ridge.ridge == pytest.approx(10 ** (best / 2) * total, rel=1e-9)
        chosen.add(best)
    assert len(chosen) > 1  # the noise matters


def test_a_late_class_leaves_early_weights_usable():
    """Statistics of a class stay: learning others does not take its accuracy away."""
    rows, labels, held = problem(5, noise=0.2)
    early = labels < 3
    ridge = learned(rows[early], labels[early], held[early])
    assert ridge.knows(range(CLASSES)) == [0, 1, 2]
    assert float((ridge.weights[:, 3:]).abs().max()) == 0.0
    ridge.update(rows[~early], labels[~early], held[~early])
    assert ridge.knows([5, 1]) == [5, 1]
    assert float((ridge.scores(rows).argmax(1) == labels).double().mean()) > 0.97
    assert difference(ridge, learned(rows, labels, held)) < 1e-9


def test_prototypes_are_class_means_by_cosine():
    rows, labels, _ = problem(6)
    first, second = PrototypeClassifier(DIM, CLASSES), PrototypeClassifier(DIM, CLASSES)
    first.update(rows.float(), labels)
    for row, label in reversed(list(zip(rows.float(), labels, strict=True))):
        second.update(row[None], label[None])
    means = torch.stack([rows.float().double()[labels == c].mean(0) for c in range(CLASSES)])
    torch.testing.assert_close(first.means, means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second.means, means, rtol=1e-12, atol=1e-12)
    cosine = torch.nn.functional.cosine_similarity(rows.float().double()[:, None], means[None], dim=-1)
    torch.testing.assert_close(first.scores(rows.float()), cosine, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(first.scores(rows.float() * 128), cosine, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [PrototypeClassifier, RidgeClassifier])
def test_saving_and_going_on(kind, tmp_path):
    rows, labels, held = problem(7)
    settings = {"width": 40, "seed": 9} if kind is RidgeClassifier else {}
    made = kind(DIM, CLASSES, **settings)
    made.update(rows[:150], labels[:150], held[:150])
    path = made.save_pretrained(tmp_path)
    assert path.name == f"{kind.name}.safetensors"
    again = kind.from_pretrained(tmp_path)
    assert torch.equal(again.scores(rows), made.scores(rows))
    for one in (made, again):
        one.update(rows[150:], labels[150:], held[150:])
    assert torch.equal(again.counts, made.counts)
    assert int(made.counts.sum()) == ROWS
    torch.testing.assert_close(again.scores(rows), made.scores(rows), rtol=1e-12, atol=1e-12)


def test_memory_does_not_grow_with_rows(tmp_path):
    sizes = []
    for repeats in (1, 5):
        rows, labels, held = problem(8)
        ridge = learned(rows.repeat(repeats, 1), labels.repeat(repeats), held.repeat(repeats))
        sizes.append(ridge.save_pretrained(tmp_path).stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 16


def test_a_torn_or_foreign_file_is_refused(tmp_path):
    made = RidgeClassifier(DIM, CLASSES, width=20)
    with pytest.raises(DataError, match=r"holds no ridge classifier.*ridge\.safetensors"):
        RidgeClassifier.from_pretrained(tmp_path)
    path = made.save_pretrained(tmp_path)
    with safe_open(str(path), framework="pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {"counts": torch.zeros(2, dtype=torch.int64)}, path, metadata=meta)
    with pytest.raises(DataError, match="counts has shape"):
        RidgeClassifier.from_pretrained(tmp_path)
    save_file(tensors, path, metadata=meta | {"classifier": "prototype"})
    with pytest.raises(DataError, match="another kind"):
        RidgeClassifier.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="not a whole ridge classifier"):
        RidgeClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows(rows):
    """No row, no held-out row, nothing but held-out rows: a guess of the ridge, never a failure."""
    data, labels, _ = problem(9)
    for held in (torch.zeros(rows, dtype=torch.bool), torch.ones(rows, dtype=torch.bool)):
        ridge = RidgeClassifier(DIM, CLASSES, width=16)
        ridge.update(data[:rows], labels[:rows], held)
        assert torch.isfinite(ridge.weights).all()
        if rows:
            assert int(ridge.scores(data[:1]).argmax()) == int(labels[0])
    zeros = RidgeClassifier(DIM, CLASSES, width=16)
    zeros.update(torch.zeros(4, DIM), torch.arange(4))
    assert float(zeros.scores(torch.ones(1, DIM)).abs().max()) == 0.0


@pytest.mark.parametrize("kind", [PrototypeClassifier, RidgeClassifier])
def test_bad_input_changes_nothing(kind):
    rows, labels, held = problem(10)
    made = kind(DIM, CLASSES)
    made.update(rows, labels, held)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    broken = rows[:3].clone()
    broken[1, 2] = float("nan")
    for error, match, call in (
        (DataError, r"features must be \(n, 12\)", lambda: made.update(rows[:, :5], labels)),
        (DataError, "as many labels", lambda: made.update(rows, labels[:5])),
        (DataError, r"0\.\.5", lambda: made.update(rows[:1], torch.tensor([6]))),
        (DataError, r"0\.\.5", lambda: made.update(rows[:1], torch.tensor([-1]))),
        (NumericalError, "diverged", lambda: made.update(broken, labels[:3])),
        (NumericalError, "diverged", lambda: made.scores(broken)),
        (DataError, r"features must be", lambda: made.scores(rows[0])),
    ):
        with pytest.raises(error, match=match):
            call()
    assert all(torch.equal(before[k], v) for k, v in made.state_dict().items())
    with pytest.raises(ConfigError, match="at least 1"):
        kind(0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_floating_dtype(dtype):
    rows, labels, held = problem(11, noise=0.1)
    ridge = RidgeClassifier(DIM, CLASSES, width=64)
    ridge.update(rows.to(dtype), labels, held)
    assert ridge.weights.dtype == torch.float64
    assert float((ridge.scores(rows.to(dtype)).argmax(1) == labels).double().mean()) > 0.95


def test_held_out_rows_are_chosen_by_what_they_are():
    keys = [f"text {i}" for i in range(2000)]
    chosen = held_out(keys)
    assert 0.17 < float(chosen.double().mean()) < 0.23
    assert held_out(keys[::-1]).flip(0).equal(chosen)
    assert held_out([keys[3], "new", keys[3]])[[0, 2]].tolist() == [bool(chosen[3])] * 2
    assert held_out([]).dtype == torch.bool
    assert held_out(["\ud800 is no character"]).shape == (1,)


@pytest.mark.parametrize(
    ("names", "match"),
    [([], "at least one"), (["head", "head"], "each once"), (["rigde"], "did you mean 'ridge'"), ([3], "allowed")],
)
def test_names_are_checked(names, match):
    with pytest.raises(ConfigError, match=match):
        check_classifiers(names)
    assert check_classifiers("ridge") == ("ridge",)
