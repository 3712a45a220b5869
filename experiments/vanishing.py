"""What do real layers multiply the gradient by, does 0.9^50 model them, and which nets learn?"""

import math
from typing import Any

import numpy as np

from experiments.atlas import drawing, frame
from experiments.vanishing_nets import CHANCE, LABELS, Config, groups, points

# ------------------------------------------------------------------------------------------ judges


def _totals(config: Config, data: frame.Data, activation: str, passed: int) -> dict[str, Any]:
    """{initializer: (mean, low, high) of the log gain after so many layers}."""
    arrays = np.asarray(data[f"gain-{activation}"]["log_gain"], np.float64)
    at = config.passed.index(passed)
    return {i: frame.interval(arrays[:, k, at]) for k, i in enumerate(config.initializers)}


def judge_factor(config: Config, data: frame.Data) -> frame.Verdict:
    """Of 50 sigmoid layers (or the most there are): 0.9 lies in the interval of the mean factor."""
    layers = max(p for p in config.passed if p <= 50)
    good, words, divergence = {}, [], 0.0
    for name, total in _totals(config, data, "sigmoid", layers).items():
        mean, low, high = np.exp(np.asarray(total) / layers)
        decades = total[0] / math.log(10)
        words.append(f"{LABELS[name]} {mean:.4f} [{low:.4f}, {high:.4f}], 10^{decades:.1f}")
        good[LABELS[name]] = bool(low <= config.factor <= high)
        divergence = max(divergence, abs(total[0] - layers * math.log(config.factor)))
    measured = f"a layer, and after {layers}: " + "; ".join(words)
    return frame.conclude(good, measured, divergence=float(divergence))


def judge_mean_field(config: Config, data: frame.Data) -> frame.Verdict:
    """By activation: |ln(measured / predicted)| a layer within 2.5 / width and the interval."""
    good, largest, where = {}, 0.0, ""
    depth = config.passed[-1]
    for a in config.activations:
        off, allowed = [], []
        for k, (i, total) in enumerate(_totals(config, data, a, depth).items()):
            off.append(abs(total[0] - data[f"gain-{a}"]["theory"][k, -1]) / depth)
            allowed.append(2.5 / config.width + (total[2] - total[1]) / 2 / depth)
            if off[-1] > largest:
                largest, where = float(off[-1]), f"{a}, {LABELS[i]}"
        good[a] = bool(np.all(np.asarray(off) < allowed))
    count = len(config.activations) * len(config.initializers)
    measured = (
        f"{count} pairs over {depth} layers of width {config.width}: the factor is off by at most "
        f"{100 * np.expm1(largest):.1f} % a layer ({where})"
    )
    return frame.conclude(good, measured, divergence=largest)


def judge_relu(config: Config, data: frame.Data) -> frame.Verdict:
    """By initializer and depth: the interval of the mean lies within `decades` of one."""
    good, words, divergence = {}, [], 0.0
    for layers in sorted({max(p for p in config.passed if p <= 50), config.passed[-1]}):
        for i, total in _totals(config, data, "relu", layers).items():
            mean, low, high = np.asarray(total) / math.log(10)
            name = f"{LABELS[i]} with {layers} layers"
            words.append(f"{name} 10^{mean:.2f} [{low:.2f}, {high:.2f}]")
            good[name] = bool(max(abs(low), abs(high)) <= config.decades)
            divergence = max(divergence, abs(float(total[0])))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def _learned(config: Config, data: frame.Data, activation: str) -> dict[tuple[str, int], Any]:
    """{(initializer, depth): (mean accuracy, every seed learned, mean last loss)}.

    A network has learned when it is right more often than not.
    """
    cells = {}
    for depths in groups(config, activation):
        arrays = data[f"train-{activation}-{max(depths)}"]
        accuracy, loss = (np.asarray(arrays[k], np.float64) for k in ("accuracy", "loss"))
        for a, i in enumerate(config.initializers):
            for b, d in enumerate(depths):
                right = accuracy[:, a, b]
                cells[i, d] = (right.mean(), bool(np.all(right > 0.5)), loss[:, a, b, -1].mean())
    return cells


