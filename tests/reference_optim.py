"""Slow, obvious optimizers in float64 NumPy: one leaf at a time, textbook formulas, no JAX.

Each function takes a parameter and a list of gradients and returns the parameter after every
step. ``lr`` is a function of the step, from 0.
"""

import numpy as np


def _steps(p, grads, lr, direction):
    """``p <- p - lr(t) d(t, g, p)`` for t = 1, 2, ..."""
    p, path = np.float64(p), []
    for t, g in enumerate(grads, 1):
        p = p - lr(t - 1) * direction(t, np.float64(g), p)
        path.append(p)
    return path


def _correction(decay, t):
    """``1 - decay**t`` in extended precision: in double it cancels for decays near one."""
    return np.float64(1 - np.longdouble(decay) ** t)


def sgd(p, grads, lr, momentum=0.0, nesterov=False):
    v = np.zeros_like(p, dtype=np.float64)

    def direction(t, g, p):
        nonlocal v
        v = momentum * v + g
        return g + momentum * v if nesterov else v

    return _steps(p, grads, lr, direction)


def momentum(p, grads, lr, momentum=0.9):
    return sgd(p, grads, lr, momentum)


def nesterov(p, grads, lr, momentum=0.9):
    return sgd(p, grads, lr, momentum, True)


def adamw(p, grads, lr, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, weight_decay=1e-4, **options):
    m = np.zeros_like(p, dtype=np.float64)
    v = np.zeros_like(p, dtype=np.float64)

    def direction(t, g, p):
        nonlocal m, v
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        m_hat = m / _correction(b1, t)
        if options.get("nesterov"):
            m_hat = b1 * m / _correction(b1, t + 1) + (1 - b1) * g / _correction(b1, t)
        v_hat = v / _correction(b2, t)
        return m_hat / (np.sqrt(v_hat + eps_root) + eps) + weight_decay * p

    return _steps(p, grads, lr, direction)


def adam(p, grads, lr, **options):
    return adamw(p, grads, lr, weight_decay=0.0, **options)


def lion(p, grads, lr, b1=0.9, b2=0.99, weight_decay=1e-3):
    m = np.zeros_like(p, dtype=np.float64)

    def direction(t, g, p):
        nonlocal m
        c = b1 * m + (1 - b1) * g
        m = b2 * m + (1 - b2) * g
        return np.sign(c) + weight_decay * p

    return _steps(p, grads, lr, direction)


def rmsprop(p, grads, lr, decay=0.9, eps=1e-8, eps_in_sqrt=True, centered=False, momentum=None):
    v = np.zeros_like(p, dtype=np.float64)
    m = np.zeros_like(p, dtype=np.float64)
    b = np.zeros_like(p, dtype=np.float64)
    p, path = np.float64(p), []
    for t, g in enumerate(map(np.float64, grads)):
        v = decay * v + (1 - decay) * g * g
        m = decay * m + (1 - decay) * g
        variance = v - m * m if centered else v
        root = np.sqrt(variance + eps) if eps_in_sqrt else np.sqrt(variance) + eps
        u = -lr(t) * g / root
        b = u if momentum is None else momentum * b + u
        p = p + b
        path.append(p)
    return path


def adagrad(p, grads, lr, initial_accumulator_value=0.1, eps=1e-7):
    s = np.full_like(p, initial_accumulator_value, dtype=np.float64)

    def direction(t, g, p):
        nonlocal s
        s = s + g * g
        return g / np.sqrt(s + eps)

    return _steps(p, grads, lr, direction)


def _rms(x):
    return np.sqrt(np.mean(x * x)) if np.size(x) else 0.0


def adafactor(p, grads, lr, min_dim_size_to_factor=128, decay_rate=0.8, clipping_threshold=1.0):
    r, c, v = 0.0, 0.0, 0.0
    factored = np.ndim(p) == 2 and min(np.shape(p)) >= min_dim_size_to_factor

    def direction(t, g, p):
        nonlocal r, c, v
        beta = 1 - t**-decay_rate
        sq = g * g + 1e-30
        if factored:
            # Rows and columns swap roles with the longer side; the outer product does not care.
            r = beta * r + (1 - beta) * sq.mean(axis=1)
            c = beta * c + (1 - beta) * sq.mean(axis=0)
            u = g / np.sqrt(np.outer(r, c) / r.mean())
        else:
            v = beta * v + (1 - beta) * sq
            u = g / np.sqrt(v)
        u = u / max(1.0, _rms(u) / clipping_threshold)
        return u * max(1e-3, _rms(p))

    return _steps(p, grads, lr, direction)


def muon(p, grads, lr, beta=0.95, eps=1e-8, steps=5):
    if np.ndim(p) != 2:
        return adam(p, grads, lr, nesterov=True)
    m = np.zeros_like(p, dtype=np.float64)

    def direction(t, g, p):
        nonlocal m
        m = beta * m + (1 - beta) * g
        x = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        s = s / (np.linalg.norm(x) + eps)
        for _ in range(steps):  # the polynomial on the singular values themselves
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        return (u * s) @ vt * np.sqrt(max(1, p.shape[1] / p.shape[0]))

    return _steps(p, grads, lr, direction)


def schedule_free_adamw(p, grads, lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    x = z = y = np.float64(p)
    v = np.zeros_like(y)
    largest = total = 0.0
    path = []
    for t, g in enumerate(grads, 1):
        rate = lr(t - 1)
        v = b2 * v + (1 - b2) * np.float64(g) ** 2
        z = z - rate * (g / (np.sqrt(v / _correction(b2, t)) + eps) + weight_decay * y)
        largest = max(largest, rate)
        total += largest**2
        share = largest**2 / total if total else 0.0
        x = (1 - share) * x + share * z
        y = b1 * x + (1 - b1) * z
        path.append(y)
    return path


def clip_by_global_norm(leaves, max_norm):
    norm = np.linalg.norm(np.concatenate([np.ravel(np.float64(x)) for x in leaves]))
    return [np.float64(x) * min(1.0, max_norm / norm if norm else 1.0) for x in leaves]


def clip_by_block_rms(leaves, threshold):
    out = []
    for x in map(np.float64, leaves):
        rms = _rms(x)
        out.append(x * min(1.0, threshold / rms if rms else 1.0))
    return out


def adaptive_clip(leaves, params, clipping, eps=1e-3):
    out = []
    for g, p in zip(map(np.float64, leaves), map(np.float64, params), strict=True):
        axes = None
        if sum(n != 1 for n in g.shape) > 1:
            axes = (0,) if g.ndim in (2, 3) else tuple(range(g.ndim - 1))
        g_norm = np.sqrt(np.sum(g * g, axis=axes, keepdims=True))
        p_norm = np.sqrt(np.sum(p * p, axis=axes, keepdims=True))
        limit = clipping * np.maximum(p_norm, eps)
        out.append(np.where(g_norm > limit, g * (limit / np.where(g_norm > 0, g_norm, 1)), g))
    return out
