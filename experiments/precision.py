"""What do fp16, bf16 and float32 lose of a gradient, and of a product of 1,000 Jacobians?"""

from typing import Any

import numpy as np

from experiments.atlas import casting, drawing, frame, products
from experiments.precision_nets import Config, initializers, points

# The largest magnitude that the cast to fp16 rounds to zero is 2^-25, half a subnormal.
ZERO_EXPONENT = -25
MEDIAN = 0.6745  # of |z|, z standard normal
TOLERATED = 0.01  # a share of lost elements that a layer can do without
LEARNED = 0.6  # accuracy on held-out digits; chance is 0.1
LABELS = {"torch_linear": "PyTorch default", "xavier_normal": "Xavier", "he_normal": "He"}


def _nets(config: Config, data: frame.Data) -> dict[str, frame.Arrays]:
    """The arrays of each net, seeds on the first axis; `gain` is a number."""
    found = {}
    for a, i in config.nets:
        k, arrays = initializers(a, config).index(i), data[a]
        found[f"{a} ({LABELS[i]})"] = {
            name: v[k] if name == "gain" else np.asarray(v)[:, k] for name, v in arrays.items()
        }
    return found


def judge_range(config: Config, data: frame.Data) -> frame.Verdict:
    """By net: unscaled bf16 makes at most 1 % of the elements zero, in every layer."""
    good, words = {}, []
    for name, arrays in _nets(config, data).items():
        half, brain = arrays["float16_zero"][:, 0].mean(0), arrays["bfloat16_zero"].mean(0)
        good[name] = bool(brain.max() <= TOLERATED)
        size = arrays["log2_rms"][:, 0].mean()
        words.append(
            f"{name}: dL/dh_1 is 2^{size:.0f}, {half[0]:.0%} zero in fp16, {brain[0]:.0%} in bf16"
        )
    return frame.conclude(good, "; ".join(words))


def layers_to_loss(arrays: frame.Arrays) -> tuple[np.ndarray, float]:
    """Layers until fp16 has lost half of the elements: measured (one a seed), predicted.

    Predicted: (25 + log2(0.6745 rms of the output's gradient)) / |log2 gain|; inf for gains of one
    or more, and where half are never lost.
    """
    zero = np.asarray(arrays["float16_zero"])[:, 0, ::-1]
    layers = np.where((zero >= 0.5).any(1), (zero >= 0.5).argmax(1) + 1.0, np.inf)
    start, rate = np.mean(arrays["log2_rms"][:, -1]), -np.log2(arrays["gain"])
    room = start + np.log2(MEDIAN) - ZERO_EXPONENT
    return layers, float(room / rate) if rate > 1e-3 else np.inf


def judge_depth(config: Config, data: frame.Data) -> frame.Verdict:
    """By net that should lose half within the depth: the layer is predicted to 10 %, or to one."""
    good, words, divergence = {}, [], 0.0
    for name, arrays in _nets(config, data).items():
        layers, predicted = layers_to_loss(arrays)
        if predicted > config.depth and not np.isfinite(layers).any():
            words.append(f"{name}: never within {config.depth}, as predicted")
            continue
        # a net that never loses half counts as losing it after the last layer
        mean = float(np.mean(np.minimum(layers, config.depth + 1)))
        good[name] = bool(abs(mean - predicted) <= max(1.0, 0.1 * predicted))
        divergence = max(divergence, abs(float(np.log(mean / predicted))))
        words.append(f"{name}: {mean:.1f} layers, predicted {predicted:.1f}")
    return frame.conclude(good, "; ".join(words), divergence=divergence)


def judge_scaling(config: Config, data: frame.Data) -> frame.Verdict:
    """By net: at some scale fp16 loses at most 1 % in every layer, and nothing overflows."""
    good, words = {}, []
    for name, arrays in _nets(config, data).items():
        lost = np.mean(arrays["float16_zero"], 0).max(1)
        whole = np.asarray(arrays["float16_finite"]).min(0) == 1
        good[name] = bool(np.any((lost <= TOLERATED) & whole))
        shares = ", ".join(
            f"x 2^{s}: {share:.0%}" + ("" if ok else " and overflow")
            for s, share, ok in zip(config.scales, lost, whole, strict=True)
        )
        words.append(f"{name} spans 2^{np.ptp(arrays['log2_rms'].mean(0)):.0f}, lost {shares}")
    return frame.conclude(good, "; ".join(words))


def judge_training(config: Config, data: frame.Data) -> frame.Verdict:
    """By half precision and scale: mean held-out accuracy is within 0.1 of float32's."""
    reference = float(np.mean(data["train-float32"]["accuracy"]))
    good, words = {}, [f"float32 {reference:.2f}, whatever the factor"]
    for dtype in ("float16", "bfloat16"):
        for index, scale in enumerate(config.train_scales):
            name = f"{dtype} x 2^{scale}"
            mean, low, high = frame.interval(data[f"train-{dtype}"]["accuracy"][:, index])
            good[name] = bool(abs(mean - reference) < 0.1) and reference > LEARNED
            words.append(f"{name} {mean:.2f} [{low:.2f}, {high:.2f}]")
    return frame.conclude(good, "; ".join(words))


# ------------------------------------------------------------------------------------------ figures