def judge_sigmoid(config: Config, data: frame.Data) -> frame.Verdict:
    """By depth: no sigmoid network has learned, whatever the initializer."""
    cells = _learned(config, data, "sigmoid")
    good, words = {}, []
    for depth in sorted({d for _, d in cells}):
        row = {i: cells[i, depth] for i in config.initializers}
        best = max(row, key=lambda i: row[i][0])
        good[f"{depth} layers"] = not any(learned for _, learned, _ in row.values())
        words.append(f"{depth} layers: at best {row[best][0]:.0%} right ({LABELS[best]})")
    return frame.conclude(good, "; ".join(words))


def judge_relu_learns(config: Config, data: frame.Data) -> frame.Verdict:
    """By initializer and depth: every seed has learned."""
    cells = _learned(config, data, "relu")
    good = {f"{LABELS[i]} with {d} layers": cell[1] for (i, d), cell in cells.items()}
    words = [f"{LABELS[i]}, {d}: {cell[0]:.0%}" for (i, d), cell in cells.items()]
    return frame.conclude(good, "digits right: " + "; ".join(words))


def _lost(config: Config, data: frame.Data, activation: str) -> dict[tuple[str, int], bool]:
    """{(initializer, depth): whether the gradient's mean gain leaves `lost_decades`}."""
    found = {}
    for depth in (d for depths in groups(config, activation) for d in depths):
        for i, total in _totals(config, data, activation, depth).items():
            found[i, depth] = bool(abs(total[0]) > config.lost_decades * math.log(10))
    return found


def judge_loss(config: Config, data: frame.Data) -> frame.Verdict:
    """By activation: wherever the gradient is lost, the loss ends within 0.1 of ln 10."""
    good, words, divergence = {}, [], 0.0
    for a in config.trained_activations:
        cells, lost = _learned(config, data, a), _lost(config, data, a)
        losses = [cells[at][2] for at, is_lost in lost.items() if is_lost]
        if losses:
            good[a] = bool(np.max(np.abs(np.asarray(losses) - CHANCE)) < 0.1)
            words.append(f"{a}: {len(losses)} settings, {min(losses):.3f} to {max(losses):.3f}")
            divergence = max(divergence, float(np.max(np.abs(np.log(np.divide(losses, CHANCE))))))
    if not good:
        return frame.Verdict("false", "no network lost its gradient; there is no loss to look at")
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_survival(config: Config, data: frame.Data) -> frame.Verdict:
    """Both directions, each where 95 % of the settings agree."""
    kept, lost = [], []
    for a in config.trained_activations:
        cells, is_lost = _learned(config, data, a), _lost(config, data, a)
        for at, cell in cells.items():
            (lost if is_lost[at] else kept).append(cell[1])
    good = {
        "'survives' is to follow from 'learns'": sum(lost) <= 0.05 * len(lost),
        "'learns' is to follow from 'survives'": sum(kept) >= 0.95 * len(kept),
    }
    measured = (
        f"{sum(kept)} of {len(kept)} settings learn whose gradient keeps within "
        f"10^{config.lost_decades:.0f}; of the {len(lost)} others {sum(lost)}"
    )
    return frame.conclude(good, measured)


# ----------------------------------------------------------------------------------------- figures


