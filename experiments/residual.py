"""Is the gradient below a residual block never smaller than above it, and is that why it flows?"""

import math
from typing import Any

import numpy as np

from experiments.atlas import drawing, frame
from experiments.residual_nets import SKIPS, STREAMS, Config, depths_kept, points

NAMES = {"none": "no skip", "plain": "h + F(h)", "pre_ln": "Pre-LN", "post_ln": "Post-LN"}


def judge_shift(config: Config, data: frame.Data) -> frame.Verdict:
    """By rule: the two agree to the tolerance for every seed."""
    errors = np.max(np.asarray(data["shift"]["error"]), 0)
    good = {r: bool(e < config.tolerance) for r, e in zip(config.rules, errors, strict=True)}
    words = [f"{r} {e:.0e}" for r, e in zip(config.rules, errors, strict=True)]
    return frame.conclude(good, "|J - (J_F + I)| / |J|: " + "; ".join(words))


def _top(data: frame.Data, rule: str) -> np.ndarray:
    """Log of the gradient's norm relative to the output's, (seeds, depths kept)."""
    return np.asarray(data[f"stream-{rule}"]["log_gradient"], np.float64)


def judge_highway(config: Config, data: frame.Data) -> frame.Verdict:
    """By rule with a skip: at no block of any network is the gradient below a tenth of the top."""
    good, words, divergence = {}, [], 0.0
    for rule in SKIPS:
        logs = _top(data, rule)
        good[NAMES[rule]] = bool(np.min(logs) > math.log(0.1))
        if not np.all(np.isfinite(logs)):
            words.append(f"{NAMES[rule]} overflows float32 on the way")
            continue
        words.append(
            f"{NAMES[rule]} from {np.exp(logs.min()):.2g} to {np.exp(logs.max()):.2g} times the "
            "output's"
        )
        divergence = max(divergence, float(np.max(np.abs(logs))))
    measured = f"{config.depth} blocks: " + "; ".join(words)
    return frame.conclude(good, measured, divergence=divergence)


def judge_without(config: Config, data: frame.Data) -> frame.Verdict:
    """Without a skip: the interval at the input lies below a thousandth of the output's."""
    mean, low, high = (v[0] / math.log(10) for v in frame.interval(_top(data, "none")))
    measured = f"after {config.depth} blocks 10^{mean:.1f} [{low:.1f}, {high:.1f}] of the output's"
    return frame.Verdict("holds" if high < -3 else "false", measured)


def judge_never(config: Config, data: frame.Data) -> frame.Verdict:
    """By scale of the branch, and for the digits' networks: no block shrinks the gradient."""
    shares = np.asarray(data["branches"]["shrinks"], np.float64)
    good, words = {}, []
    mean, low, high = frame.interval(shares)
    for k, s in enumerate(config.scales):
        good[f"s = {s:g}"] = bool(np.all(shares[:, k] == 0))
        words.append(f"s = {s:g}: {mean[k]:.3f} [{low[k]:.3f}, {high[k]:.3f}]")
    trained = np.asarray(data["digits"]["shrinks"], np.float64)
    for k, when in enumerate(("at first", "trained")):
        m, a, b = frame.interval(trained[:, k])
        good[f"Pre-LN on digits, {when}"] = bool(np.all(trained[:, k] == 0))
        words.append(f"Pre-LN on digits, {when}: {m:.3f} [{a:.3f}, {b:.3f}]")
    return frame.conclude(good, "share of blocks that shrink it: " + "; ".join(words))


def judge_law(config: Config, data: frame.Data) -> frame.Verdict:
    """By scale: |z| < 4 for the share, whose blocks are independent draws."""
    shares, law = (np.asarray(data["branches"][k], np.float64) for k in ("shrinks", "theory"))
    count = len(shares) * config.depth
    error = np.sqrt(np.maximum(law * (1 - law), 1 / count) / count)
    z = (shares.mean(0) - law) / error
    good = {f"s = {s:g}": bool(abs(v) < 4) for s, v in zip(config.scales, z, strict=True)}
    words = [
        f"s = {s:g}: {m:.4f}, predicted {p:.4f} (z = {v:.1f})"
        for s, m, p, v in zip(config.scales, shares.mean(0), law, z, strict=True)
    ]
    return frame.conclude(good, "; ".join(words))