def figures(config: Config, data: frame.Data) -> list[Any]:
    first, axes = drawing.panels(2, width=9.6, height=3.8)
    depth = np.arange(1, config.depth + 1)
    for index, (name, arrays) in enumerate(_nets(config, data).items()):
        shares = arrays["float16_zero"][:, 0, ::-1], arrays["bfloat16_zero"][:, ::-1]
        for ax, lost in zip(axes, shares, strict=True):
            drawing.line(ax, index, depth, lost, name, markevery=7)
    for ax, name in zip(axes, ("fp16", "bf16"), strict=True):  # one legend serves both
        drawing.words(ax, f"{name}: dL/dh lost", "layers", "share zero", legend=name == "bf16")
        ax.set_ylim(-0.03, 1.03)
    second, axes = drawing.panels(2, width=9.6, height=3.8)
    arrays, product = data["products"], config.product
    at, width = products.depths(product), product.width
    for index, mode in enumerate(products.modes(product)):
        for way, style in (("graded", "-"), ("plain", ":")):
            label = f"s_{mode + 1}, {way}"
            values = np.maximum(arrays[way][..., index], -2.2 * product.depth)
            drawing.line(axes[0], index, at, values, label, linestyle=style, markevery=6)
    drawing.words(axes[0], "products in float32", "layers", "ln singular value")
    axes[0].set_xscale("log")
    axes[0].set_yscale("symlog", linthresh=10)
    modes = np.arange(2, width + 1)
    lost = np.minimum(arrays["lost_at"][:, 1:], product.depth + 1)  # inf: never
    drawing.line(axes[1], 0, modes, lost, "measured")
    drawing.theory(axes[1], modes, products.lost_at_predicted(product)[1:], "ln(1/eps) / gap")
    drawing.words(axes[1], "layers until rounding hides it", "singular value", "layers")
    axes[1].set_yscale("log")
    return [first, second]


CLAIMS = (
    frame.Claim(
        key="range",
        statement="fp16 loses small gradients; bf16 keeps them, for it has float32's range.",
        predicted="zero below 2^-25 in fp16; below 2^-126 in bf16, as XLA flushes subnormals",
        judge=judge_range,
        intuition="bf16 fails where float32 fails: it moves the problem of a vanishing gradient, "
        "and solves only that of a small loss.",
    ),
    frame.Claim(
        key="depth",
        statement="At a gain g a layer, fp16 loses a gradient within 25 / |log2 g| layers.",
        predicted="(25 + log2(0.67 rms)) / |log2 sqrt(chi_1)| layers; chi_1 by mean-field theory, "
        "Schoenholz et al. 2017",
        judge=judge_depth,
        intuition="Nine sigmoid layers of PyTorch's default are enough: count binades, not layers.",
    ),
    frame.Claim(
        key="loss_scale",
        statement="Loss scaling keeps fp16 from losing gradients.",
        predicted="as long as the layers' gradients span less than fp16's 40 binades: one factor "
        "moves all of them (Micikevicius et al. 2018)",
        judge=judge_scaling,
        intuition="A loss scale moves the whole net; it cannot help layers that are further apart "
        "than the type is wide. First cure the gain, then scale.",
    ),
    frame.Claim(
        key="training",
        statement="A net that trains in float32 trains in half precision.",
        predicted="fp16 with a loss scale, bf16 without; Adam's step does not depend on the scale",
        judge=judge_training,
        intuition="Adam hides a gradient of 1e-8 in float32. In fp16 the same gradient is zero.",
    ),
    frame.Claim(
        key="product_spectrum",
        statement="The singular values of a deep net are those of the product of its Jacobians, "
        "multiplied in float32.",
        predicted="the j-th is lost after ln(1/eps) / (lambda_1 - lambda_j) layers: Newman 1986",
        judge=lambda config, data: products.judge_spectrum(config.product, data["products"]),
        intuition="A condition number of a deep product beyond 1e7 is a picture of rounding.",
    ),
    frame.Claim(
        key="product_range",
        statement="A product of 1,000 layers is out of float32's reach.",
        predicted="0.9^k is zero at k = 829, 1.1^k infinite at k = 931; nothing is lost if every "
        "mode keeps an exponent of its own (graded product)",
        judge=lambda config, data: products.judge_range(config.product, data["products"]),
        intuition="Range is a matter of bookkeeping, not of the type.",
    ),
    frame.Claim(
        key="zero_norm",
        statement="A gradient norm of 0 says that the gradient is 0.",
        predicted="squares leave float32 below 1e-19 and above 1e19",
        judge=lambda config, data: casting.judge_norm(data["norms"]),  # noqa: ARG005
        intuition="Before you hunt a dead gradient, look at its largest element instead of its "
        "norm. Clipping by such a norm turns 1e20 into 0.",
    ),
)

EXPERIMENT = frame.Experiment(
    name="precision",
    question=__doc__,
    claims=CLAIMS,
    presets={
        "tiny": Config(
            nets=(("sigmoid", "torch_linear"),), width=16, depth=12, seeds=2, scales=(0, 16),
            train_depth=2, train_width=8, train_seeds=2, train_scales=(0, 8), steps=20,
            product=products.Config(width=4, depth=60, seeds=2),
        ),
        "quick": Config(),
        "full": Config(
            width=256, depth=100, seeds=32, train_depth=24, train_width=128, train_seeds=8,
            steps=2000, product=products.Config(width=64, seeds=16),
        ),
    },
    points=points,
    figures=figures,
)  # fmt: skip
