"""What does layer normalization make insensitive, and what does it do to the gradient?"""

import math
from typing import Any

import numpy as np

from experiments.atlas import drawing, frame
from experiments.layer_norm_nets import FORMS, ORDERS, Config, points, rates
from jaxgrad.nn.normalization import EPSILON

# ------------------------------------------------------------------------------------------ judges


def judge_forward(config: Config, data: frame.Data) -> frame.Verdict:
    """By alpha: the output changes by less than the tolerance, in every seed."""
    change = np.max(np.asarray(data["scale"]["output_change"]), 0)
    good = {
        f"alpha = {a:g}": bool(c < config.tolerance)
        for a, c in zip(config.factors, change, strict=True)
    }
    words = [f"{a:g}: {c:.1e}" for a, c in zip(config.factors, change, strict=True)]
    return frame.conclude(
        good, "largest relative change of the output at alpha " + "; ".join(words)
    )


def judge_backward(config: Config, data: frame.Data) -> frame.Verdict:
    """By alpha: the gradient's norm changes by less than the tolerance."""
    ratios = np.asarray(data["scale"]["gradient_ratio"], np.float64)
    mean, low, high = frame.interval(ratios)
    good, words = {}, []
    for a, m, b, c in zip(config.factors, mean, low, high, strict=True):
        good[f"alpha = {a:g}"] = bool(abs(m - 1) < config.tolerance)
        words.append(f"{a:g}: x {m:.4g} [{b:.4g}, {c:.4g}]")
    divergence = float(np.max(np.abs(np.log(mean))))
    return frame.conclude(good, "gradient at alpha " + "; ".join(words), divergence=divergence)


def judge_training(config: Config, data: frame.Data) -> frame.Verdict:
    """By alpha: with the same learning rate the mean loss stays within 5 % of that at alpha = 1."""
    loss = np.asarray(data["train"]["loss"], np.float64).mean(-1)
    good, words, divergence = {}, [], 0.0
    base = loss[:, 0]
    words.append(f"1: {base.mean():.3f}")
    for k, (alpha, factor) in enumerate(rates(config)):
        if k and factor == 1:
            ratio = np.log(loss[:, k] / base)
            good[f"alpha = {alpha:g}"] = bool(abs(ratio.mean()) < 0.05)
            mean, low, high = frame.interval(loss[:, k])
            words.append(f"{alpha:g}: {mean:.3f} [{low:.3f}, {high:.3f}]")
            divergence = max(divergence, abs(float(ratio.mean())))
    return frame.conclude(good, "mean loss at alpha " + "; ".join(words), divergence=divergence)


