"""The edge of chaos: theory's own numbers hold, tampered ones do not, real tiny nets agree."""

import numpy as np
import pytest
from atlas_cases import measured, spread, tampered, verdict, words

from experiments import edge_of_chaos, edge_of_chaos_nets
from jaxgrad import theory

EXPERIMENT = edge_of_chaos.EXPERIMENT
TINY = EXPERIMENT.presets["tiny"]


@pytest.fixture(scope="module")
def ideal():
    """Data that are exactly what the statements say."""
    sigma_w, sigma_b = (a.ravel() for a in edge_of_chaos_nets.cells(TINY))
    field = theory.mean_field("tanh", sigma_w, sigma_b)
    law, fall = (
        theory.log_gain_of("tanh", field.q, sigma_w, TINY.width, n)
        for n in (TINY.depth, edge_of_chaos_nets.SPAN)
    )
    limit = edge_of_chaos.limits(TINY)
    kinds = len(edge_of_chaos_nets.kinds(TINY))
    data = {
        "plane": {
            "q": spread(field.q, 4, 1e-6),
            "log_gain": spread(np.asarray(law.mean), 4),
            "log_apart": spread(np.stack([0 * fall.mean, fall.mean], -1), 4, 0),
            "c": np.minimum(spread(field.c, 4), 1),
        },
        "spectra": {
            "spread": spread(edge_of_chaos.predicted_spreads(TINY), 3, 0),
            "largest": spread(np.ones((kinds, 2)), 3),
            "values": np.ones((3, kinds, 2, 24)),
        },
    }
    for depth in TINY.depths:
        accuracy = np.where(depth < np.append(limit, np.inf), 0.9, 0.1)
        data[f"depth={depth}"] = {
            "accuracy": spread(accuracy, 2),
            "loss": spread(np.append(np.full(len(limit), 0.4), 0.2), 2),
        }
    return data


def test_numbers_that_are_the_theorys_hold(ideal):
    assert set(words(EXPERIMENT, TINY, ideal).values()) == {"holds"}


@pytest.mark.parametrize(
    ("key", "point", "name", "change", "word"),
    [
        ("mean_field", "plane", "log_gain", lambda a: a + 50, "false"),
        ("mean_field", "plane", "q", lambda a: a * [1, 1, 1, 2], "holds if"),
        ("critical_line", "plane", "log_gain", lambda a: a - 5, "false"),
        ("correlation", "plane", "log_apart", lambda a: 2 * a, "holds if"),
        ("correlation", "plane", "c", lambda a: a - 0.2, "holds if"),
        ("isometry", "spectra", "largest", lambda a: a + 1, "false"),
        ("isometry", "spectra", "largest", lambda a: a + np.c_[[0, 0, 1, 1]], "holds if"),
        ("free_probability", "spectra", "spread", lambda a: 1.2 * a + 0.02, "false"),
        ("free_probability", "spectra", "spread", lambda a: a * [1.2, 1], "holds if"),
    ],
)
def test_numbers_that_are_not_the_theorys_do_not(ideal, key, point, name, change, word):
    found = verdict(EXPERIMENT, key, TINY, tampered(ideal, point, name, change))
    assert found.word == word, found.measured


def test_both_halves_of_the_correlation_claim_can_be_false(ideal):
    other = tampered(ideal, "plane", "log_apart", lambda a: 2 * a)
    other = tampered(other, "plane", "c", lambda a: a - 0.2)
    assert verdict(EXPERIMENT, "correlation", TINY, other).word == "false"


def test_the_rule_of_six_is_judged_by_phase(ideal):
    def swapped(data, columns):
        for depth in TINY.depths:
            data = tampered(
                data, f"depth={depth}", "accuracy", lambda a: np.where(columns, 1 - a, a)
            )
        return verdict(EXPERIMENT, "six_xi", TINY, data)

    # columns: ordered, critical, orthogonal; no column of the tiny preset is chaotic
    assert swapped(ideal, [False, False, True]).word == "holds"
    assert swapped(ideal, [True, False, False]).condition == "critical line"
    assert swapped(ideal, [True, True, False]).word == "false"


def test_orthogonal_weights_are_faster_only_where_all_seeds_say_so(ideal):
    reverse = tampered(ideal, "depth=4", "loss", lambda a: a[:, ::-1])
    assert verdict(EXPERIMENT, "orthogonal_faster", TINY, reverse).condition == "depth 40"
    reverse = tampered(reverse, "depth=40", "loss", lambda a: a[:, ::-1])
    assert verdict(EXPERIMENT, "orthogonal_faster", TINY, reverse).word == "false"


@pytest.mark.slow
def test_tiny_nets_agree_with_the_theory_and_tampering_shows(tmp_path):
    result = measured(EXPERIMENT, tmp_path)
    assert max(result.traces.values()) == 1
    gain, size = edge_of_chaos.deviations(TINY, result.data)
    assert max(np.abs(gain).max(), np.abs(size).max()) < 4
    found = words(EXPERIMENT, TINY, result.data)
    assert found["mean_field"] == "holds" and found["isometry"] == "holds if"
    other = tampered(result.data, "plane", "log_gain", lambda a: a + TINY.depth * 0.5)
    assert verdict(EXPERIMENT, "mean_field", TINY, other).word != "holds"
    # the linear net's Gaussian spread is known exactly at this width
    exact = theory.second_moment_at_width(TINY.spectrum_width, TINY.spectrum_depth) - 1
    linear = result.data["spectra"]["spread"][:, 0, 0]
    assert abs(linear.mean() / float(exact) - 1) < 0.25
    np.testing.assert_allclose(result.data["spectra"]["largest"][:, 0, 1], 1, atol=1e-5)
