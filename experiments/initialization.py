"""What each initializer keeps, by activation and depth, and what the names of initializers hide."""

import math
from typing import Any

import numpy as np

from experiments.atlas import drawing, frame
from experiments.initialization_nets import CHANCE, LABELS, Config, points

# ------------------------------------------------------------------------------------------ judges


def _kept(config: Config, data: frame.Data, activation: str, rule: str, key: str) -> Any:
    """(mean, low, high) of the log of a quantity of the last layer over the first kept."""
    logs = np.asarray(data[f"signal-{activation}"][key], np.float64)
    logs = logs[:, config.initializers.index(rule)]
    if key != "log_gain":
        logs = np.log(np.maximum(logs, 1e-300))
    return frame.interval(logs[:, -1] - logs[:, 0])


def _stable(config: Config, data: frame.Data, pairs: Any, key: str) -> frame.Verdict:
    """By (activation, initializer): the interval stays within a factor of two of one."""
    good, words, divergence = {}, [], 0.0
    for activation, rule in pairs:
        mean, low, high = _kept(config, data, activation, rule, key)
        name = f"{activation} with {LABELS[rule]}"
        good[name] = bool(max(abs(low), abs(high)) <= math.log(2))
        words.append(f"{name} x {np.exp(mean):.3g} [{np.exp(low):.3g}, {np.exp(high):.3g}]")
        divergence = max(divergence, abs(float(mean)))
    measured = f"layers {config.kept[0]} to {config.kept[-1]}: " + "; ".join(words)
    return frame.conclude(good, measured, divergence=divergence)


def judge_xavier(config: Config, data: frame.Data) -> frame.Verdict:
    """Of tanh and sigmoid with Xavier: the activations' variance keeps within a factor of two."""
    pairs = [(a, "xavier_normal") for a in ("tanh", "sigmoid") if a in config.activations]
    return _stable(config, data, pairs, "variance")


def judge_xavier_gradient(config: Config, data: frame.Data) -> frame.Verdict:
    """Of tanh and sigmoid with Xavier: the gradient keeps within a factor of two."""
    pairs = [(a, "xavier_normal") for a in ("tanh", "sigmoid") if a in config.activations]
    return _stable(config, data, pairs, "log_gain")


def judge_he(config: Config, data: frame.Data) -> frame.Verdict:
    """By activation (ReLU, GELU, SiLU) with He: mean squares keep, up to what width allows.

    3.5 / width a layer and half of the interval: in ReLU networks of this width the typical mean
    square drifts and spreads while its expectation stays (`theory.log_gain`).
    """
    good, words, divergence = {}, [], 0.0
    span = config.kept[-1] - config.kept[0]
    for a in ("relu", "gelu", "silu"):
        if a in config.activations:
            mean, low, high = _kept(config, data, a, "he_normal", "square")
            allowed = 3.5 / config.width * span + (high - low) / 2
            good[f"{a} with He"] = bool(abs(mean) < allowed)
            words.append(f"{a} x {np.exp(mean):.3g} [{np.exp(low):.3g}, {np.exp(high):.3g}]")
            divergence = max(divergence, abs(float(mean)))
    measured = f"layers {config.kept[0]} to {config.kept[-1]}: " + "; ".join(words)
    return frame.conclude(good, measured, divergence=divergence)


def judge_theory(config: Config, data: frame.Data) -> frame.Verdict:
    """By activation: each layer's gradient and mean square within 3.5 / width of theory.

    The allowance is a layer's, and widened by the interval's half, but no more than by 1.5 / width.
    """
    good, largest, where = {}, 0.0, ""
    span = config.kept[-1] - config.kept[0]
    for a in config.activations:
        arrays, fine = data[f"signal-{a}"], []
        for k, rule in enumerate(config.initializers):
            for key in ("square", "log_gain"):
                mean, low, high = _kept(config, data, a, rule, key)
                law = np.asarray(arrays[f"theory_{key}"], np.float64)[k]
                law = law if key == "log_gain" else np.log(np.maximum(law, 1e-300))
                off = abs(float(mean - law[-1] + law[0])) / span
                noise = min(float(high - low) / 2 / span, 1.5 / config.width)
                fine.append(off < 3.5 / config.width + noise)
                if off > largest:
                    largest, where = off, f"{a}, {LABELS[rule]}"
        good[a] = all(fine)
    measured = (
        f"{len(good) * len(config.initializers)} pairs, width {config.width}: off by at most "
        f"{largest:.4f} nats a layer ({where})"
    )
    return frame.conclude(good, measured, divergence=largest)


