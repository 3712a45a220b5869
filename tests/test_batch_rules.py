"""Every rule against the Jacobian: what it calls independent is, what it refuses is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from reference_batching import (
    W,
    assert_independent,
    jacobian,
    leaks,
    leaks_anywhere,
    of_shape,
    read,
)

MASK = np.random.default_rng(8).random((3, 5, 4)) > 0.5


def attention(x):
    logits = jnp.einsum("btd,bsd->bts", x @ W, x @ W.T)
    return jax.nn.softmax(jnp.where(jnp.tri(x.shape[1]) > 0, logits, -1e9)) @ x


def conv(x, kernel, **options):
    return lax.conv_general_dilated(x, kernel, (1,), "SAME", **options)


def scan_over_time(x):
    def step(h, v):
        h = jnp.tanh(h @ W + v)
        return h, h * 2

    last, outs = lax.scan(step, jnp.zeros((x.shape[0], 4)), jnp.swapaxes(x, 0, 1))
    return last + outs.sum(0)


def mixture(x):
    gates = jax.nn.softmax(x @ W)
    chosen = jax.nn.one_hot(jnp.argmax(gates, -1), 4)
    return jnp.einsum("...e,...d,edf->...f", gates * chosen, x, np.stack([W, W.T, W @ W, -W]))


SPD = "btd,bsd->bts"
INDEPENDENT = {
    "elementwise": lambda x: jnp.where(x > 0, jnp.exp(x), x**2 + 1),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "layer norm": lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True),
    "reductions": lambda x: x.max(1) + x.min(1) + x.prod(1) + jnp.sqrt((x**2).sum(1)),
    "logsumexp": lambda x: jax.nn.logsumexp(x, axis=(1, 2)),
    "merged with time": lambda x: (jnp.tanh(x.reshape(-1, 4)) @ W).reshape(x.shape),
    "merged, time first": lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, 4) @ W,
    "time first": lambda x: jnp.cumsum(jnp.swapaxes(x, 0, 1) @ W, axis=0),
    "time first, summed": lambda x: jnp.swapaxes(x, 0, 1).sum(0),
    "attention": attention,
    "outer product": lambda x: jnp.einsum("bti,btj->bij", x, x),
    "dropout with a fixed mask": lambda x: jnp.where(MASK, x / 0.5, 0) @ W,
    "mixture of experts": mixture,
    "convolution": lambda x: conv(x, of_shape(2, 5, 3)),
    "convolution, feature groups": lambda x: conv(x, of_shape(10, 1, 3), feature_group_count=5),
    "kernel per example": jax.vmap(lambda v: conv(v[None], v[:2, None].repeat(5, 1))),
    "kernel from example": lambda x: conv(of_shape(2, 5, 6), jnp.tanh(x)),
    "max pooling": lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2), (1, 1, 1), "SAME"),
    "average pooling": lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 1), (1, 2, 1), "VALID"),
    "generic reduce": lambda x: lax.reduce(x, 0.0, lambda a, b: a + b * a, (1,)),
    "cumulated": lambda x: jnp.cumsum(x, 1) * jnp.cumprod(x, 2) + lax.cummax(x, axis=1),
    "sorted": lambda x: jnp.sort(x, axis=-1),
    "sorted by a key": lambda x: jnp.take_along_axis(x, jnp.argsort(x.sum(-1))[..., None], axis=1),
    "top k": lambda x: lax.top_k(x, 2)[0],
    "top k, its indices": lambda x: jnp.take_along_axis(x, lax.top_k(x, 2)[1], axis=-1),
    "concatenated": lambda x: jnp.concatenate([x, -x, jnp.ones((3, 1, 4))], axis=1),
    "doubled batch": lambda x: sum(jnp.split(jnp.concatenate([x, 2 * x]) @ W, 2)),
    "doubled batch, one half": lambda x: jnp.concatenate([x, 2 * x, x])[3:6],
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0))),
    "sliced": lambda x: x[:, 1:4, ::2],
    "one step taken": lambda x: x[:, -1] + x[:, 0],
    "slices at a dynamic place": lambda x: lax.dynamic_slice_in_dim(x, jnp.int32(1), 2, axis=1),
    "updated in place": lambda x: lax.dynamic_update_slice(x, x[:, :2] * 2, (0, 1, 0)),
    "set in place": lambda x: x.at[:, 1].set(x[:, 0] ** 2).at[..., 2].mul(3.0),
    "scattered into zeros": lambda x: jnp.zeros((3, 7, 4)).at[:, 2:7].add(2 * x),
    "reversed in time": lambda x: x[:, ::-1] * 2,
    "split": lambda x: jnp.split(x, 2, axis=-1)[0] * jnp.split(x, 2, axis=-1)[1],
    "rows of a constant picked": lambda x: x * jnp.asarray(W)[jnp.argmax(x, -1)],
    "indices of a constant": lambda x: x[:, np.array([0, 0, 3])],
    "rolled": lambda x: jnp.roll(x, 2, axis=1),
    "fft": lambda x: jnp.fft.rfft(x, axis=-1).real + jnp.fft.ifft(x, axis=1).real[..., :3],
    "cholesky": lambda x: jnp.linalg.cholesky(x[:, :4].mT @ x[:, :4] + 9 * jnp.eye(4)),
    "solved": lambda x: jnp.linalg.solve(x[:, :4] + 9 * jnp.eye(4), x[:, :4]),
    "solved, A fixed": lambda x: jnp.linalg.solve(W + 9 * jnp.eye(4), x[:, :4]),
    "triangular solve": lambda x: jax.scipy.linalg.solve_triangular(x[:, :4] + 5, x[:, :4]),
    "eigenvalues": lambda x: jnp.linalg.eigvalsh(jnp.einsum(SPD, x, x)),
    "singular values": lambda x: jnp.linalg.svd(x, compute_uv=False),
    "qr": lambda x: jnp.linalg.qr(x)[1],
    "determinant": lambda x: jnp.linalg.slogdet(x[:, :4])[1],
    "relu": lambda x: jax.nn.relu(x) @ W,
    "rematerialized": jax.checkpoint(lambda v: jnp.sin(v) @ W),
    "scan over time": scan_over_time,
    "scan over layers": lambda x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, W[None])[0],
    "associative scan": lambda x: lax.associative_scan(lambda a, b: a * b + b, x, axis=1),
    "cond": lambda x: lax.cond(W[0, 0] > 9, lambda v: v, lambda v: v @ W, x),
    "cond on all examples": lambda x: lax.cond(x.sum() > 0, lambda v: 2 * v, lambda v: v @ W, x),
    "switched per example": jax.vmap(lambda v: lax.cond(v.sum() > 0, jnp.sin, jnp.cos, v)),
    "mean behind stop_gradient": lambda x: x - lax.stop_gradient(x.mean(0)),
    "mean behind stop_gradient in a branch": lambda x: (
        x
        - lax.cond(
            W[0, 0] > 9,
            lambda v: 2 * lax.stop_gradient(v.mean(0)),
            lambda v: lax.stop_gradient(v.max(0)),
            x,
        )
    ),
    "weights by rank in the batch": lambda x: x * jnp.argsort(x.sum((1, 2)))[:, None, None],
    "stop_gradient of the others": lambda x: jnp.einsum("btd,cse->btd", x, lax.stop_gradient(x)),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_what_is_proved_independent_has_a_block_diagonal_jacobian(name):
    assert_independent(INDEPENDENT[name], of_shape(3, 5, 4))


COUPLED = {
    "reduce_sum": lambda x: x - x.mean(0),
    "reduce_max": lambda x: x / x.max((0, 1)),
    "dot_general": lambda x: jnp.einsum("btd,ctd->bct", x, x),
    "cumsum": lambda x: jnp.cumsum(x, 0),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x, axis=0),
    "sort": lambda x: jnp.sort(x, 0),
    "top_k": lambda x: lax.top_k(x.T, 2)[0],
    "slice": lambda x: x * x[:1],
    "rev": lambda x: x + x[::-1],
    "add": lambda x: x[:, None, 0] + x[None, :, 0],
    "mul": lambda x: x[:, None] * x[None],
    "fft": lambda x: jnp.fft.fft(x, axis=0).real,
    "reduce_window_sum": lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1, 1), (1, 1, 1), "SAME"),
    "cholesky": lambda x: jnp.linalg.cholesky(jnp.einsum("btd,btc->tdc", x, x) + jnp.eye(4)),
    "concatenate": lambda x: jnp.concatenate([x[:, :, :2].sum(1), W[:3, :2], W[:1, :2]]),
    "conv_general_dilated": lambda x: conv(x.swapaxes(0, 2), of_shape(3, 5, 3)),
}


@pytest.mark.parametrize("name", COUPLED)
def test_what_is_refused_is_coupled_wherever_one_looks_for_the_examples(name):
    f, xs = COUPLED[name], of_shape(3, 5, 4)
    assert leaks_anywhere(f, xs) > 0
    with pytest.raises(ValueError, match="examples of the batch are coupled by `") as error:
        read(f, xs)
    if name not in ("cholesky",):  # there, the product before it
        assert f"`{name}`" in str(error.value)


def test_softmax_over_the_batch_is_coupled():
    with pytest.raises(ValueError, match="coupled by `reduce_"):
        read(lambda x: jax.nn.softmax(x, axis=0), of_shape(3, 4))


def test_a_mean_loss_over_the_batch_is_no_batch_of_outputs():
    with pytest.raises(ValueError, match=r"coupled by `reduce_sum`.*test_batch_rules\.py"):
        read(lambda x: jnp.mean((x @ W) ** 2), of_shape(3, 4))


@pytest.mark.parametrize("axis", [1, -1])
def test_the_batch_may_be_any_axis(axis):
    def f(x):
        return jnp.tanh(jnp.einsum("tdb,de->tbe" if axis == -1 else "tbd,de->tbe", x, W)).sum(0)

    xs = of_shape(5, 4, 3) if axis == -1 else of_shape(5, 3, 4)
    before, after, verdict, _ = read(f, xs, axis)
    assert verdict == "proved"
    assert leaks(jacobian(f, xs), before, after) == 0
    assert np.array_equal(before.to_examples((xs,)), np.moveaxis(xs, axis, 0).reshape(3, 20))


def test_a_program_claimed_independent_is_so_whatever_operations_it_is_made_of():
    """Random programs, with axes of equal sizes so that they are easily taken for each other."""
    rng, claimed = np.random.default_rng(3), 0
    for _ in range(20):
        program = [random_step(rng) for _ in range(4)]
        f = functools.partial(run_steps, program)
        xs = of_shape(3, 2, 3)
        try:
            before, after, _, _ = read(f, xs)
        except ValueError:
            continue
        claimed += 1
        assert leaks(jacobian(f, xs), before, after) == 0, program
    assert claimed > 4


def random_step(rng):
    kinds = ["sin", "reduce", "transpose", "merge", "split", "dot", "cumsum", "take", "outer"]
    return str(rng.choice([*kinds, "softmax", "rev", "concatenate"])), int(rng.integers(0, 1000))


def run_steps(program, x):
    for kind, seed in program:
        axis = seed % x.ndim if x.ndim else 0
        n = x.shape[axis] if x.ndim else 1
        if kind == "sin" or x.ndim == 0:
            x = jnp.sin(x) + x
        elif kind == "reduce":
            x = x.sum(axis, keepdims=seed % 2 == 0) if x.ndim > 1 else x
        elif kind == "transpose":
            x = jnp.transpose(x, np.random.default_rng(seed).permutation(x.ndim))
        elif kind == "merge":
            x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        elif kind == "split":
            x = x.reshape(*x.shape[:axis], 3, -1, *x.shape[axis + 1 :]) if n % 3 == 0 else x
        elif kind == "dot":
            kernel = np.random.default_rng(seed).standard_normal((n, 3)).astype(np.float32)
            x = jnp.moveaxis(jnp.tensordot(x, kernel, (axis, 0)), -1, seed % x.ndim)
        elif kind == "cumsum":
            x = jnp.cumsum(x, axis)
        elif kind == "take":
            x = jnp.take(x, jnp.array([0, n - 1, 0]), axis)
        elif kind == "outer":
            x = x * x[(slice(None),) * axis + (slice(0, 1),)]
        elif kind == "softmax":
            x = jax.nn.softmax(x, axis)
        elif kind == "rev":
            x = jnp.flip(x, axis) + x
        elif x.size < 100:
            x = jnp.concatenate([x, 2 * x], axis)
    return x
