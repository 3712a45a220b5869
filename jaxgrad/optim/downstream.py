"""What stands behind a state leaf: scaled by hand, does the update grow without end?"""

import numpy as np

from jaxgrad.optim.probing import Probe, has_kink, slopes


class Down:
    """Which leaves have a clip behind them, and which change no update at all.

    Attributes:
        verdicts: by leaf: whether the update stops growing; None where the leaf cannot tell.
        records: leaves without influence on the update.
    """

    def __init__(self) -> None:
        self.verdicts: dict[int, bool | None] = {}
        self.records: set[int] = set()


def downstream(probe: Probe, emissions: np.ndarray, counted: list[int]) -> Down:
    """Scales state leaves by hand and watches the update.

    Args:
        probe: the probe.
        emissions: steps at which updates come out.
        counted: state leaves that belong to a rule.

    Returns:
        Verdicts and records.
    """
    down = Down()
    if not emissions.size or not counted:
        return down
    step = int(emissions[min(1, emissions.size - 1)])
    groups: dict[str, list[int]] = {}
    for k in counted:
        groups.setdefault(probe.owners[k][0], []).append(k)
    for members in groups.values():
        chosen = np.zeros(len(probe.names))
        chosen[members] = 1
        # A tiny gradient leaves the update to the state; a rule with a second moment only needs a
        # real one to have an update at all.
        looks = [probe.saturate(step, chosen, last) for last in (2.0**-40, 1.0)]
        # Equal up to rounding: the leaf is a record.
        silent = step > 0 and not any((c > 1e-5 * s).any() for c, s, _ in looks)
        for k in members:
            owner = probe.owners[k][1]
            columns = range(looks[0][0].shape[1]) if owner is None else [owner]
            verdicts = [_saturates(c[:, j], s[:, j], z[j]) for c, s, z in looks for j in columns]
            known = [v for v in verdicts if v is not None]
            down.verdicts[k] = any(known) if known else None
            if silent:
                down.records.add(k)
    return down


def _saturates(change: np.ndarray, size: np.ndarray, still: float) -> bool | None:
    """Whether an update stops growing at a kink as a state leaf grows, or as it shrinks.

    False where it grows without end. None where this leaf cannot tell: a sign hides its size, or
    the rule itself levels off smoothly, as Adam does when its second moment grows.
    """
    x = np.arange(len(change) - 1) * 0.25
    change, size = change[:-1], size[:-1]
    up = slopes(x, np.where(change > 2.0**-9 * still, change, np.nan))
    up = _until_overflow(up, change)
    up = up[np.isfinite(up)]
    if (up > 0.9).sum() > 8:
        if up[-8:].min() > 0.5:
            # Steeper than a moment in a numerator: the mean in a centered RMSprop's root.
            return False if np.median(up[-8:]) < 1.5 else None
        clean = up.min() > -0.05 and up.max() < 1.05 and np.abs(up[-8:]).max() < 0.05
        return True if clean and has_kink(up) else None
    low = -slopes(x, size)[::-1]  # as a second moment shrinks, the update grows like its root
    rising = np.isfinite(low) & (np.abs(low - 0.5) < 0.05)
    if rising.sum() > 8:
        after = low[np.flatnonzero(rising)[-1] :]
        after = after[np.isfinite(after)]
        flat = after.size > 8 and np.abs(after[-8:]).max() < 0.02
        return True if flat and has_kink(low, 0.2) else None
    return None


def _until_overflow(steep: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Cuts a curve where the probe left float32's range: the value falls or is not finite."""
    bad = np.flatnonzero(~np.isfinite(values[1:]) | (values[1:] < 0.5 * values[:-1]))
    bad = bad[bad > 8]
    return steep[: bad[0]] if bad.size else steep
