"""What does clipping really do, for each optimizer?

A run of 100 steps with gradients of norm about 1, in which one gradient (step 50) is 1000 times
larger. Measured, without a clip, with one before the rule and with one after it (max_norm 1):
the largest step, over the median step; how far the outlier moved the parameters by step 100, in
median steps; and how much the step changes if every gradient is 1000 times as large.

Run: ``python -m experiments.benchmarks.clipping_effect``; seconds on a CPU, no randomness but a
fixed seed.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import optim

RATE, STEPS, OUTLIER, SIZE = 1e-2, 100, 50, 256
RULES = {
    "sgd": optim.sgd(RATE),
    "momentum": optim.momentum(RATE),
    "adam": optim.adam(RATE),
    "lion": optim.lion(RATE, weight_decay=0.0),
    "rmsprop": optim.rmsprop(RATE),
    "muon": optim.muon(RATE),
}


def path(tx, grads):
    params = jnp.zeros((16, 16))

    def body(state, g):
        u, state = tx.update(g, state, params)
        return state, u

    return np.asarray(jax.jit(lambda g: jax.lax.scan(body, tx.init(params), g)[1])(grads))


def norms(x):
    return np.linalg.norm(x.reshape(len(x), -1), axis=1)


def main() -> None:
    rng = np.random.default_rng(0)
    mean = rng.standard_normal((16, 16))
    calm = (mean + rng.standard_normal((STEPS, 16, 16))) / SIZE**0.5 / 2**0.5
    spiky = calm.copy()
    spiky[OUTLIER] *= 1000
    calm, spiky = jnp.float32(calm), jnp.float32(spiky)
    clip = optim.clip_by_global_norm(1.0)
    print("| rule | clip | largest / median step | outlier's push, in steps | step at 1000 g |")
    print("| --- | --- | --- | --- | --- |")
    for name, rule in RULES.items():
        orders = {"none": rule, "before": optim.chain(clip, rule), "after": optim.chain(rule, clip)}
        for order, tx in orders.items():
            still, moved, big = path(tx, calm), path(tx, spiky), path(tx, 1000 * calm)
            step = np.median(norms(still))
            largest = norms(moved).max() / step
            push = np.linalg.norm((moved - still).sum(axis=0)) / step
            growth = np.median(norms(big)) / step
            print(f"| {name} | {order} | {largest:.3g} | {push:.3g} | {growth:.3g}x |")


if __name__ == "__main__":
    main()
