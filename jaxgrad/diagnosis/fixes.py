"""Cures as code to paste, by code of the finding."""
# ruff: noqa: E501 (code to paste is not broken into Python strings)

FIXES = {
    "optimizer.clip_after_update": "tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate))  # clip first",
    "optimizer.clip_always": "tx = optax.chain(optax.clip_by_global_norm({threshold:.3g}), rule)  # about the 90th percentile of the raw norms",
    "optimizer.ascent": "updates, state = tx.update(grads, state, params)\nparams = optax.apply_updates(params, updates)  # updates carry the minus sign: check optax.scale(-learning_rate)",
    "lr.too_high": "learning_rate = {factor:g} * learning_rate",
    "lr.too_low": "learning_rate = {factor:g} * learning_rate",
    "accumulation.sums": "tx = optax.MultiSteps(rule, every_k_schedule={every}, use_grad_mean=True)",
    "accumulation.ineffective": "tx = optax.MultiSteps(rule, every_k_schedule={every})  # keeps the sum between micro-batches",
    "accumulation.misweighted": "tx = jaxgrad.optim.accumulate(rule, {every})  # and pass weights=number_of_tokens to update\n# or divide the summed loss of every micro-batch by the mean number of tokens of all",
    "norm.post_ln_without_warmup": "schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps=1000, decay_steps=total)\ntx = optax.adamw(schedule)\n# or Pre-LN: h = h + sublayer(norm(h))",
    "precision.underflow": "loss = lambda p, b: 2**15 * loss_fn(p, b)   # then divide the gradients by 2**15\ntx = jaxgrad.optim.dynamic_loss_scale(tx)   # or compute in bfloat16",
    "precision.lost_updates": "params = jax.tree.map(lambda p: p.astype(jnp.float32), params)   # keep and update these;\nhalf = lambda tree: jax.tree.map(lambda p: p.astype(jnp.{dtype}), tree)\nloss = lambda params, batch: loss_fn(half(params), batch)   # compute with the rounded ones",
    "precision.overflow": "x = x.astype(jnp.bfloat16)  # or float32: float16 ends at 65504",
    "gradient.blocked": "# remove the operation, or keep the path: y = x + jax.lax.stop_gradient(jnp.round(x) - x)",
    "gradient.nonfinite": "safe = jnp.where(x > 0, x, 1.0)            # make the argument safe first,\ny = jnp.where(x > 0, jnp.{operation}(safe), 0.0)   # then select",
    "gradient.vanishing": "# ReLU or GELU with he_normal, or a residual path h = h + f(norm(h))\nkernel_init = jax.nn.initializers.he_normal()",
    "gradient.exploding": "tx = optax.chain(optax.clip_by_global_norm(1.0), rule)\nrecurrent_init = jax.nn.initializers.orthogonal()",
    "init.too_small": "kernel_init = jax.nn.initializers.variance_scaling({gain:g}, 'fan_in', 'normal')",
    "init.too_large": "kernel_init = jax.nn.initializers.variance_scaling({gain:g}, 'fan_in', 'normal')",
    "init.symmetric": "kernel_init = jax.nn.initializers.he_normal()  # a random draw: equal units stay equal",
    "init.activation_mismatch": "kernel_init = jax.nn.initializers.variance_scaling({gain:g}, '{mode}', 'normal')  # for {kind}",
    "unit.dead": "bias_init = jax.nn.initializers.zeros\nkernel_init = jax.nn.initializers.he_normal()  # or jax.nn.leaky_relu, or a wider layer",
    "unit.saturated": "kernel_init = jax.nn.initializers.glorot_normal()\nbias_init = jax.nn.initializers.zeros",
    "loss.double_softmax": "loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)  # logits: no softmax before",
    "loss.single_class_softmax": "loss = optax.sigmoid_binary_cross_entropy(logits, labels)  # one output: a sigmoid, not a softmax",
    "loss.output_mismatch": "logits = h @ kernel + bias   # the last layer is linear; the loss takes the logits",
    "loss.output_mismatch (log)": "loss = optax.sigmoid_binary_cross_entropy(logits, labels)   # takes the last layer's outputs as they are\n# of more than two classes: optax.softmax_cross_entropy_with_integer_labels(logits, labels)",
    "loss.output_mismatch (shapes)": "assert prediction.shape == target.shape   # prediction = prediction[:, 0], or target = target[:, None]",
    "loss.output_mismatch (axis)": "probabilities = jax.nn.softmax(logits, axis=-1)   # over the classes, not over the batch",
    "loss.output_mismatch (pool)": "x = x.mean(axis=1)   # over positions; axis 0 is the batch",
    "loss.output_mismatch (mixed)": "x = x.transpose(1, 0, 2)   # to time-major; reshape would mix the examples",
    "gradient.blocked (sum)": "x = x + positions   # a sum has to be assigned",
    "data.unnormalized": "x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-6)",
    "data.labels_out_of_range": "assert labels.min() >= 0 and labels.max() < {size}",
    "regularization.dominates": "tx = optax.adamw(learning_rate, weight_decay=1e-4)   # or divide the penalty's factor by {factor:.0f}",
    "regularization.dropout_too_strong": "x = nn.Dropout(0.1, deterministic=False)(x)",
    "norm.batch_of_one": "x = nn.LayerNorm()(x)   # or nn.GroupNorm: no statistics over the batch",
    "batch.too_small": "tx = optax.MultiSteps(rule, every_k_schedule={every})   # or a larger batch, or learning_rate / {every}",
    "attention.logit_growth": "scores = q @ k.T / jnp.sqrt(q.shape[-1])   # and q = norm(q), k = norm(k)",
    "attention.rank_collapse": "h = h + attention(norm(h))   # a residual path around every attention",
    "loss.spike": "tx = optax.chain(optax.clip_by_global_norm(1.0), rule)   # and look at the batch of step {step}",
}


def fix(code: str, **values: object) -> str:
    """The cure of a finding."""
    return FIXES[code].format(**values)
