"""What does clipping the gradient's norm change, for each rule, and where must it stand?"""

import math
from typing import Any

import numpy as np

from experiments.atlas import drawing, frame
from experiments.clipping_nets import EVERY, SETTINGS, Config, points

NAMES = tuple(SETTINGS)


def _of(data: frame.Data, rule: str, key: str, setting: str) -> np.ndarray:
    """One number a seed."""
    return np.asarray(data[f"digits-{rule}"][key], np.float64)[:, NAMES.index(setting)]


def _damage(data: frame.Data, rule: str, where: str) -> np.ndarray:
    """By how much the spike raised the loss of the steps after it, in nats; one number a seed."""
    spiked, calm = (_of(data, rule, "after_spike", f"{where}{s}") for s in (", spike", ""))
    # beyond a guess a loss says no more; a network that broke is one that guesses
    return np.minimum(np.nan_to_num(spiked, nan=np.inf), math.log(10)) - calm


def judge_before(config: Config, data: frame.Data) -> frame.Verdict:
    """By rule: clipped before, the interval of the spike's damage reaches no tenth of a nat."""
    return _judge_damage(config, data, "before")


def judge_after(config: Config, data: frame.Data) -> frame.Verdict:
    """By rule: clipped after the update, all of the interval lies above a tenth of a nat."""
    return _judge_damage(config, data, "after")


def _judge_damage(config: Config, data: frame.Data, where: str) -> frame.Verdict:
    good, words = {}, []
    for rule in config.rules:
        mean, low, high = frame.interval(_damage(data, rule, where))
        without = float(np.mean(_damage(data, rule, "none")))
        good[rule] = bool(high < 0.1 if where == "before" else low > 0.1)
        words.append(f"{rule} {mean:+.2f} [{low:+.2f}, {high:+.2f}] (no clip {without:+.2f})")
    measured = f"nats of loss over {config.window} steps after a gradient x {config.spike:g}: "
    return frame.conclude(good, measured + "; ".join(words))


def judge_step(config: Config, data: frame.Data) -> frame.Verdict:
    """By rule: without a clip the spike's step is over twice the one with it."""
    good, words = {}, []
    for rule in config.rules:
        relative = {
            where: _of(data, rule, "spike_step", f"{where}, spike")
            / _of(data, rule, "usual_step", f"{where}, spike")
            for where in ("none", "before")
        }
        mean, low, high = frame.interval(relative["none"])
        good[rule] = bool(mean > 2 * relative["before"].mean())
        words.append(
            f"{rule} {mean:.3g} [{low:.3g}, {high:.3g}] usual steps, clipped "
            f"{relative['before'].mean():.3g}"
        )
    return frame.conclude(good, "the spike's step: " + "; ".join(words))


def _memory(data: frame.Data, rule: str, where: str) -> np.ndarray:
    """Step by gradient long after the spike, relative to the same run without one; NaN: broken."""
    return _of(data, rule, "later_rate", f"{where}, small spike") / _of(
        data, rule, "later_rate", where
    )


def judge_memory(config: Config, data: frame.Data) -> frame.Verdict:
    """By rule, without a clip: steps `later` steps on are three quarters of the usual, or more.

    In units of the gradient, whose own size the damage raises.
    """
    good, words, divergence = {}, [], 0.0
    for rule in config.rules:
        mean, low, high = frame.interval(_memory(data, rule, "none"))
        clipped = float(np.mean(_memory(data, rule, "before")))
        good[rule] = bool(mean > 0.75)
        found = f"x {mean:.3f} [{low:.3f}, {high:.3f}]" if np.isfinite(mean) else "broken"
        words.append(f"{rule} {found}, clipped x {clipped:.3f}")
        if np.isfinite(mean):
            divergence = max(divergence, abs(math.log(mean)))
    span = f"steps {config.later} to {config.later + config.window}"
    measured = f"steps by gradient, {span} after one x {config.small_spike:g}: " + "; ".join(words)
    return frame.conclude(good, measured, divergence=divergence)


