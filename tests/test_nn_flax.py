"""One transformer three times: pure, flax linen, flax NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import flax_transformers
from jaxgrad.nn import transformer

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 6)))


@pytest.mark.parametrize("causal", [True, False])
def test_linen_and_nnx_with_the_weights_of_the_pure_transformer_are_it(causal):
    config = transformer.Config(
        11, width=8, depth=2, heads=2, causal=causal, max_length=9, initializer="torch_linear"
    )
    params = transformer.init(jax.random.key(0), config)

    @jax.jit
    def pure(params):
        logits = transformer.apply(params, TOKENS, config)
        return jnp.sum(logits**2), logits

    def of_linen(params):
        module, variables = flax_transformers.to_linen(params, config)
        logits = module.apply(variables, TOKENS)
        return jnp.sum(logits**2), logits

    gradient, logits = jax.jit(jax.grad(pure, has_aux=True))(params)
    other, from_linen = jax.jit(jax.grad(of_linen, has_aux=True))(params)
    np.testing.assert_allclose(from_linen, logits, rtol=0, atol=1e-6)
    # the conversion is linear in the weights, so gradients come back through it
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))
    model = flax_transformers.to_nnx(params, config)
    np.testing.assert_allclose(nnx.jit(lambda m: m(TOKENS))(model), logits, rtol=0, atol=1e-6)
    # every weight counts, so a swapped one is seen; only a key's bias shifts all logits alike
    paths, tree = jax.tree.flatten_with_path(params)
    leaves = [leaf for _, leaf in paths]
    for k, (path, leaf) in enumerate(paths):
        ramp = 0.1 * jnp.arange(leaf.size).reshape(leaf.shape)
        moved = jax.tree.unflatten(tree, [*leaves[:k], leaf + ramp, *leaves[k + 1 :]])
        seen = np.abs(pure(moved)[1] - logits).max() > 1e-3
        assert seen != ("['key']['bias']" in jax.tree_util.keystr(path))


def test_a_transformer_that_the_flax_forms_do_not_have_is_refused():
    config = transformer.Config(11, residual="post_ln")
    with pytest.raises(ValueError, match="written for 'pre_ln', got 'post_ln'"):
        flax_transformers.to_linen(transformer.init(jax.random.key(0), config), config)
