"""Which tensors are found, which features they are protected through, and which models are refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from guard_helpers import (
    OPTIMIZERS,
    answer,
    bert,
    change,
    classifier,
    default_loss,
    fit,
    lora_bert,
    lora_mlp,
    mlp,
    protected,
    rows,
    tokens,
)
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from growthring.errors import DataError, GuardError, NumericalError
from growthring.guards import PEGP
from growthring.guards.batches import mask_for
from growthring.guards.sites import find_sites


def projector(guard: PEGP, site: str) -> Tensor:
    basis = guard._memory.space(site).basis().double()
    return basis @ basis.mT


def spaces(guard: PEGP) -> int:
    return len(guard._memory.spaces)


# --- grouping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "cast inputs"])
def test_query_key_value_share_one_basis(narrow: bool) -> None:
    base = bert().to(torch.bfloat16) if narrow else bert()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "key", "value"]))
    if narrow:  # PEFT keeps the adapter in float32 and casts every input to it, each in a copy of its own
        assert model.base_model.model.encoder.layer[0].attention.self.query.lora_A["default"].weight.dtype == (
            torch.float32
        )
    guard = PEGP(1.0)
    certificate = guard.consolidate(model, [tokens(2, 4, 1)])
    assert len(certificate.sites) == 2 * 3 * 2
    shared = {guard._memory.site_space[s.name] for s in certificate.sites if s.kind == "lora_A"}
    assert len(shared) == 2  # one a layer
    assert spaces(guard) == 2 + 6  # every B sees its own A x


def test_features_changed_in_place_are_not_the_same_features() -> None:
    """Two layers read one buffer at different times: the same memory, other numbers."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Linear(20, 16).requires_grad_(False)
            self.early, self.late = nn.Linear(16, 3, bias=False), nn.Linear(16, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.embed(x)
            first = self.early(hidden)
            # as nn.ReLU(inplace=True) does; autograd would object to it here
            hidden = torch.sin(hidden) if torch.is_grad_enabled() else hidden.sin_()
            return first + self.late(hidden)

    model, old = InPlace(), rows(3, 20, 1)
    guard = protected(model, old)
    before = answer(model, old)
    fit(model, rows(6, 20, 2), guard, steps=30)
    assert change(answer(model, old), before) < 1e-5


def test_members_of_a_group_that_part_in_a_later_batch() -> None:
    """The first batch sends both layers the same tensor, the second one does not."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(12, 3, bias=False), nn.Linear(12, 3, bias=False)

        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            return self.a(x) + self.b(x if other is None else other)

    model = Routed()
    batches = [{"x": rows(2, 12, 1)}, {"x": rows(2, 12, 2), "other": rows(2, 12, 3)}]
    guard = PEGP(1.0)
    guard.consolidate(model, batches)
    guard.begin_task()
    old = model.b.weight.detach().clone()
    with torch.no_grad():
        model.b.weight += rows(3, 12, 4)
    guard.after_step()
    moved = model.b.weight.detach() - old
    assert float(moved.norm()) > 0.1
    assert float((moved @ batches[1]["other"].T).abs().max()) < 1e-5


def test_spaces_that_were_apart_stay_apart_when_their_sites_meet() -> None:
    """Task 1 feeds two layers differently, task 2 alike; what task 1 needed of the second is still kept."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(12, 3, bias=False), nn.Linear(12, 3, bias=False)

        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            return self.a(x) + self.b(x if other is None else other)

    model = Two()
    guard = PEGP(1.0)
    first = {"x": rows(2, 12, 1), "other": rows(2, 12, 2)}
    guard.consolidate(model, [first])
    guard.begin_task()
    guard.end_task(None, [{"x": rows(2, 12, 3)}])
    p = projector(guard, "b.weight")
    torch.testing.assert_close(first["other"].double() @ p, first["other"].double(), rtol=0, atol=1e-5)
    q = projector(guard, "a.weight")
    torch.testing.assert_close(first["x"].double() @ q, first["x"].double(), rtol=0, atol=1e-5)


# --- masks ------------------------------------------------------------------------------------------------------


def test_padding_does_not_enter_the_memory() -> None:
    model = lora_bert(r=16)
    short = tokens(2, 4, 1)
    padded = {k: F.pad(v, (0, 5)) for k, v in short.items()}
    guards = [PEGP(1.0), PEGP(1.0)]
    for guard, batch in zip(guards, (short, padded), strict=True):
        guard.consolidate(model, [batch])
    name = "base_model.model.encoder.layer.1.attention.self.query.lora_A.default.weight"
    assert guards[1]._memory.space(name).rank == 8
    torch.testing.assert_close(*(projector(g, name) for g in guards), rtol=0, atol=1e-4)


def test_padding_behind_a_prompt_does_not_enter_the_memory() -> None:
    config = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)
    model = get_peft_model(bert(), config)
    name = "base_model.encoder.layer.1.attention.self.query.weight"
    model.get_parameter(name).requires_grad_(True)
    short = tokens(2, 4, 1)
    padded = {k: F.pad(v, (0, 5)) for k, v in short.items()}
    guards = [PEGP(1.0, kinds=["linear"]), PEGP(1.0, kinds=["linear"])]
    for guard, batch in zip(guards, (short, padded), strict=True):
        guard.consolidate(model, [batch])
    assert guards[1]._memory.space(name).rank == 2 * (2 + 4)
    torch.testing.assert_close(*(projector(g, name) for g in guards), rtol=0, atol=1e-4)


