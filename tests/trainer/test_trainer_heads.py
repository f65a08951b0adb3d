"""Heads, pooling, and the local cross-entropy."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from trainer_helpers import differing, stream_of, weights
from transformers import AutoModel

import growthring as gr
from growthring.errors import ConfigError
from growthring.trainer.classifier import find_pooling, pool


def batch_of(trainer, task, count=8):
    split = trainer._data[task]["train"]
    return trainer._collate([split[i] for i in range(count)])


def test_label_vectors_are_the_untouched_models_and_never_move(build):
    trainer = build()
    vectors = trainer.model.head.vectors.clone()
    texts = [entry.text for entry in trainer.stream.classes]
    base = trainer.model.encoder.get_base_model()
    expected = []
    for text in texts:
        tokens = trainer.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = base(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state[0]
        expected.append(F.normalize(hidden.mean(0), dim=0))  # B starts at zero: the adapter changes nothing yet
    torch.testing.assert_close(vectors, torch.stack(expected))
    assert not any(p.requires_grad for p in trainer.model.head.parameters())
    trainer.fit()
    assert torch.equal(trainer.model.head.vectors, vectors)


@pytest.mark.filterwarnings("ignore:task:UserWarning", "ignore:stream:UserWarning")  # one task, its rows twice
def test_label_texts_work_before_any_training(build):
    """Texts that hold their label's own word: similarity to the label finds many of them without a single step."""
    rows = [(f"{word} {word} {word} {tail}", word) for word in ("cat", "plane") for tail in ("the", "of", "it", "was")]
    stream = gr.TaskStream([gr.Task("words", rows, rows)])
    trainer = build(stream)
    right = sum(p == t for p, t in zip(trainer.predict(0, seen=0), stream.encode(0, "test"), strict=True))
    assert right == len(rows)


@pytest.mark.filterwarnings("ignore:task:UserWarning", "ignore:stream:UserWarning")  # one task, its rows twice
def test_label_texts_that_the_tokenizer_cannot_tell_apart(build):
    """Words it does not know are all one token, and a task of such labels would learn nothing."""
    rows = [("a cat", "xylophone"), ("a dog", "zither"), ("the cat", "xylophone"), ("the dog", "zither")]
    stream = gr.TaskStream([gr.Task("music", rows, rows)])
    with pytest.raises(ConfigError, match=r"'music': .* texts of 'xylophone' and 'zither'; give label_texts"):
        build(stream)
    build(stream, head="linear")


@pytest.mark.parametrize("head", ["label-text", "linear"])
def test_the_loss_compares_the_tasks_own_classes_only(build, head):
    trainer = build(stream_of(3, "class"), head=head)
    for task in range(3):
        trainer._prepare([task])
    own, batch = trainer.stream.class_ids(1), batch_of(trainer, 1)

    out = trainer.model(**batch)
    logits = out["logits"].detach()
    local = torch.tensor([own.index(int(y)) for y in batch["labels"]])
    assert float(out["loss"].detach()) == pytest.approx(float(F.cross_entropy(logits[:, own], local)), rel=1e-6)

    probe = logits.clone().requires_grad_()
    masked = probe.masked_fill(~trainer.model.allowed[batch["task_ids"]], float("-inf"))
    F.cross_entropy(masked, batch["labels"]).backward()
    others = [c for c in range(len(trainer.stream.classes)) if c not in own]
    assert not probe.grad[:, others].any()
    assert probe.grad[:, own].all()

    if head == "linear":
        trainer.model.head.requires_grad_(True)
        trainer.model(**batch)["loss"].backward()
        gradients = [b.weight.grad for b in trainer.model.head.blocks]
        assert all(g is None or not g.any() for g in (gradients[0], gradients[2]))
        assert gradients[1].any()


def test_a_joint_batch_mixes_tasks(build):
    trainer = build(joint=True)
    left, right = batch_of(trainer, 0, 4), batch_of(trainer, 1, 4)
    split = [trainer._data[t]["train"][i] for t in (0, 1) for i in range(4)]
    both = trainer.model(**trainer._collate(split))["loss"]
    parts = trainer.model(**left)["loss"] + trainer.model(**right)["loss"]
    torch.testing.assert_close(both, parts / 2)


