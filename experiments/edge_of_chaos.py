"""Does mean-field theory say where deep nets lose their gradient, and how deep a net trains?"""

from typing import Any

import numpy as np

from experiments.atlas import drawing, frame
from experiments.edge_of_chaos_nets import (
    SPAN,
    Config,
    cells,
    critical,
    kinds,
    points,
    trained_settings,
)
from jaxgrad import theory


def _phases(config: Config) -> dict[str, np.ndarray]:
    ratios = np.tile(config.ratios, len(config.biases))
    near = abs(ratios - 1) < 0.1
    return {
        "ordered phase": (ratios < 1) & ~near,
        "near the critical line": near,
        "chaotic phase": (ratios > 1) & ~near,
    }


def deviations(config: Config, data: frame.Data) -> tuple[np.ndarray, np.ndarray]:
    """(z of the log squared gain, z of q), cell by cell, by their finite-width laws."""
    sigma_w, sigma_b = (a.ravel() for a in cells(config))
    q = theory.mean_field("tanh", sigma_w, sigma_b).q
    law = theory.log_gain_of("tanh", q, sigma_w, config.width, config.depth)
    spread = theory.variance_fluctuation("tanh", q, sigma_w, config.width)
    arrays, root = data["plane"], np.sqrt(len(data["plane"]["q"]))
    gain = (np.mean(arrays["log_gain"], 0) - law.mean) / np.asarray(law.standard_deviation) * root
    size = (np.mean(arrays["q"], 0) / np.asarray(q) - 1) / np.asarray(spread) * root
    return np.asarray(gain, float), np.asarray(size, float)


def judge_theory(config: Config, data: frame.Data) -> frame.Verdict:
    """By phase: every cell's |z| is below 4, for the gradient's log gain and for q."""
    gain, size = deviations(config, data)
    good, words = {}, []
    for phase, mask in _phases(config).items():
        worst = np.abs(gain[mask]).max(), np.abs(size[mask]).max()
        good[phase] = bool(max(worst) < 4)
        words.append(f"{phase}: |z| <= {worst[0]:.1f} (gain), {worst[1]:.1f} (q*)")
    sigma_w, sigma_b = (a.ravel() for a in cells(config))
    ideal = np.log(theory.mean_field("tanh", sigma_w, sigma_b).chi_1) * config.depth
    nats = np.abs(np.mean(data["plane"]["log_gain"], 0) - ideal).max()
    words.append(f"infinite width alone is off by up to {nats:.2f} nats in {config.depth} layers")
    return frame.conclude(good, "; ".join(words), divergence=float(nats))


def crossings(config: Config, data: frame.Data) -> np.ndarray:
    """Where each seed's log gain is zero: sigma_w over the critical one, (seeds, biases)."""
    gains = np.asarray(data["plane"]["log_gain"], float)
    gains = gains.reshape(len(gains), len(config.biases), -1)
    found = np.full(gains.shape[:2], np.nan)
    for i, j in np.ndindex(*found.shape):
        g = gains[i, j]
        k = np.flatnonzero((g[:-1] < 0) & (g[1:] >= 0))
        if len(k):
            low, high = np.log(config.ratios[k[0]]), np.log(config.ratios[k[0] + 1])
            found[i, j] = np.exp(low - g[k[0]] * (high - low) / (g[k[0] + 1] - g[k[0]]))
    return found


