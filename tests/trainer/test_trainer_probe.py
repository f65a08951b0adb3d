from __future__ import annotations

import pytest
import torch

from growthring.errors import ConfigError, DataError, NumericalError
from growthring.trainer import fit_linear_probe


def blobs(count, seed, spread=1.0, classes=3, dim=6):
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0)) * 2
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, dim, generator=draw), labels


def test_it_is_scikit_learns_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    (x, y), held = blobs(90, 1, 2.0), blobs(30, 2, 2.0)
    penalty = 0.05
    found = fit_linear_probe(x, y, *held, 3, [penalty])
    scale = float(x.double().square().mean().sqrt())
    # scikit-learn minimises C * sum of losses + 1/2 ||W||^2
    other = linear_model.LogisticRegression(C=1 / (len(x) * penalty), fit_intercept=False, tol=1e-10, max_iter=10_000)
    other.fit((x.double() / scale).numpy(), y.numpy())
    torch.testing.assert_close(found.weight * scale, torch.from_numpy(other.coef_), atol=1e-5, rtol=1e-4)


def test_the_validation_rows_choose_the_penalty():
    (x, y), (held, truth) = blobs(24, 1, 4.0), blobs(300, 2, 4.0)
    found = fit_linear_probe(x, y, held, truth, 3)
    scores = dict(found.tried)
    assert list(scores) == sorted(scores, reverse=True)
    assert found.validation == max(scores.values()) == scores[found.penalty]
    assert len(set(scores.values())) > 1  # else nothing was chosen
    right = ((held.double() @ found.weight.T).argmax(1) == truth).double().mean()
    assert float(right) == found.validation
    turned = fit_linear_probe(x, y, held, (truth + 1) % 3, 3)  # other validation labels, another choice
    assert turned.tried != found.tried


def test_the_scale_of_the_features_plays_no_part():
    (x, y), held = blobs(60, 1), blobs(30, 2)
    small, large = (fit_linear_probe(x * k, y, held[0] * k, held[1], 3) for k in (2.0**-10, 2.0**10))
    assert small.tried == large.tried
    torch.testing.assert_close(small.weight * 2.0**-10, large.weight * 2.0**10)


def test_what_cannot_be_learned_from():
    (x, y), held = blobs(12, 1), blobs(6, 2)
    with pytest.raises(ConfigError, match="numbers above 0"):
        fit_linear_probe(x, y, *held, 3, [0.0, 1.0])
    with pytest.raises(ConfigError, match="numbers above 0"):
        fit_linear_probe(x, y, *held, 3, [])
    with pytest.raises(DataError, match="12 labels"):
        fit_linear_probe(x[:5], y, *held, 3)
    with pytest.raises(DataError, match="validation features"):
        fit_linear_probe(x, y, held[0][:0], [], 3)
    with pytest.raises(DataError, match="run from 0 to 2, of 2 classes"):
        fit_linear_probe(x, y, *held, 2)
    for bad in (x * 0, x * float("nan")):
        with pytest.raises(NumericalError, match="root mean square"):
            fit_linear_probe(bad, y, *held, 3)


def test_it_works_under_no_grad_and_in_half_precision():
    (x, y), held = blobs(30, 1), blobs(12, 2)
    with torch.no_grad():
        found = fit_linear_probe(x.bfloat16(), y.tolist(), held[0].bfloat16(), held[1].tolist(), 3)
    assert found.weight.dtype == torch.float64
    assert found.validation > 0.8
