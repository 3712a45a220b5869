"""What do the update rules differ in: the loss reached, the rates that reach it, the memory?"""

from typing import Any

import numpy as np

from experiments.atlas import drawing, frame
from experiments.optimizers_nets import RULES, TASKS, Config, points, rates


def _losses(data: frame.Data, task: str) -> np.ndarray:
    """(seeds, rules, rates); a run that diverged counts as the loss at the start."""
    found = np.asarray(data[task]["loss"], float)
    start = np.asarray(data[task]["start"], float)[:, None, None]
    return np.where(np.isfinite(found), np.minimum(found, start), start)


def best(data: frame.Data, task: str) -> tuple[np.ndarray, np.ndarray]:
    """(place of each rule's best rate by the mean over seeds, its losses (seeds, rules))."""
    found = _losses(data, task)
    places = found.mean(0).argmin(-1)
    return places, np.take_along_axis(found, places[None, :, None], -1)[..., 0]


def windows(config: Config, data: frame.Data, task: str) -> np.ndarray:
    """Decades of learning rates at which a rule gets 90 % of its own descent, (seeds, rules)."""
    found = _losses(data, task)
    start = np.asarray(data[task]["start"], float)[:, None, None]
    floor = found.min(-1, keepdims=True)
    decade = (config.decades[1] - config.decades[0]) / (config.rates - 1)
    return decade * (found <= floor + 0.1 * (start - floor)).sum(-1)


def judge_sensitivity(config: Config, data: frame.Data) -> frame.Verdict:
    """By task: Adam's window of good rates is wider than SGD's, for the seeds' 95 % interval."""
    good, words, undecided = {}, [], False
    for task in TASKS:
        found = windows(config, data, task)
        gap = found[:, RULES.index("Adam")] - found[:, RULES.index("SGD")]
        mean, low, high = frame.interval(gap)
        good[task] = bool(low > 0)
        sizes = ", ".join(f"{r} {w:.1f}" for r, w in zip(RULES, found.mean(0), strict=True))
        open_ = " (these seeds do not decide it)" if low <= 0 < mean else ""
        undecided |= bool(open_)
        words.append(
            f"{task}: decades {sizes}; Adam less SGD {mean:+.2f} [{low:+.2f}, {high:+.2f}]{open_}"
        )
    if undecided and not any(good.values()):
        return frame.Verdict("holds if", "; ".join(words), "more seeds than these bear it out")
    return frame.conclude(good, "; ".join(words))


