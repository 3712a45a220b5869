"""Numbers and texts as the atlas writes them, in HTML and in Markdown."""

import math
import re

from experiments.atlas.frame import Verdict
from jaxgrad.report.page import escaped

_POWER = re.compile(r"\^(?:\(([^()]{1,16})\)|(-?\d+(?:\.\d+)?|-?[A-Za-z]\w*))")


def factor(nats: float) -> str:
    """A divergence as a factor between measured and predicted, with `10^k` for large ones."""
    if math.isnan(nats):
        return "not a number"
    nats = abs(nats)
    if math.isinf(nats):
        return "infinite"
    if nats < math.log(10):
        digits = 2 if nats > 0.05 else 3 if nats > 0.005 else 4
        return f"×{math.exp(nats):.{digits}f}"
    if nats < math.log(1e5):
        return f"×{float(f'{math.exp(nats):.2g}'):,.0f}"
    exponent = math.floor(nats / math.log(10))
    lead = math.exp(nats - exponent * math.log(10))
    if f"{lead:.1f}" == "10.0":
        lead, exponent = 1.0, exponent + 1
    return f"×{lead:.1f}·10^{exponent}"


def nats(value: float) -> str:
    """A divergence in nats, to three digits."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinitely many nats"
    return f"{float(f'{abs(value):.3g}'):g} nats"


def parts(measured: str) -> list[str]:
    """The cases that a judge lists, apart."""
    return [part.strip() for part in measured.split(";") if part.strip()]


def rich(value: object) -> str:
    """A text in HTML, its powers raised: 10^-7, 0.9^depth, s^(1/2)."""
    return _POWER.sub(lambda m: f"<sup>{m[1] or m[2]}</sup>", escaped(value))


def cell(value: object) -> str:
    """A text in a cell of a Markdown table: one line, and nothing in it is markup."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\|*~$`])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text).replace("](", "] (")


def spoken(verdict: Verdict) -> str:
    """A verdict's word with its condition."""
    return f"{verdict.word} {verdict.condition}".strip()
