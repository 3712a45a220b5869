"""What jaxgrad builds lowers for CPU, CUDA and TPU, without such a device at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg

PLATFORMS = ["cpu", "cuda", "tpu"]


def weights():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((3, 4, 4)) / 2, jnp.float32)


def loss(params, x):
    h, _ = jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, params)
    return jnp.mean(jg.tap(h, "out") ** 2)


def unrolled(x):
    for w in weights():
        x = jax.nn.relu(x @ w) + jnp.sort(x)
    return x


@pytest.mark.parametrize(
    ("fun", "args"),
    [
        (jg.value_and_grad_flow(loss), (weights(), jnp.ones((2, 4)))),
        (lambda x: jg.layer_jacobians(jg.factorize(unrolled, x), x), (jnp.ones(4),)),
        (lambda x: jg.factorize(unrolled, x).states(x), (jnp.ones(4),)),
        (lambda x: jg.jacobian_product(jg.factorize(unrolled, x), x).log_norm(), (jnp.ones(4),)),
    ],
    ids=["flow", "layer Jacobians", "states", "product"],
)
def test_it_lowers_for_every_platform(fun, args):
    def leaves(*args):
        return jax.tree.leaves(fun(*args))

    exported = jax.export.export(jax.jit(leaves), platforms=PLATFORMS)(*args)
    assert exported.platforms == tuple(PLATFORMS)
