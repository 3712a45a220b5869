"""Models of the diagnosis benchmark in flax and equinox, and the arguments made of them."""

# ruff: noqa: E731 (programs as their users write them)
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from experiments import diagnosis_models as m

mse = lambda out, y: jnp.square(out - y).mean()


class LinenMLP(nn.Module):
    """Dense layers with a norm, an activation and dropout between them."""

    widths: tuple = (32, 32, 10)
    rate: float = 0.0
    act: Any = nn.relu
    kernel: Any = nn.initializers.lecun_normal()
    norm: Any = None
    bias: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Any) -> Any:  # noqa: D102
        for width in self.widths[:-1]:
            x = nn.Dense(width, kernel_init=self.kernel, bias_init=self.bias)(x)
            x = self.norm()(x) if self.norm else x
            x = self.act(x)
            x = nn.Dropout(self.rate, deterministic=False)(x) if self.rate else x
        return nn.Dense(self.widths[-1])(x)


class LinenCNN(nn.Module):
    """Convolutions over 8 x 8 digits, with or without batch norm."""

    norm: bool = True
    depth: int = 3
    kernel: Any = nn.initializers.he_normal()
    bias: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Any) -> Any:  # noqa: D102
        x = x.reshape(-1, 8, 8, 1)
        for i in range(self.depth):
            x = nn.Conv(
                8, (3, 3), strides=2 if i < 2 else 1, kernel_init=self.kernel, bias_init=self.bias
            )(x)
            x = nn.BatchNorm(use_running_average=False)(x) if self.norm else x
            x = nn.relu(x)
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def linen(
    seed: int, model: Any, data: Any, tx: Any, loss: Any = m.cross_entropy, **more: Any
) -> dict[str, Any]:
    """A linen model; batch statistics, if any, are updated and thrown away."""
    rngs = {"params": jax.random.key(seed), "dropout": jax.random.key(1)}
    variables = model.init(rngs, data[0])
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def objective(params: Any, batch: Any, key: Any = None) -> Any:
        rngs = None if key is None else {"dropout": key}
        out = model.apply(
            {"params": params, **rest}, batch[0], rngs=rngs, mutable=list(rest) or False
        )
        return loss(out[0] if rest else out, batch[1])

    return {"loss": objective, "params": params, "batch": data, "optimizer": tx, **more}


def keyed(seed: int, model: Any, data: Any, tx: Any) -> dict[str, Any]:
    return linen(seed, model, data, tx, key=jax.random.key(seed))


def nnx_mlp(
    seed: int, data: Any, tx: Any, wrap: Any = lambda z: z, act: Any = nnx.relu
) -> dict[str, Any]:
    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.one, self.two = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)
            self.out = nnx.Linear(32, 10, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.out(act(self.two(act(self.one(x)))))

    graph, state = nnx.split(Model(nnx.Rngs(seed)))
    loss = lambda state, b: m.cross_entropy(wrap(nnx.merge(graph, state)(b[0])), b[1])
    return {"loss": loss, "params": state, "batch": data, "optimizer": tx}


def eqx_mlp(seed: int, tx: Any, edit: Any = lambda w: w, wrap: Any = lambda z: z) -> dict[str, Any]:
    model = eqx.nn.MLP(64, 10, 32, 3, activation=jax.nn.silu, key=jax.random.key(seed))
    weights = lambda t: [layer.weight for layer in t.layers[:-1]]
    model = eqx.tree_at(weights, model, [edit(w) for w in weights(model)])
    biases = lambda t: [layer.bias for layer in t.layers]
    model = eqx.tree_at(biases, model, [jnp.zeros_like(b) for b in biases(model)])

    def loss(model: Any, batch: Any) -> Any:
        return m.cross_entropy(wrap(jax.vmap(model)(batch[0])), batch[1])

    return {"loss": loss, "params": model, "batch": m.digits(seed), "optimizer": tx}
