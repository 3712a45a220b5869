"""What clips where: the order of clipping and state in any optax transformation."""

from typing import Any

import numpy as np
from jaxtyping import PyTree

from jaxgrad.optim.probing import Probe, Responses, compile_probe, has_kink, slopes
from jaxgrad.optim.reading import clip_follows_a_rule, flattened, read_steps

# A normalizer g / (|g| + eps) looks like a clip with gain 1 / eps.
_LARGEST_GAIN = 1e3
_STAGES = (4, 64, 1024)


class Order(str):
    """The verdict of `clip_order`: a string with its evidence.

    Attributes:
        leaves: verdict of every state leaf by name: ``"before"``, ``"after"``, ``"both"``,
            ``"none"``, or ``"accumulator"``, ``"record"`` and ``"unmoved"``, which do not count.
        responses: how every state leaf answers to large gradients: ``"raw"``, ``"clipped"``,
            ``"normalized"``, ``"skipped"`` or ``"unmoved"``.
        steps: names of the clips and rules that could be read, in order.
        intentional: whether a rule clips its own update by design (Adafactor).
    """

    leaves: dict[str, str]
    responses: dict[str, str]
    steps: tuple[str, ...]
    intentional: bool

    def __new__(cls, verdict: str, **evidence: Any) -> "Order":
        """Makes a string that carries its evidence."""
        order = super().__new__(cls, verdict)
        order.leaves = evidence.get("leaves", {})
        order.responses = evidence.get("responses", {})
        order.steps = evidence.get("steps", ())
        order.intentional = evidence.get("intentional", False)
        return order


def clip_order(tx: Any, params: PyTree, *, extra_args: dict[str, Any] | None = None) -> Order:
    """Judges where a transformation clips: before or after the rule's state.

    By behavior: each state leaf's answer to gradients of norm 2^-56 to 2^60, and the update's
    answer to a scaled state (`jaxgrad.optim.probing`). Where behavior cannot tell (a clip after
    Lion's sign), the transformation's closures are read.

    Args:
        tx: any optax transformation, ``MultiSteps`` included.
        params: parameters, or ones like them.
        extra_args: further arguments that its ``update`` needs.

    Returns:
        A string with evidence: ``"before"`` (every state leaf sees clipped gradients), ``"after"``,
        ``"both"``, ``"none"`` (no clip), ``"mixed"`` (leaves differ; see ``.leaves``), or
        ``"stateless"`` (a clip without a stateful rule, where order has no meaning).

    Raises:
        TypeError: if ``update`` needs further arguments.
    """
    probe = compile_probe(tx, params, extra_args or {})
    read = read_steps(tx)
    steps = flattened(read)
    seen = _run(probe)
    emissions = np.flatnonzero(seen.updated[_unit(probe)].max(axis=-1) > 0)
    kinds = [_kind(probe, seen, k) for k in range(len(probe.names))]
    counted = _counted(probe, seen, kinds)
    down = _downstream(probe, emissions, counted)
    counted = [k for k in counted if k not in down.records]
    up = {k: _up(probe, kinds, k, seen) for k in counted}
    intentional = any(step.kind == "own_clip" for step in steps) or any(
        "v_row" in name for name in probe.names
    )
    follows = clip_follows_a_rule(read)
    after = {k: _after(probe, down.verdicts, k, follows) for k in counted}
    if intentional:
        after = dict.fromkeys(counted, follows)
    verdict = _verdict(up, after) if counted else _stateless(probe, seen, emissions)
    leaves = dict.fromkeys(probe.names, "unmoved")
    for k, name in enumerate(probe.names):
        if k in counted:
            leaves[name] = _WORDS[bool(up[k]), bool(after[k])]
        elif k in down.records:
            leaves[name] = "record"
        elif kinds[k] != "unmoved":
            leaves[name] = "accumulator" if _resets(seen, k) else "record"
    return Order(
        verdict,
        leaves=leaves,
        responses=dict(zip(probe.names, kinds, strict=True)),
        steps=tuple(step.name for step in steps),
        intentional=intentional,
    )


_WORDS = {
    (True, False): "before",
    (False, True): "after",
    (True, True): "both",
    (False, False): "none",
}


def _verdict(up: dict[int, bool | None], after: dict[int, bool]) -> str:
    known_up = {v for v in up.values() if v is not None}
    known_after = set(after.values())
    if len(known_up) > 1 or len(known_after) > 1:
        return "mixed"
    return _WORDS[True in known_up, True in known_after]


def _run(probe: Probe) -> Responses:
    """As many steps as it takes for every leaf to move and for two updates to come out."""
    seen = None
    for steps in _STAGES:
        seen = probe.respond(steps)
        moved = np.any(seen.moved > 0, axis=(0, 1))
        parameters = [k for k, (_, owner) in enumerate(probe.owners) if owner is not None]
        emissions = (seen.updated[_unit(probe)].max(axis=-1) > 0).sum()
        if emissions >= 2 and all(moved[k] for k in parameters):
            break
    assert seen is not None
    return seen


