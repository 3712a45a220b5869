"""Do layers of gain 1.1 multiply the gradient by 1.1 each, where does it overflow, what then?"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.atlas import drawing, frame
from experiments.exploding_nets import KINDS, RULES, Config, points
from jaxgrad import precision, theory

# ------------------------------------------------------------------------------------------ judges


def judge_factor(config: Config, data: frame.Data) -> frame.Verdict:
    """By kind, for every gain above one: the mean factor is the gain to the tolerance."""
    good, words, divergence = {}, [], 0.0
    depth, shown = config.passed[-1], config.gains.index(1.1)
    for kind in KINDS:
        mean, low, high = frame.interval(np.asarray(data[f"gain-{kind}"]["log_gain"])[..., -1])
        off = (mean - depth * np.log(config.gains))[np.asarray(config.gains) > 1]
        good[kind] = bool(np.all(np.abs(np.expm1(off / depth)) < config.tolerance))
        at = (f"{np.exp(value[shown] / depth):.4f}" for value in (mean, low, high))
        words.append("{} {} [{}, {}]".format(kind, *at) + f", x {np.exp(mean[shown]):.3g}")
        divergence = max(divergence, float(np.max(np.abs(off))))
    measured = f"at gain 1.1, a layer and after {depth}: " + "; ".join(words)
    return frame.conclude(good, measured, divergence=divergence)


def judge_width(config: Config, data: frame.Data) -> frame.Verdict:
    """By kind of Gaussian layers: |z| < 4 against the exact law, at every gain and depth kept."""
    good, words, divergence = {}, [], 0.0
    for kind, phi in (("linear, Gaussian", "linear"), ("ReLU, He", "relu")):
        logs = 2 * np.asarray(data[f"gain-{kind}"]["log_gain"], np.float64)
        law = theory.log_gain([config.width], phi)
        passed = np.asarray(config.passed)
        own = 2 * np.log(config.gains)[:, None]
        predicted = passed * (float(law.mean) + own)
        z = (logs.mean(0) - predicted) / np.sqrt(passed * float(law.variance) / len(logs))
        good[kind] = bool(np.max(np.abs(z)) < 4)
        drift = float(np.mean(logs[..., -1] - passed[-1] * own[:, 0]) / passed[-1] / 2)
        words.append(
            f"{kind}: {drift:+.5f} nats a layer, predicted {float(law.mean) / 2:+.5f}, largest "
            f"|z| {np.max(np.abs(z)):.1f}"
        )
        divergence = max(divergence, abs(drift - float(law.mean) / 2))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_tanh(config: Config, data: frame.Data) -> frame.Verdict:
    """By gain above one: mean-field theory of tanh, to twice the tolerance a layer."""
    arrays = data["gain-tanh, orthogonal"]
    depth = config.passed[-1]
    mean, low, high = frame.interval(np.asarray(arrays["log_gain"])[..., -1])
    predicted = np.asarray(arrays["mean_field"])[:, -1]
    good, words, divergence = {}, [], 0.0
    for k, gain in enumerate(config.gains):
        if gain > 1:
            good[f"gain {gain}"] = bool(abs(mean[k] - predicted[k]) < 2 * config.tolerance * depth)
            words.append(
                f"{gain}: {np.exp(mean[k] / depth):.4f} [{np.exp(low[k] / depth):.4f}, "
                f"{np.exp(high[k] / depth):.4f}], theory {np.exp(predicted[k] / depth):.4f}"
            )
            divergence = max(divergence, abs(float(mean[k] - predicted[k])) / depth)
    return frame.conclude(good, "a layer: " + "; ".join(words), divergence=divergence)


def _bracket(config: Config, dtype: str, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """The layers between which a gradient of norm gain^l has its largest element pass a limit."""
    unit = np.log(np.asarray(config.range_gains))
    low, high = np.log(limit) / unit, np.log(limit * config.range_width**0.5) / unit
    # a matrix product in the type is off by a rounding a layer
    slack = 1 + high * float(jnp.finfo(dtype).eps) / unit
    return np.floor(low - slack), np.ceil(high + slack)


def judge_overflow(config: Config, data: frame.Data) -> frame.Verdict:
    """By type: every network's first infinite element lies where gain^l says, for every gain."""
    good, words = {}, []
    for dtype in config.dtypes:
        layers = np.asarray(data[f"range-{dtype}"]["element"])
        low, high = _bracket(config, dtype, precision.limits(dtype).largest)
        within = (layers >= low) & (layers <= high)
        good[dtype] = bool(np.all(within | ((layers > config.range_depth) & (high >= layers))))
        counts = (f"{int(np.median(c))}" for c in layers.T)
        words.append(f"{dtype}: " + ", ".join(counts))
    gains = ", ".join(str(g) for g in config.range_gains)
    return frame.conclude(good, f"layers at gains {gains}: " + "; ".join(words))


