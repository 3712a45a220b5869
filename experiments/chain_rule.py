"""Is the end-to-end gradient the product of the layers' Jacobians, and what follows from it?"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxgrad as jg
from experiments.atlas import deep, drawing, frame
from jaxgrad import nn
from jaxgrad.nn import mlp, recurrent, resnet, transformer

ARCHITECTURES = {
    "MLP": ("mlp", {"residual": "none"}),
    "MLP, Pre-LN": ("mlp", {"residual": "pre_ln", "norm": "layer"}),
    "MLP, Post-LN": ("mlp", {"residual": "post_ln", "norm": "layer"}),
    "ResNet": ("resnet", {}),
    "encoder": ("transformer", {"causal": False, "residual": "post_ln"}),
    "causal transformer": ("transformer", {"causal": True, "positions": "rotary"}),
    "vanilla RNN": ("recurrent", {"cell": "vanilla"}),
    "GRU": ("recurrent", {"cell": "gru"}),
    "LSTM": ("recurrent", {"cell": "lstm"}),
}
CELLS = ("vanilla", "gru", "lstm")


@dataclass(frozen=True)
class Config:
    """The architectures, small enough for dense Jacobians, and deep stacks for the weights.

    Attributes:
        architectures: names in `ARCHITECTURES`.
        width: of the streams.
        depth: blocks or time steps.
        seeds: networks an architecture.
        tolerance: of max |product - whole| / max |whole|, in float32.
        steps: of the recurrent networks whose hidden Jacobians are multiplied.
        activations: of the stacks whose first and last weights are compared.
        stack_width: theirs.
        stack_depth: theirs.
        stacks: of each.
    """

    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    width: int = 8
    depth: int = 3
    seeds: int = 2
    tolerance: float = 1e-5
    steps: int = 20
    activations: tuple[str, ...] = ("sigmoid", "tanh", "relu", "gelu")
    stack_width: int = 64
    stack_depth: int = 20
    stacks: int = 8


# ------------------------------------------------------------------------------------ measurements


def _function(name: str, config: Config) -> tuple[Any, Any]:
    """(key -> (parameters, x), (parameters, x) -> an array): one example."""
    (kind, options), width, depth = ARCHITECTURES[name], config.width, config.depth
    draw = jax.random.normal
    if kind == "mlp":
        model = mlp.Config(width, width, width, depth, "gelu", **options)
        return (
            lambda key: (mlp.init(key, model), draw(key, (width,))),
            lambda params, x: mlp.apply(params, x, model),
        )
    if kind == "resnet":
        images = resnet.Config(1, 4, (4, 4), 1, norm="layer")
        return (
            lambda key: (resnet.init(key, images)[0], draw(key, (1, 6, 6, 1))),
            lambda params, x: resnet.apply(params, x, images),
        )
    if kind == "transformer":
        text = transformer.Config(5, width=width, depth=depth, heads=2, **options)
        return (
            lambda key: (transformer.init(key, text), draw(key, (4, width))),
            lambda params, h: transformer.trunk(params, h, text),
        )
    time = recurrent.Config(3, 2, width, **options)

    def from_first(params: Any, h: jax.Array) -> jax.Array:
        cell, xs = params
        state = (jnp.zeros_like(h), h) if time.cell == "lstm" else h
        return recurrent.hidden(recurrent.run(cell, state, xs, time)[0], time)

    def start(key: jax.Array) -> tuple[Any, jax.Array]:
        return (recurrent.init(key, time)["cell"], draw(key, (depth, 3))), jnp.zeros(width)

    return start, from_first


def _chain(name: str, config: Config) -> frame.Arrays:
    """The product against `jacrev` of the whole, and spectral norms."""
    found: dict[str, list] = {"error": [], "layers": [], "log_norm": [], "log_norms": []}
    start, f = _function(name, config)
    jacobian = frame.compiled(jax.jacrev(lambda params, x: jnp.ravel(f(params, x)), argnums=1))
    for key in jax.random.split(jax.random.key(0), config.seeds):
        params, x = start(key)
        chain = jg.factorize(partial(f, params), x)
        matrices = [np.asarray(j, np.float64) for j in jg.layer_jacobians(chain, x)]
        product = matrices[0]
        for j in matrices[1:]:
            product = j @ product
        whole = np.asarray(jacobian(params, x)).reshape(product.shape)
        found["error"].append(np.abs(product - whole).max() / np.abs(whole).max())
        found["layers"].append(len(chain))
        found["log_norm"].append(np.log(np.linalg.norm(product, 2)))
        found["log_norms"].append(sum(np.log(np.linalg.norm(j, 2)) for j in matrices))
    return {key: np.asarray(values) for key, values in found.items()}


def _hidden(config: Config) -> frame.Arrays:
    """|product of dh_t / dh_(t-1) - dh_T / dh_0| / |dh_T / dh_0| by cell; (seeds, cells)."""
    width = config.width

    def one(key: jax.Array) -> jax.Array:
        keys, errors = jax.random.split(key, 3), []
        xs = jax.random.normal(keys[1], (config.steps, 3))
        start = jax.random.normal(keys[2], (width,))
        for cell in CELLS:
            model = recurrent.Config(3, 2, width, cell=cell)
            params = recurrent.init(keys[0], model)["cell"]

            def state_of(h: jax.Array, memory: Any, cell: str = cell) -> Any:
                return (memory, h) if cell == "lstm" else h

            def step(
                carry: Any, x: jax.Array, params: Any = params, model: Any = model,
                state_of: Any = state_of, cell: str = cell,
            ) -> tuple[Any, None]:  # fmt: skip
                state, product = carry
                h, memory = recurrent.hidden(state, model), state[0] if cell == "lstm" else None

                def through_h(h: jax.Array) -> jax.Array:
                    after = recurrent.step(params, state_of(h, memory), x, model)
                    return recurrent.hidden(after, model)

                product = jax.jacfwd(through_h)(h) @ product
                return (recurrent.step(params, state, x, model), product), None

            def last(
                h: jax.Array, params: Any = params, model: Any = model, state_of: Any = state_of
            ) -> jax.Array:
                state = state_of(h, jnp.zeros(width))
                return recurrent.hidden(recurrent.run(params, state, xs, model)[0], model)

            begin = (state_of(start, jnp.zeros(width)), jnp.eye(width))
            (_, product), _ = lax.scan(step, begin, xs)
            whole = jax.jacrev(last)(start)
            errors.append(jnp.linalg.norm(product - whole) / jnp.linalg.norm(whole))
        return jnp.stack(errors)

    return {"error": frame.over_seeds(one, config.stacks)}


def _weights(config: Config) -> frame.Arrays:
    """Of bias-free Xavier stacks, by activation: (seeds, activations) logs.

    "ratio": norm of the first weights' gradient over the last's. "gain": of the gradient at the
    first layer's output over that at the last's. "formula": largest relative difference between
    the first weights' gradient and x (phi'(z_1) * J_2^T ... J_L^T g)^T.
    """
    n, keys = config.stack_width, jax.random.split(jax.random.key(1))
    shape = (config.stacks, config.stack_depth)
    kernels = deep.draw("xavier_normal", keys[0], (n, n), *shape)["kernel"]
    x, direction = jax.random.normal(keys[1], (2, config.stacks, n))

    def one(kernels: jax.Array, x: jax.Array, direction: jax.Array) -> dict[str, jax.Array]:
        found: dict[str, list] = {"ratio": [], "gain": [], "formula": []}
        for name in config.activations:
            phi = nn.activation(name)

            def layer(h: jax.Array, w: jax.Array, phi: Any = phi) -> tuple[jax.Array, jax.Array]:
                h = phi(h @ w)
                return h, h

            def loss(kernels: jax.Array, x: jax.Array, layer: Any = layer) -> jax.Array:
                return lax.scan(layer, x, kernels)[0] @ direction

            weights = jax.grad(loss)(kernels, x)
            first, _ = layer(x, kernels[0])
            below = jax.grad(loss, argnums=1)(kernels[1:], first)
            slopes = jax.vmap(jax.grad(phi))(x @ kernels[0])
            formula = jnp.outer(x, slopes * below)
            norms = jnp.linalg.norm(weights, axis=(1, 2))
            largest = jnp.max(jnp.abs(formula - weights[0])) / jnp.max(jnp.abs(weights[0]))
            found["ratio"].append(jnp.log(norms[0] / norms[-1]))
            found["gain"].append(jnp.log(jnp.linalg.norm(below) / jnp.linalg.norm(direction)))
            found["formula"].append(largest)
        return {key: jnp.stack(values) for key, values in found.items()}

    return frame.compiled(jax.vmap(one))(kernels, x, direction)


def points(config: Config) -> dict:
    chains = {f"chain-{a}": partial(_chain, a, config) for a in config.architectures}
    return {**chains, "hidden": partial(_hidden, config), "weights": partial(_weights, config)}


# ------------------------------------------------------------------------------------------ judges


def judge_product(config: Config, data: frame.Data) -> frame.Verdict:
    """By architecture: the two agree to the tolerance for every seed."""
    good, words = {}, []
    for name in config.architectures:
        arrays = data[f"chain-{name}"]
        error = float(np.max(arrays["error"]))
        good[name] = error < config.tolerance
        words.append(f"{name} {error:.0e} ({int(arrays['layers'][0])} layers)")
    return frame.conclude(good, "largest relative difference: " + "; ".join(words))


def judge_norms(config: Config, data: frame.Data) -> frame.Verdict:
    """By architecture: the product of the layers' norms is that of the whole, to 10 %."""
    good, words, divergence = {}, [], 0.0
    for name in config.architectures:
        arrays = data[f"chain-{name}"]
        excess = np.asarray(arrays["log_norms"]) - np.asarray(arrays["log_norm"])
        good[name] = bool(np.all(np.abs(excess) < 0.1))
        words.append(f"{name} x {np.exp(excess.mean()):.3g}")
        divergence = max(divergence, float(np.max(np.abs(excess))))
    measured = "product of spectral norms over the norm of the product: " + "; ".join(words)
    return frame.conclude(good, measured, divergence=divergence)


