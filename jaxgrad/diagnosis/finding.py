"""What a diagnosis says: findings, of which one is the primary cause, and the report of them."""

import fnmatch
import html
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrad import store

SEVERITIES = ("error", "warning", "info")
STAGES = ("static", "initial", "running", "counterfactual")
_WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        code: stable name of the fault, such as ``"init.too_small"``.
        severity: ``"error"``, ``"warning"`` or ``"info"``; a healthy run has no error and no
            warning.
        stage: ``"static"``, ``"initial"``, ``"running"`` or ``"counterfactual"``: where in the life
            of a run the deciding evidence stands.
        where: name of the layer or parameter.
        cause: one sentence.
        evidence: measured values with their thresholds, and what a probe did.
        fix: code to paste.
        confidence: between 0 and 1.
        consequence_of: code of the finding that this one follows from, or None.
        may_be_wrong: known ways in which this finding can be mistaken.
    """

    code: str
    severity: str
    stage: str
    where: str
    cause: str
    evidence: dict[str, Any] = field(default_factory=dict)
    fix: str = ""
    confidence: float = 0.9
    consequence_of: str | None = None
    may_be_wrong: str = ""

    @property
    def is_alarm(self) -> bool:
        """Whether the finding is an error or a warning that follows from no other."""
        return self.severity != "info" and self.consequence_of is None

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain, JSON-ready values."""
        return {key: plain(value) for key, value in vars(self).items()}


def matches(finding: Finding, patterns: Sequence[str]) -> bool:
    """Whether a finding is one that the user knows and means.

    Args:
        finding: the finding.
        patterns: ``"code"`` or ``"code:where"``, either with ``*``.
    """
    for pattern in patterns:
        code, _, where = pattern.partition(":")
        if fnmatch.fnmatchcase(finding.code, code) and fnmatch.fnmatchcase(
            finding.where, where or "*"
        ):
            return True
    return False


@dataclass(frozen=True)
class Report:
    """The result of `jaxgrad.diagnose`.

    Attributes:
        primary: the one cause to mend first; None where no error and no warning was found.
        findings: all findings, the primary one first.
        rows: the layers in forward order, one dict of numbers each.
        facts: what was measured of the run as a whole.
        notes: what the reader must know about the reading itself: opaque regions, parameters that
            no row covers, probes that could not be run.
        course: what the pictures of the page are drawn from, or None.
    """

    primary: Finding | None
    findings: tuple[Finding, ...]
    rows: tuple[dict[str, Any], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    course: Any = field(default=None, repr=False, compare=False)

    @property
    def verdict(self) -> str:
        """The first line of the report."""
        if self.primary is None:
            return "healthy: no error and no warning"
        at = f" at {self.primary.where}" if self.primary.where else ""
        return f"{self.primary.severity}: {self.primary.code}{at}: {self.primary.cause}"

    def to_dict(self) -> dict[str, Any]:
        """The report as nested dicts of JSON values; NaN and infinities are strings."""
        return {
            "version": 1,
            "verdict": self.verdict,
            "primary": None if self.primary is None else self.primary.to_dict(),
            "findings": [finding.to_dict() for finding in self.findings],
            "layers": plain(list(self.rows)),
            "facts": plain(self.facts),
            "notes": list(self.notes),
        }

    def save(self, path: str | Path) -> Path:
        """Writes the report.

        Args:
            path: a file; ``.json`` gives `to_dict`, ``.html`` a page that stands alone, with
                pictures where matplotlib is installed (``pip install 'jaxgrad[report]'``).

        Returns:
            The path.

        Raises:
            ValueError: for any other ending.
        """
        path = Path(path)
        if path.suffix not in (".json", ".html"):
            raise ValueError(f"save(path): expected a .json or .html file, got {path.name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        page = path.suffix == ".html"
        text = self._page() if page else store.to_json(self.to_dict(), indent=2)
        _ = path.write_text(text, encoding="utf-8")
        return path

    def _page(self) -> str:
        try:
            # by name: the room of reports reads this one, and this is the one way back
            room = importlib.import_module("jaxgrad.report.diagnosis_page")
        except ImportError as error:
            words = f"{self}\n\nnote: no pictures ({error}): pip install 'jaxgrad[report]'"
            return (
                '<!doctype html><meta charset="utf-8"><title>jaxgrad diagnosis</title>'
                f"<pre>{html.escape(words)}</pre>\n"
            )
        return room.diagnosis_page(self)

    def __str__(self) -> str:
        """The verdict, a card for each finding, and the table of layers."""
        parts = [self.verdict, *(_card(f) for f in self.findings), self._table()]
        parts += [f"note: {note}" for note in self.notes]
        return "\n\n".join(part for part in parts if part)

    def _table(self) -> str:
        if not self.rows:
            return ""
        guilty: set[str] = set()
        for finding in self.findings:
            if finding.is_alarm:
                guilty |= {finding.where, *map(str, finding.evidence.get("layers", ()))}
        labels = ("activation RMS", "gradient RMS", "zero share", "weight grad")
        keys = ("activation_rms", "gradient_rms", "zero_share", "weight_gradient_rms")
        head = f"  {'layer':<38}" + "".join(f"{label:>15}" for label in labels)
        lines = [head, "-" * _WIDTH]
        for row in self.rows:
            mark = ">" if row["name"] in guilty or guilty & set(row.get("parameters", ())) else " "
            cells = "".join(f"{_number(row.get(key)):>15}" for key in keys)
            lines.append(f"{mark} {row['name'][:38]:<38}{cells}")
        return "\n".join(lines)


def plain(value: Any) -> Any:
    """A value as JSON knows it: numbers of arrays become Python's, non-finite ones strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return plain(np.asarray(value)) if hasattr(value, "dtype") else str(value)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}"


def _card(finding: Finding) -> str:
    """A finding for the terminal, one fact a line."""
    title = f"[{finding.severity}] {finding.code}" + (
        f" at {finding.where}" if finding.where else ""
    )
    lines = [title, f"  cause:      {finding.cause}"]
    if finding.consequence_of:
        lines.append(f"  follows:    {finding.consequence_of}")
    for key, value in finding.evidence.items():
        lines.append(f"  {key + ':':<11} {_short(value)}")
    for i, line in enumerate(finding.fix.splitlines()):
        lines.append(f"  {'fix:' if i == 0 else '':<11} {line}")
    lines.append(f"  confidence: {finding.confidence:.0%} ({finding.stage})")
    if finding.may_be_wrong:
        lines.append(f"  wrong if:   {finding.may_be_wrong}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple) and len(value) > 8:
        return ", ".join(_short(v) for v in value[:8]) + f", ... ({len(value)} in all)"
    if isinstance(value, list | tuple):
        return ", ".join(_short(v) for v in value)
    return str(value)


def as_consequence(finding: Finding, code: str) -> Finding:
    """The finding as something that follows from another one; no alarm of its own."""
    return replace(finding, consequence_of=code, severity="info")