def judge_line(config: Config, data: frame.Data) -> frame.Verdict:
    """By bias: the gradient keeps its size at the predicted sigma_w, to 3 %."""
    good, words, divergence = {}, [], 0.0
    for j, bias in enumerate(config.biases):
        mean, low, high = frame.interval(crossings(config, data)[:, j])
        line = critical(bias)[0] ** 2
        words.append(
            f"sigma_b^2 = {bias}: sigma_w^2 = {line * mean**2:.3f} "
            f"[{line * low**2:.3f}, {line * high**2:.3f}], theory {line:.3f}"
        )
        good[f"sigma_b^2 = {bias}"] = bool(abs(mean - 1) < 0.03)
        divergence = max(divergence, abs(float(np.log(mean)))) if mean > 0 else np.inf
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_correlation(config: Config, data: frame.Data) -> frame.Verdict:
    """Ordered: ln(1 - c) falls as a tangent's law says, to |z| < 4. Chaotic: c ends at c*."""
    sigma_w, sigma_b = (a.ravel() for a in cells(config))
    field = theory.mean_field("tanh", sigma_w, sigma_b)
    arrays, phases = data["plane"], _phases(config)
    ordered, chaotic = phases["ordered phase"], phases["chaotic phase"]
    # nearby inputs part as a tangent vector grows, so its finite-width law holds for 1 - c
    law = theory.log_gain_of("tanh", field.q, sigma_w, config.width, SPAN)
    fall = np.diff(np.asarray(arrays["log_apart"], float), axis=-1)[..., 0]
    z = (fall.mean(0) - law.mean) / np.asarray(law.standard_deviation) * np.sqrt(len(fall))
    rate = (fall.mean(0) / SPAN / np.log(np.asarray(field.chi_1, float)))[ordered]
    mean, low, high = frame.interval(arrays["c"])
    error = np.maximum((high - low) / 4, 1e-9)[chaotic]
    off = (mean - np.asarray(field.c))[chaotic]
    good = {
        "the ordered phase": bool(np.all(np.abs(z[ordered]) < 4)),
        "the chaotic phase": bool(np.all(np.abs(off) < 4 * error)),
    }
    words = (
        f"ordered: 1 - c decays at {rate.min():.3f} to {rate.max():.3f} times the rate of infinite "
        f"width, |z| <= {np.abs(z[ordered]).max():.1f} by the law of this width; chaotic: c off c* "
        f"by {off.min():+.3f} to {off.max():+.3f}, {np.abs(off / error).max():.1f} standard errors"
    )
    divergence = float(np.abs(np.log(np.maximum(rate, 1e-9))).max())
    return frame.conclude(good, words, divergence=divergence)


def limits(config: Config) -> np.ndarray:
    """6 xi_c of the Gaussian columns."""
    sigma = np.array([s for kind, s in trained_settings(config) if kind == "gaussian"])
    field = theory.mean_field("tanh", sigma, config.bias**0.5)
    edge = np.isclose(sigma, critical(config.bias)[0])
    return np.where(edge, np.inf, 6 * np.asarray(field.xi_c, float))


def judge_depth(config: Config, data: frame.Data) -> frame.Verdict:
    """By phase: more than a factor 1.5 off the boundary, exactly those below it pass 50 %."""
    limit, right, words = limits(config), {}, []
    sigma = np.array([s for _, s in trained_settings(config)][: len(limit)])
    edge = critical(config.bias)[0]
    phase = np.select([np.isclose(sigma, edge), sigma < edge], ["critical line", "ordered phase"],
                      "chaotic phase")  # fmt: skip
    agree, clear = [], []
    for depth in config.depths:
        accuracy = np.mean(data[f"depth={depth}"]["accuracy"], 0)[: len(limit)]
        agree.append((accuracy > 0.5) == (depth < limit))
        clear.append(np.maximum(depth / limit, limit / depth) > 1.5)
        words.append(f"depth {depth}: accuracy " + ", ".join(f"{a:.2f}" for a in accuracy))
    agree, clear = np.array(agree), np.array(clear)
    for name in ("ordered phase", "critical line", "chaotic phase"):
        if clear[:, phase == name].any():
            right[name] = bool((agree | ~clear)[:, phase == name].all())
    columns = ", ".join(f"{s**2:.2f} ({x:.0f})" for s, x in zip(sigma, limit, strict=True))
    words.insert(
        0,
        f"{agree.sum()} of {agree.size} cells as the rule says, {agree[clear].sum()} of "
        f"{clear.sum()} far from the boundary; sigma_w^2 (6 xi_c): {columns}",
    )
    return frame.conclude(right, "; ".join(words))


def judge_isometry(config: Config, data: frame.Data) -> frame.Verdict:
    """By net: orthogonal weights leave the largest singular value below 1.2."""
    good, words = {}, []
    largest = np.asarray(data["spectra"]["largest"], float)
    for k, name in enumerate(kinds(config)):
        mean, low, high = frame.interval(largest[:, k, 1])
        gaussian = largest[:, k, 0].mean()
        good[name] = bool(high < 1.2)
        words.append(f"{name}: {mean:.2f} [{low:.2f}, {high:.2f}], Gaussian {gaussian:.2f}")
    worst = float(np.log(largest[:, :, 1].mean(0)).max())
    return frame.conclude(good, "; ".join(words), divergence=worst)


def predicted_spreads(config: Config) -> np.ndarray:
    """Variance of the squared singular values over their mean squared, (kinds, 2)."""
    rows = []
    for phi, q, sigma_w in kinds(config).values():
        laws = [
            theory.squared_singular_values(phi, q, sigma_w, config.spectrum_depth, weights)
            for weights in ("gaussian", "orthogonal")
        ]
        rows.append([float(law.variance / law.mean**2) for law in laws])
    return np.array(rows)