def judge_hidden(config: Config, data: frame.Data) -> frame.Verdict:
    """By cell: the product is dh_T / dh_0 to a thousandth, in every seed."""
    errors = np.asarray(data["hidden"]["error"], np.float64)
    good, words = {}, []
    for k, cell in enumerate(CELLS):
        mean, low, high = frame.interval(errors[:, k])
        good[cell] = bool(np.max(errors[:, k]) < 1e-3)
        words.append(f"{cell} {mean:.1e} [{low:.1e}, {high:.1e}]")
    measured = f"relative difference over {config.steps} steps: " + "; ".join(words)
    return frame.conclude(good, measured)


def judge_backward(config: Config, data: frame.Data) -> frame.Verdict:
    """By activation: the formula is the gradient to ten times the tolerance."""
    errors = np.max(np.asarray(data["weights"]["formula"]), 0)
    good = {
        a: bool(e < 10 * config.tolerance) for a, e in zip(config.activations, errors, strict=True)
    }
    words = [f"{a} {e:.0e}" for a, e in zip(config.activations, errors, strict=True)]
    return frame.conclude(good, "largest relative difference: " + "; ".join(words))


def judge_weights(config: Config, data: frame.Data) -> frame.Verdict:
    """By activation: first over last weight gradient is the gain, to a factor of three."""
    ratio, gain = (np.asarray(data["weights"][k], np.float64) for k in ("ratio", "gain"))
    good, words, divergence = {}, [], 0.0
    for k, a in enumerate(config.activations):
        mean, low, high = frame.interval(ratio[:, k])
        law = gain[:, k].mean()
        good[a] = bool(abs(mean - law) < np.log(3))
        words.append(
            f"{a} {np.exp(mean):.2g} [{np.exp(low):.2g}, {np.exp(high):.2g}], gain "
            f"{np.exp(law):.2g}"
        )
        divergence = max(divergence, abs(float(mean - law)))
    measured = f"{config.stack_depth} layers: " + "; ".join(words)
    return frame.conclude(good, measured, divergence=divergence)


