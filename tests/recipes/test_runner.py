from __future__ import annotations

import inspect
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

import growthring.guards
from growthring.errors import ConfigError, DataError
from growthring.recipes import METHODS, build, load_config, run
from growthring.recipes.method_settings import ADAPTER_DEFAULTS, GUARD_DEFAULTS


def changed(before, after):
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.filterwarnings("ignore:PEGP.*no free direction:UserWarning")  # three rows fill a prompt of width 32
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_what_it_says_and_writes_a_run_folder(
    name, tiny_stream, tiny_encoder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    method, folder = METHODS[name], tmp_path / "out"
    config = load_config(tiny_stream(name, **({"optimizer": {"rank": 4}} if method.optimizer else {})))
    result = run(config, folder)
    held = {path.name for path in folder.iterdir()}
    stock = bool(ADAPTER_DEFAULTS[method.adapter]) and method.adapter != "lora+weights"
    weights = "adapter" if stock else "model"
    expected = {"config.yaml", "results.json", "log.jsonl", "report.html", "head.json", "head.safetensors", weights}
    assert held == expected | ({"memory"} if method.guard else set())
    assert {path.name for path in tmp_path.iterdir()} == {"data", "stream.yaml", "out"}, (
        "nothing outside the run folder"
    )

    stored = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert stored["rows"] == (["untouched", "joint"] if method.joint else ["untouched", "animals", "traffic"])
    assert [len(row) for row in stored["matrix"]] == [2] * len(stored["rows"])
    assert (stored["method"], stored["title"], stored["name"]) == (name, method.title, "out")
    guards = {c["guard"] for c in stored["certificates"]}
    assert guards == {method.guard, *(["fresh-lora"] if name == "gorp" else [])} - {None}
    assert len(stored["certificates"]) == 2 * len(guards)
    assert bool(stored["optimizer"]) == (method.optimizer is not None)
    assert stored["matrix"] == result.matrix.to_list()
    again = load_config(folder / "config.yaml")
    assert again.resolved() == stored["config"]
    assert again.model_copy(update={"output": None}) == config
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["learning_rate"] for event in events if event["event"] == "log"], "losses are logged"

    base = AutoModel.from_pretrained(str(tiny_encoder))
    before = {key: value.clone() for key, value in base.state_dict().items()}
    if stock:
        import growthring.adapters  # noqa: F401  # registers what PEFT does not have

        first = build(config).model.encoder.state_dict()
        loaded = PeftModel.from_pretrained(base, str(folder / "adapter")).state_dict()
        if method.guard in ("inflora", "o-lora"):
            assert any(value.abs().sum() > 0 for key, value in loaded.items() if "lora_B" in key)
        else:
            assert changed(first, {key: loaded[key] for key in first}), "the adapter holds what was learned"
        return
    after = AutoModel.from_pretrained(str(folder / "model"), add_pooling_layer=False).state_dict()
    moved = changed(before, after)
    assert moved
    others = {
        key for key in moved if not (key.endswith("weight") and after[key].dim() == 2 and "embeddings" not in key)
    }
    assert bool(others) == (method.adapter == "full")


def test_a_folder_that_holds_a_run_is_refused_and_overwritten_on_request(tiny_stream, tmp_path):
    folder = tmp_path / "out"
    first = run(load_config(tiny_stream("sequential-linear")), folder)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    config = load_config(tiny_stream("pegp"))
    with pytest.raises(ConfigError, match=r"already holds results.json, model; .*--overwrite"):
        run(config, folder)
    assert json.loads((folder / "results.json").read_text(encoding="utf-8"))["method"] == first.method
    run(config, folder, overwrite=True)
    assert (folder / "adapter").is_dir()
    assert not (folder / "model").exists(), "what the earlier run left is gone"
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_wrong_configuration_leaves_the_earlier_run_alone(tiny_stream, tmp_path):
    folder = tmp_path / "out"
    run(load_config(tiny_stream("pegp")), folder)
    broken = load_config(tiny_stream("pegp", adapter={"target_modules": ["qeury"]}))
    with pytest.raises(ConfigError):
        run(broken, folder, overwrite=True)
    assert (folder / "results.json").is_file()


def test_modules_that_are_not_there_are_named_with_those_that_are(tiny_stream):
    config = load_config(tiny_stream("pegp", adapter={"target_modules": ["value", "qeury"]}))
    with pytest.raises(ConfigError, match="no linear layer 'qeury'; did you mean 'query'"):
        build(config)


