"""Is the end-to-end gradient the product of the layers' Jacobians, and what follows from it?"""

from typing import Any

import numpy as np

from experiments.atlas import drawing, frame
from experiments.chain_rule_nets import CELLS, Config, points


def judge_product(config: Config, data: frame.Data) -> frame.Verdict:
    """By architecture: the two agree to the tolerance for every seed."""
    good, words = {}, []
    for name in config.architectures:
        arrays = data[f"chain-{name}"]
        error = float(np.max(arrays["error"]))
        good[name] = error < config.tolerance
        words.append(f"{name} {error:.0e} ({int(arrays['layers'][0])} layers)")
    return frame.conclude(good, "largest relative difference: " + "; ".join(words))


def judge_norms(config: Config, data: frame.Data) -> frame.Verdict:
    """By architecture: the product of the layers' norms is that of the whole, to 10 %."""
    good, words, divergence = {}, [], 0.0
    for name in config.architectures:
        arrays = data[f"chain-{name}"]
        excess = np.asarray(arrays["log_norms"]) - np.asarray(arrays["log_norm"])
        good[name] = bool(np.all(np.abs(excess) < 0.1))
        words.append(f"{name} x {np.exp(excess.mean()):.3g}")
        divergence = max(divergence, float(np.max(np.abs(excess))))
    measured = "product of spectral norms over the norm of the product: " + "; ".join(words)
    return frame.conclude(good, measured, divergence=divergence)


def judge_hidden(config: Config, data: frame.Data) -> frame.Verdict:
    """By cell: the product is dh_T / dh_0 to a thousandth, in every seed."""
    errors = np.asarray(data["hidden"]["error"], np.float64)
    good, words = {}, []
    for k, cell in enumerate(CELLS):
        mean, low, high = frame.interval(errors[:, k])
        good[cell] = bool(np.max(errors[:, k]) < 1e-3)
        words.append(f"{cell} {mean:.1e} [{low:.1e}, {high:.1e}]")
    measured = f"relative difference over {config.steps} steps: " + "; ".join(words)
    return frame.conclude(good, measured)


def judge_backward(config: Config, data: frame.Data) -> frame.Verdict:
    """By activation: the formula is the gradient to ten times the tolerance."""
    errors = np.max(np.asarray(data["weights"]["formula"]), 0)
    good = {
        a: bool(e < 10 * config.tolerance) for a, e in zip(config.activations, errors, strict=True)
    }
    words = [f"{a} {e:.0e}" for a, e in zip(config.activations, errors, strict=True)]
    return frame.conclude(good, "largest relative difference: " + "; ".join(words))


def judge_weights(config: Config, data: frame.Data) -> frame.Verdict:
    """By activation: first over last weight gradient is the gain, to a factor of three."""
    ratio, gain = (np.asarray(data["weights"][k], np.float64) for k in ("ratio", "gain"))
    good, words, divergence = {}, [], 0.0
    for k, a in enumerate(config.activations):
        mean, low, high = frame.interval(ratio[:, k])
        law = gain[:, k].mean()
        good[a] = bool(abs(mean - law) < np.log(3))
        words.append(
            f"{a} {np.exp(mean):.2g} [{np.exp(low):.2g}, {np.exp(high):.2g}], gain "
            f"{np.exp(law):.2g}"
        )
        divergence = max(divergence, abs(float(mean - law)))
    measured = f"{config.stack_depth} layers: " + "; ".join(words)
    return frame.conclude(good, measured, divergence=divergence)


def figures(config: Config, data: frame.Data) -> list[Any]:
    figure, (left, right) = drawing.panels(2, width=10.4, height=3.6)
    excess = [
        (np.asarray(a["log_norms"]) - np.asarray(a["log_norm"])) / np.log(10)
        for a in (data[f"chain-{name}"] for name in config.architectures)
    ]
    rows = np.arange(len(config.architectures))
    left.barh(rows, [e.mean() for e in excess], color=drawing.COLORS[0])
    left.set_yticks(rows, config.architectures)
    left.invert_yaxis()
    title = "Product of the layers' norms over the true norm"
    drawing.words(left, title, "log10", "", legend=False)
    at = np.arange(len(config.activations))
    for k, (key, label) in enumerate(
        (("gain", "gain of the Jacobians"), ("ratio", "first over last weight gradient"))
    ):
        values = np.asarray(data["weights"][key], np.float64) / np.log(10)
        drawing.dots(right, k, at, values, label)
    right.set_xticks(at, config.activations)
    title = f"Weights of {config.stack_depth} Xavier layers"
    drawing.words(right, title, "", "log10")
    return [figure]


CLAIMS = (
    frame.Claim(
        key="product",
        statement="The gradient is the product of the layers' Jacobians, whatever the network.",
        predicted="J = J_L ... J_1, equal to float32 rounding",
        judge=judge_product,
        intuition="A network is a chain wherever its dataflow narrows to one tensor; a residual "
        "block is one layer of it.",
    ),
    frame.Claim(
        key="backward",
        statement="Multiply the output's gradient back through every layer to reach a weight.",
        predicted="dL/dW_1 = x (phi'(z_1) * J_2^T ... J_L^T g)^T",
        judge=judge_backward,
        intuition="A weight's gradient has two factors: what comes back, and what went in.",
    ),
    frame.Claim(
        key="weights",
        statement="dL/dW_1 is the product of the Jacobians times dL/dW_L.",
        predicted="|dL/dW_1| / |dL/dW_L| = the gain from the last layer to the first",
        judge=judge_weights,
        intuition="In ReLU networks without biases activations fade as gradients do, and all "
        "layers' weights get the same, tiny gradient: comparing layers hides the fault.",
    ),
    frame.Claim(
        key="norms",
        statement="The gradient's gain is the product of the layers' gains.",
        predicted="|J_L ... J_1| = |J_L| ... |J_1| (spectral norms)",
        judge=judge_norms,
        intuition="It is an upper bound only: layers rarely stretch the same direction.",
    ),
    frame.Claim(
        key="hidden",
        statement="Through time the gradient is the product of dh_t / dh_(t-1).",
        predicted="dh_T / dh_0 = product over t (Pascanu et al. 2013, equation 5)",
        judge=judge_hidden,
        intuition="An LSTM's gradient runs beside its hidden state, through the cell: that is "
        "what the cell is for.",
    ),
)

EXPERIMENT = frame.Experiment(
    name="chain_rule",
    question="Is the gradient the product of the layers' Jacobians, and what follows from it?",
    claims=CLAIMS,
    presets={
        "tiny": Config(
            architectures=("MLP", "LSTM"), depth=3, steps=10, activations=("sigmoid", "relu"),
            stack_width=32, stacks=4,
        ),
        "quick": Config(),
        "full": Config(width=16, depth=12, seeds=8, stack_width=256, stacks=64),
    },
    points=points,
    figures=figures,
)  # fmt: skip
