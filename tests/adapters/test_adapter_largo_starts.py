from __future__ import annotations

import pytest
import torch
from adapter_helpers import bert, tokens
from largo_helpers import IDS, LINEAR, Kinds, kinds, layers, moved
from peft import PeftModel, get_peft_model
from torch import nn

from growthring.adapters import LargoConfig, start_from_activations
from growthring.adapters.largo.starts import start_factors
from growthring.errors import ConfigError, DataError, NumericalError

TOLERANCE = {"atol": 1e-12, "rtol": 1e-12}


def matrix(rows=9, columns=7, rank=None, dtype=torch.float64):
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if rank is not None:
        u, s, v = torch.linalg.svd(made, full_matrices=False)
        s[rank:] = 0
        made = u @ torch.diag(s) @ v
    return made.to(dtype)


# --- singular vectors of the weight ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 2, 11.0])
@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (4, 4)])
@pytest.mark.parametrize("init", ["principal", "minor"])
def test_the_factors_are_balanced_and_multiply_to_the_part_asked_for(init, shape, alpha):
    weight = matrix(*shape)
    config = LargoConfig(r=3, init=init, alpha=alpha)
    a, b = start_factors(weight, config, "w")
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    chosen = slice(0, 3) if init == "principal" else slice(len(s) - 3, None)
    part = u[:, chosen] @ torch.diag(s[chosen]) @ v[chosen]
    torch.testing.assert_close(config.scaling * b @ a, part, **TOLERANCE)
    torch.testing.assert_close(a.norm(), b.norm(), **TOLERANCE)
    torch.testing.assert_close(torch.linalg.matrix_norm(a, 2), torch.linalg.matrix_norm(b, 2), **TOLERANCE)
    torch.testing.assert_close(a.norm() ** 2, s[chosen].sum() / config.scaling, **TOLERANCE)
    assert a.is_contiguous()
    assert a.untyped_storage().nbytes() == a.numel() * 8


@pytest.mark.parametrize("init", ["principal", "minor"])
def test_the_product_form_has_orthonormal_rows(init):
    weight = matrix()
    a, b = start_factors(weight, LargoConfig(r=3, init=init, form="product"), "w")
    assert b is None
    torch.testing.assert_close(a @ a.T, torch.eye(3, dtype=torch.float64), **TOLERANCE)
    _, _, v = torch.linalg.svd(weight, full_matrices=False)
    chosen = v[:3] if init == "principal" else v[-3:]
    torch.testing.assert_close(a.T @ a, chosen.T @ chosen, **TOLERANCE)


def test_rank_of_the_full_matrix():
    weight = matrix(5, 4)
    a, b = start_factors(weight, LargoConfig(r=4), "w")
    torch.testing.assert_close(b @ a, weight, **TOLERANCE)


@pytest.mark.parametrize("rank", [0, 2, 4])
@pytest.mark.parametrize("init", ["principal", "minor"])
def test_a_weight_of_deficient_rank_starts_alive(init, rank):
    linear = nn.Linear(7, 9, bias=False).double()
    linear.weight.data = matrix(rank=rank)
    model = get_peft_model(nn.Sequential(linear), LargoConfig(r=3, init=init, target_modules=["0"], alpha=6))
    (layer,) = layers(model).values()
    x = torch.randn(20, 7, dtype=torch.float64)
    assert torch.equal(model(x), x @ matrix(rank=rank).T)
    model(x).square().sum().backward() if rank else model(x).sum().backward()
    assert layer.largo_B["default"].weight.grad.norm() > 1e-3
    product = 2 * layer.largo_B0["default"] @ layer.largo_A0["default"]
    if init == "principal":
        assert torch.linalg.matrix_rank(product) == min(rank, 3)
    else:
        torch.testing.assert_close(product, torch.zeros_like(product), atol=1e-12, rtol=0)


def test_a_balanced_start_is_kept_where_it_lives():
    a, b = start_factors(matrix(rank=6), LargoConfig(r=3, init="principal"), "w")
    torch.testing.assert_close(a.norm(), b.norm(), **TOLERANCE)  # of deficient rank, but not among the first three