def judge_proportional(config: Config, data: frame.Data) -> frame.Verdict:
    """By rule: from max_norm 0.01 to 0.001 the mean step falls by ten, to 25 %."""
    good, words, divergence = {}, [], 0.0
    for rule in config.rules:
        ratio = np.log(
            _of(data, rule, "mean_step", "before at 0.001")
            / _of(data, rule, "mean_step", "before at 0.01")
        )
        mean, low, high = np.exp(frame.interval(ratio))
        good[rule] = bool(abs(math.log(mean) - math.log(0.1)) < math.log(1.25))
        words.append(f"{rule} x {mean:.3f} [{low:.3f}, {high:.3f}]")
        divergence = max(divergence, abs(math.log(mean / 0.1)))
    return frame.conclude(good, "mean step " + "; ".join(words), divergence=divergence)


def judge_rare(config: Config, data: frame.Data) -> frame.Verdict:
    """By task: after the first fifth (text) or in the last quarter (digits) under 5 % of steps."""
    good, words = {}, []
    engaged = np.asarray(data["text"]["engaged"], np.float64)[:, 1]
    mean, low, high = frame.interval(engaged[:, 1:].mean(1))
    good["text with AdamW"] = bool(mean < 0.05)
    first = engaged[:, 0].mean()
    words.append(f"text with AdamW {mean:.1%} [{low:.1%}, {high:.1%}] (first fifth {first:.1%})")
    for rule in config.rules:
        mean, low, high = frame.interval(_of(data, rule, "engaged_last", "before"))
        whole = _of(data, rule, "engaged", "before").mean()
        good[f"digits with {rule}"] = bool(mean < 0.05)
        words.append(f"digits with {rule} {mean:.1%} [{low:.1%}, {high:.1%}] (all {whole:.1%})")
    return frame.conclude(good, "steps with a norm above 1.0: " + "; ".join(words))


def judge_text(config: Config, data: frame.Data) -> frame.Verdict:
    """Of a transformer without spikes: the clip changes the last loss by over 2 %."""
    del config
    loss = np.asarray(data["text"]["loss"], np.float64)[..., -1]
    ratio = np.log(loss[:, 1] / loss[:, 0])
    mean, low, high = np.expm1(frame.interval(ratio))
    measured = f"last loss {mean:+.1%} [{low:+.1%}, {high:+.1%}] with the clip at 1.0"
    helps = float(frame.interval(ratio)[2]) < -0.02
    return frame.Verdict("holds" if helps else "false", measured)


def judge_direction(config: Config, data: frame.Data) -> frame.Verdict:
    """By kind: the clipped gradient keeps its direction, a cosine above 0.99."""
    cosine = np.asarray(data["text"]["value_cosine"], np.float64)[:, 0]
    mean, low, high = frame.interval(cosine)
    good = {"by norm": True, "by value": bool(low > 0.99)}
    measured = f"by value at {config.by_value} of the norm {mean:.3f} [{low:.3f}, {high:.3f}]"
    return frame.conclude(good, measured, divergence=abs(math.log(mean)))


def figures(config: Config, data: frame.Data) -> list[Any]:
    spikes, axes = drawing.panels(len(config.rules), width=11.0, height=3.2)
    for column, (ax, rule) in enumerate(zip(axes, config.rules, strict=True)):
        losses = np.asarray(data[f"digits-{rule}"]["loss"], np.float64)
        steps = (np.arange(losses.shape[-1]) + 0.5) * EVERY
        for index, setting in enumerate(NAMES[3:6]):
            values = np.nan_to_num(losses[:, NAMES.index(setting)], nan=100.0)
            label = setting.split(",")[0] if column == 0 else ""
            label = {"none": "no clip", "before": "clip before", "after": "clip after"}.get(
                label, ""
            )
            drawing.line(ax, index, steps, np.clip(values, 1e-4, 100), label)
        ax.axvline(config.spike_at, color=drawing.FAINT, linewidth=0.8)
        ax.set(yscale="log")
        drawing.words(ax, rule, "step", "loss" if column == 0 else "", legend=column == 0)
    norms, (left, right) = drawing.panels(2, width=9.6)
    series = np.asarray(data["text"]["norm"], np.float64)
    steps = (np.arange(series.shape[-1]) + 0.5) * config.text_steps / series.shape[-1]
    for k, name in enumerate(("no clip", "clip at 1.0")):
        drawing.line(left, k, steps, series[:, k], name)
    left.axhline(1.0, color=drawing.INK, linestyle="--", linewidth=1.0)
    left.set(yscale="log")
    drawing.words(left, "A transformer on text, AdamW", "step", "norm of the gradient")
    for k, where in enumerate(("none", "before")):
        values = np.stack([_memory(data, r, where) for r in config.rules], 1)
        label = "no clip" if where == "none" else "clip before"
        drawing.dots(right, k, np.arange(len(config.rules)), values, label)
    right.set_xticks(range(len(config.rules)), config.rules)
    right.axhline(1.0, color=drawing.FAINT, linewidth=0.8)
    title = f"Steps {config.later} after the spike"
    drawing.words(right, title, "", "step by gradient over no spike's")
    return [spikes, norms]