def test_a_linear_head_grows_and_old_blocks_rest(build):
    trainer = build(stream_of(3), head="linear", args={"weight_decay": 0.1})
    seen = []

    class Watch(gr.guards.base.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append([b.weight.detach().clone() for b in kwargs["model"].head.blocks])

        def on_train_end(self, args, state, control, **kwargs):
            seen.append([b.weight.detach().clone() for b in kwargs["model"].head.blocks])

    trainer.callbacks.append(Watch())
    trainer.fit()
    assert [len(blocks) for blocks in seen] == [1, 1, 2, 2, 3, 3]
    assert trainer.model.head.members == [trainer.stream.class_ids(t) for t in range(3)]
    for task in range(3):
        start, end = seen[2 * task], seen[2 * task + 1]
        for old in range(task):
            assert torch.equal(start[old], end[old])
        assert torch.equal(start[task], trainer.model.head.initial[trainer.stream.class_ids(task)])
        assert not torch.equal(start[task], end[task])


def test_a_head_of_its_own_learns(build):
    run = build(stream_of(2, train=64), head="linear", args={"max_steps": 30}).fit()
    assert run.matrix.values[1, 0] >= 0.9


def test_recurring_classes_train_again_and_are_guarded(build):
    stream = stream_of(3, "domain")
    free = build(stream, head="linear")
    free.fit()
    assert len(free.model.head.blocks) == 1

    guard = gr.PEGP(energy=0.9)
    trainer = build(stream, head="linear", guards=[guard], args={"weight_decay": 0.1})
    run = trainer.fit()
    assert len(trainer.model.head.blocks) == 1
    for certificate in run.certificates[1:]:
        (site,) = [s for s in certificate.sites if s.name == "head.blocks.0.weight"]
        assert site.kind == "linear"
        assert 0.0 <= site.leak <= 1e-5
        assert site.free > 0
    assert certificate.held == 0


def test_a_guard_knows_blocks_that_rest(build):
    run = build(stream_of(3), head="linear", guards=[gr.PEGP(energy=0.9)]).fit()
    names = [{s.name for s in c.sites if s.name.startswith("head.")} for c in run.certificates]
    assert names[0] == {"head.blocks.0.weight"}
    assert run.certificates[2].leak <= 1e-5
    assert run.certificates[2].held == 0


def test_a_linear_head_alone_can_train(build, tiny_encoder):
    """Linear probing: the encoder is frozen by the user, the head learns."""
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(tiny_encoder).requires_grad_(False)
    trainer = build(stream_of(train=64), model=encoder, adapter=None, head="linear", args={"max_steps": 20})
    before = {k: v for k, v in weights(trainer).items() if k.startswith("encoder.")}
    run = trainer.fit()
    after = {k: v for k, v in weights(trainer).items() if k.startswith("encoder.")}
    assert differing(before, after) == []
    assert run.matrix.values[1, 0] >= 0.8


@pytest.mark.parametrize("head", ["label-text", "linear"])
def test_heads_on_half_precision_encoders(build, tiny_encoder, lora, head):
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(tiny_encoder, dtype=torch.bfloat16)
    trainer = build(model=encoder, head=head)
    trainer.fit()
    assert trainer.model(**batch_of(trainer, 0))["logits"].dtype == torch.float32


def test_names_load_in_float32_whatever_the_file_holds(build, tiny_encoder, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path / "half"
    AutoModel.from_pretrained(tiny_encoder, dtype=torch.float16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    trainer = build(model=folder, adapter="linear")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_pooling_by_hand():
    hidden = torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    torch.testing.assert_close(pool(hidden, mask, "mean")[0], hidden[0, :2].mean(0))
    torch.testing.assert_close(pool(hidden, mask, "mean")[1], hidden[1].mean(0))
    assert torch.equal(pool(hidden, mask, "cls"), hidden[:, 0])
    assert torch.equal(pool(hidden, mask, "last"), torch.stack([hidden[0, 1], hidden[1, 2]]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
    ],
)
def test_pooling_is_read_from_the_sentence_encoder(tmp_path, tiny_encoder, settings, expected):
    encoder = AutoModel.from_pretrained(tiny_encoder)
    assert find_pooling(encoder, tmp_path) == "mean"
    assert find_pooling(encoder, None) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert find_pooling(encoder, tmp_path) == expected
    assert find_pooling(encoder, tmp_path, "mean") == "mean"


@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
def test_every_pooling_trains(build, pooling):
    trainer = build(pooling=pooling, args={"max_steps": 1})
    trainer.fit()
    assert trainer.model.pooling == pooling


@pytest.mark.parametrize("head", ["label-text", "linear"])
def test_a_saved_head_gives_the_same_logits(build, tmp_path, head):
    trainer = build(head=head, output_dir=tmp_path / "run")
    trainer.fit()
    tensors = load_file(tmp_path / "run" / "head.safetensors")
    document = json.loads((tmp_path / "run" / "head.json").read_text())
    assert [c["key"] for c in document["classes"]] == [c.key for c in trainer.stream.classes]
    assert (document["head"], document["pooling"]) == (head, "mean")
    batch = batch_of(trainer, 0)
    with torch.no_grad():
        features = trainer.model.embed(batch["input_ids"], batch["attention_mask"])
        logits = trainer.model.head(features)
    if head == "label-text":
        mine = F.normalize(features, dim=-1) @ tensors["vectors"].T * document["scale"]
    else:
        mine = features @ tensors["initial"].T
        for number, members in enumerate(document["blocks"]):
            mine[:, members] = features @ tensors[f"blocks.{number}.weight"].T
    torch.testing.assert_close(mine, logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "lable-text"}, "head='lable-text': did you mean 'label-text'"),
        ({"head": "linaer"}, "did you mean 'linear'"),
        ({"pooling": "men"}, "pooling='men': did you mean 'mean'"),
        ({"pooling": "max"}, "pooling='max'"),
    ],
)
def test_wrong_names_offer_the_nearest(build, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)
