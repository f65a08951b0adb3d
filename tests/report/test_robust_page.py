from __future__ import annotations

import copy
import io

import pytest
from rich.console import Console
from test_page import HOSTILE, Page

from growthring.errors import DataError
from growthring.report import render_robust_report, robust_table, write_robust_report


def place(alpha, test, ood, above, deviation=1.5, sd=0.01):
    return {
        "alpha": alpha, "id_validation": test + 0.01, "id_test": test, "id_test_sd": sd,
        "ood": {"near": ood - 0.1, "far": ood + 0.1}, "ood_mean": ood, "ood_mean_sd": sd, "deviation": deviation,
        "seconds": 3.0, "effective_robustness": above,
    }  # fmt: skip


def row(name, setting, curve, *, chosen=True, baseline=False):
    return {
        "name": name, "method": name, "title": name.upper(), "setting": setting, "chosen": chosen,
        "baseline": baseline, "trained": 12_345, "curve": curve,
    }  # fmt: skip


@pytest.fixture
def results():
    start = place(0.0, 0.7, 0.6, 0.0, 0.0)
    small, large = {"learning_rate": 0.001}, {"learning_rate": 0.01}
    return {
        "kind": "robust",
        "growthring_version": "1.2.3",
        "model": "/some/where/my-encoder",
        "task": {"name": "reviews", "labels": ["no", "yes"], "train": 100, "validation": 20, "test": 30},
        "domains": [{"name": "near", "rows": 40}, {"name": "far", "rows": 50}],
        "seeds": [0, 1],
        "search_seed": 0,
        "choices": [
            {
                "name": "lora", "method": "lora", "chosen": small, "index": 0,
                "tried": [{"setting": small, "id_validation": 0.9}, {"setting": large, "id_validation": 0.8}],
            },
            {"name": "largo", "method": "largo", "chosen": large, "index": 0, "tried": [
                {"setting": large, "id_validation": None}
            ]},
        ],
        "frontier": [[0.7, 0.6], [0.9, 0.5]],
        "frontier_of": ["lora"],
        "settings": [
            row("lora", small, [start, place(1.0, 0.9, 0.5, 0.0)], baseline=True),
            row("lora", large, [start, place(1.0, 0.8, 0.4, -0.15)], chosen=False, baseline=True),
            row("largo", large, [start, place(1.0, 0.85, 0.561, 0.036)]),
        ],
        "versions": {"torch": "2"},
        "config": {"model": "x"},
    }  # fmt: skip


def test_the_page_holds_every_number(results, tmp_path):
    path = write_robust_report(results, tmp_path / "deep" / "report.html")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    assert "2 methods on reviews, and beyond it" in page.text
    assert "my-encoder" in page.text
    assert "/some/where" not in page.text
    for words in ("85.0 ± 1.0", "56.1 ± 1.0", "+3.6", "learning rate 0.01", "12,345", "Start: untouched model"):
        assert words in page.text
    assert "default-src 'none'" in text
    assert "<script src" not in text
    heads = [tag for tag, _ in page.tags if tag in ("h1", "h2")]
    assert heads.count("h1") == 1
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_figure_has_a_way_for_each_setting_and_the_frontier(results):
    figure = Page(render_robust_report(results)).figures["frontier"]
    first, second, faint, frontier = figure["data"]
    assert [trace["meta"].get("slot") for trace in figure["data"]] == [0, 1, 0, None]
    assert (first["x"], first["y"]) == ([70.0, 90.0], [60.0, 50.0])
    assert second["x"][-1] == 85.0
    assert faint["opacity"] < 1
    assert "error_x" not in faint
    assert second["error_y"]["array"] == [0.0, 1.0]
    assert frontier["meta"]["role"] == "frontier"
    assert frontier["x"][1:-1] == [70.0, 90.0]
    assert frontier["x"][0] == figure["layout"]["xaxis"]["range"][0]
    assert (frontier["y"][0], frontier["y"][-1]) == (60.0, 50.0)


def test_bars_are_inside_the_axes(results):
    results["settings"][2]["curve"][-1] |= {"id_test_sd": 0.2, "ood_mean_sd": 0.3}
    layout = Page(render_robust_report(results)).figures["frontier"]["layout"]
    for axis, low, high in (("xaxis", 65.0, 105.0), ("yaxis", 26.1, 86.1)):
        assert layout[axis]["range"][0] < low
        assert layout[axis]["range"][1] > high


def test_pages_of_less(results):
    bare = copy.deepcopy(results)
    bare |= {"frontier": None, "frontier_of": [], "seeds": [0]}
    for one in bare["settings"]:
        one["curve"] = one["curve"][-1:]  # no way, so no start either
        for where in one["curve"]:
            where |= {"effective_robustness": None, "deviation": None}
    page = Page(render_robust_report(bare))
    assert "Start: untouched" not in page.text
    assert "±" not in page.text.split("How to read")[0]
    assert "Above the frontier" not in page.text.split("How to read")[0]
    assert len(page.figures["frontier"]["data"]) == 3
    below = copy.deepcopy(results)
    below["settings"][2]["curve"][-1]["effective_robustness"] = -0.02
    assert "LARGO: no trained model lies above it" in Page(render_robust_report(below)).text
    same = copy.deepcopy(results)  # everything at one point: axes still have a width
    for one in same["settings"]:
        one["curve"] = [place(1.0, 0.5, 0.5, 0.0)]
    low, high = Page(render_robust_report(same)).figures["frontier"]["layout"]["xaxis"]["range"]
    assert low < 50 < high


@pytest.mark.parametrize("words", HOSTILE)
def test_names_are_only_text(results, words):
    results["task"]["name"] = words
    results["settings"][2]["title"] = words
    results["settings"][2]["setting"] = {words: words}
    results["domains"][0]["name"] = words
    for one in results["settings"]:
        for where in one["curve"]:
            where["ood"][words] = where["ood"].pop("near", 0.4)
    page = Page(render_robust_report(results))
    assert len(page.all("script")) == 3
    assert not page.all("img")
    assert words in "".join(page.words)


def test_the_table_for_the_terminal(results):
    console = Console(file=io.StringIO(), width=140)
    console.print(robust_table(results))
    text = console.file.getvalue()
    for words in ("reviews", "LORA", "LARGO", "85.0 ± 1.0", "46.1", "+3.6", "0.0", "1.5", "3.0 s"):
        assert words in text
    assert text.count("LORA") == 1  # its chosen setting alone


def test_a_long_name_of_a_domain_hides_no_numbers(results):
    name = "far " * 30
    results["domains"][1]["name"] = name
    for one in results["settings"]:
        for where in one["curve"]:
            where["ood"][name] = where["ood"].pop("far", 0.4)
    console = Console(file=io.StringIO(), width=100)
    console.print(robust_table(results))
    for words in ("LORA", "LARGO", "85.0 ± 1.0", "56.1 ± 1.0", "+3.6", "1.5", "3.0 s", "far far"):
        assert words in console.file.getvalue()


def test_what_is_no_sweep(results):
    with pytest.raises(DataError, match="missing task, domains"):
        render_robust_report({"kind": "robust"})
    with pytest.raises(DataError, match="kind: robust"):
        robust_table({**results, "kind": "run"})
    with pytest.raises(DataError, match="nothing was trained"):
        robust_table({**results, "settings": []})
