"""What the data say of Pre-LN and Post-LN, statement by statement."""

from typing import Any

import numpy as np

from experiments.atlas import frame
from experiments.pre_post_ln_nets import NORMS, Config, entropy, kept
from jaxgrad import theory


def tasks(config: Config) -> dict[str, tuple[str, str]]:
    """{case: (beginning of its points' names, end)} of the trainings."""
    found = {f"digits, {d} blocks": ("digits", f"-{d}") for d in config.depths}
    return {**found, f"text, {config.depths[-1]} blocks": ("text", "")}


def rates(config: Config, case: tuple[str, str]) -> np.ndarray:
    """The peak learning rates of a task."""
    return np.array(config.text_rates if case[0] == "text" else config.rates)


def losses(data: frame.Data, case: tuple[str, str], norm: str) -> np.ndarray:
    """Final losses, (runs, rates, without and with warm-up)."""
    return np.asarray(data[f"{case[0]}-{norm}{case[1]}"]["loss"], float)


def marginal(data: frame.Data, case: tuple[str, str]) -> float:
    """The loss that ignores the input."""
    return entropy(data["labels"][case[0]])


def outcomes(found: np.ndarray, chance: float) -> np.ndarray:
    """Trains: below 93 % of the marginal entropy; diverges: above 120 % or not finite; stalls."""
    with np.errstate(invalid="ignore"):
        words = [found < 0.93 * chance, ~(found <= 1.2 * chance)]
    return np.select(words, ["trains", "diverges"], "stalls")


def mean_outcomes(data: frame.Data, case: tuple[str, str], norm: str) -> np.ndarray:
    """The outcome of the mean over runs, (rates, warm-ups)."""
    return outcomes(losses(data, case, norm).mean(0), marginal(data, case))


def judge_diverges(config: Config, data: frame.Data) -> frame.Verdict:
    """By task: at Pre-LN's best rate without warm-up Post-LN diverges."""
    good, words = {}, []
    for name, case in tasks(config).items():
        place = np.nanargmin(losses(data, case, "pre").mean(0)[:, 0])
        found = losses(data, case, "post")[:, place, 0]
        outcome = str(mean_outcomes(data, case, "post")[place, 0])
        good[name] = outcome == "diverges"
        words.append(
            f"{name}: at {rates(config, case)[place]:g} Post-LN {outcome} at {found.mean():.2f}, "
            f"Pre-LN {losses(data, case, 'pre').mean(0)[place, 0]:.2f}"
        )
    return frame.conclude(good, "; ".join(words))


def judge_stalls(config: Config, data: frame.Data) -> frame.Verdict:
    """By task: runs that fail where Pre-LN trains end at the marginal entropy, to 3 %."""
    good, words, divergence = {}, [], None
    for name, case in tasks(config).items():
        chance = marginal(data, case)
        found = losses(data, case, "post")
        failed = outcomes(found, chance) != "trains"
        failed &= (mean_outcomes(data, case, "pre") == "trains")[None]
        if not failed.any():
            words.append(f"{name}: none fails")
            continue
        mean, spread = found[failed].mean(), found[failed].std()
        good[name] = bool(abs(mean / chance - 1) < 0.03)
        words.append(
            f"{name}: {failed.sum()} runs fail at {mean:.3f} (spread {spread:.3f}), "
            f"H = {chance:.3f}"
        )
        ratio = abs(float(np.log(mean / chance))) if mean > 0 else float("inf")
        divergence = max(divergence or 0.0, ratio)
    if not good:  # nothing failed, so nothing stalls
        good = {"failing runs": False}
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_warm_up(config: Config, data: frame.Data) -> frame.Verdict:
    """By task and rate: where Post-LN fails without warm-up and Pre-LN trains, warm-up helps."""
    good, words = {}, []
    for name, case in tasks(config).items():
        pre, post = (mean_outcomes(data, case, norm) for norm in NORMS)
        found = losses(data, case, "post").mean(0)
        for k, rate in enumerate(rates(config, case)):
            if pre[k, 0] == "trains" and post[k, 0] != "trains":
                good[f"{name} at {rate:g}"] = post[k, 1] == "trains"
                words.append(f"{name} at {rate:g}: {found[k, 0]:.2f}, warmed up {found[k, 1]:.2f}")
    if not good:  # Post-LN needs no warm-up here
        return frame.Verdict("false", "Post-LN fails nowhere that Pre-LN trains")
    return frame.conclude(good, "; ".join(words))


