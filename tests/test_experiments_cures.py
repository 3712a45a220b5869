"""Cures: the switched net is the plain one, and who trains decides the verdicts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import cures
from experiments.atlas import running
from jaxgrad import theory

CONFIG = cures.EXPERIMENT.presets["tiny"]
JUDGES = {claim.key: claim.judge for claim in cures.CLAIMS}
ROWS, COLUMNS = list(cures.NETS), list(cures.CURES)


def matrix(**trained):
    """Accuracy by net and cure: the healthy net learns always, the others where they are told."""
    accuracy = np.full((2, len(ROWS), len(COLUMNS)), 0.1)
    accuracy[:, 0] = 0.9
    for cure, nets in trained.items():
        name = {"rate": "rate / 10"}.get(cure, cure)
        for net in nets:
            accuracy[:, ROWS.index(net), COLUMNS.index(name)] = 0.8
    return {"matrix": {"accuracy": accuracy}}


@pytest.mark.parametrize(
    ("key", "cure", "nets"),
    [
        ("skip", "skip", cures.VANISHING),
        ("layer_norm", "LayerNorm", cures.VANISHING),
        ("init", "init", cures.VANISHING),
        ("clip", "clip", cures.EXPLODING),
        ("rate / 10", "rate", cures.EXPLODING),
        ("Adam", "Adam", tuple(cures.FAILING)),
        ("together", "together", tuple(cures.FAILING)),
    ],
)
def test_a_cure_holds_for_the_nets_that_it_trains(key, cure, nets):
    def verdict(trained):
        return JUDGES[key](CONFIG, matrix(**{cure: trained}))

    assert verdict(nets).word == "holds" and verdict(()).word == "false"
    some = verdict(nets[:1])
    assert (some.word, some.condition) == ("holds if", nets[0])
    one_seed = matrix(**{cure: nets})
    one_seed["matrix"]["accuracy"][0, 1:] = 0.1
    assert JUDGES[key](CONFIG, one_seed).word == "false"


def test_nets_that_train_untreated_are_no_cases():
    net = cures.VANISHING[0]
    assert JUDGES["relu"](CONFIG, matrix(ReLU=[net])).word == "holds"
    verdict = JUDGES["relu"](CONFIG, matrix(ReLU=[net], none=[net]))
    assert verdict.word == "false" and "none of the nets fails" in verdict.measured


def test_a_panacea_trains_all_and_a_harmless_cure_leaves_accuracy():
    assert JUDGES["panacea"](CONFIG, matrix()).word == "false"
    verdict = JUDGES["panacea"](CONFIG, matrix(skip=cures.FAILING))
    assert (verdict.word, verdict.condition) == ("holds if", "skip")
    assert JUDGES["panacea"](CONFIG, matrix(**dict.fromkeys(cures.ALONE[:0]))).word == "false"
    assert JUDGES["harmless"](CONFIG, matrix()).word == "holds"
    data = matrix()
    data["matrix"]["accuracy"][:, 0, 2] = 0.8
    assert JUDGES["harmless"](CONFIG, data).word == "holds if"
    data["matrix"]["accuracy"][:, 0, 1:] = 0.8
    assert JUDGES["harmless"](CONFIG, data).word == "false"


def test_the_critical_weights_are_those_of_theory():
    for name, gain in zip(("relu", "sigmoid", "tanh"), cures.CRITICAL, strict=True):
        q = 1.0 if name == "relu" else float(theory.variance_fixed_point(name, gain, 0.0))
        assert float(theory.chi_1(name, max(q, 1e-8), gain)) == pytest.approx(1, rel=0.01)


def test_the_switched_net_is_the_plain_one():
    key, apply = jax.random.key(0), jax.jit(cures._apply)
    for index, phi in enumerate((jax.nn.relu, jax.nn.sigmoid, jnp.tanh)):
        s = cures.Setting(activation=index, gain=1.3, bias=0.1)
        params, x = cures._params(key, s, CONFIG), jax.random.normal(key, (3, 64))
        h = phi(x @ params["embed"]["kernel"] + 0.1)
        for kernel in params["blocks"]["kernel"]:
            h = phi(h @ kernel + 0.1)
        expected = h @ params["readout"]["kernel"]
        np.testing.assert_allclose(apply(params, x, s), expected, rtol=1e-5, atol=1e-6)
        skipped = apply(params, x, s._replace(skip=1.0))
        assert not np.allclose(skipped, expected)
        scaled = jax.tree.map(lambda a: a, params)
        scaled["blocks"] = {**params["blocks"], "kernel": 7 * params["blocks"]["kernel"]}
        scaled["blocks"]["bias"], params["blocks"]["bias"] = 2 * [0 * params["blocks"]["bias"]]
        normal = s._replace(norm=1)
        np.testing.assert_allclose(  # LayerNorm does not see the weights' scale
            apply(scaled, x, normal), apply(params, x, normal), rtol=1e-2, atol=1e-3
        )


def test_the_switched_rule_is_the_plain_one():
    params = {"w": jnp.arange(4.0)}
    grads = [{"w": jnp.array([1.0, -2.0, 3.0, 0.5]) * k} for k in (1, 2)]
    clipped = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))
    for s, plain in (
        (cures.Setting(rate=0.1), optax.sgd(0.1)),
        (cures.Setting(adam=1, rate=0.01), optax.adam(0.01)),
        (cures.Setting(clip=0.5, rate=0.1), clipped),
    ):
        rule = cures._rule(s)
        state, other = rule.init(params), plain.init(params)
        for g in grads:
            ours, state = rule.update(g, state, params)
            theirs, other = plain.update(g, other, params)
            np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-4)


@pytest.mark.slow
def test_the_tiny_run_traces_once_and_tampering_flips_its_verdicts(tmp_path):
    result = running.run(cures.EXPERIMENT, "tiny", tmp_path)
    assert result.traces == {"matrix": 1}
    accuracy = result.data["matrix"]["accuracy"]
    assert accuracy.shape == (2, len(ROWS), len(COLUMNS)) and np.all(accuracy <= 1)
    assert JUDGES["together"](result.config, result.data).word == "false"
    tampered = accuracy.copy()
    tampered[:, 1:, COLUMNS.index("together")] = 1
    data = {"matrix": {"accuracy": tampered}}
    assert JUDGES["together"](result.config, data).word == "holds"
    assert len(cures.figures(result.config, result.data)) == 1
