"""Diagnosis: the right cause on faulty programs, silence on healthy ones, and the report's form."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import diagnosis_models as models
from experiments import diagnosis_programs_late as late
from experiments.diagnosis_programs import PROGRAMS, Program
from jaxgrad.diagnosis import Finding, Report, causes, diagnose
from jaxgrad.diagnosis.finding import matches

assert late.PROGRAMS is PROGRAMS
BY_NAME = {p.name: p for p in PROGRAMS}
# One program a mechanism; all others run with --all, and in the benchmark.
QUICK_FAULTY = (
    "large_init", "zero_init", "dead_bias", "labels_from_one", "softmax_of_one", "batch_norm_one",
    "linen_argmax", "broadcast_targets", "raw_targets", "accumulation_sums", "where_sqrt",
    "bfloat16_small_steps",
)  # fmt: skip
QUICK_HEALTHY = ("relu_he_adam", "lora", "target_network")


def examine(program: Program, seed: int = 0) -> Report:
    return diagnose(**program.make(seed))


def speeds(names: tuple[str, ...], faulty: bool) -> list[Any]:
    return [
        pytest.param(p, id=p.name, marks=[] if p.name in names else [pytest.mark.slow])
        for p in PROGRAMS
        if bool(p.codes) == faulty
    ]


@pytest.mark.parametrize("program", speeds(QUICK_FAULTY, True))
def test_the_primary_cause_of_a_faulty_program_is_named(program: Program) -> None:
    report = examine(program)
    assert report.primary is not None
    assert report.primary.code in program.codes
    assert report.primary.fix and report.primary.cause
    assert not report.notes
    if program.where:
        assert any(part in report.primary.where for part in program.where)


@pytest.mark.parametrize("program", speeds(QUICK_HEALTHY, False))
def test_a_healthy_program_raises_no_alarm(program: Program) -> None:
    report = examine(program)
    assert report.primary is None
    assert all(f.severity == "info" for f in report.findings)
    assert not report.notes


def linear_loss(params: Any, batch: Any) -> Any:
    return jnp.square(batch["x"] @ params["w"] - batch["y"]).mean()


def linear_problem() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 3)).astype(np.float32)
    return {"w": jnp.zeros((3, 1))}, {"x": x, "y": x @ np.ones((3, 1), np.float32)}


def test_a_report_is_stable_json_and_prints_its_verdict_first(tmp_path: Any) -> None:
    params, batch = linear_problem()
    report = diagnose(linear_loss, params, batch, optax.sgd(0.1))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["primary"] is None and data["version"] == 1
    assert str(report).splitlines()[0] == report.verdict == data["verdict"]
    assert json.loads(report.save(tmp_path / "r.json").read_text())["verdict"] == report.verdict
    page = report.save(tmp_path / "r.html").read_text()
    assert report.verdict in page and page.count("<svg") >= 6  # see test_diagnosis_page
    with pytest.raises(ValueError, match=r"\.json or \.html"):
        _ = report.save(tmp_path / "r.txt")


def test_guilty_rows_are_marked_in_the_table() -> None:
    finding = Finding("unit.dead", "error", "initial", "b", "why")
    rows = ({"name": "a", "activation_rms": 1.0}, {"name": "b", "activation_rms": 0.0})
    lines = str(Report(finding, (finding,), rows)).splitlines()
    assert any(line.startswith("> b") for line in lines)
    assert any(line.startswith("  a ") for line in lines)


def test_non_finite_evidence_is_json() -> None:
    finding = Finding("lr.too_high", "error", "running", "", "why", {"loss": float("inf")})
    assert finding.to_dict()["evidence"] == {"loss": "inf"}


def test_the_earlier_link_of_the_chain_is_primary_and_the_later_ones_its_consequences() -> None:
    dead = Finding("unit.dead", "error", "initial", "a", "why")
    high = Finding("lr.too_high", "error", "counterfactual", "optimizer", "why")
    small = Finding("init.too_small", "error", "initial", "a", "why")
    primary, findings = causes.judge([high, dead, small])
    assert primary == small
    assert {f.code: f.consequence_of for f in findings} == {
        "init.too_small": None, "unit.dead": "init.too_small", "lr.too_high": "init.too_small",
    }  # fmt: skip
    assert sum(f.is_alarm for f in findings) == 1


def test_information_is_never_primary() -> None:
    info = Finding("gradient.blocked", "info", "static", "a", "why")
    assert causes.judge([info]) == (None, (info,))


def test_what_is_known_and_meant_is_silenced() -> None:
    made = BY_NAME["linen_argmax"].make(0)
    loud = diagnose(**made)
    assert loud.primary is not None
    where = loud.primary.where
    assert diagnose(**made, ignore=[f"gradient.blocked:{where}"]).primary is None
    assert not matches(loud.primary, ["gradient.blocked:elsewhere"])
    assert matches(loud.primary, ["gradient.*"])


def test_a_leaf_that_is_said_to_be_frozen_may_lose_its_gradient() -> None:
    made = BY_NAME["stopped"].make(0)
    frozen = [{"w": i > 1, "b": i > 1} for i in range(5)]
    report = diagnose(**made, trainable=frozen)
    assert report.primary is None or report.primary.code != "gradient.blocked"
    assert any(f.code == "gradient.blocked" and f.severity == "info" for f in report.findings)


def test_a_frozen_base_is_information_and_has_a_place() -> None:
    report = diagnose(**BY_NAME["lora_inside"].make(0))
    assert report.primary is None
    blocked = [f for f in report.findings if f.code == "gradient.blocked"]
    assert [f.severity for f in blocked] == ["info"]
    assert "base" in blocked[0].where and len(blocked[0].evidence["layers"]) == 4


@pytest.mark.slow
def test_an_output_that_forgot_its_input_is_told_from_one_that_keeps_it() -> None:
    """The loss alone would not tell: both stand at the entropy of the labels."""
    report = diagnose(**BY_NAME["rate_high_adam"].make(3))
    assert report.primary is not None and report.primary.code == "lr.too_high"
    facts = report.primary.evidence
    assert facts["spread_kept"] < 1e-6 and facts["spread_kept_at_a_tenth"] > 1


def test_a_while_loop_is_named_as_a_block() -> None:
    def loss(params: Any, batch: Any) -> Any:
        h = batch @ params["w"]
        h = jax.lax.while_loop(lambda c: jnp.any(c > 1), lambda c: 0.5 * c, h)
        return jnp.square(h).mean()

    report = diagnose(loss, {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)), optax.sgd(0.1))
    assert report.primary is not None
    assert report.primary.code == "gradient.blocked"
    assert "while" in report.primary.cause
    assert report.primary.where == "w"


def test_progress_is_told_and_auxiliary_outputs_are_dropped() -> None:
    params, batch = linear_problem()
    lines: list[str] = []
    loss = lambda p, b: (linear_loss(p, b), {"anything": 1})  # noqa: E731
    report = diagnose(loss, params, batch, has_aux=True, progress=lines.append)
    assert report.primary is None
    assert any("tracing" in line for line in lines) and any("training" in line for line in lines)


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    params, batch = linear_problem()
    with pytest.raises(TypeError, match="scalar"):
        _ = diagnose(lambda p, b: b["x"] @ p["w"], params, batch)
    with pytest.raises(TypeError, match="no floating-point"):
        _ = diagnose(linear_loss, {"n": jnp.arange(3)}, batch)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    params, batch = linear_problem()
    with pytest.raises(ValueError, match="trainable"):
        _ = diagnose(linear_loss, params, batch, trainable={"v": True})


def test_the_reported_fix_of_a_vanishing_start_trains() -> None:
    sick = diagnose(**BY_NAME["small_init"].make(0))
    assert sick.primary is not None and sick.primary.code == "init.too_small"
    facts = sick.primary.evidence
    assert facts["loss_with_the_needed_scale"] < 0.5 * facts["loss_as_given"]
    made = BY_NAME["small_init"].make(0)
    widths = [64, *[32] * 12, 10]
    cured = diagnose(**made | {"params": models.mlp_params(0, widths, models.he)})
    assert cured.primary is None


def test_an_optimizer_that_cannot_be_run_is_said_to_be_so() -> None:
    def update(grads: Any, state: Any, params: Any = None) -> Any:
        raise ValueError("needs the moon")

    params, batch = linear_problem()
    tx = optax.GradientTransformation(lambda _: (), update)
    report = diagnose(linear_loss, params, batch, tx)
    assert report.primary is None
    assert any("needs the moon" in note for note in report.notes)


def test_a_satisfied_hinge_is_no_dead_unit() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 8)).astype(np.float32)
    params = models.mlp_params(0, [8, 16, 4])
    params[-1]["b"] = jnp.full(4, 50.0)

    def hinge(params: Any, x: Any) -> Any:
        return jnp.maximum(0.0, 1.0 - models.mlp(params, x)).mean() + 0.0 * params[0]["w"].sum()

    assert diagnose(hinge, params, x, optax.sgd(0.1)).primary is None