def judge_effective(config: Config, data: frame.Data) -> frame.Verdict:
    """By alpha: with a rate alpha^2 times as large every loss of the run is that at alpha = 1.

    To 1 % over the first quarter of the run, where rounding has not been amplified yet.
    """
    loss = np.asarray(data["train"]["loss"], np.float64)
    early = loss[..., : loss.shape[-1] // 4]
    good, words, divergence = {}, [], 0.0
    for k, (alpha, factor) in enumerate(rates(config)):
        if k and factor != 1:
            off = float(np.max(np.abs(np.log(early[:, k] / early[:, 0]))))
            good[f"alpha = {alpha:g}"] = off < 0.01
            words.append(f"{alpha:g}: {np.expm1(off):.1e}")
            divergence = max(divergence, off)
    measured = "largest relative difference of the losses at alpha " + "; ".join(words)
    return frame.conclude(good, measured, divergence=divergence)


def judge_growth(config: Config, data: frame.Data) -> frame.Verdict:
    """By (alpha, rate): the squared norm ends within 1 % of the sum of squares."""
    grown, sums = (np.asarray(data["train"][k], np.float64) for k in ("growth", "pythagoras"))
    good, words, divergence = {}, [], 0.0
    for k, (alpha, factor) in enumerate(rates(config)):
        off = float(np.max(np.abs(np.log(grown[:, k] / sums[:, k]))))
        good[f"alpha = {alpha:g}, rate x {factor:g}"] = off < 0.01
        words.append(f"alpha {alpha:g}, rate x {factor:g}: x {grown[:, k].mean():.3f}")
        divergence = max(divergence, off)
    measured = f"off by at most {np.expm1(divergence):.1e}; grown " + "; ".join(words)
    return frame.conclude(good, measured, divergence=divergence)


def judge_placement(config: Config, data: frame.Data) -> frame.Verdict:
    """By sigma: the root mean squares of the two forms differ by less than the tolerance."""
    rms = np.asarray(data["epsilon"]["rms"], np.float64).mean(0)
    good, words = {}, []
    for s, practiced, written in zip(config.sigmas, rms[0], rms[1], strict=True):
        good[f"sigma = {s:g}"] = bool(abs(written / practiced - 1) < config.tolerance)
        words.append(f"{s:g}: {practiced:.3g} and {written:.3g}")
    divergence = float(np.max(np.abs(np.log(rms[1] / rms[0]))))
    measured = "root mean square of sqrt(var + eps) and std + eps at sigma " + "; ".join(words)
    return frame.conclude(good, measured, divergence=divergence)


def judge_constant(config: Config, data: frame.Data) -> frame.Verdict:
    """By form: the gain at a constant input is finite and 1 / sqrt(eps), to 1 %."""
    del config
    gains = np.asarray(data["epsilon"]["constant_gain"], np.float64).mean(0)
    good = {
        f: bool(abs(g * math.sqrt(EPSILON) - 1) < 0.01) for f, g in zip(FORMS, gains, strict=True)
    }
    words = [f"{f}: {g:.4g}" for f, g in zip(FORMS, gains, strict=True)]
    finite = gains[np.isfinite(gains)]
    divergence = float(np.max(np.abs(np.log(finite * math.sqrt(EPSILON))))) if len(finite) else None
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_null(config: Config, data: frame.Data) -> frame.Verdict:
    """By width: a random gradient passes with sigma times its norm within 2 % of one."""
    arrays = data["null"]
    mean, low, high = frame.interval(np.asarray(arrays["passed"], np.float64))
    good, words = {}, []
    for n, m, a, b in zip(config.widths, mean, low, high, strict=True):
        good[f"width {n}"] = bool(abs(m - 1) < 0.02)
        words.append(f"{n}: {m:.4f} [{a:.4f}, {b:.4f}], sqrt(1 - 2/n) = {math.sqrt(1 - 2 / n):.4f}")
    lost = max(float(np.max(arrays[k])) for k in ("ones", "input"))
    measured = f"at width {'; '.join(words)}; along 1 and along x - mu at most {lost:.0e} passes"
    return frame.conclude(good, measured, divergence=float(np.max(np.abs(np.log(mean)))))


def _stacks(config: Config, data: frame.Data) -> Any:
    """(order, activation, (mean, low, high) of ln of the factor a layer, theory)."""
    for k, order in enumerate(ORDERS):
        for a in config.activations:
            arrays = data[f"deep-{a}"]
            logs = np.asarray(arrays["log_gain"], np.float64)[:, k]
            yield order, a, frame.interval(logs), float(arrays["theory"][k])


def judge_prevents(config: Config, data: frame.Data) -> frame.Verdict:
    """By order and activation: over all layers the gradient keeps within ten of one."""
    good, words, divergence = {}, [], 0.0
    for order, a, (mean, low, high), _ in _stacks(config, data):
        total = config.depth * mean
        good[f"{a} in {order}"] = bool(config.depth * max(abs(low), abs(high)) < math.log(10))
        words.append(f"{a} in {order} {np.exp(mean):.4f} (10^{total / math.log(10):.1f})")
        divergence = max(divergence, abs(float(total)))
    measured = f"factor a layer (after {config.depth}): " + "; ".join(words)
    return frame.conclude(good, measured, divergence=divergence)


def judge_theory(config: Config, data: frame.Data) -> frame.Verdict:
    """By order and activation: within 2 % a layer of theory, beyond the interval."""
    good, words, divergence = {}, [], 0.0
    for order, a, (mean, low, high), law in _stacks(config, data):
        good[f"{a} in {order}"] = bool(abs(mean - law) < 0.02 + (high - low) / 2)
        words.append(f"{a} in {order} {np.exp(mean):.4f}, theory {np.exp(law):.4f}")
        divergence = max(divergence, abs(float(mean - law)))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


# ----------------------------------------------------------------------------------------- figures


def figures(config: Config, data: frame.Data) -> list[Any]:
    scale, (left, right) = drawing.panels(2, width=9.6)
    alphas = np.asarray(config.factors)
    ratios = np.asarray(data["scale"]["gradient_ratio"], np.float64)
    drawing.line(left, 0, alphas, ratios, "gradient")
    change = np.asarray(data["scale"]["output_change"], np.float64)
    drawing.line(left, 1, alphas, np.maximum(change, 1e-8), "change of the output")
    drawing.theory(left, alphas, 1 / alphas, "1 / alpha")
    left.set(xscale="log", yscale="log")
    drawing.words(left, "Weights times alpha", "alpha", "relative to alpha = 1")
    losses = np.asarray(data["train"]["loss"], np.float64)
    steps = (np.arange(losses.shape[-1]) + 0.5) * config.steps / losses.shape[-1]
    last = len(rates(config)) - 1
    for index, k in enumerate((0, last - 1, last)):
        label = "alpha = {:g}, rate x {:g}".format(*rates(config)[k])
        drawing.line(right, index, steps, losses[:, k], label, markevery=(index, 4))
    right.set(yscale="log")
    drawing.words(right, "Digits with LayerNorm", "step", "loss")
    stacks, (ax, form) = drawing.panels(2, width=9.6)
    for k, order in enumerate(ORDERS):
        means = np.stack(
            [np.exp(np.asarray(data[f"deep-{a}"]["log_gain"]))[:, k] for a in config.activations], 1
        )
        drawing.dots(ax, k, np.arange(len(config.activations)), means, order)
        law = [np.exp(data[f"deep-{a}"]["theory"][k]) for a in config.activations]
        ax.plot(law, color=drawing.INK, marker="_", linestyle="none", markersize=16,
                label="theory" if k == 0 else "")  # fmt: skip
    ax.set_xticks(range(len(config.activations)), config.activations)
    ax.axhline(1, color=drawing.FAINT, linewidth=0.8)
    drawing.words(ax, "LayerNorm, no skip", "", "factor of the gradient a layer")
    rms = np.asarray(data["epsilon"]["rms"], np.float64)
    for k in range(2):
        drawing.line(form, k, config.sigmas, rms[:, k], FORMS[k])
    form.set(xscale="log", yscale="log")
    drawing.words(
        form, "Where epsilon stands", "deviation of the input", "root mean square of the output"
    )
    return [scale, stacks]


CLAIMS = (
    frame.Claim(
        key="forward",
        statement="LayerNorm's output does not change with the scale of the weights before it.",
        predicted="no change (Ba et al. 2016, section 5.1); by epsilon, eps / (2 sigma^2)",
        judge=judge_forward,
        intuition="Invariance ends where the variance of the input comes near epsilon.",
    ),
    frame.Claim(
        key="backward",
        statement="LayerNorm makes the gradient insensitive to the scale of the weights.",
        predicted="a factor of one; from invariance under scaling: 1 / alpha",
        judge=judge_backward,
        intuition="Ten times larger weights get ten times smaller gradients, and need steps ten "
        "times larger: their effective learning rate is a hundred times lower.",
    ),
    frame.Claim(
        key="training",
        statement="LayerNorm makes training insensitive to the scale of the weights.",
        predicted="the same losses with the same learning rate",
        judge=judge_training,
        intuition="Initialization scale is a learning rate in disguise.",
    ),
    frame.Claim(
        key="effective",
        statement="Under a norm the learning rate that counts is lr / |W|^2.",
        predicted="weights x alpha with lr x alpha^2: the same losses (van Laarhoven 2017)",
        judge=judge_effective,
        intuition="Weight decay acts on normalized layers by keeping this rate up.",
    ),
    frame.Claim(
        key="growth",
        statement="Normalized weights can only grow: each step adds lr^2 |g|^2 to |W|^2.",
        predicted="|W|^2 + sum of lr^2 |g|^2, since <W, g> = 0 (Euler)",
        judge=judge_growth,
        intuition="Without weight decay a too large rate lowers itself, by growing the weights.",
    ),
    frame.Claim(
        key="placement",
        statement="LayerNorm is (x - mu) / (sigma + eps).",
        predicted="the same output as sqrt(var + eps), which frameworks compute",
        judge=judge_placement,
        intuition="At eps = 1e-5 the two part below sigma = 0.02: what is small is not normalized.",
    ),
    frame.Claim(
        key="constant",
        statement="Epsilon makes LayerNorm's gradient safe at a constant input.",
        predicted=f"a gain of 1 / sqrt(eps) = {EPSILON**-0.5:.0f}",
        judge=judge_constant,
        intuition="Written as in the textbooks the gain is 1 / eps = 1e5, and automatic "
        "differentiation of std gives NaN.",
    ),
    frame.Claim(
        key="null",
        statement="LayerNorm only rescales the gradient, by 1 / sigma.",
        predicted="sigma |J^T g| / |g| = 1; two of n directions are lost: sqrt(1 - 2 / n)",
        judge=judge_null,
        intuition="What is the same for all features, and what only scales the input, gets no "
        "gradient at all. In groups of 4 features that is half of everything.",
    ),
    frame.Claim(
        key="prevents",
        statement="LayerNorm prevents vanishing and exploding gradients.",
        predicted="a factor near one a layer",
        judge=judge_prevents,
        intuition="It steadies the forward pass. The backward pass is the skip's to keep.",
    ),
    frame.Claim(
        key="theory",
        statement="What a normalized layer does to the gradient follows from its activation alone.",
        predicted="E phi'^2 / E phi^2 (norm first), E phi'^2 / Var phi (norm last), squared norms",
        judge=judge_theory,
        intuition="LN after ReLU explodes by 1.21 a layer: sqrt(pi / (pi - 1)).",
    ),
)

EXPERIMENT = frame.Experiment(
    name="layer_norm",
    question="What does LayerNorm make insensitive, and what does it do to the gradient?",
    claims=CLAIMS,
    presets={
        "tiny": Config(
            factors=(0.001, 10.0), activations=("sigmoid", "relu"), deep_width=128, depth=20,
            trained_factors=(10.0,), trained=2, steps=60,
        ),
        "quick": Config(),
        "full": Config(
            width=512, seeds=64, deep_width=512, trained=16, trained_width=128, steps=2000
        ),
    },
    points=points,
    figures=figures,
)  # fmt: skip
