from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from growthring.errors import ConfigError, DataError
from growthring.report import promise_kept, render_report, write_report

VOID = {"meta", "line", "circle", "br", "link", "img"}
HOSTILE = ["</script><script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "<!--<script>", "{{ 7*7 }} $x$"]


class Page(HTMLParser):
    """Tags, attributes, visible text and scripts of a page; checks that every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def figures(self):
        return json.loads(self.scripts[0])


def test_the_page_is_one_accessible_file(pegp, joint, tmp_path):
    path = write_report([pegp, joint], tmp_path / "deep" / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert page.text.startswith("growthring report")  # several runs: the name of one of them would mislead
    assert len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if tag in {"h1", "h2", "h3", "h4"}]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(page.figures) <= set(ids)
    for place in (attrs for _, attrs in page.tags if attrs.get("role") in {"img", "region"}):
        assert place["aria-label"]
    assert len(page.all("caption")) == len(page.all("table"))
    # nothing is fetched: only links inside the page, no sources, and a policy that forbids the rest
    assert all(value.startswith("#") for _, attrs in page.tags for key, value in attrs.items() if key == "href")
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)
    assert not [attrs for _, attrs in page.tags if {"src", "srcset", "data", "action"} & set(attrs)]
    assert not page.all("link")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert any("default-src 'none'" in attrs.get("content", "") for attrs in page.all("meta"))


def test_values_appear(pegp, joint):
    page = Page(render_report([pegp, joint]))
    for expected in (
        "2 methods on 3 tasks in a row",
        "In short: PEGP",
        "78.3 % mean accuracy over all tasks",
        "−10.0 points earlier tasks lost this much",
        "Most forgotten task trec −15.0 points from its best score",
        "promise kept at most 3.0×10⁻⁷ of any update",
        "Joint 80.0 — — — — — 2 min 05 s",
        "after bbc 70.0 85.0 50.0",
        "Wall time, 2 min 05 s in total",
        "tiny <model>",
    ):
        assert expected in page.text
    figures = page.figures
    assert set(figures) == {"final", "heat-1", "curves-1", "capacity-1", "heat-2", "curves-2"}
    heat = figures["heat-1"]["data"][0]
    assert heat["z"][3] == pytest.approx([65, 80, 90])
    assert (heat["zmin"], heat["zmax"]) == (0, 100)
    assert figures["curves-1"]["data"][1]["y"] == pytest.approx([30, 35, 85, 80])
    assert figures["curves-1"]["data"][1]["marker"]["symbol"] == ["circle-open", "circle-open", "circle", "circle"]
    # rings: 2 of 10 taken by the first task, one more by each of the others, 6 free
    assert [trace["x"] for trace in figures["capacity-1"]["data"]] == [pytest.approx([v]) for v in (20, 10, 10, 60)]
    assert figures["final"]["data"][0]["z"] == [pytest.approx([65, 80, 90]), pytest.approx([70, 80, 90])]


def test_hostile_names_stay_text(make):
    rows = [[0.1] * 4, [0.2] * 4, [0.3] * 4]
    results = make(
        HOSTILE, None, rows, method="<b>m</b>", title="</title><script>alert(2)</script>", leaks=[None, 1e-7]
    )
    results |= {"name": "</title><script>", "config": {"</pre>": "<script>"}, "versions": {"<i>": "<script>"}}
    results["certificates"][0]["notes"] = ["<script>note</script>"]
    text = render_report(results)
    page = Page(text)
    assert len(page.all("script")) == 3
    assert not page.all("img")
    assert not page.all("i")
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    for name in HOSTILE:
        assert name in page.text
    start = text.index('id="figure-data">')
    data = text[start + len('id="figure-data">') : text.index("</script>", start)]
    assert not set("<>&") & set(data)
    # inside plotly, which reads its labels as HTML, the names are escaped once more
    assert page.figures["curves-1"]["data"][1]["name"].startswith("\"'&gt;&lt;img src=x")
    assert page.figures["curves-1"]["data"][3]["name"] == "{{ 7*7 }} &#36;x&#36;"


def test_plotly_cannot_close_its_script():
    from growthring.report import page

    assert "</script" not in page.plotly().lower()


def test_joint_alone_and_one_task(make, joint):
    text = Page(render_report(joint)).text
    assert "All tasks were learned together" in text
    assert "no promise no guard was active" in text
    assert "needs two tasks" in text
    one = make(["only"], None, [[0.5], [0.9]], leaks=[None])
    page = Page(render_report(one))
    assert "PEGP on one task" in page.text
    assert "nothing to protect yet" in page.text
    assert page.figures["heat-1"]["data"][0]["z"] == [[50], [90]]


def test_missing_parts_and_numbers_are_dashes(pegp):
    pegp["matrix"][3][0] = math.nan
    pegp["metrics"] = dict.fromkeys(pegp["metrics"])
    kept = {key: pegp[key] for key in ("method", "tasks", "rows", "matrix", "metrics")}
    page = Page(render_report(kept))
    assert "Final average —" in page.text
    assert "after spam — 80.0 90.0" in page.text
    assert page.figures["heat-1"]["data"][0]["z"][3][0] is None
    assert set(page.figures) == {"heat-1", "curves-1"}
    for gone in ("Certificates", "Rings", "Wall time", "Configuration", "None", "nan"):
        assert gone not in page.text


@pytest.mark.parametrize("leak", [2e-5, math.nan])
def test_a_leak_above_the_limit_is_said_plainly(pegp, leak):
    pegp["certificates"][1]["leak"] = leak
    text = Page(render_report(pegp)).text
    assert "promise broken" in text
    assert "promise kept" not in text.split("How to read")[0].replace("the promise is kept", "")


def test_a_leak_that_was_not_measured_is_not_called_kept(pegp):
    pegp["certificates"][2]["leak"] = None
    text = Page(render_report(pegp)).text
    assert "not fully measured the leak of 1 of 3 certificates was not measured" in text


def test_two_guards_on_one_task_make_one_ring(pegp):
    pegp["certificates"] += [{**c, "guard": "other"} for c in pegp["certificates"]]
    page = Page(render_report(pegp))
    assert [trace["x"] for trace in page.figures["capacity-1"]["data"]] == [
        pytest.approx([v]) for v in (20, 10, 10, 60)
    ]


def test_twenty_tasks_with_names_of_any_length(make):
    names = [f"customer {i} " + "very " * i for i in range(20)]
    rows = [[0.5] * 20 for _ in range(21)]
    page = Page(render_report(make(names, None, rows, leaks=[None, *[1e-7] * 19])))
    ticks = page.figures["heat-1"]["layout"]["xaxis"]
    assert len(ticks["tickvals"]) == 20
    assert max(map(len, ticks["ticktext"])) <= 18
    assert len([b for b in page.all("button") if "data-slot" in b]) == 20
    assert len(page.figures["capacity-1"]["data"]) == 21
    assert names[19].strip() in page.text


def test_methods_on_other_streams_are_not_put_in_one_figure(make, pegp):
    other = make(["trec", "bbc"], None, [[0.1, 0.2]], method="other", title="Other")
    page = Page(render_report([other, pegp]))
    assert "final" not in page.figures
    assert "In short: PEGP" in page.text


def test_unusable_results_are_refused(pegp):
    with pytest.raises(ConfigError, match="no results"):
        render_report([])
    with pytest.raises(DataError, match="missing metrics"):
        render_report({key: value for key, value in pegp.items() if key != "metrics"})
    pegp["matrix"][0] = [83.0, 1, 1]
    with pytest.raises(DataError, match="divide percent by 100"):
        render_report(pegp)


def bounded(kept, name="radius"):
    one = {"name": "layer.0.query.default", "kind": "largo", "frobenius": 0.25, "spectral": 0.125, "bound": 0.5}
    one |= {"radii": [0.1, 0.2], "kept": kept, "bound": None if kept is None else 0.5}
    counts = {"probes": 0, "held": 0, "protected_tasks": 0, "task_index": 0, "energy": 0.0, "free": 0, "dims": 0}
    rest = {"leak": None, "output_change": None, "kept": kept, "sites": [], "notes": ["||W - W_0||_F"]}
    return {"guard": name, "task": "trec", "deviations": [one], **counts, **rest}


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (True, "promise kept every layer is as near to the pretrained model as its bound says"),
        (False, "promise broken layers ended farther from the pretrained model than their bounds allow"),
        (None, "no promise how far layers moved was measured, not bounded"),
    ],
)
def test_bounds_of_deviations_are_judged_and_listed(pegp, kept, said):
    pegp["certificates"] = [bounded(kept)]
    page = Page(render_report(pegp))
    assert said in page.text
    assert "How far each layer is from the pretrained model" in page.text
    assert "layer.0.query.default largo 2.5×10⁻¹" in page.text or "layer.0.query.default largo 0.25" in page.text
    assert promise_kept(bounded(kept)) is kept


def test_a_broken_bound_is_not_hidden_by_a_kept_promise(pegp):
    pegp["certificates"].append(bounded(True))
    assert "promise kept at most" in Page(render_report(pegp)).text
    pegp["certificates"].append(bounded(False))
    text = Page(render_report(pegp)).text
    assert "promise broken layers ended farther" in text
    pegp["certificates"][1]["leak"] = 2e-5
    assert "promise broken 2.0×10⁻⁵ of an update" in Page(render_report(pegp)).text
