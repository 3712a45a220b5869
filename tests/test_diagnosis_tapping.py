"""Tensors measured inside the compiled program and on the host: the same figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.diagnosis import passes, tapping
from jaxgrad.diagnosis.evidence import Evidence
from jaxgrad.diagnosis.problem import make_problem, why_undifferentiable


def _weights(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s) / s[-2] ** 0.5 for k, s in zip(keys, shapes, strict=True)]


def _plain(params, batch):
    for w in params[:-1]:
        batch = jnp.tanh(batch @ w)
    return jnp.mean(jnp.square(jax.nn.relu(batch) @ params[-1]))


def _scanned(params, batch):
    def body(h, w):
        return jax.nn.sigmoid(h @ w), None

    h, _ = jax.lax.scan(body, batch, params)
    return jnp.mean(jnp.square(h))


def _branches(params, batch):
    a, b = params
    h = jax.lax.cond(
        jnp.sum(batch) > 1e9,
        lambda: jnp.tanh(batch @ a) @ a,
        lambda: jax.nn.relu(batch @ b) @ b,
    )
    return jnp.mean(jnp.square(h))


def _loop_in_branch(params, batch):
    def stages(h):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params[0])[0]

    h = jax.lax.cond(jnp.sum(batch) > 1e9, stages, lambda h: h * 2, batch)
    return jnp.mean(jnp.square(h @ params[1]))


def _half(params, batch):
    half = [p.astype(jnp.bfloat16) for p in params]
    return _plain(half, batch.astype(jnp.bfloat16)).astype(jnp.float32)


CASES = {
    "plain": (_plain, _weights((8, 16), (16, 16), (16, 4)), (32, 8)),
    "tokens": (_plain, _weights((8, 16), (16, 16), (16, 4)), (6, 5, 8)),
    "scanned": (_scanned, _weights((5, 8, 8))[0], (32, 8)),
    "branches": (_branches, _weights((8, 8), (8, 8)), (32, 8)),
    "loop in a branch": (_loop_in_branch, _weights((5, 8, 8), (8, 8)), (32, 8)),
    "bfloat16": (_half, _weights((8, 16), (16, 16), (16, 4)), (32, 8)),
    "huge": (_plain, [w * 1e25 for w in _weights((8, 16), (16, 4))], (32, 8)),
}


def _problem(loss, params, batch):
    return make_problem(loss, params, batch, batches=None, has_aux=False, key=None, trainable=None)


def _evidence(name):
    loss, params, shape = CASES[name]
    evidence = Evidence(_problem(loss, params, jnp.ones(shape) * 0.3), None, None)
    assert not why_undifferentiable(evidence.problem)
    return evidence


@pytest.mark.parametrize("name", CASES)
def test_what_is_measured_inside_and_on_the_host_is_the_same(name, monkeypatch):
    evidence = _evidence(name)
    problem, wiring = evidence.problem, evidence.wiring
    x = jax.random.normal(jax.random.key(1), problem.batch.shape)
    found = []
    for limit in (2**24, 0):
        monkeypatch.setattr(passes, "_MAX_CARRIED", limit)
        instrument = passes.Instrument(problem, wiring, evidence.structure)
        assert instrument.outside == (limit > 0)
        found.append(instrument.measure(problem.values, x))
    outside, inside = found
    loose = 1e-2 if name == "bfloat16" else 2e-4  # what is fused decides where bfloat16 rounds
    assert outside.names == inside.names
    assert outside.value == pytest.approx(inside.value, nan_ok=True)
    for key in (*tapping.FORWARD, *tapping.BACKWARD):
        a, b = outside.rows[key], inside.rows[key]
        size = np.nanmax(np.abs(outside.rows["rms"]), initial=0) if key == "mean" else 0.0
        np.testing.assert_allclose(a, b, rtol=loose, atol=1e-6 * size, err_msg=key)
    for value, tensor in outside.tensors.items():
        other = inside.tensors[value]
        for a, b in (
            (tensor.units, other.units),
            (tensor.unit_gradients, other.unit_gradients),
        ):
            finite = np.isfinite(b)  # inside, the square of a huge deviation overflows
            size = np.max(np.abs(b), initial=0, where=finite)
            np.testing.assert_allclose(
                a[finite], b[finite], rtol=10 * loose, atol=0.1 * loose * size
            )


def test_gradients_are_those_of_the_loss_itself(monkeypatch):
    evidence = _evidence("plain")
    exact = jax.grad(CASES["plain"][0])(CASES["plain"][1], evidence.problem.batch)
    for measured in (evidence.initial, evidence.instrument.measure(evidence.problem.values)):
        for a, b in zip(measured.grads, exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_statistics_of_a_tensor_are_those_that_numpy_says():
    x = np.random.default_rng(0).standard_normal((3, 40, 6)).astype(np.float32)
    x[:, :, 0] = 0.0
    record = {"tensor": x, "seen": np.asarray([True, True, False])}
    tensor = tapping.of_tensors(record, {"tensor": x * 1e-30}, -1, 6)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(tensor.row["rms"][:2], np.sqrt((wide[:2] ** 2).mean((1, 2))))
    np.testing.assert_allclose(
        tensor.row["gradient_rms"][:2], 1e-30 * np.sqrt((wide[:2] ** 2).mean((1, 2))), rtol=1e-6
    )
    np.testing.assert_allclose(tensor.row["zero_share"][:2], 1 / 6, rtol=1e-6)
    varied = ((wide - wide.mean(1, keepdims=True)) ** 2).mean((1, 2)) / (wide**2).mean((1, 2))
    np.testing.assert_allclose(tensor.row["example_share"][:2], varied[:2], rtol=1e-5)
    low = dict(zip(tapping.UNITS, np.moveaxis(tensor.units, 1, 0), strict=True))
    np.testing.assert_allclose(low["low"][:2], wide.min(1)[:2])
    np.testing.assert_allclose(low["std"][:2], wide.std(1)[:2], rtol=1e-5)
    assert not tensor.row["rms"][2]
    assert not tensor.units[2].any()