CLAIMS = (
    frame.Claim(
        key="before",
        statement="A clip before the update keeps one wrong gradient from doing damage.",
        predicted="a loss as without the spike, whatever the rule",
        judge=judge_before,
        intuition="The clip belongs between backward and step.",
    ),
    frame.Claim(
        key="after",
        statement="A clip after the update lets one wrong gradient corrupt training.",
        predicted="a loss above that without the spike, whatever the rule",
        judge=judge_after,
        intuition="SGD forgets a bounded step soon. Rules with a memory go on in the wrong "
        "direction: momentum and Adam for ten steps, Lion for a hundred.",
    ),
    frame.Claim(
        key="step",
        statement="Clipping protects by making the step of a spike smaller.",
        predicted=f"a step more than halved; of Adam at most {0.1 / 0.001**0.5:.2f} lr an element",
        judge=judge_step,
        intuition="Lion's step is its rate whatever the gradient; Adam's has a ceiling.",
    ),
    frame.Claim(
        key="memory",
        statement="When a spike has passed without a clip, the rule works as before.",
        predicted="step by gradient as usual; for gradients of one size Adam's is "
        "(1 + (1 - b2) K^2 b2^k / (1 - b2^t))^-1/2 of it, k steps after step t - k",
        judge=judge_memory,
        intuition="Adam remembers the square of a spike for 1 / (1 - b2) = 1000 steps, and crawls: "
        "a clip protects its second moment.",
    ),
    frame.Claim(
        key="proportional",
        statement="A ten times lower max_norm makes ten times smaller steps.",
        predicted="0.1 (a clip that is always active scales the gradient)",
        judge=judge_proportional,
        intuition="Adam and Lion divide the scale out again: below the usual norm the threshold "
        "does nothing for them.",
    ),
    frame.Claim(
        key="rare",
        statement="A clip at 1.0 is a guard that engages on rare spikes only.",
        predicted="under 5 % of the steps",
        judge=judge_rare,
        intuition="Whether 1.0 is high depends on the model's size and loss: watch the raw norm.",
    ),
    frame.Claim(
        key="text",
        statement="A clip at 1.0 makes a healthy transformer train better.",
        predicted="a last loss lower by over 2 %",
        judge=judge_text,
        intuition="Under Adam a clip is insurance: no gain while nothing happens.",
    ),
    frame.Claim(
        key="direction",
        statement="Clipping keeps the gradient's direction.",
        predicted="a cosine of one with the raw gradient",
        judge=judge_direction,
        intuition="By norm exactly; by value the gradient turns towards its small elements.",
    ),
)

EXPERIMENT = frame.Experiment(
    name="clipping",
    question="What does clipping change for each rule, and where must it stand?",
    claims=CLAIMS,
    presets={
        "tiny": Config(
            rules=("SGD", "Adam"), width=16, hidden=1, seeds=3, steps=200, spike_at=80, later=40,
            text_width=16, text_depth=1, length=16, text_batch=4, text_steps=40,
        ),
        "quick": Config(),
        "full": Config(seeds=32, width=256, steps=4000, spike_at=2000, text_width=256,
                       text_depth=6, length=128, text_steps=5000),
    },
    points=points,
    figures=figures,
)  # fmt: skip