def judge_mean_square(config: Config, data: frame.Data) -> frame.Verdict:
    """By scale: the mean squared factor is 1 + s^2, inside the interval or to 1 %."""
    mean, low, high = frame.interval(np.asarray(data["branches"]["square"], np.float64))
    good, words, divergence = {}, [], 0.0
    for k, s in enumerate(config.scales):
        law = 1 + s**2
        good[f"s = {s:g}"] = bool(low[k] <= law <= high[k] or abs(mean[k] / law - 1) < 0.01)
        words.append(f"s = {s:g}: {mean[k]:.4f} [{low[k]:.4f}, {high[k]:.4f}], 1 + s^2 {law:.4f}")
        divergence = max(divergence, abs(math.log(mean[k] / law)))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_fitted(config: Config, data: frame.Data) -> frame.Verdict:
    """In every network that learned y = x / 10: the gradient at the input is not smaller."""
    logs = np.asarray(data["fitted"]["log_gain"], np.float64).sum(1)
    mean, low, high = np.exp(frame.interval(logs))
    measured = (
        f"{config.trained_depth} blocks pass x {mean:.3f} [{low:.3f}, {high:.3f}] of it (last loss "
        f"{np.mean(data['fitted']['loss']):.1e})"
    )
    good = bool(np.all(logs >= 0))
    divergence = abs(float(logs.mean()))
    return frame.Verdict("holds" if good else "false", measured, divergence=divergence)


def figures(config: Config, data: frame.Data) -> list[Any]:
    deep, (left, right) = drawing.panels(2, width=9.6)
    depth = depths_kept(config)
    for index, rule in enumerate(STREAMS):
        drawing.line(left, index, depth, _top(data, rule) / math.log(10), NAMES[rule])
    drawing.words(left, f"{config.depth} blocks on text", "block", "log10 of the gradient over top")
    x = np.asarray(config.scales)
    drawing.line(right, 0, x, data["branches"]["shrinks"], "random branches")
    drawing.theory(right, x, data["branches"]["theory"], "noncentral chi-squared law")
    for k, when in enumerate(("at first", "trained")):
        share = float(np.mean(np.asarray(data["digits"]["shrinks"])[:, k]))
        right.axhline(share, color=drawing.COLORS[k + 1], linestyle=":")
        right.text(x[0], share, f"Pre-LN on digits, {when}", va="bottom", fontsize=8.5)
    right.set(xscale="log", ylim=(-0.02, 0.7))
    right.set_xticks(config.scales, [f"{s:g}" for s in config.scales])
    right.minorticks_off()
    drawing.words(right, "Blocks that shrink the gradient", "scale s of the branch", "share")
    return [deep]


CLAIMS = (
    frame.Claim(
        key="shift",
        statement="The Jacobian of a residual block is J_F + I: the +1 is always there.",
        predicted="equal to float32 rounding, whatever the residual rule",
        judge=judge_shift,
        intuition="Rules with a norm after the sum have no +1: their highway has a toll at every "
        "block.",
    ),
    frame.Claim(
        key="highway",
        statement="In a 96-layer Transformer vanishing gradients are prevented architecturally.",
        predicted="at every block at least the gradient at the output",
        judge=judge_highway,
        intuition="What a skip prevents is an exponential. Plain sums grow instead, and Post-LN "
        "still loses most of it.",
    ),
    frame.Claim(
        key="without",
        statement="The same 96 blocks without the skips lose the gradient.",
        predicted="below a thousandth of the output's",
        judge=judge_without,
        intuition="Attention blocks without skips vanish as deep sigmoid layers do.",
    ),
    frame.Claim(
        key="never",
        statement="Through a residual block the gradient is never smaller than dL/d_output.",
        predicted="no block shrinks it; false for J_F = -I / 2, which halves it exactly",
        judge=judge_never,
        intuition="'Never' is true on average only. A tenth-scale branch shrinks a third of all "
        "gradients, a smaller one half of them, each by little.",
    ),
    frame.Claim(
        key="law",
        statement="How often a random branch shrinks the gradient is known exactly.",
        predicted="ncx2(n, n / s^2).cdf(n / s^2), about Phi(-s sqrt(n) / 2)",
        judge=judge_law,
        intuition="Wider streams make shrinking rarer, smaller branches make it more frequent.",
    ),
    frame.Claim(
        key="mean_square",
        statement="A block multiplies the gradient's mean square by 1 + s^2.",
        predicted="1 + s^2 (Yang and Schoenholz 2017)",
        judge=judge_mean_square,
        intuition="L blocks of branches 1 / sqrt(L) multiply it by e, and no depth explodes.",
    ),
    frame.Claim(
        key="trained",
        statement="However small J_F is, the gradient reaches the input undiminished.",
        predicted="at least 1; a network that learned y = x / 10 must pass 0.1",
        judge=judge_fitted,
        intuition="Training can close the highway: J_F = -I / 10 a block is a solution like "
        "any other.",
    ),
)

EXPERIMENT = frame.Experiment(
    name="residual",
    question="Is the gradient below a residual block never smaller than above it?",
    claims=CLAIMS,
    presets={
        "tiny": Config(
            depth=16, text_width=16, length=8, kept=4, seeds=3, scales=(0.1, 1.0), branches=16,
            trained_depth=4, trained_width=16, trained=2, steps=300,
        ),
        "quick": Config(),
        "full": Config(text_width=256, length=128, seeds=16, width=256, branches=256, trained=16),
    },
    points=points,
    figures=figures,
)  # fmt: skip