def figures(config: Config, data: frame.Data) -> list[Any]:
    figure, (left, right) = drawing.panels(2, width=10.4, height=3.6)
    excess = [
        (np.asarray(a["log_norms"]) - np.asarray(a["log_norm"])) / np.log(10)
        for a in (data[f"chain-{name}"] for name in config.architectures)
    ]
    rows = np.arange(len(config.architectures))
    left.barh(rows, [e.mean() for e in excess], color=drawing.COLORS[0])
    left.set_yticks(rows, config.architectures)
    left.invert_yaxis()
    title = "Product of the layers' norms over the true norm"
    drawing.words(left, title, "log10", "", legend=False)
    at = np.arange(len(config.activations))
    for k, (key, label) in enumerate(
        (("gain", "gain of the Jacobians"), ("ratio", "first over last weight gradient"))
    ):
        values = np.asarray(data["weights"][key], np.float64) / np.log(10)
        drawing.dots(right, k, at, values, label)
    right.set_xticks(at, config.activations)
    title = f"Weights of {config.stack_depth} Xavier layers"
    drawing.words(right, title, "", "log10")
    return [figure]


CLAIMS = (
    frame.Claim(
        key="product",
        statement="The gradient is the product of the layers' Jacobians, whatever the network.",
        predicted="J = J_L ... J_1, equal to float32 rounding",
        judge=judge_product,
        intuition="A network is a chain wherever its dataflow narrows to one tensor; a residual "
        "block is one layer of it.",
    ),
    frame.Claim(
        key="backward",
        statement="Multiply the output's gradient back through every layer to reach a weight.",
        predicted="dL/dW_1 = x (phi'(z_1) * J_2^T ... J_L^T g)^T",
        judge=judge_backward,
        intuition="A weight's gradient has two factors: what comes back, and what went in.",
    ),
    frame.Claim(
        key="weights",
        statement="dL/dW_1 is the product of the Jacobians times dL/dW_L.",
        predicted="|dL/dW_1| / |dL/dW_L| = the gain from the last layer to the first",
        judge=judge_weights,
        intuition="In ReLU networks without biases activations fade as gradients do, and all "
        "layers' weights get the same, tiny gradient: comparing layers hides the fault.",
    ),
    frame.Claim(
        key="norms",
        statement="The gradient's gain is the product of the layers' gains.",
        predicted="|J_L ... J_1| = |J_L| ... |J_1| (spectral norms)",
        judge=judge_norms,
        intuition="It is an upper bound only: layers rarely stretch the same direction.",
    ),
    frame.Claim(
        key="hidden",
        statement="Through time the gradient is the product of dh_t / dh_(t-1).",
        predicted="dh_T / dh_0 = product over t (Pascanu et al. 2013, equation 5)",
        judge=judge_hidden,
        intuition="An LSTM's gradient runs beside its hidden state, through the cell: that is "
        "what the cell is for.",
    ),
)

EXPERIMENT = frame.Experiment(
    name="chain_rule",
    question="Is the gradient the product of the layers' Jacobians, and what follows from it?",
    claims=CLAIMS,
    presets={
        "tiny": Config(
            architectures=("MLP", "LSTM"), depth=3, steps=10, activations=("sigmoid", "relu"),
            stack_width=32, stacks=4,
        ),
        "quick": Config(),
        "full": Config(width=16, depth=12, seeds=8, stack_width=256, stacks=64),
    },
    points=points,
    figures=figures,
)  # fmt: skip