def largest_rates(config: Config, data: frame.Data, case: tuple[str, str]) -> np.ndarray:
    """Per run the largest rate that trains without warm-up, (runs, norms); 0 where none does."""
    rows = []
    for norm in NORMS:
        trains = outcomes(losses(data, case, norm)[..., 0], marginal(data, case)) == "trains"
        rows.append((trains * rates(config, case)).max(-1))
    return np.array(rows).T


def judge_lower(config: Config, data: frame.Data) -> frame.Verdict:
    """By task: the largest rate that trains is 5 to 10 times lower for Post-LN."""
    good, words = {}, []
    for name, case in tasks(config).items():
        pre, post = largest_rates(config, data, case).T
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.exp(np.mean(np.log(pre / post)))
        good[name] = bool(5 <= ratio <= 10.5)
        if np.isfinite(ratio):
            words.append(f"{name}: {ratio:.1f} times ({pre.max():g} against {post.max():g})")
        else:
            words.append(f"{name}: in some run Post-LN trains at none of the rates")
    return frame.conclude(good, "; ".join(words))


def judge_last(config: Config, data: frame.Data) -> frame.Verdict:
    """By norm: the last matrix's gradient is the theory's at every depth above 1, to 10 %."""
    depths, arrays = kept(config.depth), data["feed_forward"]
    good, words, divergence = {}, [], 0.0
    for norm in NORMS:
        mean, low, high = frame.interval(arrays[f"{norm}_last"])
        predicted = np.asarray(theory.last_weight_gradient(config.width, depths, norm), float)
        # Post-LN's stream reaches its mean square with the first block
        ratio = (mean / predicted)[depths > 1]
        good[f"{norm.capitalize()}-LN"] = bool(np.all(np.abs(ratio - 1) < 0.1))
        words.append(
            f"{norm.capitalize()}-LN at depth {depths[-1]}: {mean[-1]:.1f} [{low[-1]:.1f}, "
            f"{high[-1]:.1f}], theory {predicted[-1]:.1f}; ratios {ratio.min():.3f} to "
            f"{ratio.max():.3f}"
        )
        divergence = max(divergence, float(np.abs(np.log(ratio)).max()))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def slopes(depths: np.ndarray, values: Any) -> np.ndarray:
    """Of ln values over ln depth, from depth 4 on, a seed each."""
    some = depths >= 4
    return np.polyfit(np.log(depths[some]), np.log(np.asarray(values, float)[:, some]).T, 1)[0]


def judge_root(config: Config, data: frame.Data) -> frame.Verdict:
    """The fitted exponent's 95 % interval holds -1/2; else by how far it is off."""
    depths = kept(config.depth)
    found = slopes(depths, data["feed_forward"]["pre_last"])
    mean, low, high = frame.interval(found)
    law = theory.last_weight_gradient(config.width, depths, "pre")
    formula = slopes(depths, np.asarray(law)[None])[0]
    words = f"exponent {mean:.3f} [{low:.3f}, {high:.3f}]; sqrt(1 + L/2) has {formula:.3f} here"
    reach = float(np.log(depths[-1] / depths[depths >= 4][0]))
    good = {"all depths": bool(low <= -0.5 <= high)}
    return frame.conclude(good, words, divergence=abs(float(mean) + 0.5) * reach)