@pytest.mark.parametrize("form", ["delta", "product"])
def test_a_randomised_decomposition_finds_the_principal_part(form):
    u, _, v = torch.linalg.svd(matrix(60, 50), full_matrices=False)
    weight = u @ torch.diag(0.5 ** torch.arange(50.0, dtype=torch.float64)) @ v
    fast = start_factors(weight, LargoConfig(r=4, svd_iterations=4, form=form), "w")
    exact = start_factors(weight, LargoConfig(r=4, form=form), "w")
    again = start_factors(weight, LargoConfig(r=4, svd_iterations=4, form=form), "w")
    assert torch.equal(fast[0], again[0])  # seeded
    torch.testing.assert_close(fast[0].T @ fast[0], exact[0].T @ exact[0], atol=1e-6, rtol=0)
    if form == "delta":
        torch.testing.assert_close(fast[1] @ fast[0], exact[1] @ exact[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_randomised_decomposition_of_deficient_rank(rank):
    weight = matrix(rank=rank)
    a, b = start_factors(weight, LargoConfig(r=4, svd_iterations=2), "w")
    torch.testing.assert_close(b @ a, weight, atol=1e-10, rtol=0)
    torch.testing.assert_close(a @ a.T, torch.eye(4, dtype=torch.float64), atol=1e-10, rtol=0)


def test_half_precision_weights_are_decomposed_in_float32():
    weight = matrix(dtype=torch.bfloat16)
    a, b = start_factors(weight, LargoConfig(r=7), "w")
    assert a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(b @ a, weight.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_have_no_singular_vectors(bad):
    base = Kinds()
    base.wide.weight.data[1, 2] = bad
    with pytest.raises(NumericalError, match="wide: the weight holds NaN or infinity"):
        get_peft_model(base, LargoConfig(r=3, target_modules=["wide"]))


def test_a_new_adapter_leaves_the_random_state_of_a_seed_reproducible():
    first, second = (kinds(svd_iterations=2) for _ in range(2))
    for one, other in zip(layers(first).values(), layers(second).values(), strict=True):
        assert torch.equal(one.largo_A0["default"], other.largo_A0["default"])


# --- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["delta", "product"])
def test_activations_give_the_main_directions_of_the_inputs(form):
    model = kinds(torch.float64, init="activation", form=form)
    rows = {}
    for name, layer in layers(model).items():
        layer.base_layer.register_forward_pre_hook(
            lambda module, args, name=name: rows.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
    batches = [IDS[:2], (IDS[2:4], "labels"), {"ids": IDS[4:]}]
    start_from_activations(model, batches)
    for name, layer in layers(model).items():
        _, _, v = torch.linalg.svd(torch.cat(rows[name]), full_matrices=False)
        a = layer.largo_A0["default"]
        torch.testing.assert_close(a @ a.T, torch.eye(3, dtype=torch.float64), **TOLERANCE)
        torch.testing.assert_close(a.T @ a, v[:3].T @ v[:3], atol=1e-8, rtol=0)
        assert "default" not in layer.largo_B0
    assert torch.equal(model(IDS), Kinds(torch.float64)(IDS))
    model(IDS).square().sum().backward()
    for layer in layers(model).values():
        assert layer.largo_B["default"].weight.grad.norm() > 0
    assert not torch.allclose(moved(model)(IDS), Kinds(torch.float64)(IDS))


def test_padding_is_left_out_and_nothing_is_changed():
    base = bert()
    model = get_peft_model(base, LargoConfig(r=4, init="activation", target_modules=r".*layer\.\d+\..*query|.*q_proj"))
    assert layers(model)
    model.train()
    flags = [module.training for module in model.modules()]
    batch = tokens()
    start_from_activations(model, [batch])
    assert [module.training for module in model.modules()] == flags
    with_padding = [layer.largo_A0["default"].clone() for layer in layers(model).values()]
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][batch["attention_mask"] == 0] = 3  # what stands under the padding says nothing
    start_from_activations(model, [other])
    for one, layer in zip(with_padding, layers(model).values(), strict=True):
        again = layer.largo_A0["default"]
        torch.testing.assert_close(one.T @ one, again.T @ again, atol=1e-5, rtol=0)
    start_from_activations(model, [{**other, "attention_mask": torch.ones_like(batch["attention_mask"])}])
    again = layer.largo_A0["default"]
    assert not torch.allclose(one.T @ one, again.T @ again, atol=1e-3)


def test_what_the_adapter_itself_adds_is_not_seen():
    still = kinds(torch.float64, init="activation")
    start_from_activations(still, [IDS])
    first = {name: layer.largo_A0["default"] for name, layer in layers(still).items()}
    model = moved(kinds(torch.float64, init="activation"), scale=1.0)
    start_from_activations(model, [IDS])
    for name, layer in layers(model).items():
        assert torch.equal(layer.largo_A0["default"], first[name])
        assert not layer.disable_adapters


def test_without_a_start_nothing_runs(tmp_path):
    message = r"conv: adapter 'default' has init='activation' and has seen no activations yet. Call .*start_from_activ"
    model = kinds(init="activation")
    with pytest.raises(ConfigError, match=message):
        model(IDS)
    with pytest.raises(ConfigError, match=message):
        model.eval()(IDS, adapter_names=["default"] * 5)
    with pytest.raises(ConfigError, match=message):
        model.merge_and_unload()
    with model.disable_adapter():
        model(IDS)
    model.save_pretrained(tmp_path / "unstarted")  # PEFT saves what there is: no start
    with pytest.raises(ConfigError, match=message):
        PeftModel.from_pretrained(Kinds(), tmp_path / "unstarted")(IDS)


@pytest.mark.parametrize("low", [False, True])
def test_a_checkpoint_is_a_start(low, tmp_path):
    model = kinds(init="activation")
    start_from_activations(model, [IDS])
    moved(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Kinds(), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(again(IDS), model(IDS))
    fresh = kinds(init="activation")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS), model(IDS))


def test_starts_that_cannot_be_made():
    model = kinds(init="activation")
    with pytest.raises(DataError, match="was given no batches"):
        start_from_activations(model, iter(()))
    with pytest.raises(DataError, match=r"conv read 2 rows with 2 independent directions, .* rank is 3"):
        start_from_activations(model, [IDS[:1, :2]])
    with pytest.raises(DataError, match="a batch must be"):
        start_from_activations(model, [7])
    with pytest.raises(ConfigError, match="seen no activations"):  # all or none: nothing was put in place
        model(IDS)
    with pytest.raises(ConfigError, match=r"no LARGO-style adapter 'other'; it has \['default'\]"):
        start_from_activations(model, [IDS], "other")
    with pytest.raises(ConfigError, match="it has none at all"):
        start_from_activations(Kinds(), [IDS])
    with pytest.raises(ConfigError, match=r"'default' does not start from activations \(layer conv\)"):
        start_from_activations(kinds(), [IDS])
    both = kinds(init="activation")
    both.add_adapter("other", LargoConfig(r=2, target_modules=LINEAR))
    both.merge_adapter(["other"])
    with pytest.raises(ConfigError, match="adapters are merged"):
        start_from_activations(both, [IDS])


def test_it_works_on_a_module_that_holds_the_model():
    class Holder(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, ids):
            return self.inner(ids)

    model = kinds(init="activation")
    start_from_activations(Holder(model), [{"ids": IDS}])
    model(IDS)
