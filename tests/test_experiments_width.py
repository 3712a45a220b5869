"""Width: slopes and best rates are read right, and verdicts follow the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import width
from experiments.atlas import running, scaled

CONFIG = width.EXPERIMENT.presets["quick"]
TINY = width.EXPERIMENT.presets["tiny"]
JUDGES = {claim.key: claim.judge for claim in width.CLAIMS}
WHATS = ("output", "output_change", "hidden_change", *(k for k in width.PREDICTED if "_" in k))


def steps(**slopes):
    """Root mean squares that are powers of the width: {what: (standard, muP)}."""
    jitter = 1 + 1e-4 * np.arange(3)[:, None]
    found = dict.fromkeys(WHATS, (0.0, 0.0)) | width.PREDICTED | slopes
    sizes = np.asarray(CONFIG.wide, float)[:, None]
    return {"step": {w: jitter[..., None] * sizes ** np.asarray(e) for w, e in found.items()}}


def losses(*shifts, better=0.1):
    """Parabolas of ln loss whose lowest point moves by some octaves a width octave."""
    rates, found = np.asarray(CONFIG.rates), {}
    for n in CONFIG.widths:
        octaves = np.log2(n / CONFIG.widths[0])
        rows = [0.05 * (rates + 8 - s * octaves) ** 2 - better * octaves - 1 for s in shifts]
        found[f"train-{n}"] = {"loss": np.exp(np.stack([rows, rows, rows]))}
        found[f"train-{n}"]["loss"] *= 1 + 1e-4 * np.arange(3)[:, None, None]
    return found


def test_slopes_and_best_rates_are_read_from_powers_and_parabolas():
    np.testing.assert_allclose(
        width.slopes(CONFIG, steps(output_change=(1.1, 0.2)), "output_change", 0), 1.1, atol=1e-12
    )
    best = width.best_rates(CONFIG, losses(-0.5, 0.25), 0)
    np.testing.assert_allclose(best, np.tile([-8, -9, -10.0], (3, 1)), atol=1e-9)
    flat = losses(0.0, 0.0)
    flat[f"train-{CONFIG.widths[0]}"]["loss"][:] = np.nan
    assert np.all(np.isfinite(width.best_rates(CONFIG, flat, 0)))


@pytest.mark.parametrize(
    ("key", "yes", "some", "no"),
    [
        ("transfer", losses(0.1, 0.1), losses(-1, 0.1), losses(-1, 1)),
        (
            "step", steps(), steps(output_change=(1.0, 0.0)), steps(hidden_change=(0.8, -0.8)),
        ),
        (
            "gradient", steps(), steps(output=(-0.5, -0.5)),
            steps(**dict.fromkeys(width.PREDICTED, (0.7, 0.7))),
        ),
        ("wider", losses(0, 0), losses(-1, 0), losses(0, 0, better=-0.1)),
    ],
)  # fmt: skip
def test_the_verdicts_take_every_word(key, yes, some, no):
    words = [JUDGES[key](CONFIG, found).word for found in (yes, some, no)]
    assert words == ["holds", "holds if", "false"]
    if key != "gradient":
        assert JUDGES[key](CONFIG, some).condition == "muP"


def test_both_parametrizations_are_one_net_at_the_base_width_and_muP_falls_as_it_should():
    at_base = scaled.parametrizations(CONFIG.base, CONFIG.base)
    assert all(np.all(np.asarray(factor) == 1) for factor in at_base)
    wide = scaled.parametrizations(4 * CONFIG.base, CONFIG.base)
    np.testing.assert_allclose(wide, [[1, 0.5], [1, 0.25], [1, 0.25]])


def test_the_rule_gives_each_kind_of_layer_its_rate():
    way = scaled.Parametrization(1.0, 0.25, 0.5)
    params = {"embed": jnp.ones(2), "hidden": jnp.ones(2), "readout": jnp.ones(2)}
    rule = scaled.adam(0.1, way)
    updates, _ = rule.update(jax.tree.map(lambda p: 3 * p, params), rule.init(params), params)
    for name, factor in (("embed", 1.0), ("hidden", 0.25), ("readout", 0.5)):
        np.testing.assert_allclose(updates[name], -0.1 * factor, rtol=1e-4)


def test_a_masked_net_is_the_smaller_net():
    way = scaled.Parametrization(1.0, 1.0, 1.0)
    params = scaled.init(jax.random.key(0), 9, jnp.asarray(5.0), 2, way)
    x = jax.random.normal(jax.random.key(1), (3, 64))
    z = x @ params["embed"][:, :5]
    for kernel in params["hidden"]:
        z = jnp.tanh(z) @ kernel[:5, :5]
    logits, last = scaled.forward(params, x, 5)
    np.testing.assert_allclose(logits, jnp.tanh(z) @ params["readout"][:5], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last[:, :5], z, rtol=1e-4, atol=1e-5)
    assert np.all(last[:, 5:] == 0)


@pytest.mark.slow
def test_the_tiny_run_traces_once_a_point_and_tampering_flips_its_verdicts(tmp_path):
    result = running.run(width.EXPERIMENT, "tiny", tmp_path)
    assert set(result.traces.values()) == {1}
    for way, change, output in ((0, 1.0, 0.0), (1, 0.0, -0.5)):
        mean = width.slopes(TINY, result.data, "output_change", way).mean()
        assert mean == pytest.approx(change, abs=0.5)
        assert width.slopes(TINY, result.data, "output", way).mean() == pytest.approx(
            output, abs=0.35
        )
    data = {name: dict(arrays) for name, arrays in result.data.items()}
    before = JUDGES["step"](TINY, data).word
    data["step"] |= dict.fromkeys(("output_change", "hidden_change"), np.ones((2, 3, 2)))
    assert before != "holds" and JUDGES["step"](TINY, data).word == "holds"
    assert len(width.figures(TINY, result.data)) == 2
