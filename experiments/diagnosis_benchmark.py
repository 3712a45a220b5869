"""How often does `jaxgrad.diagnose` name the right cause, and how often does it cry wolf?

Prediction: fault detected >= 95 %, primary cause right >= 85 %, layer right >= 80 %, false alarms
<= 2 % of healthy runs. The part "report" was written before the rules had met it, the part "late"
beside the last rules. Beside ours, on the same programs: the rules of published tools
(`diagnosis_tools`), whether a program trains after the reported fix (`diagnosis_cures`), and what
is said of the training after the fact, from its recording (`diagnosis_stored`).
Run: ``python -m experiments.diagnosis_benchmark --seeds 5 --rows rows.jsonl [--only NAME ...]``,
again and again until it says "done" (each run stops after `--minutes`), then with ``--summarize``.
"""

import argparse
import json
import math
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from experiments.diagnosis_programs import Program
from experiments.diagnosis_programs_late import PROGRAMS
from jaxgrad.diagnosis import diagnose

NOTE = (
    "Programs of the part 'report' were written before the rules had met them; at first contact "
    "(seed 0) their rates were: cause 25 of 31, one crash, no false alarm on 26 healthy programs; "
    "then rules were mended. Programs of the part 'late' were written beside the rules for stalls "
    "and for updates that round away. All rates here are after that, on seeds that no rule was "
    "changed for. 71 further faulty programs, after public code, met the rules later: 61 were "
    "detected and 52 causes right at first contact, and 93 of 94 healthy ones were silent. Of 50 "
    "more, written blind, 40 were detected and 38 causes right at first contact, without an alarm "
    "on 81 healthy ones; rules were mended, and then 16 of 20 new faults were detected and 15 "
    "causes right, without an alarm on 30 healthy ones. Of 33 more 33 were detected and 32 causes "
    "right, of 65 in two further sets 53 and 50; the 70 healthy ones beside them were silent. Of "
    "41 in a seventh set 37 were detected and 36 causes right, with one alarm and a crash on 31; "
    "of 53 in an eighth 48 and 45, with one alarm on 40."
)


