"""Diagnosis of a run that is over: each fault from what was recorded of it, silence on the rest."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrad import cli, monitor, store
from jaxgrad.diagnosis import diagnose_run
from jaxgrad.flow import value_and_grad_flow
from jaxgrad.monitor.recording import Recording
from jaxgrad.monitor.summary import EXPONENTS, LEAVES, ROWS, SCALARS

STEPS, LAYERS = 60, 6
NAMES = tuple(f"layer_{k}" for k in range(LAYERS))


def made(**changes: Any) -> Recording:
    """A recording of a healthy run, with changes: facts, scalars, or rows by name."""
    t = np.arange(STEPS)
    scalars = {name: np.full(STEPS, np.nan) for name in SCALARS}
    scalars |= {"loss": 2.3 * 0.97**t + 0.01, "gradient_norm": 0.5 * 0.99**t, "nonfinite": 0.0 * t,
                "update_norm": np.full(STEPS, 0.02), "alignment": np.full(STEPS, 0.3)}  # fmt: skip
    rows = {name: np.zeros((STEPS, LAYERS)) for name in (*ROWS, *LEAVES)}
    for name in ("activation_rms", "gradient_rms", "weight_rms", "weight_gradient_rms"):
        rows[name] = np.ones((STEPS, LAYERS))
    rows |= {"update_rms": np.full((STEPS, LAYERS), 1e-3), "gradient_reached": rows["weight_rms"],
             "exponents": np.ones((STEPS, len(EXPONENTS) + 1)),
             "rounded_away": np.zeros((STEPS, LAYERS))}  # fmt: skip
    facts = {"classes": 10, "leaf_sizes": [16] * LAYERS, "leaf_dtypes": ["float32"] * LAYERS,
             "optimizer": {"clip_order": "none", "steps": ["adam"], "leaves": {}}}  # fmt: skip
    for name, value in changes.items():
        group = scalars if name in scalars else rows if name in rows else facts
        group[name] = value
    curve = {"first": t, "last": t, "count": np.ones(STEPS, int)}
    owners = tuple((name,) for name in NAMES)
    return Recording(NAMES, NAMES, owners, facts, curve, scalars, scalars, scalars, t, rows)


def across(first: float, last: float) -> np.ndarray:
    """A quantity that changes from the first layer to the last by equal factors."""
    return np.tile(np.geomspace(first, last, LAYERS), (STEPS, 1))


FLAT = np.full(STEPS, 2.3)
BROKEN = np.where(np.arange(STEPS) < 40, 0.5, np.nan)


def after(step: int, layer: int, value: float = 3.0, other: Any = 0.0) -> np.ndarray:
    """Zeros, but `value` in one layer from a step on."""
    table = np.full((STEPS, LAYERS), other, float)
    table[step:, layer] = value
    return table


CLIPPED = {"clip_order": "after", "steps": ["trace", "clip"], "leaves": {"trace": "after"},
           "intentional": False}  # fmt: skip
FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "clip behind the momentum": (
        {"optimizer": CLIPPED}, "optimizer.clip_after_update", "optimizer",
    ),
    "up the gradient": (
        {"alignment": np.full(STEPS, -0.4), "loss": FLAT + np.arange(STEPS)},
        "optimizer.ascent", "optimizer",
    ),
    "clipped away": (
        {"clipped_norm": np.full(STEPS, 1e-3), "loss": FLAT}, "optimizer.clip_always", "optimizer",
    ),
    "born backward": (
        {"gradient_nonfinite": after(40, 2), "nonfinite": after(40, 0)[:, 0]},
        "gradient.nonfinite", "layer_3",
    ),
    "born forward": (
        {"activation_nonfinite": after(40, 4), "nonfinite": after(40, 0)[:, 0], "loss": BROKEN},
        "gradient.nonfinite", "layer_4",
    ),
    "grown until it broke": (
        {"activation_rms": np.tile(np.geomspace(1, 1e9, STEPS), (LAYERS, 1)).T,
         "activation_nonfinite": after(40, 1), "nonfinite": after(40, 0)[:, 0], "loss": BROKEN},
        "gradient.exploding", "layer_1",
    ),
    "too small": (
        {"activation_rms": across(1, 1e-7), "gradient_rms": across(1e-8, 1e-2), "loss": FLAT},
        "init.too_small", "layer_0",
    ),
    "too large": (
        {"activation_rms": across(1, 1e5), "loss": 1e4 + 0 * FLAT}, "init.too_large", "layer_0",
    ),
    "vanishing": (
        {"gradient_rms": across(1e-9, 1e-2), "loss": FLAT}, "gradient.vanishing", "layer_0",
    ),
    "exploding": ({"gradient_rms": across(1e6, 1), "loss": FLAT}, "gradient.exploding", "layer_0"),
    "dead": (
        {"activation_zero_share": after(0, 2, 1.0), "weight_gradient_rms": after(0, 2, 0.0, 1.0),
         "loss": FLAT},
        "unit.dead", "layer_2",
    ),
    "no gradient at all": (
        {"weight_gradient_rms": np.zeros((STEPS, LAYERS)), "loss": FLAT},
        "gradient.blocked", "layer_5",
    ),
    "rate too high": (
        {"update_rms": np.full((STEPS, LAYERS), 2.0), "loss": 2.3 + 5 * np.arange(STEPS)},
        "lr.too_high", "optimizer",
    ),
    "rate too low": (
        {"update_rms": np.full((STEPS, LAYERS), 1e-7), "loss": FLAT}, "lr.too_low", "optimizer",
    ),
    "rounded away": (
        {"rounded_away": after(0, 3, 0.97), "leaf_dtypes": ["bfloat16"] * LAYERS, "loss": FLAT},
        "precision.lost_updates", "layer_3",
    ),
    "a spike": (
        {"loss": np.where(np.arange(STEPS) == 33, 40.0, 2.3 * 0.97 ** np.arange(STEPS)),
         "gradient_norm": np.where(np.arange(STEPS) == 33, 40.0, 0.5)},
        "loss.spike", "step 33",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_recorded_fault_is_named_with_its_place(fault: str) -> None:
    changes, code, where = FAULTS[fault]
    report = diagnose_run(made(**changes))
    assert report.primary is not None
    assert (report.primary.code, report.primary.where) == (code, where)
    assert report.primary.fix and report.primary.cause
    assert sum(f.is_alarm for f in report.findings) == 1
    assert diagnose_run(made(**changes), ignore=[f.code for f in report.findings]).primary is None


HEALTHY: dict[str, dict[str, Any]] = {
    "it learns": {},
    "it learns in bfloat16, and rounds some away": {
        "rounded_away": after(0, 3, 0.97), "leaf_dtypes": ["bfloat16"] * LAYERS,
    },
    "a frozen layer": {"weight_gradient_rms": after(0, 2, 0.0, 1.0)},
    "a loss that stays where it is": {"loss": FLAT},
    "converged: nothing is left": {
        "loss": 0 * FLAT + 1e-4, "gradient_norm": 0 * FLAT + 1e-6,
        "update_rms": np.full((STEPS, LAYERS), 1e-8),
        "gradient_rms": np.full((STEPS, LAYERS), 1e-8), "clipped_norm": 0 * FLAT + 1e-6,
    },
    "warm-up from next to nothing": {
        "update_rms": np.tile(np.geomspace(1e-9, 1e-5, STEPS), (LAYERS, 1)).T,
        "update_norm": np.geomspace(1e-9, 1e-5, STEPS), "loss": FLAT,
    },
    "clipped by a little": {"clipped_norm": np.full(STEPS, 0.25)},
    "small gradients in a run that learns": {"gradient_rms": across(1e-9, 1e-2)},
    "a branch that starts at zero": {"activation_zero_share": after(0, 2, 1.0), "loss": FLAT},
    "biases that start at zero": {
        "update_rms": after(0, 1, 1.0, 1e-3), "leaf_ranks": [2, 1, 2, 1, 2, 1], "loss": FLAT + 0.1,
    },
    "half of all units are silent": {"activation_zero_share": np.full((STEPS, LAYERS), 0.5)},
    "Adafactor clips its own update": {"optimizer": CLIPPED | {"intentional": True}},
    "nothing but losses and flows": {
        **{name: np.full(STEPS, np.nan) for name in SCALARS if name not in ("loss", "nonfinite")},
    },
}  # fmt: skip


@pytest.mark.parametrize("run", HEALTHY)
def test_a_recorded_healthy_run_raises_no_alarm(run: str) -> None:
    report = diagnose_run(made(**HEALTHY[run]))
    assert report.primary is None
    assert not any(f.is_alarm for f in report.findings)


def test_what_a_stored_run_cannot_tell_is_said() -> None:
    full = diagnose_run(made(clipped_norm=np.full(STEPS, 0.4))).notes
    assert len(full) == 1 and "nothing was tried again" in full[0]
    bare = made(classes=None)
    for name in ("update_rms", "exponents", "rounded_away"):
        del bare.rows[name]
    del bare.facts["optimizer"]
    notes = " ".join(diagnose_run(bare).notes)
    for words in ("no updates", "no clipped norms", "no optimizer", "number of classes"):
        assert words in notes
    late = made(loss=FLAT, activation_rms=across(1, 1e-7))
    late.steps[:] += 500
    report = diagnose_run(late)
    assert report.primary is None
    assert any("begins at step 500" in note for note in report.notes)


def test_the_words_are_those_of_a_live_diagnosis() -> None:
    stored = diagnose_run(made(optimizer=CLIPPED)).to_dict()
    assert set(stored) == {"version", "verdict", "primary", "findings", "layers", "facts", "notes"}
    live = {"code", "severity", "stage", "where", "cause", "evidence", "fix", "confidence",
            "consequence_of", "may_be_wrong"}  # fmt: skip
    assert set(stored["primary"]) == live
    assert set(stored["layers"][0]) == {
        "name", "activation_rms", "gradient_rms", "zero_share", "weight_gradient_rms", "parameters",
    }  # fmt: skip
    assert json.loads(json.dumps(stored)) == stored


def test_an_empty_recording_is_refused() -> None:
    empty = made()
    nothing = {key: value[:0] for key, value in empty.curve.items()}
    with pytest.raises(ValueError, match="holds no step"):
        _ = diagnose_run(Recording(**{**vars(empty), "curve": nothing}))


def test_the_command_judges_a_run_folder_and_ends_with_its_status(tmp_path: Any, capsys) -> None:
    tx = optax.chain(optax.trace(0.9), optax.clip_by_global_norm(0.01), optax.scale(-0.1))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 4)), jnp.float32)

    def loss(params: Any, x: Any) -> Any:
        return jnp.square(jnp.tanh(x @ params["one"]) @ params["two"] - x[:, :1]).mean()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        (value, flow), grads = value_and_grad_flow(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, flow, updates

    params = {"one": 0.5 * jnp.eye(4), "two": jnp.ones((4, 1))}
    state = tx.init(params)
    with monitor.Recorder(tmp_path / "run", optimizer=tx) as record:
        for t in range(5):
            params, state, value, flow, updates = step(params, state)
            record(t, value, flow, params=params, updates=updates)
    with pytest.raises(SystemExit) as end:
        cli.main(["diagnose", str(tmp_path / "run")])
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith("error: optimizer.clip_after_update")
    saved = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert saved["verdict"] == said.splitlines()[0]
    page = (tmp_path / "run" / "diagnosis.html").read_text()
    assert page.count("<svg") >= 5 and "optimizer.clip_after_update" in page
    store.save_run(tmp_path / "other", {"kind": "else"})
    with pytest.raises(SystemExit) as end:
        cli.main(["diagnose", str(tmp_path / "other")])
    assert end.value.code == 2 and "holds no recording" in capsys.readouterr().err