def figures(config: Config, data: frame.Data) -> list[Any]:
    gains, axes = drawing.panels(len(config.initializers), width=9.6)
    depth = np.asarray(config.passed)
    for k, (ax, i) in enumerate(zip(axes, config.initializers, strict=True)):
        for index, a in enumerate(config.activations):
            down = np.asarray(data[f"gain-{a}"]["log_gain"], np.float64)[:, k] / math.log(10)
            drawing.line(ax, index, depth, down, a)
        drawing.theory(ax, depth, depth * np.log10(config.factor), f"{config.factor}^depth")
        drawing.words(ax, LABELS[i], "layers passed", "log10 of the gradient", legend=k == 0)
    for ax in axes[1:]:
        ax.sharey(axes[0])
    rows, values = [], []
    depths = (*config.depths, config.deepest)
    for a in config.trained_activations:
        cells = _learned(config, data, a)
        for i in config.initializers:
            rows.append(f"{a}, {LABELS[i]}")
            values.append([cells.get((i, d), (np.nan,))[0] for d in depths])
    steps = f"{config.steps} steps ({config.deepest_steps} at {config.deepest} layers)"
    learned, (ax,) = drawing.panels(1, width=7.2, height=0.3 * len(rows) + 1)
    columns = [f"{d} layers" for d in depths]
    image = drawing.grid(ax, values, rows, columns, form="{:.0%}", limits=(0.0, 1.0))
    _ = learned.colorbar(image, ax=ax, label="right (chance: 10 %)")
    drawing.words(ax, f"Digits after {steps} of Adam", "", "", legend=False)
    return [gains, learned]


CLAIMS = (
    frame.Claim(
        key="factor",
        statement="A sigmoid layer multiplies the gradient by about 0.9: after 50, 0.9^50.",
        predicted=f"0.9 a layer, 0.9^50 = {0.9**50:.5f}, 0.9^100 = {0.9**100:.2e} (arithmetic)",
        judge=judge_factor,
        intuition="Sigmoid nets do not fade, they are cut off: six layers cost what 0.9^50 costs.",
    ),
    frame.Claim(
        key="mean_field",
        statement="A layer multiplies the gradient's norm by sqrt(chi_1), whatever its activation.",
        predicted="sqrt(chi_1) = sigma_w sqrt(E phi'^2) at the layer's own q (Poole et al. 2016)",
        judge=judge_mean_field,
        intuition="One number a layer, known before any training, tells how deep a net can go.",
    ),
    frame.Claim(
        key="relu",
        statement="ReLU's gradient is 1 for positive inputs, so ReLU layers do not shrink it.",
        predicted="a factor of one at every depth (within ten)",
        judge=judge_relu,
        intuition="ReLU closes half of the gates; it is the initializer's factor 2 that pays for "
        "them. PyTorch's default pays a sixth of it.",
    ),
    frame.Claim(
        key="sigmoid_stalls",
        statement="Deep sigmoid networks stall.",
        predicted="at most one digit in two right after training",
        judge=judge_sigmoid,
        intuition="'Deep' begins at ten layers, not at a hundred, and no initializer in use helps.",
    ),
    frame.Claim(
        key="relu_learns",
        statement="Replace sigmoid by ReLU and deep networks train.",
        predicted="most digits right at every depth, with every initializer",
        judge=judge_relu_learns,
        intuition="The activation alone is no fix: name the initializer too.",
    ),
    frame.Claim(
        key="loss",
        statement="The loss of a network without gradient lies flat at chance.",
        predicted=f"ln(10) = {CHANCE:.4f}: the readout's bias learns the classes' frequencies",
        judge=judge_loss,
        intuition="A loss of ln(number of classes) that does not move says that nothing of the "
        "input reaches the output, and no gradient the input.",
    ),
    frame.Claim(
        key="survival",
        statement="A network learns if and only if its gradient survives at initialization.",
        predicted="kept within 10^6: learns; else stalls",
        judge=judge_survival,
        intuition="A lost gradient is a sentence; a kept one is no promise.",
    ),
)

EXPERIMENT = frame.Experiment(
    name="vanishing",
    question="What do real layers multiply the gradient by, does 0.9^50 model them, who learns?",
    claims=CLAIMS,
    presets={
        "tiny": Config(
            activations=("sigmoid", "relu"), trained_activations=("sigmoid", "relu"),
            initializers=("he_normal", "torch_linear"), width=32,
            passed=(2, 10, 20), depths=(2, 20), deepest_activations=(), steps=60, seeds=16,
        ),
        "quick": Config(),
        "full": Config(width=256, seeds=64, trained=8, steps=1000, batch=128),
    },
    points=points,
    figures=figures,
)  # fmt: skip