def examine(program: Program, seed: int) -> tuple[dict[str, Any], Any]:
    """One program, one seed: its row, and the report."""
    start = time.perf_counter()
    made = program.make(seed)
    began = time.perf_counter()
    report = diagnose(**made)
    primary = report.primary
    code = primary.code if primary else None
    where = primary.where if primary else ""
    row = {
        "name": program.name, "kind": program.kind, "part": program.part, "seed": seed,
        "expected": list(program.codes), "code": code, "where": where,
        "alarms": [f.code for f in report.findings if f.is_alarm],
        "right": code in program.codes if program.codes else code is None,
        "place": any(w in where for w in program.where) if program.where and primary else None,
        "seconds": round(time.perf_counter() - began, 2),
        "making": round(began - start, 2), "notes": list(report.notes),
    }  # fmt: skip
    return row, report


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

    return {
        "detected": rate(sum(bool(r["alarms"]) for r in faulty), len(faulty)),
        "cause": rate(sum(r["right"] for r in faulty), len(faulty)),
        "layer": rate(sum(bool(r["place"]) for r in placed), len(placed)),
        "false_alarms": rate(sum(bool(r["alarms"]) for r in healthy), len(healthy)),
        "seconds_median": sorted(r["seconds"] for r in rows)[len(rows) // 2] if rows else None,
    }


def tool_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same rates of the published tools' rules; `any` counts every cause that they name."""
    table: dict[str, Any] = {}
    for name in {tool for row in rows for tool in row["tools"]}:
        faulty = [r for r in rows if r["expected"]]
        healthy = [r for r in rows if not r["expected"]]
        said = [(set(r["expected"]), r["tools"][name]) for r in faulty]
        first = sum(bool(e & set(t["causes"])) for e, t in said)
        table[name] = {
            "detected": rate(sum(bool(t["fired"]) for _, t in said), len(said)),
            "cause_of_first_alarm": rate(first, len(said)),
            "any_cause": rate(sum(bool(e & set(t["any_cause"])) for e, t in said), len(said)),
            "false_alarms": rate(
                sum(bool(r["tools"][name]["fired"]) for r in healthy), len(healthy)
            ),
        }
    return table


def cure_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of the faulty programs that train, as they are and after the reported fix."""
    tried = [r["cure"] for r in rows if r.get("cure")]
    kinds = ("automatic", "by hand")
    return {
        "before": rate(sum(c["before"] for c in tried), len(tried)),
        "after": rate(sum(c["after"] for c in tried), len(tried)),
        **{
            kind: rate(sum(c["after"] for c in tried if c["how"] == kind),
                        sum(c["how"] == kind for c in tried))
            for kind in kinds
        },
        "failed": sorted({r["name"] for r in rows if r.get("cure") and not r["cure"]["after"]}),
    }  # fmt: skip


def rate(hits: int, total: int) -> dict[str, Any]:
    """A share with its 95 % interval."""
    low, high = wilson(hits, total)
    return {"hits": hits, "of": total, "rate": hits / max(total, 1), "interval": [low, high]}


def _cure(program: Program, seed: int, report: Any) -> dict[str, Any] | None:
    from experiments.diagnosis_cures import cured, trains

    if not program.codes:
        return None
    made = program.make(seed)
    before, _, stays = trains(made)
    found = {"before": before, "loss_before": stays, "after": False, "how": "none"}
    if report.primary is None:
        return found
    better, how = cured(program.name, seed, made, report.primary)
    if better is None:
        return found | {"how": how}
    after, _, last = trains(better)
    return found | {"after": after, "how": how, "loss_after": last}


def work(options: argparse.Namespace) -> bool:
    """Examines what is not in the file of rows yet; whether all is done."""
    known = _read(options.rows)
    done = {(r["name"], r["seed"]) for r in known}
    until = time.monotonic() + 60 * options.minutes
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        # in an order of its own, so that an unfinished file is a fair sample
        for program in random.Random(0).sample(PROGRAMS, len(PROGRAMS)):
            unwanted = options.only and program.name not in options.only
            if unwanted or (options.part and program.part != options.part):
                continue
            if (program.name, seed) in done:
                continue
            if time.monotonic() > until:
                return False
            row = _row(program, seed, options)
            with options.rows.open("a", encoding="utf-8") as file:
                _ = file.write(json.dumps(row) + "\n")
            mark = "ok  " if row["right"] else "BAD "
            print(
                f"{mark}{row['name']:<26} seed {seed} {row['seconds']:6.1f} s  {row['code']} "
                f"at {row['where']!r} place={row['place']} {row['alarms'][1:]} {row['notes']} "
                f"{row.get('cure') or ''}",
                flush=True,
            )
    return True


def _row(program: Program, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    try:
        row, report = examine(program, seed)
    except Exception as error:  # a crash counts as a wrong answer
        return {"name": program.name, "kind": program.kind, "part": program.part, "seed": seed,
                "expected": list(program.codes), "code": f"CRASH {error}", "where": "",
                "alarms": [], "right": False, "place": None, "seconds": 0.0,
                "notes": []}  # fmt: skip
    if options.cures:
        row["cure"] = _cure(program, seed, report)
    if options.tools:
        from experiments.diagnosis_tools import examine as ask

        row["tools"] = ask(program.make(seed))
    if options.stored:
        row["stored"] = _stored(program, seed)
    return row


def _stored(program: Program, seed: int) -> dict[str, Any]:
    """What is said of the same training after the fact, from its recording."""
    from experiments.diagnosis_stored import examine_stored

    with tempfile.TemporaryDirectory() as folder:
        report = examine_stored(program, seed, Path(folder) / "run")
    code = report.primary.code if report.primary else None
    where = report.primary.where if report.primary else ""
    return {
        "expected": list(program.codes), "code": code,
        "alarms": [f.code for f in report.findings if f.is_alarm],
        "right": code in program.codes if program.codes else code is None,
        "place": any(w in where for w in program.where) if program.where and code else None,
        "seconds": 0.0,
    }  # fmt: skip


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser()
    _ = parser.add_argument("--seeds", type=int, default=5)
    _ = parser.add_argument("--first-seed", type=int, default=0)
    _ = parser.add_argument("--only", nargs="*", default=None)
    _ = parser.add_argument("--part", default=None)
    _ = parser.add_argument("--tools", action="store_true")
    _ = parser.add_argument("--cures", action="store_true")
    _ = parser.add_argument("--stored", action="store_true")
    _ = parser.add_argument("--minutes", type=float, default=8.5)
    _ = parser.add_argument("--rows", type=Path, default=Path("results/diagnosis_rows.jsonl"))
    _ = parser.add_argument("--more-rows", type=Path, nargs="*", default=())
    _ = parser.add_argument("--summarize", type=Path, default=None)
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    if options.summarize is None:
        print("done" if work(options) else "not done yet: run it again")
        return
    rows = [row for path in (options.rows, *options.more_rows) for row in _read(path)]
    result = results(rows)
    print(json.dumps({k: v for k, v in result.items() if k != "wrong"}, indent=1))
    _ = options.summarize.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All rates, the confusion matrix, and the wrong answers."""
    parts = {
        part: summary([r for r in rows if r["part"] == part]) | {
            "programs": len({r["name"] for r in rows if r["part"] == part})
        }
        for part in ("tune", "report", "late")
    }  # fmt: skip
    keys = ("name", "seed", "expected", "code", "where")
    asked, cured = [r for r in rows if "tools" in r], [r for r in rows if r.get("cure")]
    return {
        "note": NOTE, "seeds": sorted({r["seed"] for r in rows}),
        "healthy_programs": len({r["name"] for r in rows if not r["expected"]}),
        "faulty_programs": len({r["name"] for r in rows if r["expected"]}),
        "summary": summary(rows), "parts": parts, "confusion": confusion(rows),
        "tools": tool_summary(asked) | {"jaxgrad": summary(asked)} if asked else {},
        "cures": cure_summary(cured) if cured else {},
        "stored": summary([r["stored"] for r in rows if "stored" in r]),
        "wrong": [{k: r[k] for k in keys} for r in rows if not r["right"]],
        "misplaced": [{k: r[k] for k in keys} for r in rows if r["place"] is False],
    }  # fmt: skip


def confusion(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Expected code -> found code -> count."""
    table: dict[str, Counter[str]] = {}
    for row in rows:
        expected = row["expected"][0] if row["expected"] else "healthy"
        table.setdefault(expected, Counter())[str(row["code"] or "healthy")] += 1
    return {k: dict(v) for k, v in table.items()}


if __name__ == "__main__":
    main()
