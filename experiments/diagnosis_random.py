"""Is `jaxgrad.diagnose` right about programs that nobody wrote?

A program is drawn at random (`random_programs`), and a fault for it (`random_faults`). Truth is
what training says: both are trained, and the fault counts where it costs a tenth of the accuracy
(or of the variance explained). The program as drawn is healthy if it learns. No rule was
changed for a seed from 5,000 on before it was counted.
Prediction: as of `diagnosis_benchmark`.
Run: ``python -m experiments.diagnosis_random --first-seed 5000 --seeds 99 --rows rows.jsonl``,
again and again until it says "done", then with ``--summarize FILE``.
"""

import argparse
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.diagnosis_benchmark import rate
from experiments.random_faults import FAULTS, Fault
from experiments.random_programs import Made, draw
from jaxgrad.diagnosis import diagnose

STEPS = 400
# What a fault costs at least, of accuracy or variance explained; what a healthy program gains.
_HARM, _LEARNED = 0.1, 0.15


def drawn(seed: int) -> tuple[Made, Made, Fault, float]:
    """A program, the same with a fault, the fault and its severity."""
    rng = np.random.default_rng([seed, 1])
    made = draw(seed)
    family, regression = made.facts["family"], made.batches[0][1].dtype == np.float32
    fits = [
        f for f in FAULTS
        if family in (f.families or (family,))
        and not (f.classes if regression else f.regression)
    ]  # fmt: skip
    fault, severity = fits[int(rng.integers(len(fits)))], float(rng.random())
    made = draw(seed, fault.depth)
    if made.facts["rule"] == "sgd" and "optimizer.clip_after_update" in fault.codes:
        # plain SGD keeps no state: a clip behind it is one before it
        fault = replace(fault, codes=(*fault.codes, "optimizer.clip_always"))
    return made, fault.change(made, severity), fault, severity


def quality(made: Made) -> float:
    """Accuracy, or share of variance explained, after training; -inf if it broke down."""
    key, tx = jax.random.key(made.facts["seed"]), made.optimizer

    @jax.jit
    def step(params: Any, state: Any, batch: Any, key: Any) -> tuple[Any, Any]:
        grads = jax.grad(made.loss)(params, batch, key if made.noisy else None)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = made.params, tx.init(made.params)
    batches = [jax.tree.map(jnp.asarray, batch) for batch in made.batches]
    for t in range(STEPS):
        batch = batches[t % len(batches)]
        params, state = step(params, state, batch, jax.random.fold_in(key, t))
    outputs = jax.jit(lambda x: made.outputs(params, x))
    pairs = [(np.asarray(outputs(x)), np.asarray(y) + made.shift) for x, y in batches]
    z, y = (np.concatenate(part) for part in zip(*pairs, strict=True))
    if not np.isfinite(z).all():
        return float("-inf")
    if y.dtype == np.float32:
        return 1 - float(np.mean((z.reshape(y.shape) - y) ** 2) / np.mean((y - y.mean(0)) ** 2))
    return float(np.mean(z.argmax(-1) == y))


def chance(made: Made) -> float:
    """The quality of the best constant answer."""
    y = np.concatenate([y for _, y in made.batches])
    return 0.0 if y.dtype == np.float32 else float(np.bincount(y.ravel()).max() / y.size)


def examine(made: Made) -> dict[str, Any]:
    """What the diagnosis says of a program."""
    key, batches = jax.random.key(0) if made.noisy else None, made.batches
    start = time.perf_counter()
    report = diagnose(
        made.loss, made.params, batches[0], optimizer=made.optimizer, batches=batches, key=key
    )
    primary = report.primary
    return {
        "code": primary.code if primary else None, "where": primary.where if primary else "",
        "alarms": [f.code for f in report.findings if f.is_alarm], "notes": list(report.notes),
        "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip


def row_of(seed: int) -> dict[str, Any]:
    """Both programs of a seed: what training says of them, and what the diagnosis does."""
    made, faulty, fault, severity = drawn(seed)
    known, harmed = quality(made), quality(faulty)
    return {
        "seed": seed, "facts": made.facts, "fault": fault.name, "severity": severity,
        "codes": list(fault.codes), "chance": chance(made), "quality": known,
        "quality_with_fault": harmed, "healthy": examine(made), "faulty": examine(faulty),
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rates, with intervals, and every wrong answer."""
    healthy = [r for r in rows if r["quality"] > r["chance"] + _LEARNED]
    harmed = [r for r in healthy if r["quality_with_fault"] < r["quality"] - _HARM]
    right = [r for r in harmed if r["faulty"]["code"] in r["codes"]]
    keys = ("seed", "fault", "severity", "quality", "quality_with_fault")
    table = Counter(r["fault"] for r in harmed)
    found = Counter(r["fault"] for r in right)
    return {
        "seeds": [min(r["seed"] for r in rows), max(r["seed"] for r in rows)],
        "programs": len(rows), "healthy": len(healthy), "harmful_faults": len(harmed),
        "detected": rate(sum(bool(r["faulty"]["alarms"]) for r in harmed), len(harmed)),
        "cause": rate(len(right), len(harmed)),
        "false_alarms": rate(sum(bool(r["healthy"]["alarms"]) for r in healthy), len(healthy)),
        "seconds_median": float(
            np.median([r[k]["seconds"] for r in rows for k in ("healthy", "faulty")])
        ),
        "by_fault": {name: [found[name], count] for name, count in sorted(table.items())},
        "wrong": [
            {k: r[k] for k in keys} | {"code": r["faulty"]["code"]}
            for r in harmed if r not in right
        ],
        "alarms_on_healthy": [
            {k: r[k] for k in keys} | {"code": r["healthy"]["code"], "facts": r["facts"]}
            for r in healthy if r["healthy"]["alarms"]
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    _ = parser.add_argument("--seeds", type=int, default=100)
    _ = parser.add_argument("--first-seed", type=int, default=2_000)
    _ = parser.add_argument("--minutes", type=float, default=60.0)
    _ = parser.add_argument("--rows", type=Path, default=Path("results/random_rows.jsonl"))
    _ = parser.add_argument("--summarize", type=Path, default=None)
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    text = options.rows.read_text(encoding="utf-8") if options.rows.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    if options.summarize is not None:
        result = summary(rows)
        print(json.dumps(result, indent=1))
        _ = options.summarize.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return
    until = time.monotonic() + 60 * options.minutes
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        if any(r["seed"] == seed for r in rows):
            continue
        if time.monotonic() > until:
            print("not done yet: run it again")
            return
        row = row_of(seed)
        with options.rows.open("a", encoding="utf-8") as file:
            _ = file.write(json.dumps(row) + "\n")
        facts = row["facts"]
        print(
            f"{seed} {facts['family']} {facts['data']} {facts['rule']} {row['quality']:.2f} "
            f"{row['healthy']['code']} | {row['fault']} {row['severity']:.2f} "
            f"{row['quality_with_fault']:.2f} {row['faulty']['code']}",
            flush=True,
        )
    print("done")


if __name__ == "__main__":
    main()