def test_a_mask_of_another_shape_is_ignored() -> None:
    x = rows(6, 12, 0).reshape(2, 3, 12)
    assert mask_for(x, {"attention_mask": torch.ones(2, 5)}) is None
    assert mask_for(x, {"attention_mask": torch.ones(2, 1, 3, 3)}) is None
    assert mask_for(x, {"attention_mask": [1, 1]}) is None
    assert mask_for(x, {"attention_mask": torch.tensor([[0.0, -1e9, 0.0], [0.0, 0.0, 0.0]])}) is None
    assert mask_for(x, x) is None
    assert mask_for(x, {"attention_mask": torch.ones(2, 3)}) is not None
    assert mask_for(x.reshape(6, 12), {"attention_mask": torch.ones(2, 3)}) is not None
    assert mask_for(x[:, 0], {"attention_mask": torch.ones(2, 3)}) is None


def test_the_encoders_mask_says_nothing_about_decoder_rows() -> None:
    """T5 with as many target as source tokens: rows of the decoder are kept where the source is padded."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60,
        d_model=32,
        d_kv=8,
        d_ff=40,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = get_peft_model(T5ForConditionalGeneration(config), LoraConfig(r=16, target_modules=["q", "v"]))
    batch = {**tokens(2, 4, 1, padded=2), "labels": tokens(2, 4, 2)["input_ids"]}
    certificate = PEGP(1.0).consolidate(model, [batch])
    ranks = {s.name: s.rank for s in certificate.sites}
    name = "base_model.model.decoder.block.0.layer.0.SelfAttention.q.lora_A.default.weight"
    assert ranks[name] >= 7  # the first decoder token is the same in both rows


def test_order_partition_and_duplication_do_not_matter() -> None:
    model = mlp(torch.float64)
    x = rows(12, 20, 5, torch.float64) * torch.linspace(2.0, 0.2, 20, dtype=torch.float64)
    feeds = [
        [x],
        [x[torch.randperm(12, generator=torch.Generator().manual_seed(1))]],
        [x[:5], x[5:6], x[6:]],
        [x, x],
        [r.unsqueeze(0) for r in x],
    ]
    for energy, limit in ((1.0, 1e-10), (0.8, 1e-4)):
        guards = [PEGP(energy) for _ in feeds]
        for guard, feed in zip(guards, feeds, strict=True):
            guard.consolidate(model, feed)
        for name in guards[0]._memory.site_space:
            expected = projector(guards[0], name)
            for other in guards[1:]:
                torch.testing.assert_close(projector(other, name), expected, rtol=0, atol=limit)


def test_more_rows_than_needed_are_thinned_the_same_way_every_time() -> None:
    model = mlp()
    x = rows(4000, 20, 5)
    first, second = PEGP(0.9), PEGP(0.9)
    first.consolidate(model, [x[:1000], x[1000:]])
    second.consolidate(model, [x[:1000], x[1000:]])
    for name, space in first._memory.spaces.items():
        assert torch.equal(space.stored, second._memory.spaces[name].stored)


def test_samples_bound_what_is_read() -> None:
    model = mlp()
    certificate = PEGP(1.0, samples=5).consolidate(model, (rows(3, 20, i) for i in range(100)))
    assert next(s.rank for s in certificate.sites if s.name == "0.weight") == 5


def test_storage_stays_below_half_a_square() -> None:
    model = mlp()
    guard = PEGP({"linear": 0.9}, probes=0)
    for task in range(30):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guard.consolidate(model, [rows(2, 20, task)])
        for space in guard._memory.spaces.values():
            assert space.stored.numel() <= space.dim * space.dim / 2
    state = guard.state_dict()
    assert sum(t.numel() for s in state["memory"]["spaces"].values() for t in s.values()) <= (
        (20 * 20 + 24 * 24 + 16 * 16) / 2 + 6
    )
    assert not state["probes"]


# --- parameters with more than one use --------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose matrix is also the output layer, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(input_ids))))


def test_a_weight_tied_to_an_embedding_is_held() -> None:
    model = Tied()
    old = {"input_ids": torch.tensor([[1, 2, 3]])}
    new = {"input_ids": torch.tensor([[1, 5, 7], [2, 8, 9]])}
    fit(model, old, steps=5)
    guard, before, tied = protected(model, old), answer(model, old), model.embed.weight.detach().clone()
    fit(model, new, guard, steps=50)
    assert change(answer(model, old), before) < 1e-5
    assert torch.equal(model.embed.weight, tied)
    certificate = guard.end_task(None, [new])
    assert [s.name for s in certificate.sites] == ["body.weight"]
    assert certificate.held == 2


def test_one_weight_in_two_linear_layers_is_held() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(torch.tanh(self.a(x))))

    model, old = Twins(), rows(3, 16, 1)
    fit(model, old, steps=5)
    guard, before = protected(model, old), answer(model, old)
    fit(model, rows(5, 16, 2), guard, steps=50)
    assert change(answer(model, old), before) < 1e-5
    assert guard.end_task(None, [old]).leak <= 1e-5


def test_a_parametrised_weight_is_held() -> None:
    model = mlp()
    torch.nn.utils.parametrizations.weight_norm(model[2])
    old = rows(3, 20, 1)
    fit(model, old, steps=5)
    guard, before = protected(model, old), answer(model, old)
    fit(model, rows(5, 20, 2), guard, steps=50)
    assert change(answer(model, old), before) < 1e-5


def test_a_weight_that_is_used_outside_its_module_is_held() -> None:
    """nn.MultiheadAttention multiplies by out_proj.weight itself: its module never sees a feature."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.out = nn.Linear(16, 3)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return self.out(self.attention(x, context, context, need_weights=False)[0])

    old = {"x": rows(4, 16, 1).reshape(1, 4, 16), "context": rows(4, 16, 2).reshape(1, 4, 16)}
    new = {"x": rows(8, 16, 3).reshape(2, 4, 16), "context": rows(8, 16, 4).reshape(2, 4, 16)}
    for model in (
        Attention(),
        get_peft_model(Attention(), LoraConfig(r=8, target_modules=["attention", "out"], init_lora_weights=False)),
    ):
        guard, before = protected(model, old), answer(model, old)
        fit(model, new, guard, steps=50)
        assert change(answer(model, old), before) < 1e-5
        certificate = guard.end_task(None, [old])
        assert certificate.held >= 2
        assert certificate.leak <= 1e-5


