"""Accumulation: verdicts follow the data, and the loop's faults are what they are called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from atlas_cases import measured, spread, tampered, verdict, words

from experiments import accumulation, accumulation_nets

EXPERIMENT = accumulation.EXPERIMENT
TINY = EXPERIMENT.presets["tiny"]


@pytest.fixture
def ideal():
    """Data for which every statement holds."""
    seeds, counts = 3, len(TINY.counts)
    return {
        "equal": {"distance": np.full((seeds, 3, counts), 1e-7)},
        "erased": {
            "variance_ratio": spread(TINY.counts, seeds, 0.1),
            "bare": np.zeros((seeds, counts)),
            "divided": np.zeros((seeds, counts)),
        },
        "summed": {"distance": np.tile([1e-6, 0.5], (seeds, 4, 1))},
        "uneven": {
            "equal": np.full(seeds, 1e-7),
            "uneven": spread(0, seeds, 1e-7),
            "weighted": np.full(seeds, 1e-7),
            "spread": np.full(seeds, 0.5),
        },
        "memory": {
            "bytes": np.array([[100, 190, 400], [100, 190, 800]]),
            "parameters": np.array(50),
        },
    }


def test_data_that_are_as_stated_hold(ideal):
    assert set(words(EXPERIMENT, TINY, ideal).values()) == {"holds"}


@pytest.mark.parametrize(
    ("key", "point", "name", "change", "word"),
    [
        ("equal", "equal", "distance", lambda a: a + np.c_[[0, 0, 0.1]], "holds if"),
        ("equal", "equal", "distance", lambda a: a + 0.1, "false"),
        ("erased", "erased", "divided", lambda a: a + 0.5, "holds if"),
        ("noise", "erased", "variance_ratio", lambda a: a / a.mean(0), "false"),
        ("noise", "erased", "variance_ratio", lambda a: a * [1, 2], "holds if"),
        ("summed", "summed", "distance", lambda a: a[..., ::-1], "false"),
        ("summed", "summed", "distance", lambda a: a + np.c_[[0, 0, 0, 1]], "holds if"),
        ("uneven", "uneven", "uneven", lambda a: a + 0.1, "holds if"),
        ("weighted", "uneven", "weighted", lambda a: a + 0.1, "false"),
        ("memory", "memory", "bytes", lambda a: a * [1, 3, 1], "false"),
        ("memory", "memory", "bytes", lambda a: a * [[1, 1, 1], [1, 3, 1]], "holds if"),
    ],
)
def test_a_verdict_follows_its_data(ideal, key, point, name, change, word):
    found = verdict(EXPERIMENT, key, TINY, tampered(ideal, point, name, change))
    assert found.word == word, found.measured


def test_claims_of_two_cases_can_be_false(ideal):
    other = tampered(ideal, "uneven", "uneven", lambda a: a + 0.1)
    other = tampered(other, "uneven", "equal", lambda a: a + 0.1)
    assert verdict(EXPERIMENT, "uneven", TINY, other).word == "false"
    other = tampered(ideal, "erased", "bare", lambda a: a + 0.5)
    other = tampered(other, "erased", "divided", lambda a: a + 0.5)
    assert verdict(EXPERIMENT, "erased", TINY, other).word == "false"


def test_the_loop_of_a_script_is_the_mean_unless_it_erases():
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=s).astype(np.float32) for s in ((4, 3, 2), 2))

    def loss(params, micro):
        return jnp.mean((micro @ params["w"]) ** 2)

    params = {"w": jnp.asarray(w)}
    each = np.stack([2 * np.mean((m @ w)[:, None] * m, 0) for m in x.astype(np.float64)])
    looped = jax.jit(accumulation_nets.looped, static_argnums=(0, 3, 4))
    cases = {(False, True): each.mean(0), (False, False): each.sum(0), (True, False): each[-1],
             (True, True): each[-1] / 4}  # fmt: skip
    for how, expected in cases.items():
        found = looped(loss, params, jnp.asarray(x), *how)["w"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0)
    found = accumulation_nets.accumulated(loss, params, jnp.asarray(x))["w"]
    np.testing.assert_allclose(found, each.mean(0), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_tiny_runs_are_as_the_library_promises(tmp_path):
    result = measured(EXPERIMENT, tmp_path)
    assert max(result.traces.values()) == 1
    found = words(EXPERIMENT, TINY, result.data)
    assert found["weighted"] == "holds" and found["noise"] == "holds"
    assert verdict(EXPERIMENT, "equal", TINY, result.data).condition.startswith("no norm")
    assert verdict(EXPERIMENT, "summed", TINY, result.data).condition == "SGD, momentum"
    assert found["uneven"] == found["erased"] == "holds if"
    other = tampered(result.data, "uneven", "weighted", lambda a: a + 1e-3)
    assert verdict(EXPERIMENT, "weighted", TINY, other).word == "false"
