"""What clips where: the order of clipping and state in any optax transformation."""

import re
from typing import Any

import numpy as np
from jaxtyping import PyTree

from jaxgrad.optim.downstream import downstream
from jaxgrad.optim.probing import Probe, Responses, compile_probe, has_kink, slopes
from jaxgrad.optim.reading import (
    Step,
    clip_follows_a_rule,
    clip_precedes_the_rules,
    flattened,
    read_steps,
)
from jaxgrad.tree import inexact_leaves

# A normalizer g / (|g| + eps) looks like a clip with gain 1 / eps.
_LARGEST_GAIN = 1e3
_STAGES = (4, 64, 1024)


class Order(str):
    """The verdict of `clip_order`: a string with its evidence.

    Attributes:
        leaves: verdict of every state leaf by name: ``"before"``, ``"after"``, ``"both"``,
            ``"none"``, or ``"accumulator"``, ``"record"`` and ``"unmoved"``, which do not count.
        responses: how every state leaf answers to large gradients: ``"raw"``, ``"clipped"``,
            ``"clipped (adaptive)"``, ``"normalized"``, ``"skipped"`` or ``"unmoved"``.
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
    Lion's sign, one before LARS's normalization, one with a threshold below that range), the
    transformation's closures are read. A threshold above that range is no clip, but ``.steps``
    names it.

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
    down = downstream(probe, emissions, counted)
    counted = [k for k in counted if k not in down.records]
    _mark_adaptive(probe, kinds, counted)
    up: dict[int, bool | None] = {k: _up(probe, kinds, k, seen) for k in counted}
    intentional = any(step.kind == "own_clip" for step in steps) or any(
        "v_row" in name for name in probe.names
    )
    follows = clip_follows_a_rule(read)
    after = {k: _after(probe, down.verdicts, k, follows) for k in counted}
    if intentional:
        after = dict.fromkeys(counted, follows)
    if not any(v is not None for v in up.values()):  # every leaf is normalized
        up = dict.fromkeys(counted, clip_precedes_the_rules(read))
    verdict = _verdict(up, after) if counted else _stateless(probe, seen, (emissions, read))
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
        intentional=intentional and not follows,
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
    """As many steps as it takes for every leaf to move and for two updates to come out.

    Longer runs are made at one scale first: a leaf that no gradient moves, as what Adafactor keeps
    in the place of a factored moment, is no reason to make them at all scales.
    """
    seen = probe.respond(_STAGES[0])
    known = _progress(probe, seen, _unit(probe))
    for steps in _STAGES[1:]:
        if known[0] == 2 and known[1].all():
            break
        further = _progress(probe, probe.respond(steps, np.zeros(1)), 0)
        if further[0] > known[0] or (further[1] & ~known[1]).any():
            seen, known = probe.respond(steps), further
    return seen


def _progress(probe: Probe, seen: Responses, unit: int) -> tuple[int, np.ndarray]:
    """How many updates came out, at most two, and which leaves of parameters moved."""
    moved = np.any(seen.moved > 0, axis=(0, 1))
    owned = [k for k, (_, owner) in enumerate(probe.owners) if owner is not None]
    return min(int((seen.updated[unit].max(axis=-1) > 0).sum()), 2), moved[owned]


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
    """State leaves that belong to a rule: parameter-shaped if any are, no accumulators.

    A flattened state has no leaf like a parameter; there, leaves count that together have as many
    entries as the parameters, or any if there are but a few.
    """
    moved = [k for k, kind in enumerate(kinds) if kind != "unmoved" and not _resets(seen, k)]
    owned = [k for k in moved if probe.owners[k][1] is not None]
    if owned:
        return owned
    total = sum(leaf.size for leaf in inexact_leaves(probe.direction))
    totals: dict[str, int] = {}
    for k, name in enumerate(probe.names):
        for prefix in _prefixes(name):
            totals[prefix] = totals.get(prefix, 0) + probe.sizes[k]
    whole = [k for k in moved if any(totals[p] == total for p in _prefixes(probe.names[k]))]
    return whole or [k for k in moved if len(kinds) <= 4]


def _prefixes(name: str) -> list[str]:
    """The names of a leaf's parents, and its own."""
    return [name[: match.start()] for match in re.finditer(r"[/\[]", name)] + [name]


def _mark_adaptive(probe: Probe, kinds: list[str], counted: list[int]) -> None:
    """A threshold that follows past norms clips nothing at first: probe again after some steps."""
    known = any(kinds[k] != "unmoved" for k, o in enumerate(probe.owners) if o[1] is None)
    raw = [k for k in counted if kinds[k] == "raw"]
    if not known or not raw:
        return
    seen = probe.respond(_STAGES[0], warm=True)
    for k in raw:
        steep = slopes(probe.scales, _curve(probe, seen, k))
        saturated = np.isfinite(steep[-3:]).all() and np.abs(steep[-3:]).max() < 0.05
        if saturated and np.nanmax(steep) > 0.5:
            kinds[k] = "clipped (adaptive)"


def _up(probe: Probe, kinds: list[str], k: int, seen: Responses) -> bool | None:
    """Whether a clip stands before a leaf; None where a normalizer hides it."""
    if kinds[k] in ("raw", "skipped"):
        return False
    if kinds[k] == "normalized":
        return None
    if kinds[k] == "clipped (adaptive)":
        return True
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


def _after(probe: Probe, measured: dict[int, bool | None], k: int, follows: bool) -> bool:
    """Whether a clip follows a leaf: as measured, as its parameter's other leaves say, as read.

    Behind a clip no moment of a rule makes the update grow without end. Where one does, another
    that seems clipped is bounded by the rule itself, as AMSGrad's two second moments by each other.
    """
    own = measured.get(k)
    others = {j: v for j, v in measured.items() if probe.owners[j][1] == probe.owners[k][1]}
    if own:
        rule = _rule(probe.owners[k][0])
        return all(v is not False for j, v in others.items() if _rule(probe.owners[j][0]) == rule)
    if own is not None:
        return own
    known = [v for v in others.values() if v is not None]
    return any(known) if known else follows


def _rule(group: str) -> str:
    """The rule that a tree of moments belongs to: ``[1][0]`` of ``[1][0]/nu``."""
    parent, _, _ = group.rpartition("/")
    return parent or (group if group.startswith("[") else "")


def _stateless(probe: Probe, seen: Responses, evidence: tuple[np.ndarray, tuple[Step, ...]]) -> str:
    emissions, read = evidence
    kinds = {step.kind for step in flattened(read)}
    if not emissions.size:  # such as a clip to zero
        before, after = clip_precedes_the_rules(read), clip_follows_a_rule(read)
        return _WORDS[before, after] if kinds & {"state", "own_clip"} else "none"
    if (
        "clip" in kinds
        and not kinds & {"state", "own_clip"}
        and _all_normalized(probe, seen, evidence)
    ):
        return "stateless"
    curves = seen.updated[:, emissions[0], :]
    clipped = any(classify(probe.scales, curves[:, j]) == "clipped" for j in range(curves.shape[1]))
    return "stateless" if clipped else "none"


def _all_normalized(probe: Probe, seen: Responses, evidence: tuple[np.ndarray, Any]) -> bool:
    curves = seen.updated[:, evidence[0][0], :]
    return all(
        classify(probe.scales, curves[:, j]) in ("normalized", "unmoved")
        for j in range(curves.shape[1])
    )
