"""What reaches the first of 500 steps of a recurrent network, and does it then remember?"""

from typing import Any

import numpy as np

from experiments.atlas import drawing, frame
from experiments.recurrent_nets import EXPONENTS, TASKS, Config, biases, points
from jaxgrad import theory

# |ln| of a gradient that counts as gone, or as exploded: three decades.
LOST = float(np.log(1e3))
# Cross-entropy of two classes below which the first input counts as remembered: half of chance.
LEARNED = float(np.log(2) / 2)


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def _decades(nats: float) -> str:
    return f"10^{nats / np.log(10):.1f}"


def profiles(config: Config, data: frame.Data) -> dict[str, np.ndarray]:
    """{cell: ln |dL/dh_t| / |dL/dh_T|, (seeds, times)}, from the last step back."""
    found = {}
    for kind, gains in (("Gaussian", config.gaussian), ("orthogonal", config.orthogonal)):
        values = np.asarray(data["vanilla"][kind.lower()], float)
        found |= {f"{kind}, gain {g:g}": values[:, k] for k, g in enumerate(gains)}
    count = {"gru": 0, "lstm": 0}
    for name, (cell, _) in biases(config.steps).items():
        found[name] = np.asarray(data[cell]["log_gradient"], float)[:, count[cell]]
        count[cell] += 1
    return found


def _ends(config: Config, data: frame.Data) -> dict[str, np.ndarray]:
    return {name: values[:, -1] for name, values in profiles(config, data).items()}