def test_torch_encoder_layers_show_their_features() -> None:
    """nn.TransformerEncoder has a fast path that calls none of its linear layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    old, new = rows(4, 16, 1).reshape(1, 4, 16), rows(8, 16, 2).reshape(2, 4, 16)
    guard, before = protected(model, old), answer(model, old)
    fit(model, new, guard, steps=50)
    assert change(answer(model, old), before) < 1e-5
    assert {s.name for s in guard.end_task(None, [old]).sites} == {
        "layers.0.linear1.weight",
        "layers.0.linear2.weight",
    }


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT 0.18 warns of a layer of our own
def test_lora_on_a_bare_parameter_is_not_taken_for_lora_on_a_layer() -> None:
    """PEFT's target_parameters adds B A to a tensor; A is never called, so what it sees is unknown."""

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.Parameter(torch.randn(16, 24) / 4)
            self.down = nn.Parameter(torch.randn(24, 16) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.up) @ self.down

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = Expert()
            self.out = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.expert(x))

    config = LoraConfig(r=4, target_modules=["out"], target_parameters=["expert.up", "expert.down"])
    model = get_peft_model(Holder(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    old = rows(3, 16, 1)
    guard, before = protected(model, old), answer(model, old)
    fit(model, rows(6, 16, 2), guard, steps=50)
    assert change(answer(model, old), before) < 1e-5


# --- wrappers ---------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """What DistributedDataParallel looks like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


def test_a_memory_made_without_a_wrapper_fits_a_wrapped_model_and_back() -> None:
    model = lora_mlp()
    wrapped = Wrapped(model)
    old = rows(3, 20, 1)
    guard, before = PEGP(1.0), None
    names = {s.name for s in guard.consolidate(wrapped, [old]).sites}
    assert names == {s.name for s in find_sites(model)}
    before = answer(model, old)
    guard.attach(model)
    guard.begin_task()
    fit(model, rows(5, 20, 2), guard, steps=20)
    # the loop trained the bare model; the wrapped one is consolidated: it is the same task
    certificate = guard.consolidate(wrapped, [rows(5, 20, 2)])
    assert certificate.leak is not None
    assert certificate.leak <= 1e-5
    assert change(answer(model, old), before) < 1e-5


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_a_compiled_model() -> None:
    model = lora_mlp()
    old = rows(3, 20, 1)
    compiled = torch.compile(model, backend="eager")
    compiled(old)  # traced before any hook is there
    guard = PEGP(1.0)
    certificate = guard.consolidate(compiled, [old])
    assert {s.name for s in certificate.sites} == {s.name for s in find_sites(model)}
    assert all("_orig_mod" not in s.name for s in certificate.sites)
    guard.begin_task()
    before = answer(model, old)
    fit(compiled, rows(5, 20, 2), guard, steps=20)
    assert change(answer(model, old), before) < 1e-5
    assert guard.end_task(None, [old]).leak <= 1e-5


def test_attached_twice_in_the_middle_of_a_task() -> None:
    """A second train() on the same task must not forget where the task began."""
    model, old, new = lora_mlp(), rows(3, 20, 1), rows(5, 20, 2)
    fit(model, old, steps=5)
    guard, before = protected(model, old), answer(model, old)
    fit(model, new, guard, steps=5)
    with torch.no_grad():  # a step that was interrupted before its projection
        for p in model.parameters():
            if p.requires_grad:
                p += 0.01
    guard.attach(model)
    guard.begin_task()
    fit(model, new, guard, steps=5)
    assert change(answer(model, old), before) < 1e-5
    assert guard.end_task(None, [new]).leak <= 1e-5


def test_another_model_starts_a_task_of_its_own() -> None:
    model, old = lora_mlp(), rows(3, 20, 1)
    guard = protected(model, old)
    twin, before = copy.deepcopy(model), copy.deepcopy(model)
    guard.attach(twin)
    with pytest.raises(GuardError, match="begin_task"):
        guard.after_step()
    guard.begin_task()
    fit(twin, rows(5, 20, 2), guard, steps=5)
    assert guard.end_task(None, [old]).leak <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


# --- refusals ---------------------------------------------------------------------------------------------------


def test_nothing_trainable() -> None:
    with pytest.raises(GuardError, match="is_trainable=True"):
        PEGP().attach(mlp().requires_grad_(False))


def test_nothing_that_can_be_protected() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2).requires_grad_(False))
    with pytest.raises(GuardError, match=r"no site among the 2 trainable.*0\.weight"):
        PEGP().attach(model)


