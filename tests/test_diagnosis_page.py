"""The page of a diagnosis: every picture is drawn from what was measured, nothing is invented."""

import importlib
import re
from typing import Any

import numpy as np
import pytest

from jaxgrad.diagnosis import Finding, Report
from jaxgrad.diagnosis.course import Course
from jaxgrad.monitor.summary import EXPONENTS
from jaxgrad.report import diagnosis_figures as drawn
from jaxgrad.report.diagnosis_page import bands, diagnosis_page

STEPS = np.arange(20)
RAW = np.linspace(2, 0.1, 20)
SPIKE = Finding(
    "loss.spike", "warning", "running", "step 7", "It <jumps>.", {"step": 7}, "fix <me>"
)
INIT = Finding("init.too_small", "error", "initial", "b", "small", {"layers": ["b", "c"]})
NOTE = Finding("lr.too_low", "info", "running", "optimizer", "slow")
ROWS = tuple(
    {"name": n, "activation_rms": 1.0, "gradient_rms": 0.0, "zero_share": z,
     "weight_gradient_rms": None, "parameters": []}
    for n, z in (("a", 0.5), ("b", float("nan")), ("c", 0.0))
)  # fmt: skip


def course(**changes: Any) -> Course:
    profile = {
        name: np.array([1.0, 0.0, np.nan])
        for name in ("activation_rms", "gradient_rms", "weight_gradient_rms")
    }
    table = np.zeros(len(EXPONENTS) + 1)
    table[-EXPONENTS.start - 10 : -EXPONENTS.start] = 9.0
    table[-1] = 10.0
    given: dict[str, Any] = {
        "initial": profile, "final": profile, "steps": STEPS, "losses": np.linspace(2, 1, 20),
        "raw_norms": RAW, "clipped_norms": np.minimum(RAW, 1.0),
        "leaf_names": ("w",), "leaf_steps": STEPS, "update_ratio": np.full((20, 1), 1e-3),
        "heat_names": ("a", "b"), "heat_steps": STEPS, "heat": np.ones((20, 2)),
        "units": (("a", np.array([0.0, 0.5, 1.0, 0.0])), ("b", np.array([1.0, 1.0]))),
        "exponents": {"now": table},
    }  # fmt: skip
    return Course(**given | changes)


def report(*findings: Finding, **changes: Any) -> Report:
    primary = findings[0] if findings and findings[0].severity != "info" else None
    return Report(primary, findings, ROWS, {"chance": 2.3}, ("a note",), course(**changes))


def texts(svg: str) -> str:
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_the_page_stands_alone_holds_every_picture_and_escapes_what_comes_from_outside() -> None:
    page = diagnosis_page(report(SPIKE, INIT))
    assert page.count("<svg") == 9
    assert "It &lt;jumps&gt;." in page and "fix &lt;me&gt;" in page and "<jumps>" not in page
    assert "default-src 'none'" in page and "<script" not in page
    assert not re.search(r'(src|href)="(?!#|data:)', page.replace("xlink:href", "href"))
    assert page.count('class="guilty"') == 2 and "a note" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_pictures_of_what_was_not_measured_are_left_out() -> None:
    nothing = Course(initial=course().initial)
    assert diagnosis_page(Report(None, (), (), {}, (), nothing)).count("<svg") == 3
    assert "<svg" not in diagnosis_page(Report(None, ()))


def test_a_band_begins_where_its_finding_holds_and_information_has_none() -> None:
    assert [(b[0], b[1], b[3]) for b in bands(report(SPIKE, INIT, NOTE))] == [
        (7.0, 7.0, "warning"), (0.0, 19.0, "error"),
    ]  # fmt: skip
    broke = Finding("gradient.exploding", "error", "running", "", "broke", {"step": 12})
    assert bands(report(broke))[0][:2] == (12.0, 19.0)


def test_the_share_of_clipped_steps_is_that_of_the_norms() -> None:
    made = course()
    share = np.mean(made.raw_norms > 1)
    svg = drawn.norms(made.steps, made.raw_norms, made.clipped_norms)
    assert f"{share:.0%} of the steps clipped" in texts(svg)
    none = drawn.norms(made.steps, made.raw_norms, np.full(20, np.nan))
    assert "clipped" not in texts(none)


def test_the_unit_map_counts_the_units_that_never_work() -> None:
    made = course()
    assert f"{np.mean([2 / 4, 0 / 2]):.0%} never" in texts(drawn.unit_map(made.units))


def test_the_histogram_says_the_zeros_and_where_each_type_ends() -> None:
    said = texts(drawn.exponent_histogram(course().exponents))
    assert "now, 10% exact zeros" in said
    for words in ("f16: zero below", "f16: fewer bits below", "f16: inf above"):
        assert words in said
    wide = np.ones(len(EXPONENTS) + 1)
    said = texts(drawn.exponent_histogram({"now": wide}))
    assert "bf16: zero below" in said and "bf16, f32: fewer bits below" in said


def test_the_guide_of_the_update_ratio_and_a_guess_are_drawn() -> None:
    made = course()
    assert "guide, 10⁻³" in texts(drawn.update_ratios(("w",), made.leaf_steps, made.update_ratio))
    assert "a guess" in texts(drawn.loss_with_bands(STEPS, made.losses, [], 2.3))
    assert "a guess" not in texts(drawn.loss_with_bands(STEPS, made.losses, [], None))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_run_of_zeros_nan_or_infinity_is_drawn_all_the_same(value: float) -> None:
    bad = np.full(20, value)
    page = diagnosis_page(
        report(INIT, losses=bad, raw_norms=bad, clipped_norms=bad, heat=np.full((20, 2), value),
               update_ratio=np.full((20, 1), value),
               units=(("a", np.zeros(3)),), exponents={"now": np.zeros(len(EXPONENTS) + 1)})
    )  # fmt: skip
    assert page.count("<svg") >= 7


def test_one_measured_step_is_enough() -> None:
    one = {name: np.ones(1) for name in ("losses", "raw_norms", "clipped_norms")}
    short = np.arange(1)
    page = diagnosis_page(
        report(INIT, steps=short, leaf_steps=short, heat_steps=short, heat=np.ones((1, 2)),
               update_ratio=np.ones((1, 1)), **one)
    )  # fmt: skip
    assert page.count("<svg") == 9


def test_without_matplotlib_the_page_is_text_and_says_what_to_install(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named 'matplotlib', for {name}")

    monkeypatch.setattr(importlib, "import_module", missing)
    text = report(SPIKE).save(tmp_path / "r.html").read_text()
    assert "<svg" not in text and "jaxgrad[report]" in text and "It &lt;jumps&gt;." in text