def judge_torch(config: Config, data: frame.Data) -> frame.Verdict:
    """By shape: PyTorch's variance is that of He, to a tenth."""
    scaled = np.asarray(data["variances"]["fan_in_variance"]).mean(0)
    good, words, divergence = {}, [], 0.0
    for shape, (_, he, torch) in zip(config.shapes, scaled.T, strict=True):
        ratio = float(torch / he)
        good[f"{shape[0]} to {shape[1]}"] = bool(abs(ratio - 1) < 0.1)
        words.append(f"{ratio:.4f} of He's ({shape[0]} to {shape[1]})")
        divergence = max(divergence, abs(math.log(ratio)))
    if "relu" in config.activations:
        mean, low, high = _kept(config, data, "relu", "torch_linear", "log_gain")
        ten = (f"{value / math.log(10):.1f}" for value in (mean, low, high))
        span = config.kept[-1] - config.kept[0]
        words.append("ReLU gradient over {} layers 10^{} [{}, {}]".format(span, *ten))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_doubles(config: Config, data: frame.Data) -> frame.Verdict:
    """By shape: He's variance is twice Xavier's, to 5 %."""
    scaled = np.asarray(data["variances"]["fan_in_variance"]).mean(0)
    good, words, divergence = {}, [], 0.0
    for (n_in, n_out), (xavier, he, _) in zip(config.shapes, scaled.T, strict=True):
        ratio = float(he / xavier)
        good[f"{n_in} to {n_out}"] = bool(abs(ratio / 2 - 1) < 0.05)
        words.append(f"{n_in} to {n_out} x {ratio:.3f} (fans: {(n_in + n_out) / n_in:.3f})")
        divergence = max(divergence, abs(math.log(ratio / 2)))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_backward(config: Config, data: frame.Data) -> frame.Verdict:
    """By shape: fan_in He keeps the gradient's squared norm to 5 %, wide to narrow or not."""
    kept = np.asarray(data["variances"]["he_backward"]).mean(0)
    good, words = {}, []
    for (n_in, n_out), ratio in zip(config.shapes, kept, strict=True):
        good[f"{n_in} to {n_out}"] = bool(abs(ratio - 1) < 0.05)
        words.append(f"{n_in} to {n_out} x {ratio:.3f} (per entry x {ratio * n_out / n_in:.2f})")
    divergence = float(np.max(np.abs(np.log(kept))))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_published(config: Config, data: frame.Data) -> frame.Verdict:
    """He learns and Xavier stays at chance, in every seed, at the best of the rates."""
    arrays = data["train"]
    best = np.asarray(arrays["accuracy"], np.float64).max(-1)
    last = np.asarray(arrays["loss"], np.float64)[..., -1].min(-1)
    words = [
        f"{LABELS[i]} {best[:, k].mean():.0%} (loss {last[:, k].mean():.2f})"
        for k, i in enumerate(config.trained_initializers)
    ]
    he, xavier = (config.trained_initializers.index(f"{i}_normal") for i in ("he", "xavier"))
    good = {
        "He is to learn": bool(np.all(best[:, he] > 0.5)),
        "Xavier is to stall": bool(np.all(last[:, xavier] > CHANCE - 0.15)),
    }
    return frame.conclude(good, f"{config.trained_depth} layers, digits right: " + "; ".join(words))


# ----------------------------------------------------------------------------------------- figures


