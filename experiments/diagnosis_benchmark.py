"""How often does `jaxgrad.diagnose` name the right cause, and how often does it cry wolf?

Prediction: fault detected >= 95 %, primary cause right >= 85 %, layer right >= 80 %, false alarms
<= 2 % of healthy runs. The part "report" was written before the rules had met it.
Run: ``python -m experiments.diagnosis_benchmark --seeds 5 [--only NAME ...]``
"""

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

from experiments.diagnosis_programs import Program
from experiments.diagnosis_programs_more import PROGRAMS
from jaxgrad.diagnosis import diagnose


def examine(program: Program, seed: int) -> dict[str, Any]:
    """One program, one seed."""
    start = time.perf_counter()
    made = program.make(seed)
    began = time.perf_counter()
    report = diagnose(**made)
    primary = report.primary
    code = primary.code if primary else None
    where = primary.where if primary else ""
    return {
        "name": program.name, "kind": program.kind, "part": program.part, "seed": seed,
        "expected": list(program.codes), "code": code, "where": where,
        "alarms": [f.code for f in report.findings if f.is_alarm],
        "right": code in program.codes if program.codes else code is None,
        "place": any(w in where for w in program.where) if program.where and primary else None,
        "seconds": round(time.perf_counter() - began, 2),
        "making": round(began - start, 2), "notes": list(report.notes),
    }  # fmt: skip


def wilson(hits: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if total == 0:
        return (0.0, 1.0)
    z, p = 1.96, hits / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return (middle - half, middle + half)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The four rates, with intervals."""
    faulty = [r for r in rows if r["expected"]]
    healthy = [r for r in rows if not r["expected"]]
    placed = [r for r in faulty if r["place"] is not None]

    def rate(hits: int, total: int) -> dict[str, Any]:
        low, high = wilson(hits, total)
        return {"hits": hits, "of": total, "rate": hits / max(total, 1), "interval": [low, high]}

    return {
        "detected": rate(sum(bool(r["alarms"]) for r in faulty), len(faulty)),
        "cause": rate(sum(r["right"] for r in faulty), len(faulty)),
        "layer": rate(sum(bool(r["place"]) for r in placed), len(placed)),
        "false_alarms": rate(sum(bool(r["alarms"]) for r in healthy), len(healthy)),
        "seconds_median": sorted(r["seconds"] for r in rows)[len(rows) // 2] if rows else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    _ = parser.add_argument("--seeds", type=int, default=5)
    _ = parser.add_argument("--first-seed", type=int, default=0)
    _ = parser.add_argument("--only", nargs="*", default=None)
    _ = parser.add_argument("--part", default=None)
    _ = parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    rows = []
    for program in PROGRAMS:
        if options.only and program.name not in options.only:
            continue
        if options.part and program.part != options.part:
            continue
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            try:
                row = examine(program, seed)
            except Exception as error:  # a crash counts as a wrong answer
                row = {"name": program.name, "kind": program.kind, "part": program.part,
                       "seed": seed, "expected": list(program.codes), "code": f"CRASH {error}",
                       "where": "", "alarms": [], "right": False, "place": None, "seconds": 0.0,
                       "notes": []}  # fmt: skip
            rows.append(row)
            mark = "ok  " if row["right"] else "BAD "
            print(
                f"{mark}{row['name']:<26} seed {seed} {row['seconds']:6.1f} s  {row['code']} "
                f"at {row['where']!r} place={row['place']} {row['alarms'][1:]} {row['notes']}",
                flush=True,
            )
    result = {"summary": summary(rows), "confusion": confusion(rows), "rows": rows}
    print(json.dumps(result["summary"], indent=1))
    if options.out:
        _ = options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def confusion(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Expected code -> found code -> count."""
    table: dict[str, Counter[str]] = {}
    for row in rows:
        expected = row["expected"][0] if row["expected"] else "healthy"
        table.setdefault(expected, Counter())[str(row["code"] or "healthy")] += 1
    return {k: dict(v) for k, v in table.items()}


if __name__ == "__main__":
    main()
