"""What a run writes, and what can be done with it without this package."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import math
import weakref

import pytest
import torch
from peft import PeftModel
from trainer_helpers import stream_of, weights
from transformers import AutoModel, AutoTokenizer, TrainingArguments

import growthring as gr
from growthring.errors import ConfigError
from growthring.trainer import continual, steps
from growthring.trainer.logs import RunLog

TEXTS = ["the cat was on the ship", "a plane", "not by train or by car"]


def embeddings(model, tokenizer):
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        hidden = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    return hidden[tokens["attention_mask"].bool()]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("method", ["pegp", "joint"])
def test_results_follow_the_schema(build, tmp_path, method):
    guards = [gr.PEGP(energy=0.9, probes=2)] if method == "pegp" else []
    folder = tmp_path / "my run"
    run = build(
        stream_of(3, "class"),
        guards=guards,
        joint=method == "joint",
        method=method,
        title="A title",
        output_dir=folder,
        evaluate_validation=True,
        config={"any": ["thing", 1]},
    ).fit()
    text = (folder / "results.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=no_constant)
    assert found == json.loads(json.dumps(run.to_dict()))
    rows = ["untouched", "joint"] if method == "joint" else ["untouched", "animals", "ways", "places"]
    assert (found["format_version"], found["name"], found["method"]) == (1, "my run", method)
    assert (found["title"], found["scenario"], found["seed"]) == ("A title", "class", 1)
    assert found["config"] == {"any": ["thing", 1]}
    assert found["rows"] == rows
    for key in ("matrix", "macro_f1", "validation_matrix"):
        assert [len(row) for row in found[key]] == [3] * len(rows)
        assert all(0.0 <= value <= 1.0 for row in found[key] for value in row)
    assert found["tasks"] == [
        {"name": t.name, "labels": list(t.labels), "train": 29, "validation": 3, "test": 20} for t in run_stream()
    ]
    assert set(found["metrics"]) == {"aa", "bwt", "fwt", "forgetting", "learning_accuracy"}
    for timing in found["timings"]["tasks"]:
        assert {"name", "train_seconds", "consolidate_seconds", "evaluate_seconds", "steps"} == set(timing)
        assert timing["steps"] == (12 if method == "joint" else 4)
    spent = sum(v for t in found["timings"]["tasks"] for k, v in t.items() if k.endswith("seconds"))
    assert 0.0 < spent <= found["timings"]["total_seconds"]
    assert {"python", "torch", "transformers", "peft", "growthring"} <= set(found["versions"])
    assert found["growthring_version"] == gr.__version__ or found["growthring_version"] == "not installed"
    assert set(found["seeds"]) == {"everything", "stream"}
    if method == "joint":
        assert found["certificates"] == []
        assert [v is None for v in found["metrics"].values()] == [False, True, True, True, True]
        return
    keys = {"guard", "task", "task_index", "protected_tasks", "leak", "kept", "energy", "free", "dims"}
    site_keys = {"name", "kind", "dim", "rank", "free", "energy_target", "energy", "leak", "rounding"}
    for number, certificate in enumerate(found["certificates"]):
        assert set(certificate) == keys | {"output_change", "probes", "held", "sites", "notes", "deviations"}
        assert certificate["task_index"] == number
        for site in certificate["sites"]:
            assert set(site) == site_keys
            assert site["rank"] + site["free"] == site["dim"]


def run_stream():
    return stream_of(3, "class")


def test_the_page_and_the_table(build, tmp_path):
    from rich.console import Console

    run = build(guards=[gr.PEGP(energy=0.9)], title="Tiny <run>").fit()
    page = run.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Tiny &lt;run&gt;" in page
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(run.summary())
    text = console.export_text()
    assert "Tiny <run>" in text
    assert f"{100 * run.matrix.values[-1].mean():.1f}" in text


def test_the_log_tells_the_whole_story(build, tmp_path):
    build(guards=[gr.PEGP(energy=0.9)], output_dir=tmp_path / "run", evaluate_validation=True).fit()
    events = [line["event"] for line in lines_of(tmp_path / "run")]
    rows = ["row", "row"]
    assert events == [*rows, *["log"] * 4, "certificate", *rows, *["log"] * 4, "certificate", *rows]
    logged = [line for line in lines_of(tmp_path / "run") if line["event"] == "log"]
    assert all({"task", "task_index", "step", "global_step", "loss", "learning_rate"} <= set(line) for line in logged)
    assert [line["task_index"] for line in logged] == [0] * 4 + [1] * 4
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in logged)


def test_numbers_that_are_none_stay_json(tmp_path):
    log = RunLog(tmp_path)
    log.write("log", grad_norm=float("nan"), loss=float("inf"), learning_rate=0.5)
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=no_constant) == {
        "event": "log",
        "grad_norm": None,
        "loss": None,
        "learning_rate": 0.5,
    }


@pytest.mark.parametrize("layers", [2, 6])
def test_the_adapter_loads_with_stock_peft(build, tiny_encoder, tmp_path, layers):
    """Six layers: PEFT then shortens the names of the targets, and a pooler must not be caught by them."""
    base = tiny_encoder
    if layers != 2:
        from transformers import BertConfig, BertModel

        base = tmp_path / "deep"
        BertModel(BertConfig.from_pretrained(tiny_encoder, num_hidden_layers=layers)).save_pretrained(base)
        AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(base)
    trainer = build(model=base, output_dir=tmp_path / "run")
    trainer.fit()
    stock = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "run" / "adapter")
    mine = embeddings(trainer.model.encoder, trainer.tokenizer)
    torch.testing.assert_close(embeddings(stock, trainer.tokenizer), mine, rtol=0, atol=1e-6)
    untouched = embeddings(AutoModel.from_pretrained(base), trainer.tokenizer)
    assert (mine - untouched).abs().max() > 1e-3
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("exclude", [None, ["value"], r".*\.value"])
def test_what_the_user_excludes_stays_excluded(build, tiny_encoder, lora, tmp_path, exclude):
    trainer = build(adapter=lora(exclude_modules=exclude), output_dir=tmp_path / "run", args={"max_steps": 1})
    trainer.fit()
    names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert any("key" in n for n in names)
    assert any("value" in n for n in names) == (exclude is None)
    assert not any("pooler" in n for n in names)
    stock = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_encoder), tmp_path / "run" / "adapter")
    torch.testing.assert_close(
        embeddings(stock, trainer.tokenizer), embeddings(trainer.model.encoder, trainer.tokenizer)
    )


@pytest.mark.parametrize("adapter", ["linear", "full"])
def test_plain_weights_load_with_stock_transformers(build, tiny_encoder, tmp_path, adapter):
    trainer = build(adapter=adapter, output_dir=tmp_path / "run")
    trainer.fit()
    folder = tmp_path / "run" / "model"
    stock, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]  # the pooler of the base is there too
    assert not info["unexpected_keys"]
    assert torch.equal(stock.pooler.dense.weight, AutoModel.from_pretrained(tiny_encoder).pooler.dense.weight)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert torch.equal(embeddings(stock, tokenizer), embeddings(trainer.model.encoder, trainer.tokenizer))
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_can_start_from_another(build, tmp_path):
    """The saved model is a model folder like any other."""
    build(adapter="linear", output_dir=tmp_path / "one").fit()
    run = build(model=tmp_path / "one" / "model", adapter="linear", output_dir=tmp_path / "two").fit()
    assert run.matrix.values.shape == (3, 2)


def test_a_run_never_lands_on_the_model_it_starts_from(build, tmp_path):
    build(adapter="linear", output_dir=tmp_path / "one").fit()
    before = (tmp_path / "one" / "model" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"would write the trained model over .*choose another folder"):
        build(model=tmp_path / "one" / "model", adapter="linear", output_dir=tmp_path / "one")
    assert (tmp_path / "one" / "model" / "model.safetensors").read_bytes() == before


def test_the_memory_loads(build, tmp_path):
    guard = gr.PEGP(energy=0.9)
    build(guards=[guard], output_dir=tmp_path / "run").fit()
    loaded = gr.PEGP.load_pretrained(tmp_path / "run" / "memory")
    assert loaded.tasks == ["animals", "ways"]
    assert loaded.settings() == guard.settings()


def test_a_run_folder_holds_nothing_else(build, tmp_path):
    build(guards=[gr.PEGP(energy=0.9)], output_dir=tmp_path / "deep" / "run").fit()
    found = {p.name for p in (tmp_path / "deep" / "run").iterdir()}
    assert found == {"results.json", "log.jsonl", "adapter", "memory", "head.json", "head.safetensors"}


def test_what_was_measured_outlives_weights_that_cannot_be_written(build, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(continual, "save_model", full)
    with pytest.raises(OSError, match="no space"):
        build(output_dir=tmp_path / "run").fit()
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["matrix"]) == 3


def test_without_a_folder_nothing_is_written(build, tmp_path):
    """Not even the folder that TrainingArguments name; the current folder is checked after every test."""
    before = {p.name for p in tmp_path.iterdir()}
    run = build(args={"output_dir": str(tmp_path / "named")}).fit()
    assert run.folder is None
    assert {p.name for p in tmp_path.iterdir()} == before


def test_a_file_in_the_place_of_the_folder(build, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        build(output_dir=tmp_path / "file")


def test_an_interrupted_run_leaves_no_results(build, tmp_path):
    folder = tmp_path / "run"
    build(output_dir=folder, args={"max_steps": 1}).fit()
    assert (folder / "results.json").is_file()

    class Stop(gr.guards.base.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if args.seed == 1001:  # in the second task
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(output_dir=folder, callbacks=[Stop()]).fit()
    assert not (folder / "results.json").exists()  # those of the earlier run would not belong to this log
    events = [line["event"] for line in lines_of(folder)]
    assert events[:2] == ["row", "log"]
    assert events.count("row") == 2
    assert not list(folder.glob(".*"))


def test_tensorboard(build, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = build(output_dir=tmp_path / "run", tensorboard=True).fit()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "test/animals", "test/ways"} <= tags
    scores = [(e.step, e.value) for e in events.Scalars("test/animals")]
    assert [s for s, _ in scores] == [0, 4, 8]
    assert [v for _, v in scores] == pytest.approx(run.matrix.values[:, 0])
    assert [e.step for e in events.Scalars("train/loss")] == [*range(1, 9)]


def test_tensorboard_that_is_missing(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"growthring\[tracking\]"):
        RunLog(tmp_path, tensorboard=True)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_run_put_together_in_python_says_how(build, lora):
    run = build(
        adapter=lora(lora_dropout=0.25),
        steps={"ways": 2},
        optimizer=(torch.optim.SGD, {"lr": 0.5, "momentum": 0.5}),
        guards=[gr.PEGP(energy={"lora_A": gr.LinearSchedule(0.8, 0.9, 2)})],
    ).fit()
    config = json.loads(json.dumps(run.config))
    assert config["adapter"]["r"] == 4
    assert config["adapter"]["lora_dropout"] == 0.25
    assert config["adapter"]["target_modules"] == "all-linear"
    assert config["head"] == "label-text"
    assert config["pooling"] == "mean"
    assert config["max_length"] == 64
    assert config["train"]["steps"] == {"ways": 2}
    assert config["train"]["optim"] == {"class": "SGD", "lr": 0.5, "momentum": 0.5}
    assert config["train"]["max_steps"] == 4
    assert config["guards"][0]["energy"] == {"lora_A": {"start": 0.8, "end": 0.9, "tasks": 2}}


def test_nothing_of_a_tasks_training_is_kept(build, monkeypatch):
    """No Trainer and no optimizer state waits for the garbage collector while the next task trains."""
    alive = []

    class Spy(steps.StreamTrainer):
        def run(self):
            assert [r() for r in alive] == [None] * len(alive)
            taken = super().run()
            alive.extend([weakref.ref(self), weakref.ref(self.optimizer)])
            return taken

    monkeypatch.setattr(continual, "StreamTrainer", Spy)
    trainer = build(stream_of(3), guards=[gr.PEGP(energy=0.9)])
    monkeypatch.setattr(gc, "collect", lambda *args: 0)
    gc.disable()
    try:
        trainer.fit()
    finally:
        gc.enable()
    assert len(alive) == 6
    assert [r() for r in alive] == [None] * 6


def test_mixed_precision_does_not_outlive_the_task(build):
    """accelerate wraps the model's forward; rows are scored, and features read, in the model's own precision."""
    trainer = build(args={"bf16": True})
    before = trainer.model.forward
    kinds = []

    class Watch(gr.guards.base.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            model = kwargs["model"]
            kinds.append(hasattr(model, "_original_forward") and model.forward is not model._original_forward)

    trainer.callbacks.append(Watch())
    trainer.fit()
    assert kinds == [True] * 8
    assert trainer.model.forward == before
    assert "_original_forward" not in vars(trainer.model)


def test_activation_checkpointing_gives_the_same_weights(build, lora):
    fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    for adapter in ("linear", lora()):
        plain, saving = (build(adapter=adapter, args={"max_steps": 2, name: on}) for on in (False, True))
        plain.fit()
        saving.fit()
        a, b = weights(plain), weights(saving)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def test_a_rerun_in_the_same_folder_replaces_the_results(build, tmp_path):
    folder = tmp_path / "run"
    build(output_dir=folder, args={"max_steps": 1}).fit()
    build(output_dir=folder, args={"max_steps": 2}, method="second").fit()
    found = json.loads((folder / "results.json").read_text())
    assert found["method"] == "second"
    assert len([line for line in lines_of(folder) if line["event"] == "log"]) == 4
