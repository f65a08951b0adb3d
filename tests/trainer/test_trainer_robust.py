from __future__ import annotations

import contextlib
import random
import warnings

import pytest
import torch
from peft import LoraConfig
from trainer_helpers import FILLER, arguments, differing, weights
from vision_helpers import HALF, image_task, tiny_clip, tiny_tokenizer, tiny_vit

import growthring as gr
from growthring.adapters import BottleneckConfig, LargoConfig
from growthring.errors import ConfigError, DataError, NumericalError
from growthring.guards import FTP, PEGP, Guard, InfLoRA, Radius
from growthring.streams import EvaluationSet
from growthring.trainer import LinearProbe, RobustTrainer


def rows(count, seed, flip=0.2):
    """Texts with a keyword; some labels are wrong, so that no model gets all of them right."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        word, label = draw.choice([("cat", "x"), ("dog", "y")])
        words = draw.sample(FILLER, 5)
        words.insert(draw.randrange(6), word)
        wrong = draw.random() < flip
        made.append((" ".join(words), {"x": "y", "y": "x"}[label] if wrong else label))
    return made


@pytest.fixture(scope="module")
def task():
    return gr.Task("pets", rows(64, 0), rows(40, 1), rows(30, 2), label_texts={"x": "cold water", "y": "warm day"})


@pytest.fixture(scope="module")
def others():
    return [EvaluationSet("near", rows(30, 3)), EvaluationSet("far", rows(25, 4, 0.4))]


def lora(**settings):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear"} | settings)


def largo(**settings):
    return LargoConfig(**{"r": 4, "target_modules": "all-linear"} | settings)


ADAPTERS = {
    "lora": lora,
    "delta": largo,
    "residual": lambda: largo(form="residual"),
    "product": lambda: largo(form="product"),
    "activation": lambda: largo(form="product", init="activation"),
    "linear": lambda: "linear",
    "full": lambda: "full",
}


@pytest.fixture
def make(tiny_encoder, task):
    def make(adapter="lora", *, task=task, args=None, model=tiny_encoder, **settings):
        adapter = ADAPTERS[adapter]() if isinstance(adapter, str) else adapter
        args = arguments(**{"max_steps": 6} | (args or {}))
        return RobustTrainer(model, task, **{"adapter": adapter, "args": args, "seed": 1} | settings)

    return make


def features(trainer, texts=("the cat is one", "a dog", "or not")):
    batch = trainer.tokenizer(list(texts), return_tensors="pt", padding=True)
    trainer.model.eval()
    with torch.no_grad():
        return trainer.model.embed(batch["input_ids"], batch["attention_mask"])


def pretrained_features(make):
    return features(make(None, args={"max_steps": 1}))


# --- the start -------------------------------------------------------------------------------------------------------


def test_a_linear_head_starts_from_the_probe(make, task):
    trainer = make()
    assert trainer.probe.validation == pytest.approx(trainer.score([task], "validation")["pets"])
    (weight,) = trainer.model.head.parameters()
    assert torch.equal(weight.detach(), trainer.probe.weight.float())
    scratch = make(start="scratch")
    assert scratch.probe is None
    assert not torch.equal(next(scratch.model.head.parameters()), weight)
    shared = make(start=trainer.probe)
    assert torch.equal(next(shared.model.head.parameters()), weight)


def test_starts_that_do_not_fit(make, task):
    with pytest.raises(ConfigError, match="start='prob': did you mean 'probe'"):
        make(start="prob")
    with pytest.raises(ConfigError, match="start='probe' with head='label-text'"):
        make(start="probe", head="label-text")
    with pytest.raises(ConfigError, match="start='label-text' with head='linear'"):
        make(start="label-text")
    with pytest.raises(ConfigError, match="head='lin'"):
        make(head="lin")
    with pytest.raises(ConfigError, match=r"the probe's weight is \(3, 32\) and the head's \(2, 32\)"):
        make(start=LinearProbe(torch.zeros(3, 32), 1.0, 0.5, ()))
    for bad in (0, True, 2.5):
        with pytest.raises(ConfigError, match="evaluate_every"):
            make(evaluate_every=bad)
    with pytest.raises(ConfigError, match="joint= is for streams"):
        make(joint=True)
    with pytest.raises(ConfigError, match="must be a Task, got str"):
        make(task="pets")
    with pytest.raises(ConfigError, match="makes a branch for every task"):
        make(guards=[InfLoRA()])


def test_label_texts_are_a_head_that_does_not_train(make, task, others):
    trainer = make(head="label-text")
    trainer.fit()
    assert not list(trainer.model.head.parameters())
    assert trainer.curve([0.0, 1.0], others)[1.0] == trainer.score(others)


def test_validation_rows_are_split_off_and_one_task_is_no_warning(make):
    plain = gr.Task("pets", rows(60, 0), rows(20, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = make(task=plain, validation_fraction=0.2)
    assert (len(trainer.task.train), len(trainer.task.validation)) == (48, 12)


# --- training --------------------------------------------------------------------------------------------------------


def test_it_is_the_training_of_a_stream_of_one(make, tiny_encoder, task):
    trainer = make("lora", start="scratch")
    trainer.fit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stream = gr.TaskStream([task])
    other = gr.ContinualTrainer(
        tiny_encoder, stream, adapter=lora(), head="linear", args=arguments(max_steps=6), seed=1
    )
    other.fit()
    assert not differing(weights(trainer), weights(other))


def test_looking_does_not_change_the_training(make):
    plain, looking = make("lora", args={"max_steps": 6}), make("lora", args={"max_steps": 6}, evaluate_every=6)
    plain.fit(), looking.fit()
    assert [step for step, _ in looking.looks] == [6]
    assert not differing(weights(plain), weights(looking))
    assert plain.looks == []


@pytest.mark.parametrize("adapter", ["lora", "delta", "linear"])
def test_the_best_weights_stay(make, task, adapter):
    trainer = make(adapter, args={"max_steps": 9, "learning_rate": 3e-2}, evaluate_every=2)
    trainer.fit()
    steps = [step for step, _ in trainer.looks]
    scores = [score for _, score in trainer.looks]
    assert steps == [2, 4, 6, 8, 9]
    assert trainer.score([task], "validation")["pets"] == max(scores)
    assert trainer.result.validation.to_list()[-1] == [max(scores)]
    best = steps[scores.index(max(scores))]  # of equals the earliest
    stopped = make(adapter, args={"max_steps": best, "learning_rate": 3e-2})
    stopped.fit()
    assert not differing(weights(trainer), weights(stopped))


def test_a_look_that_is_best_in_the_middle_is_taken(make, monkeypatch):
    """The negative control of the test above: there the last look may be the best one."""
    scores = iter([0.2, 0.9, 0.9, 0.4])
    trainer = make("lora", args={"max_steps": 4}, evaluate_every=1)
    monkeypatch.setattr(trainer._best, "_score", lambda: next(scores))
    trainer.fit()
    stopped, last = make("lora", args={"max_steps": 2}), make("lora", args={"max_steps": 4})
    stopped.fit(), last.fit()
    assert not differing(weights(trainer), weights(stopped))
    assert differing(weights(trainer), weights(last))


@pytest.mark.parametrize("guard", [Radius, FTP])
@pytest.mark.parametrize("adapter", ["delta", "linear"])
def test_radii_belong_to_the_best_weights(make, monkeypatch, guard, adapter):
    scores = iter([0.2, 0.9, 0.4, 0.4, 0.4, 0.4])
    made = guard(mu=5.0 if guard is Radius else 1e-2)  # radii that fall again, so that the last ones would not do
    trainer = make(adapter, args={"max_steps": 6, "learning_rate": 3e-2}, evaluate_every=1, guards=[made])
    monkeypatch.setattr(trainer._best, "_score", lambda: next(scores))
    (certificate,) = trainer.fit().certificates
    assert certificate.kept is not False
    total = sum(one.frobenius**2 for one in certificate.deviations) ** 0.5
    assert total == pytest.approx(trainer.deviation(), rel=1e-5)


def test_test_rows_are_scored_only_when_asked(make):
    assert make(evaluate_test=False).fit().matrix.to_list() == []
    assert len(make().fit().matrix.to_list()) == 2


def test_no_set_of_another_domain_is_reachable_while_training(make, others, monkeypatch):
    """Sets are arguments of scoring alone."""
    trainer = make()

    def touched(*_):
        raise AssertionError("an OOD set was touched")

    monkeypatch.setattr(EvaluationSet, "check", touched)
    monkeypatch.setattr(EvaluationSet, "of", touched)
    trainer.fit()
    with pytest.raises(AssertionError, match="touched"):
        trainer.score(others)


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_scores_are_shares_of_right_answers(make, task, others):
    trainer = make()
    result = trainer.fit()
    found = trainer.score({"own": task, "elsewhere": others[0]})
    assert found["own"] == result.matrix.to_list()[-1][0]
    assert trainer.score([task], "train")["pets"] != found["own"]
    texts, labels = others[0].test.texts, others[0].test.labels
    answers = []
    for text in texts:
        batch = trainer.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = trainer.model.logits(trainer.model.embed(batch["input_ids"], batch["attention_mask"]))
        answers.append(task.labels[int(logits.argmax())])
    right = sum(a == b for a, b in zip(answers, labels, strict=True)) / len(labels)
    assert found["elsewhere"] == right


def test_batches_and_order_do_not_matter(make, others):
    trainer, narrow = make(), make(eval_batch_size=3)
    trainer.fit(), narrow.fit()
    assert trainer.score(others) == narrow.score(others)
    turned = EvaluationSet("near", list(others[0].test)[::-1])
    assert trainer.score([turned])["near"] == trainer.score(others)["near"]


def test_sets_that_cannot_be_scored(make, task, others):
    trainer = make()
    with pytest.raises(DataError, match="the label 'z' is none of task 'pets'"):
        trainer.score([EvaluationSet("odd", [("a cat", "z")])])
    with pytest.raises(DataError, match="train rows of task 'pets'"):
        trainer.score([EvaluationSet("same", list(task.train))])
    with pytest.raises(ConfigError, match="'near' is there twice"):
        trainer.score([others[0], others[0]])
    with pytest.raises(ConfigError, match="no split 'tests'; did you mean 'test'"):
        trainer.score([task], "tests")
    with pytest.raises(ConfigError, match="an evaluation set or a task is needed, got dict"):
        trainer.score([{"text": "a"}])
    for alone in (others[0], task, "near"):
        with pytest.raises(ConfigError, match="sets: give a list of sets or a mapping of names, got one "):
            trainer.score(alone)
    assert trainer.score([]) == {}


# --- between start and end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_places_on_the_way(make, others, adapter):
    trainer = make(adapter, args={"max_steps": 8, "learning_rate": 3e-2})
    before = features(trainer)
    head_before = {n: p.detach().clone() for n, p in trainer.model.head.named_parameters()}
    trainer.fit()
    after, kept = features(trainer), weights(trainer)
    scalings = [dict(m.scaling) for m in trainer.model.modules() if hasattr(m, "largo_A") or hasattr(m, "lora_A")]
    assert not torch.allclose(before, after, atol=1e-3)
    head_after = {n: p.detach().clone() for n, p in trainer.model.head.named_parameters()}
    with trainer.interpolated(0.0):
        torch.testing.assert_close(features(trainer), before, atol=1e-5, rtol=1e-4)
        assert all(torch.equal(p, head_before[n]) for n, p in trainer.model.head.named_parameters())
        assert trainer.deviation() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(before, pretrained_features(make), atol=1e-5, rtol=1e-4)
    far = trainer.deviation()
    with trainer.interpolated(0.25):
        assert trainer.deviation() == pytest.approx(far / 4, rel=1e-4)
        for name, parameter in trainer.model.head.named_parameters():
            torch.testing.assert_close(parameter, 0.75 * head_before[name] + 0.25 * head_after[name])
        with trainer.interpolated(1.0):
            pass
    with trainer.interpolated(1.0):
        assert torch.equal(features(trainer), after)
    assert torch.equal(features(trainer), after)
    assert not differing(weights(trainer), kept)
    assert scalings == [
        dict(m.scaling) for m in trainer.model.modules() if hasattr(m, "largo_A") or hasattr(m, "lora_A")
    ]


@pytest.mark.parametrize("adapter", ["lora", "delta", "residual", "product"])
def test_a_place_is_the_interpolated_weight(make, adapter):
    """Merged weights: ``W0 + alpha (W1 - W0)``, not the weights of interpolated factors."""
    trainer = make(adapter, args={"max_steps": 8, "learning_rate": 3e-2})
    layers = [m for m in trainer.model.modules() if hasattr(m, "get_delta_weight")]
    trainer.fit()
    whole = [layer.get_delta_weight("default") for layer in layers]
    with trainer.interpolated(0.3):
        for layer, delta in zip(layers, whole, strict=True):
            torch.testing.assert_close(layer.get_delta_weight("default"), 0.3 * delta)
        inside = features(trainer)
    for layer, delta in zip(layers, whole, strict=True):
        layer.base_layer.weight.data += 0.3 * delta
    trainer.model.encoder.disable_adapter_layers()
    torch.testing.assert_close(features(trainer), inside, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_deviation_is_that_of_dense_weights(make, tiny_encoder, adapter):
    trainer = make(adapter, args={"learning_rate": 3e-2})
    start = {n: p.detach().double().clone() for n, p in trainer.model.encoder.named_parameters()}
    assert trainer.deviation() == 0.0
    trainer.fit()
    if adapter in ("linear", "full"):
        now = dict(trainer.model.encoder.named_parameters())
        total = sum(float((now[n].detach().double() - start[n]).square().sum()) for n in start)
    else:
        layers = [m for m in trainer.model.modules() if hasattr(m, "get_delta_weight")]
        total = sum(float(layer.get_delta_weight("default").detach().double().square().sum()) for layer in layers)
    assert trainer.deviation() == pytest.approx(total**0.5, rel=1e-5)
    assert total > 0


def test_adapters_without_matrices_have_a_way_and_no_deviation(make, others):
    trainer = make(BottleneckConfig(r=4), args={"learning_rate": 3e-2})
    before = features(trainer)
    trainer.fit()
    assert trainer.deviation() is None
    with trainer.interpolated(0.0):
        assert torch.equal(features(trainer), before)


def test_only_the_head_trains_without_an_adapter(make, tiny_encoder, others):
    from transformers import AutoModel, AutoTokenizer

    frozen = AutoModel.from_pretrained(tiny_encoder).requires_grad_(False)
    trainer = make(None, model=frozen, tokenizer=AutoTokenizer.from_pretrained(tiny_encoder))
    trainer.fit()
    assert trainer.deviation() == 0.0
    assert trainer.trained == 64


def test_ways_that_cannot_be_gone(make):
    trainer = make(lora(init_lora_weights="pissa"))
    trainer.fit()
    with pytest.raises(ConfigError, match="scaling it does not lead back"), trainer.interpolated(0.5):
        pass
    with trainer.interpolated(1.0):  # the trained model itself is no place between
        pass
    doubled = make(lora(use_dora=True))
    with pytest.raises(ConfigError, match="DoRA"), doubled.interpolated(0.5):
        pass
    assert doubled.deviation() is None
    for bad in (-0.1, 1.1, float("nan"), True, "half"):
        with pytest.raises(ConfigError, match="between 0"), trainer.interpolated(bad):
            pass


def test_an_error_inside_leaves_the_model_as_it_was(make):
    trainer = make("linear")
    trainer.fit()
    kept = weights(trainer)
    with contextlib.suppress(NumericalError), trainer.interpolated(0.5):
        assert differing(weights(trainer), kept)
        raise NumericalError("inside")
    assert not differing(weights(trainer), kept)


def test_points_hold_everything(make, task, others):
    trainer = make(evaluate_every=3, method="mine")
    trainer.fit()
    made = trainer.point(others, alpha=0.5, setting={"learning_rate": 0.01})
    assert (made.method, made.seed, made.alpha, made.trained) == ("mine", 1, 0.5, trainer.trained)
    assert set(made.ood) == {"near", "far"}
    assert made.deviation == pytest.approx(trainer.deviation() / 2, rel=1e-5)
    assert made.seconds > 0
    with trainer.interpolated(0.5):
        assert made.id_test == trainer.score([task])["pets"]
        assert made.id_validation == trainer.score([task], "validation")["pets"]
    assert trainer.curve([0.5], others) == {0.5: dict(made.ood)}
    assert trainer.point(test=False).id_test is None


# --- guards and files ------------------------------------------------------------------------------------------------


def test_any_guard_may_stand_by(make):
    class Counting(PEGP):
        steps = 0

        def after_step(self):
            super().after_step()
            self.steps += 1

    guard = Counting(samples=8, probes=0)
    make(guards=[guard], evaluate_every=2).fit()
    assert guard.steps == 6
    assert isinstance(guard, Guard)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_was_saved_is_restored(make, others, tmp_path, adapter):
    trainer = make(adapter, args={"max_steps": 8, "learning_rate": 3e-2})
    trainer.fit()
    trainer.save(tmp_path)
    other = make(adapter, start="scratch", seed=2)
    assert other.curve([0.0, 0.5, 1.0], others) != trainer.curve([0.0, 0.5, 1.0], others)
    other.restore(tmp_path)
    assert torch.equal(features(other), features(trainer))
    assert other.curve([0.0, 0.5, 1.0], others) == trainer.curve([0.0, 0.5, 1.0], others)
    assert other.deviation() == pytest.approx(trainer.deviation(), rel=1e-6)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file() == (adapter not in ("linear", "full"))


def test_files_that_do_not_fit(make, tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        make().restore(tmp_path)
    make().save(tmp_path)
    with pytest.raises(DataError, match=r"does not fit this model: \d+ tensors differ"):
        make("linear").restore(tmp_path)
    with pytest.raises(DataError, match="does not fit this model"):
        make(lora(r=2)).restore(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be read"):
        make().restore(tmp_path)


def test_images(make):
    colours = image_task("colours", ["red", "green"], test=8)
    settings = {"image_processor": HALF, "evaluate_every": 3, "args": {"learning_rate": 1e-3}}
    trainer = make(lora(), task=colours, model=tiny_vit(), **settings)
    trainer.fit()
    far = EvaluationSet("far", image_task("x", ["red", "green"], seed=7).test)
    assert trainer.point([far], alpha=0.5).ood["far"] > 0.4
    with pytest.raises(DataError, match="test rows of task 'colours'"):
        trainer.score([EvaluationSet("same", colours.test)])


@pytest.mark.parametrize("head", ["linear", "label-text"])
def test_dual_encoders(make, head):
    colours = image_task("colours", ["red", "green"], test=8)
    trainer = make(
        lora(target_modules=["q_proj", "v_proj"]), task=colours, model=tiny_clip(), tokenizer=tiny_tokenizer(),
        image_processor=HALF, head=head,
    )  # fmt: skip
    before = trainer.score([colours])
    result = trainer.fit()
    assert result.matrix.to_list() == [list(before.values()), list(trainer.score([colours]).values())]
    with trainer.interpolated(0.0):
        assert trainer.score([colours]) == before
