from __future__ import annotations

import csv
import json
import shutil

import pytest

import growthring.adapters  # registers what PEFT does not have
from growthring.errors import ConfigError
from growthring.recipes import METHODS, build, explain_sites, parse_config, run
from growthring.recipes.method_settings import ADAPTER_DEFAULTS

TRAIN = {"max_steps": 2, "batch_size": 8, "learning_rate": 0.01}


def task(name, **settings):
    return {"name": name, "train": f"images/{name}/train", "test": f"images/{name}/test", **settings}


def config(world, method, model="my-vit", **changes):
    stream = {"tasks": [task("fruit"), task("flowers")], "scenario": "class", **changes.pop("stream", {})}
    data = {"method": method, "model": f"./{model}", "stream": stream, "train": TRAIN, **changes}
    return parse_config(data, base=world)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_images(method, image_world):
    own = {"optimizer": {"rank": 4}} if METHODS[method].optimizer else {}
    trainer = build(config(image_world, method, **own))
    assert (trainer.stream.modality, trainer.model.kind) == ("image", "image")
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    result = trainer.fit()
    after = dict(trainer.model.named_parameters())
    assert any(n.startswith("encoder.") and (n not in before or (after[n] != before[n]).any()) for n in after)
    for certificate in result.certificates:
        assert certificate.kept is not False
    kinds = {"prefix": growthring.adapters.PrefixTokensConfig, "prompt": growthring.adapters.PromptTokensConfig}
    if METHODS[method].adapter in kinds:
        assert type(trainer.model.encoder.peft_config["default"]) is kinds[METHODS[method].adapter]


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.guard and ADAPTER_DEFAULTS[m.adapter]])
@pytest.mark.parametrize("tower", ["text", "image"])
def test_either_tower_of_a_dual_encoder_can_be_adapted(method, tower, image_world):
    adapter = {"tower": tower} | ({"tokens": 2} if "tokens" in ADAPTER_DEFAULTS[METHODS[method].adapter] else {})
    trainer = build(config(image_world, method, "my-clip", adapter=adapter))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    part = {"text": "text_model", "image": "vision_model"}[tower]
    assert trained
    assert all(part in name for name in trained)
    result = trainer.fit()
    assert result.mtil is not None


def test_zero_shot_is_guarded_and_scored_on_a_reference(image_world, tmp_path):
    stream = {"reference": task("known")}
    settings = config(
        image_world, "pegp", "my-clip", stream=stream, adapter={"tower": "image"}, prompt_template="the picture of {}"
    )
    result = run(settings, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [c["task"] for c in stored["certificates"]] == ["reference", "fruit", "flowers"]
    assert stored["certificates"][1]["leak"] <= 1e-5, "the first task is guarded already"
    assert len(stored["reference"]) == len(stored["rows"]) == 3
    assert set(stored["mtil"]) == {"transfer", "average", "last"}
    assert stored["config"]["stream"]["reference"]["name"] == "known"
    assert json.loads((tmp_path / "out" / "head.json").read_text(encoding="utf-8"))["prompt_template"] == (
        "the picture of {}"
    )
    assert result.reference == stored["reference"]


def test_an_online_stream_sees_each_row_once(image_world):
    stream = {"scenario": "online-class", "validation_fraction": 0.2}
    settings = config(
        image_world, "pegp-adapter", stream=stream, train={"batch_size": 4}, classifiers=["ridge", "head"]
    )
    trainer = build(settings)
    result = trainer.fit()
    steps = [-(-len(task.train) // 4) for task in trainer.stream]
    assert [one["steps"] for one in result.timings["tasks"]] == steps
    assert {view.classifier for view in result.views} == {"ridge", "head"}
    with pytest.raises(ConfigError, match="each training row is seen once"):
        build(config(image_world, "pegp", stream=stream, train={"max_steps": 50}))


def test_image_files_may_be_listed_in_a_table(image_world, tmp_path):
    shutil.copytree(image_world, tmp_path, dirs_exist_ok=True)
    for split in ("train", "test"):
        files = sorted((tmp_path / "images" / "fruit" / split).rglob("*.png"))
        with (tmp_path / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            names = [(path.relative_to(tmp_path).as_posix(), path.parent.name) for path in files]
            csv.writer(file).writerows([("file", "kind"), *names])
    listed = {"name": "fruit", "train": "train.csv", "test": "test.csv", "image": "file", "label": "kind"}
    settings = config(tmp_path, "sequential-prompt", stream={"tasks": [listed, task("flowers")]}, image_size=24)
    trainer = build(settings)
    assert trainer.stream[0].labels == ("cherry", "lemon")
    assert trainer._collate.images.crop == (24, 24)


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("my-vit", {"adapter": {"tower": "image"}}, "adapter.tower: has no effect: ViTModel is no dual encoder"),
        ("my-vit", {"prompt_template": "a {}"}, "prompt_template: has no effect: ViTModel is no dual encoder"),
        ("my-vit", {"head": "label-text"}, "an image encoder reads no text"),
        ("my-vit", {"stream": {"reference": task("known")}}, "the stream has a reference"),
        ("my-vit", {"image_size": 13}, "cannot be cut into patches of 8"),
        ("my-clip", {"method": "pegp-prompt"}, "adapter.tower: is missing: CLIPModel has two towers, and a prompt"),
        ("my-clip", {"guard": {"energy": {"linear": 0.5}}}, "guard: the kind linear has no effect"),
        ("my-clip", {"prompt_template": "a photo"}, "it needs one {}, where the class name goes"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(model, changes, said, image_world):
    changes = dict(changes)
    with pytest.raises(ConfigError) as caught:
        build(config(image_world, changes.pop("method", "pegp"), model, **changes))
    assert said in str(caught.value)


def test_a_linear_head_is_a_site_of_its_own(image_world):
    rows = explain_sites(build(config(image_world, "pegp", guard={"energy": {"linear": 0.5}})))
    assert {kind for row in rows for kind in row["kinds"]} == {"lora_A", "lora_B", "linear"}