def judge_default(config: Config, data: frame.Data) -> frame.Verdict:
    """By task: at its best rate Adam ends below momentum at its own, for the 95 % interval."""
    del config
    good, words = {}, []
    for task in TASKS:
        _, found = best(data, task)
        gap = found[:, RULES.index("Adam")] - found[:, RULES.index("momentum")]
        mean, low, high = frame.interval(gap)
        good[task] = bool(high < 0)
        ends = ", ".join(f"{r} {w:.3f}" for r, w in zip(RULES, found.mean(0), strict=True))
        words.append(f"{task}: {ends}; Adam less momentum {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    return frame.conclude(good, "; ".join(words))


def judge_smaller(config: Config, data: frame.Data) -> frame.Verdict:
    """By task: among the weights the RMS update falls with the RMS gradient (slope < -0.05)."""
    del config
    good, words = {}, []
    for task in TASKS:
        places, _ = best(data, task)
        slopes = np.asarray(data[task]["slope"], float)
        slopes = np.take_along_axis(slopes, places[None, :, None], -1)[..., 0]
        mean, low, high = frame.interval(slopes[:, RULES.index("Adam")])
        good[task] = bool(high < -0.05)
        sgd = slopes[:, RULES.index("SGD")].mean()
        words.append(f"{task}: slope {mean:+.3f} [{low:+.3f}, {high:+.3f}], SGD {sgd:+.3f}")
    return frame.conclude(good, "; ".join(words))


def judge_scale(config: Config, data: frame.Data) -> frame.Verdict:
    """By rule: gradients times 10^-4 to 10^4 leave the size of the update as it is, to 2 %."""
    found = np.asarray(data["scale"]["update"], float)
    one = config.scales.index(1.0)
    good, words, divergence = {}, [], 0.0
    for k, name in enumerate(("SGD", "Adam", "Lion")):
        logs = np.log(found[:, k] / found[:, k, one : one + 1]).mean(0)
        good[name] = bool(np.abs(logs).max() < 0.02)
        words.append(
            f"{name}: x {np.exp(logs[0]):.3g} at {config.scales[0]:g}, x {np.exp(logs[-1]):.3g} at "
            f"{config.scales[-1]:g}"
        )
        if name != "SGD":
            divergence = max(divergence, float(np.abs(logs).max()))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_lion_rate(config: Config, data: frame.Data) -> frame.Verdict:
    """By task: Adam's best rate is 3 to 10 times Lion's (the centers of both windows)."""
    table = np.log(rates(config))
    good, words = {}, []
    for task in TASKS:
        found = _losses(data, task)
        start = np.asarray(data[task]["start"], float)[:, None, None]
        floor = found.min(-1, keepdims=True)
        inside = found <= floor + 0.1 * (start - floor)
        centers = (inside * table).sum(-1) / inside.sum(-1)
        gap = centers[:, RULES.index("Adam")] - centers[:, RULES.index("Lion")]
        mean, low, high = np.exp(frame.interval(gap))
        good[task] = bool(3 <= mean <= 10)
        words.append(f"{task}: {mean:.1f} times [{low:.1f}, {high:.1f}]")
    return frame.conclude(good, "; ".join(words))


def shares(config: Config, data: frame.Data) -> dict[str, float]:
    """Adam's bytes over Lion's, by what is counted."""
    (adam, lion) = np.asarray(data["memory"]["bytes"], float)
    ratios = {
        "only the optimizer's state is counted": adam[0, 1] / lion[0, 1],
        "weights, gradients and state are": (2 * adam[0, 0] + adam[0, 1])
        / (2 * lion[0, 0] + lion[0, 1]),
    }
    for k, tokens in enumerate(config.tokens):
        ratios[f"the whole step on {tokens} tokens is"] = adam[k].sum() / lion[k].sum()
    return {name: float(ratio) for name, ratio in ratios.items()}


def judge_memory(config: Config, data: frame.Data) -> frame.Verdict:
    """By what is counted: Adam takes twice the bytes of Lion, to 5 %."""
    found = shares(config, data)
    good = {name: bool(abs(ratio / 2 - 1) < 0.05) for name, ratio in found.items()}
    words = "; ".join(
        f"{name.removesuffix(' is').removesuffix(' are').removesuffix(' is counted')}: Adam over "
        f"Lion {ratio:.3f}, {100 * (1 - 1 / ratio):.0f} % saved"
        for name, ratio in found.items()
    )
    divergence = max(abs(float(np.log(2 / ratio))) for ratio in found.values())
    return frame.conclude(good, words, divergence=divergence)


def judge_state(config: Config, data: frame.Data) -> frame.Verdict:
    """By rule: Adam keeps 8 bytes a float32 parameter and Lion 4, to 1 %."""
    del config
    found = np.asarray(data["memory"]["bytes"], float)[:, 0]
    good, words = {}, []
    for (weights, state, _), name, predicted in zip(found, ("Adam", "Lion"), (8, 4), strict=True):
        each = 4 * state / weights
        good[name] = bool(abs(each / predicted - 1) < 0.01)
        words.append(f"{name}: {each:.4f} bytes of state a parameter")
    return frame.conclude(good, "; ".join(words))


def figures(config: Config, data: frame.Data) -> list[Any]:
    figure, axes = drawing.panels(2, width=9.6, height=3.8)
    table = np.log10(rates(config))
    for ax, task in zip(axes, TASKS, strict=True):
        found = _losses(data, task)
        for k, name in enumerate(RULES):
            drawing.line(ax, k, table[k], found[:, k], name)
        start = np.asarray(data[task]["start"], float).mean()
        ax.axhline(start, color=drawing.FAINT, linewidth=0.8)
        ax.set_ylim(0, 1.3 * start)
        drawing.words(ax, f"Loss on {task}", "log10 of the learning rate", "loss at the end, nats")
    bars, (ax,) = drawing.panels(1, width=7.2, height=3.2)
    found = np.asarray(data["memory"]["bytes"], float) / 1e6
    names, left = [], np.zeros(2 * len(config.tokens))
    for tokens in config.tokens:
        names += [f"Adam, {tokens} tokens", f"Lion, {tokens} tokens"]
    rows = found.transpose(1, 0, 2).reshape(-1, 3)
    for part, label in enumerate(("weights", "optimizer's state", "gradients and activations")):
        ax.barh(names, rows[:, part], left=left, color=drawing.COLORS[part], label=label)
        left = left + rows[:, part]
    ax.invert_yaxis()
    drawing.words(ax, "Memory of a training step of a transformer", "megabytes", "")
    return [figure, bars]


EXPERIMENT = frame.Experiment(
    name="optimizers",
    question="What do the update rules differ in: the loss reached, the rates that reach it, the "
    "memory?",
    claims=(
        frame.Claim(
            key="lion_memory",
            statement="Lion saves about 2x memory against Adam.",
            predicted="Adam's bytes over Lion's: 2; of weights, gradients and state 16 / 12 = 1.33",
            judge=judge_memory,
            intuition="One state of two is saved: a quarter of what is kept per parameter, and "
            "next to nothing once activations fill the memory.",
        ),
        frame.Claim(
            key="state",
            statement="Adam keeps two moments a parameter, Lion one.",
            predicted="8 and 4 bytes in float32 (Kingma and Ba 2014; Chen et al. 2023)",
            judge=judge_state,
        ),
        frame.Claim(
            key="sensitivity",
            statement="SGD needs tuning; Adam works over a wide range of learning rates.",
            predicted="a wider window of rates that give 90 % of the rule's best descent",
            judge=judge_sensitivity,
            intuition="Adam fixes the unit of the learning rate, not its tolerance: the default "
            "lands in the window because the window is always in the same place.",
        ),
        frame.Claim(
            key="default",
            statement="Adam trains better than SGD with momentum.",
            predicted="a lower loss after the same steps, both at their best rate",
            judge=judge_default,
            intuition="On text, whose tokens are rare and common, it does.",
        ),
        frame.Claim(
            key="smaller_updates",
            statement="In Adam weights with consistently large gradients get smaller updates.",
            predicted="updates fall with the gradient's size; by the rule |u| = lr |m| / sqrt(v), "
            "whose size does not depend on it",
            judge=judge_smaller,
            intuition="A smaller rate times a larger gradient: the update is the same. What makes "
            "it smaller is a gradient that changes its sign.",
        ),
        frame.Claim(
            key="scale_free",
            statement="The size of an update does not depend on the scale of the loss.",
            predicted="unchanged for gradients times c, as long as they are far above eps = 1e-8",
            judge=judge_scale,
            intuition="Below about 1e-6 Adam's eps is felt: tiny losses train slowly.",
        ),
        frame.Claim(
            key="lion_rate",
            statement="Lion needs a learning rate 3 to 10 times smaller than Adam.",
            predicted="3 to 10 (Chen et al. 2023); 4.4 for pure noise, sqrt((1 + b1) / (1 - b1))",
            judge=judge_lion_rate,
        ),
    ),
    presets={
        "tiny": Config(
            rates=3, seeds=2, width=8, depth=1, steps=20, batch=8, stream=8, blocks=1,
            text_steps=10, windows=2, window=8, wide=16, tokens=(32,),
        ),
        "quick": Config(),
        "full": Config(
            decades=(-3.5, 2.0), rates=23, seeds=8, width=256, depth=4, steps=2000, batch=128,
            stream=256, blocks=6, text_steps=3000, windows=64, window=128, wide=768,
            tokens=(1024, 16384),
        ),
    },
    points=points,
    figures=figures,
)  # fmt: skip
