"""The recorder: bounded, killed and resumed, the same from inside a jitted loop and outside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrad import monitor, store
from jaxgrad.diagnosis import diagnose_run
from jaxgrad.flow import value_and_grad_flow
from jaxgrad.monitor.recording import Curve, Snapshots
from jaxgrad.monitor.summary import EXPONENTS, SCALARS, exponents, rounded_away

TX = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))
X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)), jnp.float32)
PARAMS = {"a": 0.5 * jnp.eye(4), "b": jnp.ones((4, 1))}


def loss(params, x):
    return jnp.square(jnp.tanh(x @ params["a"]) @ params["b"] - 1).mean()


@jax.jit
def step(params, state):
    (value, flow), grads = value_and_grad_flow(loss)(params, X)
    updates, state = WATCHED.update(grads, state, params)
    return optax.apply_updates(params, updates), state, (value, flow, updates, grads)


WATCHED = monitor.watch(TX)


def recorded(folder, steps=6, **options):
    params, state = PARAMS, WATCHED.init(PARAMS)
    with monitor.Recorder(folder, optimizer=TX, **options) as record:
        for t in range(steps):
            before = params
            params, state, (value, flow, updates, grads) = step(params, state)
            record(t, value, flow, params=before, updates=updates, grads=grads, state=state)
    return monitor.load_recording(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("recorder") / "run")


def test_every_step_of_a_short_run_is_kept_with_its_numbers(run):
    np.testing.assert_array_equal(run.steps, np.arange(6))
    assert run.exact and run.names == ("a", "b") and run.parameter_names == ("a", "b")
    params, state = PARAMS, WATCHED.init(PARAMS)
    for t in range(6):
        params, state, (value, flow, updates, grads) = step(params, state)
        wanted = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
        np.testing.assert_allclose(run.mean["gradient_norm"][t], wanted, rtol=1e-6, atol=0)
        np.testing.assert_allclose(run.mean["clipped_norm"][t], min(wanted, 0.5), rtol=1e-6, atol=0)
        np.testing.assert_allclose(run.mean["loss"][t], value, rtol=1e-6, atol=0)
        np.testing.assert_allclose(run.rows["gradient_rms"][t], flow.gradient_rms, atol=0)
        rms = [np.sqrt(np.mean(np.square(updates[n], dtype=np.float64))) for n in ("a", "b")]
        np.testing.assert_allclose(run.rows["update_rms"][t], rms, rtol=1e-6, atol=0)
        np.testing.assert_allclose(run.mean["alignment"][t], 1.0, rtol=1e-6)
    assert run.facts["leaf_sizes"] == [16, 4] and run.facts["leaf_ranks"] == [2, 2]
    assert run.facts["leaf_dtypes"] == ["float32"] * 2
    assert run.facts["optimizer"]["clip_order"] == "stateless"


def test_trees_that_do_not_match_the_flow_are_left_out_and_said(tmp_path):
    value, flow, updates, grads = step(PARAMS, WATCHED.init(PARAMS))[2]
    with monitor.Recorder(tmp_path / "run") as record:
        record(0, value, flow, updates={"a": updates["a"], "b": None}, grads=grads)
    run = monitor.load_recording(tmp_path / "run")
    assert run.facts["unmatched_updates"] == "1 leaves beside 2 of the flow"
    assert "update_rms" not in run.rows and np.isfinite(run.mean["update_norm"]).all()
    assert any("updates that were recorded do not match" in n for n in diagnose_run(run).notes)


def test_recording_inside_a_jitted_scan_gives_what_a_loop_gives(run, tmp_path):
    with monitor.Recorder(tmp_path / "scan", optimizer=TX) as record:

        @jax.jit
        def train(params):
            def body(carry, t):
                params, state = carry
                (value, flow), grads = value_and_grad_flow(loss)(params, X)
                updates, state = WATCHED.update(grads, state, params)
                record(t, value, flow, params=params, updates=updates, grads=grads, state=state)
                return (optax.apply_updates(params, updates), state), (value, flow)

            return jax.lax.scan(body, (params, WATCHED.init(params)), jnp.arange(6))

        _, (values, flows) = jax.block_until_ready(train(PARAMS))
        jax.effects_barrier()
    inside = monitor.load_recording(tmp_path / "scan")
    assert inside.facts == run.facts
    for name in SCALARS:
        np.testing.assert_allclose(inside.mean[name], run.mean[name], rtol=1e-5)
    for name, rows in run.rows.items():
        np.testing.assert_allclose(inside.rows[name], rows, rtol=1e-5, atol=1e-7)
    with monitor.Recorder(tmp_path / "stacked") as record:
        record(0, values, flows)
    stacked = monitor.load_recording(tmp_path / "stacked")
    np.testing.assert_allclose(stacked.mean["loss"], run.mean["loss"], rtol=1e-5)
    np.testing.assert_allclose(stacked.rows["gradient_rms"], run.rows["gradient_rms"], rtol=1e-5)
    assert np.isnan(stacked.mean["update_norm"]).all() and "update_rms" not in stacked.rows


def test_a_curve_is_bounded_and_keeps_a_spike_of_one_step():
    curve = Curve(16)
    values = np.zeros((5000, len(SCALARS)))
    values[3210, 0] = 77.0
    for t, row in enumerate(values):
        curve.add(t, list(row))
    data = curve.to_dict()
    assert len(data["count"]) <= 17 and data["count"].sum() == 5000
    assert data["first"][0] == 0 and data["last"][-1] == 4999
    assert (data["first"][1:] == data["last"][:-1] + 1).all()
    where = int(np.argmax(data["high"][:, 0]))
    assert data["high"][where, 0] == 77 and data["first"][where] <= 3210 <= data["last"][where]
    np.testing.assert_allclose((data["mean"][:, 0] * data["count"]).sum(), 77.0, rtol=1e-12)
    again = Curve(16)
    again.restore(data)
    for t in range(5000, 5100):
        again.add(t, [1.0] * len(SCALARS))
    assert again.to_dict()["count"].sum() == 5100


def test_snapshots_are_bounded_and_keep_both_ends_and_the_break():
    kept = Snapshots(8)
    for t in range(1000):
        kept.add(t, {"x": np.asarray([t])}, broken=t >= 777)
    table = kept.table()
    assert len(table) <= 8 + 3
    assert {0, 776, 777, 999} <= set(table)
    assert all(row["x"][0] == t for t, row in table.items())
    steps = [t for t in table if t not in (776, 777, 999)]
    assert len(set(np.diff(steps))) == 1


def test_the_folder_of_a_long_run_does_not_grow(tmp_path):
    sizes = []
    flow = step(PARAMS, WATCHED.init(PARAMS))[2][1]
    with monitor.Recorder(tmp_path / "run", snapshots=8, points=16, seconds=1e9) as record:
        for t in range(4096):
            record(t, np.float32(np.sin(t)), flow)
            if t in (511, 4095):
                sizes.append(sum(f.stat().st_size for f in record.save().iterdir()))
    assert sizes[1] < 1.5 * sizes[0]


def test_a_run_is_continued_or_refused_never_overwritten_in_silence(tmp_path):
    first = recorded(tmp_path / "run", 4)
    with pytest.raises(FileExistsError, match="resume=True"):
        _ = monitor.Recorder(tmp_path / "run")
    flow = step(PARAMS, WATCHED.init(PARAMS))[2][1]
    with monitor.Recorder(tmp_path / "run", resume=True) as record:
        with pytest.raises(ValueError, match="step 3 comes after step 3"):
            record(3, jnp.float32(1), flow)
        record(4, jnp.float32(9.0), flow)
    both = monitor.load_recording(tmp_path / "run")
    np.testing.assert_array_equal(both.steps, np.arange(5))
    np.testing.assert_array_equal(both.mean["loss"][:4], first.mean["loss"])
    assert both.mean["loss"][4] == 9 and both.facts == first.facts
    other = jax.jit(value_and_grad_flow(lambda p, x: jnp.mean(x @ p["c"])))
    (_, foreign), _ = other({"c": PARAMS["a"]}, X)
    with pytest.raises(ValueError, match="names are not those"):
        monitor.Recorder(tmp_path / "run", resume=True)(9, jnp.float32(0), foreign)
    store.save_run(tmp_path / "other", {"kind": "else"})
    with pytest.raises(store.StoreError, match="holds no recording"):
        _ = monitor.load_recording(tmp_path / "other")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_exponents_are_counted_at_every_scale_subnormals_and_zeros_included(dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(3000) * 2.0 ** rng.integers(-160, 140, 3000)
    with np.errstate(over="ignore"):
        x = jnp.asarray(x.astype(np.float32)).astype(dtype)
    wide = np.abs(np.asarray(x).astype(np.float64))
    counted = np.asarray(jax.jit(lambda leaf: exponents([leaf]))(x))
    finite = wide[np.isfinite(wide)]
    powers = np.floor(np.log2(finite[finite > 0])).astype(int)
    wanted = np.bincount(powers - EXPONENTS.start, minlength=len(EXPONENTS))
    np.testing.assert_array_equal(counted[:-1], wanted)
    assert counted[-1] == (finite == 0).sum() > 0
    many = np.asarray(exponents([jnp.ones((300, 100))]))
    np.testing.assert_allclose(many[-EXPONENTS.start], 30_000, rtol=1e-6)


def test_updates_that_round_away_are_counted():
    value = jnp.ones(4, jnp.bfloat16)
    update = jnp.asarray([0.0, 2.0**-10, 2.0**-6, -(2.0**-10)], jnp.float32)
    np.testing.assert_allclose(rounded_away([value], [update]), [2 / 3], rtol=1e-6)
    np.testing.assert_array_equal(rounded_away([value.astype(jnp.float32)], [update]), [0.0])


CHILD = """
import sys, jax.numpy as jnp, jax
from jaxgrad import monitor
from jaxgrad.flow import value_and_grad_flow
(_, flow), _ = jax.jit(value_and_grad_flow(lambda p, x: jnp.mean(x @ p)))(jnp.eye(3), jnp.eye(3))
record = monitor.Recorder(sys.argv[1], seconds=0.0)
for t in range(10**9):
    record(t, jnp.float32(t), flow)
    if t == 50:
        print("going", flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_can_be_read_and_continued(tmp_path):
    root = Path(__file__).parent.parent
    for _ in range(3):
        folder = tmp_path / "run"
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, cwd=root,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert child.stdout is not None and child.stdout.readline() == b"going\n"
        time.sleep(0.3)
        child.send_signal(signal.SIGKILL)
        _ = child.wait()
        child.stdout.close()
        run = monitor.load_recording(folder)
        assert run.curve["last"][-1] >= 0
        np.testing.assert_array_equal(run.mean["loss"], run.curve["first"].astype(float))
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