def judge_spectra(config: Config, data: frame.Data) -> frame.Verdict:
    """By weights: the measured variance is that of free probability, to 10 % or 0.01."""
    spread = np.asarray(data["spectra"]["spread"], float)
    predicted, mean = predicted_spreads(config), spread.mean(0)
    good, words = {}, []
    for j, weights in enumerate(("Gaussian weights", "orthogonal weights")):
        close = np.abs(mean - predicted)[:, j] < np.maximum(0.1 * predicted[:, j], 0.01)
        good[weights] = bool(close.all())
        pairs = zip(kinds(config), mean[:, j], predicted[:, j], strict=True)
        words.append(f"{weights}: " + ", ".join(f"{k} {m:.3g} ({p:.3g})" for k, m, p in pairs))
    some = predicted > 0.01
    divergence = float(np.abs(np.log(mean[some] / predicted[some])).max())
    return frame.conclude(good, "; ".join(words) + " (predicted)", divergence=divergence)


def judge_faster(config: Config, data: frame.Data) -> frame.Verdict:
    """By depth: on the critical line orthogonal nets end at a lower loss than Gaussian ones."""
    names = trained_settings(config)
    both = [k for k, (_, s) in enumerate(names) if np.isclose(s, names[-1][1])]
    good, words = {}, []
    for depth in config.depths:
        loss = np.asarray(data[f"depth={depth}"]["loss"], float)[:, both]
        mean, low, high = frame.interval(loss[:, 1] - loss[:, 0])
        good[f"depth {depth}"] = bool(high < 0)
        words.append(
            f"depth {depth}: loss {loss[:, 1].mean():.3f} against {loss[:, 0].mean():.3f}, "
            f"difference {mean:.3f} [{low:.3f}, {high:.3f}]"
        )
    return frame.conclude(good, "; ".join(words))


def _figure_plane(config: Config, data: frame.Data) -> Any:
    figure, axes = drawing.panels(2, width=9.6, height=3.8)
    sigma_w, _ = cells(config)
    gains = np.asarray(data["plane"]["log_gain"], float) / config.depth
    gains = gains.reshape(len(gains), *sigma_w.shape)
    for j, bias in enumerate(config.biases):
        fine = np.linspace(sigma_w[j, 0], sigma_w[j, -1], 40)
        chi = np.log(theory.mean_field("tanh", fine, bias**0.5).chi_1)
        drawing.theory(axes[0], fine**2, chi, "theory: ln chi_1" if j == 0 else "")
        drawing.line(
            axes[0], j, sigma_w[j] ** 2, gains[:, j], f"sigma_b² = {bias}", linestyle="none"
        )
    axes[0].axhline(0, color=drawing.FAINT, linewidth=0.8)
    drawing.words(axes[0], "The gradient's growth", "sigma_w²", "ln of |gradient|² a layer")
    limit, names = limits(config), trained_settings(config)
    values = np.array([np.mean(data[f"depth={d}"]["accuracy"], 0) for d in config.depths])
    columns = [
        f"{s**2:.2f}\n6ξ={x:.0f}" if np.isfinite(x) else f"{s**2:.2f}\n6ξ=∞"
        for (_, s), x in zip(names, limit, strict=False)
    ] + ["orth.\n6ξ=∞"]
    rows = [str(d) for d in config.depths]
    _ = drawing.grid(axes[1], values, rows, columns, limits=(0, 1))
    for i, depth in enumerate(config.depths):  # a frame where the rule says that it trains
        for j, x in enumerate([*limit, np.inf]):
            if depth < x:
                box = [j - 0.47, j + 0.47, j + 0.47, j - 0.47, j - 0.47]
                axes[1].plot(
                    box, [i - 0.46, i - 0.46, i + 0.46, i + 0.46, i - 0.46],
                    color=drawing.COLORS[1], linewidth=1.6,
                )  # fmt: skip
    drawing.words(
        axes[1], "Training accuracy; framed: depth < 6 xi_c", "sigma_w²", "depth", legend=False
    )
    return figure


def _figure_spectra(config: Config, data: frame.Data) -> Any:
    figure, axes = drawing.panels(2, width=9.6, height=3.6)
    values = np.asarray(data["spectra"]["values"], float)
    rank = np.linspace(0, 1, values.shape[-1])
    for j, (ax, weights) in enumerate(zip(axes, ("Gaussian", "Orthogonal"), strict=True)):
        for k, name in enumerate(kinds(config)):
            drawing.line(ax, k, rank, np.maximum(values[:, k, j], 1e-4), name)
        ax.set_yscale("log")
        ax.set_ylim(1e-3, 20)
        title = f"{weights} weights, {config.spectrum_depth} layers"
        drawing.words(ax, title, "rank / width", "singular value of the Jacobian")
    return figure