def test_dora_is_refused() -> None:
    with pytest.raises(GuardError, match=r"DoRA: use_dora=False"):
        PEGP().attach(lora_mlp(use_dora=True))


def test_a_model_without_weights_yet() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 2)
    with pytest.raises(GuardError, match="meta"):
        PEGP().attach(model)


def test_before_anything_is_attached() -> None:
    guard = PEGP()
    for call in (guard.begin_task, lambda: guard.end_task(None, [rows(2, 20, 0)])):
        with pytest.raises(GuardError, match="not attached"):
            call()
    guard.attach(mlp())
    for call in (guard.before_step, guard.after_step):
        with pytest.raises(GuardError, match="outside a task"):
            call()


def test_no_batches() -> None:
    with pytest.raises(GuardError, match="no batch"):
        PEGP().consolidate(mlp(), [])


def test_what_a_batch_may_be() -> None:
    model, x = mlp(), rows(4, 20, 1)
    ranks = {
        tuple(s.rank for s in PEGP(1.0).consolidate(model, feed).sites)
        for feed in ([x], [(x, torch.zeros(4))], [[x, torch.zeros(4)]], [{"input": x}])
    }
    assert ranks == {(4, 4, 4)}
    with pytest.raises(DataError, match="mapping of tensors, a tuple that starts with one, or a tensor; got str"):
        PEGP().consolidate(model, {"input": x})
    with pytest.raises(DataError, match="got list"):
        PEGP().consolidate(model, [[[1.0, 2.0]]])