def judge_flat(config: Config, data: frame.Data) -> frame.Verdict:
    """By net: first and last block differ by less than 25 %."""
    arrays = data["feed_forward"]
    profile = np.log(np.asarray(arrays["pre_profile"], float))
    falls = {
        "feed-forward blocks": profile[:, 0] - profile[:, -1],
        "attention blocks": np.asarray(data["attention"]["pre"], float)[:, 0],
    }
    good, words, divergence = {}, [], 0.0
    for name, fall in falls.items():
        mean, low, high = np.exp(frame.interval(fall))
        good[name] = bool(abs(np.log(mean)) < np.log(1.25))
        words.append(f"{name}: first over last {mean:.2f} [{low:.2f}, {high:.2f}]")
        divergence = max(divergence, abs(float(np.log(mean))))
    exponent = slopes(kept(config.depth), arrays["pre_profile"]).mean()
    return frame.conclude(
        good, "; ".join(words) + f"; it falls as depth^{exponent:.2f}", divergence=divergence
    )


def judge_decay(config: Config, data: frame.Data) -> frame.Verdict:
    """By net: ln of the gradient falls by ln(3/2) / 2 a sublayer, to 25 %."""
    found = {
        "feed-forward blocks": (data["feed_forward"]["post_log_gain"], config.depth),
        "attention blocks": (np.asarray(data["attention"]["post"])[:, 0], 2 * config.blocks),
    }
    good, words, divergence = {}, [], 0.0
    for name, (gain, sublayers) in found.items():
        mean, low, high = frame.interval(gain)
        predicted = -sublayers * np.log(1.5) / 2
        good[name] = bool(abs(mean / predicted - 1) < 0.25)
        words.append(
            f"{name}: ln {mean:.2f} [{low:.2f}, {high:.2f}] after {sublayers} sublayers, predicted "
            f"{predicted:.1f}"
        )
        divergence = max(divergence, abs(float(mean - predicted)))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def two_modes(config: Config) -> np.ndarray:
    """Ln of the gradient at the blocks' inputs by the recursion for uniform attention."""
    profile = theory.post_ln_attention_profile(config.blocks, config.tokens).gradient
    return np.log(np.asarray(profile, float))[:-1]


def judge_modes(config: Config, data: frame.Data) -> frame.Verdict:
    """By part of the net: the recursion's ln is met to 0.2 at every block."""
    mean = np.asarray(data["attention"]["post"], float).mean(0)
    gap, half = mean - two_modes(config), config.blocks // 2
    parts = {"the upper half": gap[half:], "the lower half": gap[:half]}
    good = {name: bool(np.abs(part).max() < 0.2) for name, part in parts.items()}
    words = "; ".join(f"{n}: off by {p.min():+.2f} to {p.max():+.2f}" for n, p in parts.items())
    lowest = f"lowest ln {mean.min():.2f}, theory {two_modes(config).min():.2f}"
    return frame.conclude(good, f"{words}; {lowest}", divergence=float(np.abs(gap).max()))


def stable_factors(config: Config, data: frame.Data, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """Largest rates over the predicted one: (loss never above its start, loss ends lower)."""
    found = np.asarray(data[f"stability-{norm}"]["losses"], float)
    first, most, last = np.moveaxis(found, -1, 0)
    with np.errstate(invalid="ignore"):
        calm = np.logical_and.accumulate(most <= first, axis=1)
        lower = np.logical_and.accumulate(last < first, axis=1)
    factors = np.array(config.factors)
    return (calm * factors).max(-1), (lower * factors).max(-1)


def judge_stable(config: Config, data: frame.Data) -> frame.Verdict:
    """By norm: up to the predicted rate, to a factor 1.5, the loss never rises above its start."""
    good, words, divergence = {}, [], 0.0
    for norm in NORMS:
        calm, lower = stable_factors(config, data, norm)
        predicted = np.asarray(data[f"stability-{norm}"]["predicted"], float)
        with np.errstate(divide="ignore"):
            mean, end = (float(np.exp(np.log(found).mean())) for found in (calm, lower))
        good[f"{norm.capitalize()}-LN"] = bool(1 / 1.5 < mean < 1.5)
        rates = ", ".join(f"{p:.3g}" for p in predicted)
        words.append(
            f"{norm.capitalize()}-LN: predicted {rates}; the loss stays below its start up to "
            f"{mean:.2g} times that, and ends lower up to {end:.2g} times"
        )
        divergence = max(divergence, abs(float(np.log(mean))) if mean > 0 else float("inf"))
    return frame.conclude(good, "; ".join(words), divergence=divergence)