def _unit(probe: Probe) -> int:
    return int(np.flatnonzero(probe.scales == 0)[0])


def _first_moves(seen: Responses, k: int) -> int | None:
    """The first step at which a leaf has moved at any scale."""
    steps = np.flatnonzero((seen.moved[:, :, k] > 0).any(axis=0))
    return int(steps[0]) if steps.size else None


def _resets(seen: Responses, k: int) -> bool:
    """Accumulators return exactly to where they were; moments never do."""
    first = _first_moves(seen, k)
    if first is None:
        return False
    moved = seen.moved[:, first:, k]
    return bool(((moved[:, 0] > 0) & (moved == 0).any(axis=1)).sum() > moved.shape[0] // 2)


def _curve(probe: Probe, seen: Responses, k: int) -> np.ndarray:
    """A leaf's response over the scales at its first move; NaN below rounding."""
    first = _first_moves(seen, k)
    if first is None:
        return np.zeros(len(probe.scales))
    moved, size = seen.moved[:, first, k], seen.size[:, first, k]
    return np.where((moved == 0) | (moved > 2.0**-14 * size), moved, np.nan)


def _kind(probe: Probe, seen: Responses, k: int) -> str:
    return classify(probe.scales, _curve(probe, seen, k))


def classify(scales: np.ndarray, curve: np.ndarray) -> str:
    """Names a response curve.

    Args:
        scales: base-two logarithms of the gradient's norm.
        curve: the response at each.

    Returns:
        ``"raw"``, ``"clipped"``, ``"normalized"``, ``"skipped"`` or ``"unmoved"``.
    """
    finite = np.isfinite(curve)
    if not (curve[finite] > 0).any():
        return "unmoved"
    if (curve[-2:] == 0).all():
        return "skipped"
    steep = slopes(scales, curve)
    if not np.isfinite(steep[-3:]).all() or np.abs(steep[-3:]).max() > 0.05:
        return "raw"
    for power in (1, 2):
        good = np.abs(steep - power) < 0.05
        pairs = np.flatnonzero(good[:-1] & good[1:])
        if pairs.size:
            at = pairs[-1] + 1
            gain = np.log2(curve[at]) / power - scales[at]
            return "clipped" if gain < np.log2(_LARGEST_GAIN) else "normalized"
    return "normalized"


def _counted(probe: Probe, seen: Responses, kinds: list[str]) -> list[int]:
    """State leaves that belong to a rule: parameter-shaped if any are, no accumulators."""
    moved = [k for k, kind in enumerate(kinds) if kind != "unmoved" and not _resets(seen, k)]
    owned = [k for k in moved if probe.owners[k][1] is not None]
    return owned or [k for k in moved if "flat" in probe.names[k] or seen.moved.shape[2] <= 4]


def _up(probe: Probe, kinds: list[str], k: int, seen: Responses) -> bool | None:
    """Whether a clip stands before a leaf; None where a normalizer hides it."""
    if kinds[k] in ("raw", "skipped"):
        return False
    if kinds[k] == "normalized":
        return None
    beside = [j for j, o in enumerate(probe.owners) if o[1] in (None, probe.owners[k][1])]
    raw = any(kinds[j] == "raw" and not _resets(seen, j) for j in beside)
    if raw and not _clips_at_a_kink(probe, seen, k):
        return None  # an eps further down, as in RMSprop with momentum
    return True


def _clips_at_a_kink(probe: Probe, seen: Responses, k: int) -> bool:
    """Looks closely at the bend of a saturating response."""
    first = _first_moves(seen, k)
    steep = slopes(probe.scales, _curve(probe, seen, k))
    rising = np.flatnonzero(steep > 0.5)
    if first is None or not rising.size:
        return False
    center = probe.scales[rising[-1]]
    fine = center + 0.25 * (np.arange(len(probe.scales)) - len(probe.scales) // 2)
    close = probe.respond(seen.moved.shape[1], fine)
    return has_kink(slopes(fine, close.moved[:, first, k]) / np.round(steep[rising[-2:]].max()))


class _Down:
    """Which leaves have a clip behind them, and which change no update at all."""

    def __init__(self) -> None:
        self.verdicts: dict[int, bool | None] = {}
        self.records: set[int] = set()


def _downstream(probe: Probe, emissions: np.ndarray, counted: list[int]) -> _Down:
    down = _Down()
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
            return False
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


def _after(probe: Probe, measured: dict[int, bool | None], k: int, follows: bool) -> bool:
    """Whether a clip follows a leaf: as measured, as its parameter's other leaves say, as read."""
    own = measured.get(k)
    if own is not None:
        return own
    others = [v for j, v in measured.items() if probe.owners[j][1] == probe.owners[k][1]]
    known = [v for v in others if v is not None]
    return any(known) if known else follows


def _stateless(probe: Probe, seen: Responses, emissions: np.ndarray) -> str:
    if not emissions.size:
        return "none"
    curves = seen.updated[:, emissions[0], :]
    clipped = any(classify(probe.scales, curves[:, j]) == "clipped" for j in range(curves.shape[1]))
    return "stateless" if clipped else "none"
