"""Are several micro-batches one large batch, and what is each way to get that wrong?"""

from typing import Any

import numpy as np

from experiments.accumulation_nets import KINDS, RULES, Config, points
from experiments.atlas import drawing, frame


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %" if value > 1e-4 else f"{value:.0e}"


def judge_equal(config: Config, data: frame.Data) -> frame.Verdict:
    """By net: for every N and seed the accumulated gradient is the large batch's."""
    found = np.asarray(data["equal"]["distance"], float)
    good, words = {}, []
    for k, kind in enumerate(KINDS):
        worst = found[:, k].max(0)
        good[f"{kind} in the net" if kind != "no norm" else kind] = bool(
            worst.max() < config.tolerance
        )
        pairs = zip(config.counts, worst, strict=True)
        words.append(f"{kind}: " + ", ".join(f"N = {n} {_percent(d)}" for n, d in pairs))
    return frame.conclude(good, "; ".join(words) + " off")


def judge_erased(config: Config, data: frame.Data) -> frame.Verdict:
    """By loop: the step's gradient is exactly that of the last micro-batch alone."""
    arrays, good, words = data["erased"], {}, []
    for name, loop in (("bare", "the loss is not divided by N"), ("divided", "it is divided by N")):
        gap = np.asarray(arrays[name], float).max(0)
        good[loop] = bool(gap.max() < config.tolerance)
        rows = ", ".join(
            f"N = {n}: {_percent(d)}" for n, d in zip(config.counts, gap, strict=False)
        )
        words.append(f"{loop}: off the last micro-batch's by {rows}")
    return frame.conclude(good, "; ".join(words))


def judge_noise(config: Config, data: frame.Data) -> frame.Verdict:
    """By N: erasing multiplies the variance of the gradient by N, to |z| < 4 over the nets."""
    ratios = np.asarray(data["erased"]["variance_ratio"], float)
    good, words, divergence = {}, [], 0.0
    for k, n in enumerate(config.counts[: ratios.shape[1]]):
        mean, low, high = frame.interval(ratios[:, k])
        error = ratios[:, k].std(ddof=1) / np.sqrt(len(ratios))
        good[f"N = {n}"] = bool(abs(mean - n) < 4 * error)
        words.append(f"N = {n}: x {mean:.2f} [{low:.2f}, {high:.2f}]")
        divergence = max(divergence, abs(float(np.log(mean / n))))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_summed(config: Config, data: frame.Data) -> frame.Verdict:
    """By rule: sums train as means at N times the learning rate, to 1 %."""
    found = np.asarray(data["summed"]["distance"], float).mean(0)
    good, words = {}, []
    for (faster, same), rule in zip(found, RULES, strict=True):
        good[rule] = bool(faster < 0.01)
        words.append(
            f"{rule}: {_percent(faster)} off means at {config.counts[1]} times the rate, "
            f"{_percent(same)} off means at the same rate"
        )
    return frame.conclude(good, "; ".join(words))


def judge_uneven(config: Config, data: frame.Data) -> frame.Verdict:
    """By counts of tokens: the mean of the means is the mean over all tokens."""
    arrays = data["uneven"]
    cases = {"equal": "equal token counts", "uneven": "the paragraphs' own lengths"}
    good, words = {}, []
    for name, case in cases.items():
        mean, low, high = frame.interval(arrays[name])
        good[case] = bool(np.max(arrays[name]) < config.tolerance)
        words.append(f"{case}: {_percent(mean)} off [{_percent(max(low, 0))}, {_percent(high)}]")
    words.append(
        f"lengths vary by {100 * np.mean(arrays['spread']):.0f} %; weighted by tokens "
        f"{_percent(float(np.max(arrays['weighted'])))} off"
    )
    return frame.conclude(good, "; ".join(words))


def judge_weighted(config: Config, data: frame.Data) -> frame.Verdict:
    """Weights that are the numbers of tokens make it exact for all batches."""
    worst = float(np.max(data["uneven"]["weighted"]))
    good = {"all batches": worst < config.tolerance}
    return frame.conclude(good, f"at most {_percent(worst)} off, for uneven lengths")


def judge_memory(config: Config, data: frame.Data) -> frame.Verdict:
    """By N: no more than the small batch's memory and two gradients."""
    arrays, good, words = data["memory"], {}, []
    size = float(arrays["parameters"])
    for n, (small, loop, large) in zip(config.counts, np.asarray(arrays["bytes"]), strict=True):
        good[f"N = {n}"] = bool(loop <= small + 2 * size)
        words.append(
            f"N = {n}: {loop / 1e3:.0f} kB against {small / 1e3:.0f} for one micro-batch and "
            f"{large / 1e3:.0f} at once"
        )
    return frame.conclude(good, "; ".join(words) + f"; a gradient is {size / 1e3:.0f} kB")


