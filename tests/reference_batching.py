"""Is a batch independent? Jacobians by brute force, block diagonal or not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxgrad.graph import batching, factorization
from jaxgrad.graph.batch_layout import candidates

W = np.random.default_rng(7).standard_normal((4, 4)).astype(np.float32)


def read(f, xs, batch_axis=0):
    """The layouts of the first and the last state, the verdict, and the layouts of all states."""
    links, graph, _ = factorization.factorize(f, (xs,), 0, batch_axis, "cuts")
    found = [links[0].batch_in, *(link.batch_out for link in links)]
    for before, after in itertools.pairwise(links):
        assert before.batch_out == after.batch_in
    return found[0], found[-1], graph.independence, found


def of_shape(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def jacobian(f, xs):
    """d f / d xs as one matrix; all leaves of x and of f(x) in a row."""
    flat, unravel = ravel_pytree(xs)
    rows = jax.jit(jax.jacrev(lambda v: ravel_pytree(f(unravel(v)))[0]))(flat)
    return np.asarray(rows)


def positions(layout):
    """Where each example's elements stand among all elements of the state: (count, size)."""
    start, state = 0, []
    for shape in layout.shapes:
        state.append(jnp.arange(start, start + np.prod(shape, dtype=int)).reshape(shape))
        start += state[-1].size
    return np.asarray(layout.to_examples(tuple(state)))


def leaks(matrix, before, after):
    """The greatest |d example b of the output / d example c of the input|, b != c."""
    blocks = np.abs(matrix[positions(after)][:, :, positions(before)]).max((1, 3), initial=0.0)
    np.fill_diagonal(blocks, 0.0)
    return blocks.max()


def assert_independent(f, xs, batch_axis=0, verdict="proved"):
    before, after, found, _ = read(f, xs, batch_axis)
    matrix = jacobian(f, xs)
    assert np.abs(matrix).max() > 0  # else nothing is tested
    assert leaks(matrix, before, after) == 0
    assert found == verdict


def leaks_anywhere(f, xs, batch_axis=0):
    """The least leak among all places that the examples could have in the output."""
    (shape,) = (x.shape for x in jax.tree.leaves(xs))
    out = jax.eval_shape(f, xs)
    count = shape[batch_axis]
    matrix = jacobian(f, xs)
    step = np.prod(shape[batch_axis:][1:], dtype=int)
    before = batching.Layout((shape,), (int(step),), (np.dtype("f4"),), count)
    places = [
        batching.Layout((out.shape,), (s,), (np.dtype("f4"),), count)
        for s in candidates(out.shape, count)
    ]
    return min((leaks(matrix, before, after) for after in places), default=np.inf)