def figures(config: Config, data: frame.Data) -> list[Any]:
    return [_figure_plane(config, data), _figure_spectra(config, data)]


EXPERIMENT = frame.Experiment(
    name="edge_of_chaos",
    question="Does mean-field theory say where deep nets lose their gradient, and how deep a net "
    "trains?",
    claims=(
        frame.Claim(
            key="mean_field",
            statement="Each layer of a random tanh net multiplies the squared gradient by chi_1, "
            "and its activations settle at q*.",
            predicted="chi_1 = sigma_w^2 E phi'^2 at q* (Poole et al. 2016; Schoenholz et al. "
            "2017), spread by width (Hanin and Nica 2019)",
            judge=judge_theory,
            intuition="Two numbers of the initializer say what happens to the gradient in fifty "
            "layers; width only decides how much one net strays from that.",
        ),
        frame.Claim(
            key="critical_line",
            statement="Between vanishing and exploding gradients lies a line in the plane of "
            "(sigma_w, sigma_b), the edge of chaos.",
            predicted="chi_1(sigma_w, sigma_b) = 1: sigma_w^2 = 1.761 at sigma_b^2 = 0.05",
            judge=judge_line,
            intuition="For tanh the weights must grow with the biases; Xavier's 1 is critical "
            "only without biases.",
        ),
        frame.Claim(
            key="correlation",
            statement="Two inputs become indistinguishable in the ordered phase and unrelated "
            "ones in the chaotic phase, e-fold every xi_c layers.",
            predicted="1 - c shrinks by chi_1 a layer; in chaos c ends at the fixed point c* < 1 "
            "(Schoenholz et al. 2017, equations 9 and 10)",
            judge=judge_correlation,
            intuition="The forward pass forgets its input over the same number of layers over "
            "which the backward pass loses its gradient.",
        ),
        frame.Claim(
            key="six_xi",
            statement="A net trains if and only if it is not deeper than about 6 xi_c.",
            predicted="depth < 6 xi_c, xi_c = -1 / ln chi_c (Schoenholz et al. 2017, figure 5)",
            judge=judge_depth,
            intuition="It is a rule of thumb for a short run at one learning rate: right far "
            "from the boundary, generous or strict by a factor of two near it.",
        ),
        frame.Claim(
            key="isometry",
            statement="Orthogonal initialization gives dynamical isometry: all singular values of "
            "the end-to-end Jacobian near 1.",
            predicted="1; for ReLU the variance still grows by 1 a layer (Pennington et al. 2017)",
            judge=judge_isometry,
            intuition="Orthogonal weights are half of it: the units must be nearly linear too.",
        ),
        frame.Claim(
            key="free_probability",
            statement="Free probability gives the spread of the squared singular values of real, "
            "finite nets.",
            predicted="variance / mean^2 = L (mu_2 / mu_1^2 - 1 - s_1), s_1 = -1 Gaussian, 0 "
            "orthogonal (Pennington et al. 2018)",
            judge=judge_spectra,
        ),
        frame.Claim(
            key="orthogonal_faster",
            statement="On the critical line orthogonal weights train faster than Gaussian ones.",
            predicted="lower loss after the same steps (Pennington et al. 2017, figure 4)",
            judge=judge_faster,
            intuition="The deeper the net, the more the shape of the spectrum matters beside its "
            "mean.",
        ),
    ),
    presets={
        "tiny": Config(
            biases=(0.05,), ratios=(0.7, 0.95, 1.05, 1.4), width=96, depth=24, seeds=4,
            trained=(0.6,), depths=(4, 40), hidden=24, steps=60, batch=32, runs=2,
            spectrum_width=48, spectrum_depth=4, spectrum_seeds=3, rate=0.03,
        ),
        "quick": Config(),
        "full": Config(
            width=512, depth=96, seeds=64, depths=(8, 15, 30, 60, 100, 200), hidden=256,
            steps=2000, runs=8, trained=(0.6, 1.0, 1.3, 1.5, 2.0, 2.5, 4.0), rate=0.003,
            spectrum_width=600, spectrum_seeds=16,
        ),
    },
    points=points,
    figures=figures,
)  # fmt: skip