def judge_norm(config: Config, data: frame.Data) -> frame.Verdict:
    """By type: the plain norm stays finite within 10 % of the layers that the elements do."""
    good, words, divergence = {}, [], 0.0
    for dtype in config.dtypes:
        arrays = data[f"range-{dtype}"]
        # gains whose elements do overflow; each seed's ratio
        all_in = np.max(arrays["element"], 0) <= config.range_depth
        ratio = (np.asarray(arrays["plain_norm"]) / np.asarray(arrays["element"]))[:, all_in]
        mean, low, high = frame.interval(ratio.mean(1))
        good[dtype] = bool(mean > 0.9)
        words.append(f"{dtype}: x {mean:.2f} [{low:.2f}, {high:.2f}]")
        divergence = max(divergence, abs(math.log(mean)))
    return frame.conclude(
        good, "of the elements' layers: " + "; ".join(words), divergence=divergence
    )


def _ended(data: frame.Data, rule: str) -> list[tuple[float, bool, bool, float]]:
    """By gain: (accuracy, all seeds learned, all seeds diverged, norm of the first gradient).

    Diverged: the last loss is no number, or above that of a guess by a tenth.
    """
    arrays = data[f"train-{rule}"]
    accuracy, last = np.asarray(arrays["accuracy"]), np.asarray(arrays["loss"])[..., -1]
    gone = ~(last <= math.log(10) + 0.1)
    first = np.exp(np.mean(np.log(np.asarray(arrays["first_norm"], np.float64)), 0))
    cells = zip(accuracy.mean(0), (accuracy > 0.5).all(0), gone.all(0), first, strict=True)
    return [(float(a), bool(b), bool(c), float(d)) for a, b, c, d in cells]


def judge_diverges(config: Config, data: frame.Data) -> frame.Verdict:
    """By rule (no clip) and gain above one: every seed diverged."""
    good, words = {}, []
    for rule in ("SGD", "Adam"):
        for gain, cell in zip(config.trained_gains, _ended(data, rule), strict=True):
            if gain > 1:
                good[f"{rule} at gain {gain}"] = cell[2]
                words.append(f"{rule}, {gain}: {cell[0]:.0%} (first norm {cell[3]:.2g})")
    return frame.conclude(good, "digits right: " + "; ".join(words))


def judge_clip(config: Config, data: frame.Data) -> frame.Verdict:
    """By gain at which a seed of plain SGD diverges: clipped, every seed learns."""
    last = np.asarray(data["train-SGD"]["loss"])[..., -1]
    diverged = (~(last <= math.log(10) + 0.1)).any(0)
    good, words = {}, []
    clipped = _ended(data, RULES[1])
    for gain, gone, cell in zip(config.trained_gains, diverged, clipped, strict=True):
        if gone:
            good[f"gain {gain}"] = cell[1]
            words.append(f"gain {gain}: {cell[0]:.0%}")
    if not good:
        return frame.Verdict("false", "plain SGD diverged at no gain; there is nothing to fix")
    return frame.conclude(good, "digits right with the clip: " + "; ".join(words))


# ----------------------------------------------------------------------------------------- figures