def test_batches_that_miss_every_site() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(GuardError, match="no protected module saw any feature"):
        PEGP().consolidate(Idle(), [rows(2, 4, 0)])


def test_features_that_are_not_numbers_leave_the_guard_as_it_was() -> None:
    model = mlp()
    guard = PEGP(1.0)
    with pytest.raises(NumericalError, match="NaN or infinity"):
        guard.consolidate(model, [rows(2, 20, 0), rows(2, 20, 1) * torch.nan])
    assert guard.tasks == []
    assert guard.consolidate(model, [rows(2, 20, 0)]).probes == 0
    guard.begin_task()
    assert guard.end_task(None, [rows(2, 20, 0)]).probes == 2  # not those of the failed attempt as well


def test_models_that_need_labels_or_plain_flags() -> None:
    class Needy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor, labels: Tensor, scale: float, names: list[str]) -> dict[str, Tensor]:
            logits = self.linear(x) * scale
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = Needy()
    batch = {"x": rows(6, 6, 1), "labels": torch.tensor([0, 1, 2, 0, 1, 2]), "scale": 2.0, "names": ["a"] * 6}
    guard = PEGP(0.9, samples=4, probes=2)
    guard.consolidate(model, [batch])
    guard.begin_task()
    assert guard.end_task(None, [batch]).output_change == 0.0
    model = lora_bert(model=classifier(), task_type="SEQ_CLS")
    guard = PEGP(0.9, samples=3)
    guard.consolidate(model, [{**tokens(4, 5, 1), "labels": torch.tensor([0, 1, 2, 0])}])
    guard.begin_task()
    assert guard.end_task(None, [tokens(4, 5, 1)]).output_change < 1e-6


