"""What `import jaxgrad` costs over `import jax, optax`: CPU seconds of fresh interpreters."""

import resource
import subprocess
import sys

import numpy as np

from experiments.benchmarks import harness

STATEMENTS = {"jax, optax": "import jax, optax", "jaxgrad": "import jaxgrad"}
AT_MOST = 1.15


def cpu_seconds(statement: str) -> float:
    """User and system seconds of one fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Time both in turn, and compare within the rounds."""
    options = harness.options(__doc__)
    samples = [
        {name: cpu_seconds(s) for name, s in STATEMENTS.items()} for _ in range(options.rounds)
    ]
    ratios = [sample["jaxgrad"] / sample["jax, optax"] for sample in samples]
    medians = {name: float(np.median([s[name] for s in samples])) for name in STATEMENTS}
    claims = [
        harness.Claim("CPU time over jax and optax", float(np.median(ratios)), at_most=AT_MOST)
    ]
    return harness.finish("startup", {}, claims, options, extra={"cpu seconds, medians": medians})


if __name__ == "__main__":
    raise SystemExit(main())