def figures(config: Config, data: frame.Data) -> list[Any]:
    gains, (left, right) = drawing.panels(2, width=11.0, height=3.6)
    passed, shown = np.asarray(config.passed), config.gains.index(1.1)
    for index, kind in enumerate(KINDS):
        logs = np.asarray(data[f"gain-{kind}"]["log_gain"], np.float64)[:, shown] / np.log(10)
        drawing.line(left, index, passed, logs, kind)
    drawing.theory(left, passed, passed * np.log10(1.1), "1.1^depth")
    drawing.words(left, "At gain 1.1", "layers passed", "log10 of the gradient")
    for index, dtype in enumerate(config.dtypes):
        for key, style in (("element", "-"), ("plain_norm", ":")):
            layers = np.asarray(data[f"range-{dtype}"][key], np.float64)
            shown_at = layers.max(0) <= config.range_depth
            label = f"{dtype}, {'an element' if key == 'element' else 'the plain norm'}"
            x = np.asarray(config.range_gains)[shown_at]
            drawing.line(right, index, x, layers[:, shown_at], label, linestyle=style)
    right.set(yscale="log", xscale="log")
    right.set_xticks(config.range_gains, [str(g) for g in config.range_gains])
    right.minorticks_off()
    drawing.words(right, "Layers until infinity", "gain a layer", "layers", legend=False)
    _ = right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    trained, (ax,) = drawing.panels(1, width=7.2, height=2.6)
    values = [[cell[0] for cell in _ended(data, rule)] for rule in RULES]
    columns = [f"gain {g}" for g in config.trained_gains]
    image = drawing.grid(ax, values, RULES, columns, form="{:.0%}", limits=(0.0, 1.0))
    _ = trained.colorbar(image, ax=ax, label="right (chance: 10 %)")
    title = f"Digits by {config.trained_depth} ReLU layers after {config.steps} steps"
    drawing.words(ax, title, "", "", legend=False)
    return [gains, trained]


CLAIMS = (
    frame.Claim(
        key="factor",
        statement="Layers of gain 1.1 multiply the gradient by 1.1 each: 117 after 50.",
        predicted=f"1.1^50 = {1.1**50:.1f}, 1.1^100 = {1.1**100:,.1f} (arithmetic)",
        judge=judge_factor,
        intuition="A gain is an exact factor for orthogonal linear layers only. Random layers pass "
        "a little less, and a tanh that saturates much less.",
    ),
    frame.Claim(
        key="width",
        statement="The log of the gradient's gain drifts down by an amount that width decides.",
        predicted="per layer E psi(K/2) / 2 + ln(2 sigma_w^2 / n) / 2, exactly (Hanin, Nica 2019)",
        judge=judge_width,
        intuition="At width 64 a He network of 100 layers has lost a factor of 7 typically, while "
        "its mean square is kept: narrow and deep is a lottery.",
    ),
    frame.Claim(
        key="tanh",
        statement="Saturation holds an exploding tanh network back, by as much as its q* says.",
        predicted="sigma_w sqrt(E phi'(sqrt(q) z)^2) at each layer's q (Poole et al. 2016)",
        judge=judge_tanh,
        intuition="Bounded activations hide explosions from the forward pass, not from the "
        "backward.",
    ),
    frame.Claim(
        key="overflow",
        statement="An exploding gradient overflows after ln(largest) / ln(gain) layers.",
        predicted="at 1.1: fp16 117 layers, float32 and bf16 931 (ranges 65504 and 3.4e38)",
        judge=judge_overflow,
        intuition="bf16 overflows where float32 does; fp16 eight times earlier.",
    ),
    frame.Claim(
        key="norm",
        statement="The gradient's norm is finite as long as its elements are.",
        predicted="the norm leaves the range at the same layer",
        judge=judge_norm,
        intuition="A sum of squares overflows at the square root of the range: after half as many "
        "layers. A clip by such a norm multiplies the gradient by zero. Scale first.",
    ),
    frame.Claim(
        key="diverges",
        statement="Exploding gradients make training diverge.",
        predicted="at a gain above one the loss ends above chance, or as no number",
        judge=judge_diverges,
        intuition="It takes a rule whose step grows with the gradient. Adam's does not.",
    ),
    frame.Claim(
        key="clip",
        statement="Clipping the gradient's norm at 1.0 fixes exploding gradients.",
        predicted="where SGD diverges, clipped SGD gets most digits right",
        judge=judge_clip,
        intuition="A clip bounds the step and leaves its direction; it repairs no initialization.",
    ),
)

EXPERIMENT = frame.Experiment(
    name="exploding",
    question="Do layers of gain 1.1 multiply the gradient by 1.1, and what if it overflows?",
    claims=CLAIMS,
    presets={
        "tiny": Config(
            gains=(1.0, 1.1), width=32, passed=(10, 20), seeds=16, range_gains=(2.0, 4.0),
            range_depth=140, range_seeds=2, trained_gains=(1.0, 2.0), trained=2, steps=100,
        ),
        "quick": Config(),
        "full": Config(width=256, seeds=64, range_width=64, trained=16, steps=2000),
    },
    points=points,
    figures=figures,
)  # fmt: skip