def test_a_model_that_returns_only_a_loss_has_no_probes() -> None:
    class LossOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).square().mean()

    model = LossOnly()
    guard = PEGP(1.0)
    guard.consolidate(model, [rows(2, 6, 1)])
    guard.begin_task()
    certificate = guard.end_task(None, [rows(2, 6, 2)])
    assert certificate.output_change is None
    assert certificate.probes == 0


# --- modes ------------------------------------------------------------------------------------------------------


def test_consolidating_leaves_modes_gradients_and_random_numbers_alone() -> None:
    model = lora_mlp(lora_dropout=0.5)
    model.train()
    model.base_model.model[2].eval()
    flags = [m.training for m in model.modules()]
    fit_loss = default_loss(model, rows(2, 20, 0))
    fit_loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    guard = PEGP(0.9)
    guard.consolidate(model, [rows(300, 20, 0)])
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == flags
    assert all(
        torch.equal(a, p.grad)
        for a, p in zip(grads, (p for p in model.parameters() if p.grad is not None), strict=True)
    )
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_failing_model_gets_its_mode_and_hooks_back() -> None:
    model = mlp()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        PEGP().consolidate(model, [rows(2, 7, 0)])
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_inference_mode_around_the_consolidation() -> None:
    model, old = lora_mlp(), rows(3, 20, 1)
    guard = PEGP(1.0)
    with torch.inference_mode():
        guard.consolidate(model, [old])
    guard.begin_task()
    before = answer(model, old)
    fit(model, rows(5, 20, 2), guard, steps=10)
    with torch.inference_mode():
        certificate = guard.end_task(None, [rows(5, 20, 2)])
    assert certificate.leak <= 1e-5
    assert change(answer(model, old), before) < 1e-5
    guard.begin_task()
    fit(model, rows(5, 20, 3), guard, steps=10)
    assert guard.end_task(None, [rows(5, 20, 3)]).leak <= 1e-5


def test_some_gradients_are_missing() -> None:
    """A branch that a batch does not use has no gradient; the others are still projected."""
    model, old = lora_mlp(), rows(3, 20, 1)
    fit(model, old, steps=5)
    guard = protected(model, old)
    default_loss(model, rows(4, 20, 2)).backward()
    first, *others = (p for p in model.parameters() if p.requires_grad)
    first.grad = None
    loud = [p.grad.norm() for p in others]
    guard.before_step()
    assert first.grad is None
    assert all(float(p.grad.norm()) < float(n) for p, n in zip(others, loud, strict=True))
    name = "base_model.model.2.lora_A.default.weight"
    grad = dict(model.named_parameters())[name].grad
    assert guard._memory.space(name).share(grad) < 1e-5


def test_gradients_of_every_layout() -> None:
    """A gradient may be a view of a bucket, or not contiguous."""
    model, old = mlp(), rows(3, 20, 1)
    guard = protected(model, old)
    default_loss(model, rows(4, 20, 2)).backward()
    bucket = torch.zeros(2 * model[0].weight.numel())
    view = bucket[: model[0].weight.numel()].view_as(model[0].weight)
    view.copy_(model[0].weight.grad)
    model[0].weight.grad = view
    model[2].weight.grad = model[2].weight.grad.T.contiguous().T
    guard.before_step()
    assert guard._memory.space("0.weight").share(bucket[: model[0].weight.numel()].view(24, 20)) < 1e-5
    assert guard._memory.space("2.weight").share(model[2].weight.grad) < 1e-5
    OPTIMIZERS["adam"](model.parameters()).step()
    guard.after_step()
    assert guard.end_task(None, [old]).leak < 1e-5