def figures(config: Config, data: frame.Data) -> list[Any]:
    figure, axes = drawing.panels(3, width=11.4, height=3.6)
    found = np.maximum(np.asarray(data["equal"]["distance"], float), 1e-9)
    for k, kind in enumerate(KINDS):
        drawing.line(axes[0], k, config.counts, np.log10(found[:, k]), kind)
    axes[0].set_xscale("log", base=2)
    drawing.words(
        axes[0], "Accumulated against at once", "micro-batches N", "log10 of the relative distance"
    )
    arrays = data["uneven"]
    spread = np.asarray(arrays["spread"], float)
    for k, (name, label) in enumerate(
        (("uneven", "mean of means"), ("weighted", "weighted by tokens"))
    ):
        values = np.log10(np.maximum(np.asarray(arrays[name], float), 1e-9))
        axes[1].plot(
            100 * spread, values, linestyle="none", color=drawing.COLORS[k],
            marker=drawing.MARKERS[k], label=label,
        )  # fmt: skip
    drawing.words(
        axes[1], "Paragraphs of text", "variation of the lengths, %",
        "log10 of the relative distance",
    )  # fmt: skip
    small, loop, large = np.asarray(data["memory"]["bytes"], float).T / 1e3
    for k, (values, label) in enumerate(
        ((large, "at once"), (loop, "accumulated"), (small, "one micro-batch"))
    ):
        axes[2].plot(
            config.counts, values, color=drawing.COLORS[k], marker=drawing.MARKERS[k], label=label
        )
    axes[2].set_xscale("log", base=2)
    axes[2].set_yscale("log")
    drawing.words(axes[2], "Memory of a step", "micro-batches N", "kB beside parameters and data")
    return [figure]


EXPERIMENT = frame.Experiment(
    name="accumulation",
    question="Are several micro-batches one large batch, and what is each way to get that wrong?",
    claims=(
        frame.Claim(
            key="equal",
            statement="Accumulating the gradients of N micro-batches equals one batch N times as "
            "large.",
            predicted="the same gradient to float32 rounding, whatever N",
            judge=judge_equal,
            intuition="Whatever couples the examples of a batch breaks it: BatchNorm sees "
            "micro-batches, however many are accumulated.",
        ),
        frame.Claim(
            key="erased",
            statement="With zero_grad() before every backward pass the effective batch is just one "
            "micro-batch.",
            predicted="the step's gradient is the last micro-batch's",
            judge=judge_erased,
            intuition="In the usual loop the loss is divided by N too, so that the gradient is an "
            "N-th of one micro-batch's: it looks like a learning rate that is too low.",
        ),
        frame.Claim(
            key="noise",
            statement="Erasing the accumulated gradient makes the gradient's noise that of one "
            "micro-batch.",
            predicted="variance x N for independent examples",
            judge=judge_noise,
            intuition="Compare the scatter of gradient norms with and without accumulation: it "
            "must fall by sqrt(N).",
        ),
        frame.Claim(
            key="summed",
            statement="Summing micro-batches instead of averaging them is a learning rate N times "
            "too high.",
            predicted="parameters as after averaging at N times the rate",
            judge=judge_summed,
            intuition="Adam hides the fault completely, a clip hides it in part; it shows when the "
            "rule is changed.",
        ),
        frame.Claim(
            key="uneven",
            statement="The mean of the micro-batches' mean losses is the batch's mean loss.",
            predicted="the same gradient",
            judge=judge_uneven,
            intuition="Tokens of short sequences weigh more: divide by the tokens of the whole "
            "batch, not of the micro-batch.",
        ),
        frame.Claim(
            key="weighted",
            statement="Micro-batches weighted by their numbers of tokens give the batch's gradient "
            "however unevenly it is split.",
            predicted="the same gradient to float32 rounding",
            judge=judge_weighted,
        ),
        frame.Claim(
            key="memory",
            statement="Accumulation trains with a large batch in the memory of a small one.",
            predicted="activations of one micro-batch, and the accumulator",
            judge=judge_memory,
            intuition="It costs one more copy of the parameters, and saves activations only.",
        ),
    ),
    presets={
        "tiny": Config(width=16, batch=32, counts=(2, 4), seeds=3, draws=100, micro=4, steps=4),
        "quick": Config(),
        "full": Config(width=512, batch=1024, counts=(2, 8, 32, 128), seeds=32, draws=4000),
    },
    points=points,
    figures=figures,
)