def _steps(values: np.ndarray, config: Config) -> int:
    """How many steps lie between the last and the first kept time."""
    return (values.shape[1] - 1) * max(config.steps // 25, 1)


def judge_singular(config: Config, data: frame.Data) -> frame.Verdict:
    """By gain: below 1 three decades are lost, above 1 three decades are gained."""
    ends, good, words, divergence = _ends(config, data), {}, [], 0.0
    for gain in config.orthogonal:
        if gain == 1:
            continue
        mean, low, high = frame.interval(ends[f"orthogonal, gain {gain:g}"])
        good[f"gain {gain:g}"] = bool(high < -LOST if gain < 1 else low > LOST)
        bound = config.steps * np.log(gain)
        words.append(
            f"gain {gain:g}: {_decades(mean)} [{_decades(low)}, {_decades(high)}], bound "
            f"{_decades(bound)}"
        )
        divergence = max(divergence, abs(float(mean - bound)))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def rates(config: Config) -> np.ndarray:
    """Ln of the gradient's factor a step by mean-field theory, for the Gaussian gains."""
    field = theory.mean_field("tanh", np.array(config.gaussian), config.noise**0.5)
    return np.log(np.asarray(field.chi_1, float)) / 2


def untied(config: Config, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation between nets) of ln |gradient| if each step had its own matrix."""
    gains = np.array(config.gaussian)
    q = theory.mean_field("tanh", gains, config.noise**0.5).q
    law = theory.log_gain_of("tanh", q, gains, config.width, steps)
    return np.asarray(law.mean, float) / 2, np.asarray(law.standard_deviation, float) / 2


def judge_mean_field(config: Config, data: frame.Data) -> frame.Verdict:
    """Mean: within 4 standard errors at every gain. Spread: within a factor 2 at every gain."""
    values = np.asarray(data["vanilla"]["gaussian"], float)
    steps, ends = _steps(values[:, 0], config), values[:, :, -1]
    mean, spread = untied(config, steps)
    z = (ends.mean(0) - mean) / (ends.std(0, ddof=1) / np.sqrt(len(ends)))
    ratio = ends.std(0, ddof=1) / spread
    good = {
        "the mean over nets": bool(np.all(np.abs(z) < 4)),
        "the spread between nets": bool(np.all((ratio < 2) & (ratio > 0.5))),
    }
    words = [
        f"gain {gain:g}: {m / steps:+.4f} nats a step, theory {p / steps:+.4f} (z = {t:+.1f}), "
        f"spread x {r:.1f}"
        for gain, m, p, t, r in zip(config.gaussian, ends.mean(0), mean, z, ratio, strict=True)
    ]
    return frame.conclude(good, "; ".join(words), divergence=float(np.abs(np.log(ratio)).max()))


def judge_gates(config: Config, data: frame.Data) -> frame.Verdict:
    """By cell: less than three decades are lost over the whole sequence."""
    ends, good, words, divergence = _ends(config, data), {}, [], 0.0
    for name in biases(config.steps):
        mean, low, high = frame.interval(ends[name])
        good[name] = bool(low > -LOST)
        words.append(f"{name}: {_decades(mean)} [{_decades(low)}, {_decades(high)}]")
        divergence = max(divergence, abs(float(mean)))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_forget(config: Config, data: frame.Data) -> frame.Verdict:
    """By bias: the rate is ln sigmoid(b) to 20 %, or to 0.01 nats a step."""
    found, good, words, divergence = profiles(config, data), {}, [], 0.0
    for name, (cell, bias) in biases(config.steps).items():
        if cell != "lstm":
            continue
        steps, predicted = _steps(found[name], config), np.log(_sigmoid(bias))
        mean, low, high = frame.interval(found[name][:, -1] / steps)
        good[f"b = {bias:.1f}"] = bool(abs(mean - predicted) < max(0.2 * abs(predicted), 0.01))
        words.append(
            f"b = {bias:.1f}: {mean:.4f} [{low:.4f}, {high:.4f}] nats a step, gate alone "
            f"{predicted:.4f}"
        )
        divergence = max(divergence, steps * abs(float(mean - predicted)))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_lyapunov(config: Config, data: frame.Data) -> frame.Verdict:
    """By cell: the gradient's rate is the largest exponent to 5 %, or to 0.01 nats a step."""
    arrays, good, words, divergence = data["exponents"], {}, [], 0.0
    top = np.asarray(arrays["exponents"], float)[..., 0]
    rate = np.asarray(arrays["rate"], float)
    for k, cell in enumerate(EXPONENTS):
        gap = rate[:, k] - top[:, k]
        mean, low, high = frame.interval(gap)
        good[cell] = bool(abs(mean) < max(0.05 * abs(top[:, k].mean()), 0.01))
        words.append(
            f"{cell}: {rate[:, k].mean():.4f} nats a step against {top[:, k].mean():.4f}, gap "
            f"{mean:.4f} [{low:.4f}, {high:.4f}]"
        )
        divergence = max(divergence, config.exponents_steps * abs(float(mean)))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_spectrum(config: Config, data: frame.Data) -> frame.Verdict:
    """By cell: over the whole sequence the median direction is within a decade of the top one."""
    exponents = np.asarray(data["exponents"]["exponents"], float)
    middle = (exponents.shape[-1] - 1) // 2
    good, words, divergence = {}, [], 0.0
    for k, cell in enumerate(EXPONENTS):
        top, median, last = (exponents[:, k, j] for j in (0, middle, -1))
        mean, low, high = frame.interval((top - median) * config.exponents_steps)
        good[cell] = bool(high < np.log(10))
        words.append(
            f"{cell}: exponents {top.mean():.3f}, {median.mean():.3f} (median), {last.mean():.3f}; "
            f"top over median {_decades(mean)} [{_decades(low)}, {_decades(high)}]"
        )
        divergence = max(divergence, abs(float(mean)))
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def tasks(config: Config, data: frame.Data) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{cell: (final losses, ln of the first gradient over the last at first)}, by seeds."""
    names = dict.fromkeys(TASKS, "vanilla")
    names |= {name: cell for name, (cell, _) in biases(config.memory).items()}
    found, count = {}, dict.fromkeys(("vanilla", "gru", "lstm"), 0)
    for name, cell in names.items():
        arrays, k = data[f"task-{cell}"], count[cell]
        loss, gradient = (np.asarray(arrays[a], float)[:, k] for a in ("loss", "log_gradient"))
        found[name], count[cell] = (loss, gradient), k + 1
    return found


def judge_task(config: Config, data: frame.Data) -> frame.Verdict:
    """By gated cell: it remembers (mean loss below half of chance), and beats all vanilla ones."""
    found = {name: loss.mean() for name, (loss, _) in tasks(config, data).items()}
    best = min(found[name] for name in TASKS)
    good = {
        name: bool(loss < LEARNED and loss < best - 0.1)
        for name, loss in found.items()
        if name not in TASKS
    }
    words = "; ".join(f"{name}: loss {loss:.3f}" for name, loss in found.items())
    return frame.conclude(good, f"{words} (chance {np.log(2):.3f}, {config.memory} steps)")


def judge_survival(config: Config, data: frame.Data) -> frame.Verdict:
    """By cell: it learns if and only if less than three decades of its gradient are lost."""
    good, words = {}, []
    for name, (loss, gradient) in tasks(config, data).items():
        learned, survives = loss.mean() < LEARNED, gradient.mean() > -LOST
        good[name] = bool(learned == survives)
        words.append(f"{name}: {_decades(gradient.mean())}, loss {loss.mean():.2f}")
    return frame.conclude(good, "; ".join(words))


def _figure_gradients(config: Config, data: frame.Data) -> Any:
    figure, axes = drawing.panels(3, width=11.4, height=3.8)
    found = profiles(config, data)
    titles = {"Gaussian": "Vanilla, Gaussian", "orthogonal": "Vanilla, orthogonal", "": "Gates"}
    for ax, (kind, title) in zip(axes, titles.items(), strict=True):
        names = [n for n in found if (n.startswith(kind) if kind else n in biases(config.steps))]
        for index, name in enumerate(names):
            values = found[name] / np.log(10)
            times = np.linspace(0, _steps(found[name], config), values.shape[1])
            label = name.removeprefix(f"{kind}, ") if kind else name
            drawing.line(ax, index, times, values, label, markevery=5)
        if kind == "Gaussian":
            for k, rate in enumerate(rates(config)):
                end = np.array([0, config.steps])
                drawing.theory(ax, end, rate * end / np.log(10), "mean field" if k == 0 else "")
        drawing.words(ax, title, "steps back from the last", "log10 of |dL/dh|")
    return figure


def _figure_memory(config: Config, data: frame.Data) -> Any:
    figure, axes = drawing.panels(2, width=9.6, height=3.6)
    exponents = np.asarray(data["exponents"]["exponents"], float)
    rank = np.arange(1, exponents.shape[-1] + 1)
    for k, cell in enumerate(EXPONENTS):
        drawing.line(axes[0], k, rank, exponents[:, k], cell)
    drawing.words(axes[0], "Lyapunov spectrum", "direction", "nats a step")
    for index, (name, (loss, gradient)) in enumerate(tasks(config, data).items()):
        axes[1].plot(
            gradient / np.log(10), loss, linestyle="none", label=name,
            color=drawing.COLORS[index], marker=drawing.MARKERS[index],
        )  # fmt: skip
    axes[1].axhline(np.log(2), color=drawing.FAINT, linewidth=0.8)
    title = f"Recalling the first of {config.memory} inputs"
    drawing.words(axes[1], title, "log10 of the first gradient at first", "final loss")
    return figure


def figures(config: Config, data: frame.Data) -> list[Any]:
    return [_figure_gradients(config, data), _figure_memory(config, data)]


EXPERIMENT = frame.Experiment(
    name="recurrent",
    question="What reaches the first of 500 steps of a recurrent network, and does it remember?",
    claims=(
        frame.Claim(
            key="singular_value",
            statement="If the recurrent matrix's largest singular value is below 1 the gradient "
            "vanishes; above 1 it explodes.",
            predicted="gain^T for orthogonal matrices, three decades at least; an upper bound "
            "(Pascanu et al. 2013, equation 7)",
            judge=judge_singular,
            intuition="The first half is a theorem, the second is not: tanh takes back what the "
            "matrix adds, once inputs push its units off zero.",
        ),
        frame.Claim(
            key="mean_field",
            statement="Mean-field theory of deep nets holds for recurrent ones: sharing one matrix "
            "over all steps changes nothing.",
            predicted="ln chi_1 / 2 a step (Chen, Pennington and Schoenholz 2018), spread as with "
            "independent layers",
            judge=judge_mean_field,
            intuition="The mean is right; but one matrix is drawn once, so its luck repeats at "
            "every step instead of averaging out: two seeds can differ by decades.",
        ),
        frame.Claim(
            key="gates",
            statement="The gates of LSTM and GRU keep the gradient from vanishing.",
            predicted="a factor near 1 over the sequence (the constant error carousel)",
            judge=judge_gates,
            intuition="At first a gate is half open, and half a gradient a step is gone in a few "
            "dozen steps: the forget bias sets the memory, not the cell's name.",
        ),
        frame.Claim(
            key="forget_bias",
            statement="An LSTM's gradient decays as its forget gate to the power of the steps.",
            predicted="ln sigmoid(b) a step; b = ln(T - 1) keeps 1/e (Tallec and Ollivier 2018)",
            judge=judge_forget,
            intuition="The norm follows the units whose gates happen to stay open, so it falls "
            "slower than the average gate. Set the forget bias to ln(T): it buys T steps.",
        ),
        frame.Claim(
            key="lyapunov",
            statement="Over a long sequence the gradient shrinks at the largest Lyapunov exponent.",
            predicted="ln(s_1) / T of the product of all Jacobians",
            judge=judge_lyapunov,
        ),
        frame.Claim(
            key="one_number",
            statement="A recurrent net's gradient vanishes or survives as a whole: one number, the "
            "spectral radius, describes it.",
            predicted="all Lyapunov exponents equal: half of the directions within a decade",
            judge=judge_spectrum,
            intuition="What survives is a few directions; in the others the past is gone whatever "
            "the gradient's norm says.",
        ),
        frame.Claim(
            key="memory_task",
            statement="LSTM and GRU learn long-term dependencies that a vanilla network does not.",
            predicted="gated cells recall the first input, vanilla ones stay at chance, ln 2",
            judge=judge_task,
            intuition="A vanilla network with a recurrent matrix of gain 1 learns it too; a GRU or "
            "an LSTM whose gates are half open at first does not. The start decides, not the name.",
        ),
        frame.Claim(
            key="survival",
            statement="A cell learns to remember if and only if its gradient at first survives the "
            "sequence.",
            predicted="learns where less than three decades are lost before training",
            judge=judge_survival,
        ),
    ),
    presets={
        "tiny": Config(
            steps=50, width=24, gaussian=(0.8, 1.6), orthogonal=(0.9, 1.5), seeds=3,
            exponents_width=6, exponents_steps=40, exponents_seeds=2, memory=10, training=20,
            hidden=8, runs=2, batch=16,
        ),
        "quick": Config(),
        "full": Config(
            width=256, seeds=32, exponents_width=128, exponents_steps=2000, exponents_seeds=8,
            memory=500, training=3000, hidden=128, runs=8, batch=128, rate=0.003,
        ),
    },
    points=points,
    figures=figures,
)  # fmt: skip