def test_settings_reach_the_trainer(tiny_stream, tmp_path, monkeypatch):
    asked = {}

    class Recorder(growthring.guards.PEGP):
        def __init__(self, energy, **settings):
            asked.update(settings, energy=energy)
            super().__init__(energy, **settings)

    monkeypatch.setattr(growthring.guards, "PEGP", Recorder)
    train = {
        "learning_rate": 0.25, "batch_size": 3, "epochs": 2, "weight_decay": 0.5, "schedule": "constant",
        "warmup": 0.1, "max_grad_norm": 0.75, "gradient_accumulation": 2, "optimizer": "adafactor",
    }  # fmt: skip
    adapter = {"r": 3, "alpha": 5, "dropout": 0.25, "target_modules": ["query"]}
    guard = {"energy": {"lora_A": 0.5, "lora_B": 0.25}, "samples": 17, "probes": 2, "unprotected": "allow"}
    changes = {"train": train, "adapter": adapter, "guard": guard, "seed": 7, "head": "linear", "pooling": "cls"}
    trainer = build(load_config(tiny_stream("pegp", **changes)), output_dir=tmp_path / "out")
    args = trainer.args
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (0.25, 3, 2)
    assert (args.weight_decay, args.lr_scheduler_type.value, args.warmup_steps) == (0.5, "constant_with_warmup", 0.1)
    assert (args.max_grad_norm, args.gradient_accumulation_steps, str(args.optim.value)) == (0.75, 2, "adafactor")
    assert args.output_dir == str(tmp_path / "out")
    peft = trainer.model.encoder.peft_config["default"]
    assert (peft.r, peft.lora_alpha, peft.lora_dropout, peft.target_modules) == (3, 5, 0.25, {"query"})
    assert asked == guard | {"project": "update", "merge": 0.0}
    assert (trainer.seed, trainer.model.pooling, type(trainer.model.head).__name__) == (7, "cls", "LinearHead")


def test_defaults_of_the_guards_are_their_own():
    guards = growthring.guards
    kinds = {
        "pegp": guards.PEGP, "inflora": guards.InfLoRA, "o-lora": guards.OLoRA,
        "gradient-memory": guards.GradientMemory, "radius": guards.Radius, "directional": guards.Directional,
        "l2-sp": guards.L2SP, "ftp": guards.FTP, "tpgm": guards.TPGM, "spd": guards.SPD,
    }  # fmt: skip
    assert set(kinds) == set(GUARD_DEFAULTS)
    for guard, kind in kinds.items():
        signature = inspect.signature(kind).parameters
        for name, default in GUARD_DEFAULTS[guard].items():
            if name != "energy" and (guard, name) != ("gradient-memory", "mode"):  # the method's; several at once
                assert default == signature[name].default, name


def test_limits_scenario_and_seed_reach_the_stream(tiny_stream):
    file = tiny_stream("pegp")
    config = load_config(file)
    tasks = [task.model_dump(exclude_none=True) | {"limit": {"train": 8, "test": 4}} for task in config.stream.tasks]
    stream = {"tasks": tasks, "scenario": "class", "validation_fraction": 0.25, "seed": 5, "name": "mine"}
    built = build(load_config(tiny_stream("pegp", stream=stream))).stream
    assert [(len(task.train), len(task.validation), len(task.test)) for task in built] == [(6, 2, 4), (6, 2, 4)]
    assert (built.scenario, built.seed, built.name) == ("class", 5, "mine")


def test_joint_training_needs_the_steps_of_every_task_or_of_none(tiny_stream):
    with pytest.raises(ConfigError, match=r"train.steps: the method 'joint' trains all tasks in one go"):
        build(load_config(tiny_stream("joint", train={"steps": {"animals": 3}})))
    build(load_config(tiny_stream("joint", train={"steps": {"animals": 3, "traffic": 1}})))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU, where fp16 works")
def test_half_precision_without_a_gpu_is_refused_and_bfloat16_is_not(tiny_stream, tmp_path):
    with pytest.raises(ConfigError, match=r"train.precision: 'fp16' needs a GPU"):
        build(load_config(tiny_stream("pegp", train={"precision": "fp16"})))
    run(load_config(tiny_stream("pegp", train={"precision": "bf16", "max_steps": 1})), tmp_path / "out")


def test_an_output_that_cannot_be_written_is_named(tiny_stream, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    config = load_config(tiny_stream("pegp"))
    with pytest.raises(ConfigError, match="is a file; the run needs a folder"):
        run(config, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"cannot be written: Not a directory"):
        run(config, tmp_path / "file" / "out")


def test_data_that_is_not_there_is_named_with_its_task(tiny_stream, tmp_path):
    (tmp_path / "data" / "animals-test.jsonl").rename(tmp_path / "data" / "animal-test.jsonl")
    with pytest.raises(DataError, match=r"task 'animals', test split .* did you mean 'animal-test.jsonl'"):
        build(load_config(tiny_stream("pegp")))
