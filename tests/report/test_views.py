from __future__ import annotations

import pytest
from test_page import HOSTILE, Page
from test_tables import cells, lines

from growthring.errors import DataError
from growthring.evaluation import AccuracyMatrix, metrics
from growthring.report import render_report, summary_table

TOLD = [[0.5, 0.5, 0.5], [0.9, 0.5, 0.5], [0.85, 0.95, 0.5], [0.8, 0.9, 1.0]]
RIDGE = [[None] * 3, [0.6, None, None], [0.6, 0.6, None], [0.6, 0.5, 0.4]]


def with_views(results, *others):
    views = [("head", "classes seen", results["matrix"]), *others]
    names = [task["name"] for task in results["tasks"]]
    return results | {
        "views": [
            {
                "classifier": classifier,
                "given": given,
                "matrix": values,
                "metrics": metrics(AccuracyMatrix(names, None, values)).to_dict(),
                "validation_matrix": None,
            }
            for classifier, given, values in views
        ]
    }


@pytest.fixture
def viewed(pegp):
    return with_views(pegp, ("ridge", "classes seen", RIDGE), ("head", "task", TOLD))


@pytest.fixture
def sited(pegp):
    def site(name, shape, treatment, **more):
        about = {"kinds": [], "condition": "", "why": "", "cost": ""} | more
        return {"guard": "pegp", "name": name, "shape": shape, "treatment": treatment, **about}

    protected = {"kinds": ["lora_A"], "condition": "dA x = 0"}
    rows = [
        site("layer.norm.weight", [8], "free", why="<b>no condition</b>", cost="outputs may drift"),
        site("layer.0.lora_A", [4, 8], "protected", **protected),
        site("layer.1.lora_A", [4, 8], "protected", **protected),
        site("head.bias", [], "held", why="no site"),
    ]
    return pegp | {"sites": rows}


def test_the_page_shows_class_beside_task_incremental_figures(viewed, joint):
    page = Page(render_report([viewed, joint]))
    assert "Final average Final average, task told Learning accuracy" in page.text
    assert "PEGP 78.3 90.0 85.0" in page.text
    assert "Joint 80.0 — —" in page.text  # it was not scored so
    assert "trained head nothing 78.3 85.0 −10.0 10.0" in page.text
    assert "trained head the task 90.0 95.0 −7.5 7.5" in page.text
    assert "ridge on random features nothing 50.0 53.3 −5.0 5.0" in page.text
    assert "ridge 60.0 50.0 40.0" in page.text
    assert "head, task told 80.0 90.0 100.0" in page.text
    assert len(page.all("caption")) == len(page.all("table"))
    assert "Classifier nearest" not in page.text


def test_one_view_alone_is_not_worth_a_table(pegp):
    for results in (pegp, with_views(pegp)):
        page = Page(render_report(results))
        assert "Other ways" not in page.text
        assert "task told" not in page.text.split("How to read")[0]
        assert len(lines(summary_table([results]))) == 6


def test_the_main_classifier_is_said_where_it_is_not_the_head(pegp):
    views = with_views(pegp, ("head", "task", TOLD))["views"]
    views[0]["classifier"] = "prototype"
    page = Page(render_report(pegp | {"views": views}))
    assert "Classifier nearest class mean" in page.text
    assert "Final average, task told" not in page.text  # no figure of that classifier with the task told


def test_the_terminal_has_a_line_for_each_view(viewed, joint):
    table = summary_table([viewed, joint])
    assert cells(table, "PEGP")[1] == "78.3"
    assert cells(table, "  head  ") == ["head", "78.3", "85.0", "-10.0", "10.0", "+7.5", "", ""]
    assert cells(table, "  head, task told")[:4] == ["head, task told", "90.0", "95.0", "-7.5"]
    assert cells(table, "  ridge")[-3:] == ["—", "", ""]
    assert len(lines(table)) == 6 + 1 + 3


def test_tensors_are_grouped_by_treatment(sited):
    page = Page(render_report(sited))
    assert "protected: moves only where earlier tasks do not look pegp 2 64 lora_A dA x = 0 —" in page.text
    assert "held: keeps its value from the second task on pegp 1 1 — no site —" in page.text
    assert "free: nothing keeps it pegp 1 8 — <b>no condition</b> outputs may drift" in page.text
    text = page.text
    assert text.index("protected: moves") < text.index("held: keeps") < text.index("free: nothing")
    assert "layer.0.lora_A layer.1.lora_A" in text


def test_runs_without_a_site_report_have_no_such_section(pegp):
    assert "What was protected" not in Page(render_report(pegp)).text
    assert "What was protected" not in Page(render_report(pegp | {"sites": []})).text


def test_zero_shot_figures_and_extra_times(pegp):
    pegp["timings"]["tasks"][1]["classifier_seconds"] = 4.5
    zero = {"mtil": {"transfer": 0.4, "average": 0.65, "last": 0.783}, "reference": [0.91, 0.9, 0.89, 0.88]}
    text = Page(render_report(pegp | zero)).text
    assert "Transfer 40.0 mean accuracy on tasks that were still to come" in text
    assert "Reference, before 91.0" in text
    assert "Reference, after 88.0" in text
    assert "Evaluation Classifiers trec 77 9.5 s 1.0 s 2.0 s — bbc 77 9.5 s 1.0 s 2.0 s 4.5 s" in text
    plain = Page(render_report(pegp | {"mtil": None, "reference": None})).text
    assert "Zero-shot accuracy, before" not in plain


def test_hostile_words_stay_text(pegp):
    site = {"guard": HOSTILE[1], "name": HOSTILE[0], "shape": [2], "treatment": HOSTILE[2], "kinds": [HOSTILE[0]]}
    results = with_views(pegp, (HOSTILE[0], HOSTILE[1], RIDGE)) | {"sites": [site]}
    page = Page(render_report(results))
    assert len(page.all("script")) == 3
    assert not page.all("img")
    for word in HOSTILE[:3]:
        assert word in page.text
    assert HOSTILE[0] in "\n".join(lines(summary_table([results])))


def test_a_view_that_does_not_fit_is_refused(viewed):
    viewed["views"][1]["matrix"] = RIDGE[:2]
    with pytest.raises(DataError, match="row names"):
        render_report(viewed)