def figures(config: Config, data: frame.Data) -> list[Any]:
    shown = [a for a in ("sigmoid", "tanh", "relu", "gelu") if a in config.activations]
    found = []
    for key, name in (("square", "mean square of activations"), ("log_gain", "the gradient")):
        figure, axes = drawing.panels(len(shown), width=11.0, height=3.2)
        for column, (ax, a) in enumerate(zip(axes, shown, strict=True)):
            for index, rule in enumerate(config.initializers):
                logs = np.asarray(data[f"signal-{a}"][key], np.float64)[:, index]
                law = np.asarray(data[f"signal-{a}"][f"theory_{key}"], np.float64)[index]
                if key == "square":
                    logs, law = np.log(np.maximum(logs, 1e-300)), np.log(np.maximum(law, 1e-300))
                label = LABELS[rule] if column == 0 else ""
                drawing.line(ax, index, config.kept, logs / np.log(10), label)
                theory_label = "theory" if column == 0 and index == 0 else ""
                drawing.theory(ax, config.kept, law / np.log(10), theory_label)
            passed = "layer" if key == "square" else "layers passed"
            drawing.words(
                ax, a, passed, f"log10 of {name}" if column == 0 else "", legend=column == 0
            )
        found.append(figure)
    return found


CLAIMS = (
    frame.Claim(
        key="theory",
        statement="Mean-field theory tells signal and gradient at every depth.",
        predicted="q' = sigma_w^2 E phi^2 + sigma_b^2, gradient x sigma_w sqrt(E phi'^2) (Poole et "
        "al. 2016, Schoenholz et al. 2017), up to O(1 / width) a layer",
        judge=judge_theory,
        intuition="No need to run a network to learn whether its initializer fits its activation.",
    ),
    frame.Claim(
        key="xavier",
        statement="Xavier keeps the activations' variance stable through tanh and sigmoid layers.",
        predicted="a variance that does not change with depth (Glorot and Bengio 2010)",
        judge=judge_xavier,
        intuition="Xavier was derived for slope one at zero. tanh fades like 1 / depth, and a "
        "sigmoid's slope is 1/4.",
    ),
    frame.Claim(
        key="xavier_gradient",
        statement="Use Xavier with tanh or sigmoid and gradients neither vanish nor explode.",
        predicted="a gradient that does not change with depth",
        judge=judge_xavier_gradient,
        intuition="For tanh Xavier is the edge: a power of depth. For sigmoid no initializer in "
        "use helps: it would take sigma_w^2 = 103.",
    ),
    frame.Claim(
        key="he",
        statement="He initialization keeps the signal for ReLU and its smooth relatives.",
        predicted="a mean square that does not change with depth (He et al. 2015)",
        judge=judge_he,
        intuition="The factor 2 is ReLU's alone: GELU and SiLU shrink small inputs by a half.",
    ),
    frame.Claim(
        key="torch",
        statement="PyTorch's default for Linear layers is a He initialization.",
        predicted="2 / fan_in; the source, kaiming_uniform with a = sqrt(5), gives 1 / (3 fan_in)",
        judge=judge_torch,
        intuition="The default has He's name and a sixth of its variance. Set the initializer.",
    ),
    frame.Claim(
        key="doubles",
        statement="He doubles the variance of Xavier.",
        predicted="2; from the fans: (fan_in + fan_out) / fan_in",
        judge=judge_doubles,
        intuition="Only square layers see a factor of two.",
    ),
    frame.Claim(
        key="backward",
        statement="He with fan_in keeps the gradient as well, whatever the layer's shape.",
        predicted="|W^T D g|^2 / |g|^2 = 1, for every fan_in and fan_out (He et al. 2015, eq. 14)",
        judge=judge_backward,
        intuition="fan_in or fan_out does not matter: it is entries that grow, not norms.",
    ),
    frame.Claim(
        key="published",
        statement="At 30 ReLU layers He trains and Xavier stalls.",
        predicted="He et al. 2015, figure 3: Xavier's error does not move",
        judge=judge_published,
        intuition="A factor of two in variance a layer is 2^15 in the gradient after 30.",
    ),
)

EXPERIMENT = frame.Experiment(
    name="initialization",
    question="What does each initializer keep, by activation and depth?",
    claims=CLAIMS,
    presets={
        "tiny": Config(
            activations=("tanh", "relu"),
            initializers=("xavier_normal", "he_normal", "torch_linear"),
            width=64, kept=(1, 5, 10, 20), shapes=((256, 256), (64, 256)), trained_depth=30,
            trained=2, steps=100, learning_rates=(0.01,),
        ),
        "quick": Config(),
        "full": Config(width=512, seeds=32, inputs=64, trained=16, steps=3000, batch=128),
    },
    points=points,
    figures=figures,
)  # fmt: skip
