"""Residual rules: how a block joins its branch F to the stream h, and how the branch is scaled.

One registry, `RULES`. A rule has parameters of its own (norms, scalars), a formula, and two gains
for the branch's initializer: of its inner layers and of its last.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxgrad.nn.normalization import Norm
from jaxgrad.theory import constants

Branch = Callable[[Array], Array]


class Gains(NamedTuple):
    """Factors of a branch's initializer.

    Attributes:
        inner: of the layers before the last (in attention, of the value projection).
        last: of the last layer.
    """

    inner: float = 1.0
    last: float = 1.0


class Site(NamedTuple):
    """Where a rule is applied.

    Attributes:
        branches: residual branches in the network; a transformer block has two.
        norm: the normalization that the rule's formula calls N.
        layers_in_branch: weight layers on a branch's path.
    """

    branches: int
    norm: Norm
    layers_in_branch: int = 2


def _unit_gains(site: Site) -> Gains:
    del site
    return Gains()


@dataclass(frozen=True)
class Rule:
    """A way to join a branch to the stream.

    Attributes:
        name: in `RULES`.
        formula: the block's output; h is the stream, F the branch, N the norm.
        norms: names of the norms in it.
        apply: (params, h, branch, site) -> the stream after the block.
        scalars: (width, site) -> first values of the rule's other parameters.
        gains: site -> factors of the branch's initializer.
        normalized: whether the stream leaves the block normalized, so that a network needs no
            norm before its readout.
    """

    name: str
    formula: str
    norms: tuple[str, ...]
    apply: Callable[[Any, Array, Branch, Site], Array]
    scalars: Callable[[int, Site], dict[str, Array]] = lambda width, site: {}  # noqa: ARG005
    gains: Callable[[Site], Gains] = _unit_gains
    normalized: bool = False


def _none(params: PyTree, h: Array, branch: Branch, site: Site) -> Array:
    del params, site
    return branch(h)


def _plain(params: PyTree, h: Array, branch: Branch, site: Site) -> Array:
    del params, site
    return h + branch(h)


def _pre_ln(params: PyTree, h: Array, branch: Branch, site: Site) -> Array:
    return h + branch(site.norm.apply(params["norm"], h))


def _post_ln(params: PyTree, h: Array, branch: Branch, site: Site) -> Array:
    return site.norm.apply(params["norm"], h + branch(h))


def _sandwich(params: PyTree, h: Array, branch: Branch, site: Site) -> Array:
    inner = branch(site.norm.apply(params["norm"], h))
    return h + site.norm.apply(params["norm_out"], inner)


def _deep_norm_constants(site: Site) -> constants.DeepNorm:
    # the paper's layer is one of attention and one of feed-forward: two branches
    return constants.deep_norm(math.ceil(site.branches / 2))


def _deep_norm(params: PyTree, h: Array, branch: Branch, site: Site) -> Array:
    alpha = jnp.asarray(_deep_norm_constants(site).alpha, h.dtype)
    return site.norm.apply(params["norm"], alpha * h + branch(h))


def _deep_norm_gains(site: Site) -> Gains:
    beta = _deep_norm_constants(site).beta
    return Gains(beta, beta)


def _scaled(params: PyTree, h: Array, branch: Branch, site: Site) -> Array:
    del site
    return h + params["alpha"].astype(h.dtype) * branch(h)


def _zero(width: int, site: Site) -> dict[str, Array]:
    del width, site
    return {"alpha": jnp.zeros((), jnp.float32)}


def _layer_scale(params: PyTree, h: Array, branch: Branch, site: Site) -> Array:
    return h + params["alpha"].astype(h.dtype) * branch(site.norm.apply(params["norm"], h))


def _layer_scale_init(width: int, site: Site) -> dict[str, Array]:
    # the paper's depth counts blocks of two branches
    first = constants.layer_scale_init(math.ceil(site.branches / 2))
    return {"alpha": jnp.full(width, first, jnp.float32)}


def _fixup(params: PyTree, h: Array, branch: Branch, site: Site) -> Array:
    del site
    p = {name: value.astype(h.dtype) for name, value in params.items()}
    return h + p["alpha"] * branch(h + p["bias_in"]) + p["bias_out"]


def _fixup_scalars(width: int, site: Site) -> dict[str, Array]:
    del width, site
    zero = jnp.zeros((), jnp.float32)
    return {"alpha": jnp.ones((), jnp.float32), "bias_in": zero, "bias_out": zero}


def _fixup_gains(site: Site) -> Gains:
    return Gains(constants.fixup_scale(site.branches, site.layers_in_branch), 0.0)


_ALL = (
    Rule("none", "F(h)", (), _none),
    Rule("plain", "h + F(h)", (), _plain),
    Rule("pre_ln", "h + F(N(h))", ("norm",), _pre_ln),
    Rule("post_ln", "N(h + F(h))", ("norm",), _post_ln, normalized=True),
    Rule("sandwich", "h + N'(F(N(h)))", ("norm", "norm_out"), _sandwich),
    Rule(
        "deep_norm", "N(alpha h + F(h)), branch x beta", ("norm",), _deep_norm,
        gains=_deep_norm_gains, normalized=True,
    ),
    Rule("rezero", "h + alpha F(h), alpha = 0 at first", (), _scaled, _zero),
    Rule(
        "layer_scale", "h + diag(alpha) F(N(h)), alpha small at first", ("norm",), _layer_scale,
        _layer_scale_init,
    ),
    Rule(
        "fixup", "h + alpha F(h + b) + b', branch x L^(-1/(2m-2)), its last layer zero", (), _fixup,
        _fixup_scalars, _fixup_gains,
    ),
    Rule("skip_init", "h + alpha F(h), alpha = 0 at first, no norm in F", (), _scaled, _zero),
)  # fmt: skip
RULES = {rule.name: rule for rule in _ALL}
"""plain: He et al. 2015 (arXiv 1512.03385); pre_ln, post_ln: Xiong et al. 2020 (2002.04745);
sandwich: Ding et al. 2021 (CogView, 2105.13290); deep_norm: Wang et al. 2022 (2203.00555); rezero:
Bachlechner et al. 2020 (2003.04887); layer_scale: Touvron et al. 2021 (2103.17239); fixup: Zhang et
al. 2019 (1901.09321); skip_init: De and Smith 2020 (2002.10444), the formula of rezero, meant to
stand in for a BatchNorm."""


def rule_of(name: str) -> Rule:
    """Looks a residual rule up.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in RULES:
        raise ValueError(f"unknown residual rule {name!r}: expected one of {', '.join(RULES)}")
    return RULES[name]


def residual_init(rule: str, width: int, site: Site) -> dict[str, Any]:
    """The rule's own parameters, float32: its norms' and its scalars.

    Args:
        rule: a name in `RULES`.
        width: features of the stream.
        site: where the rule is applied.
    """
    chosen = rule_of(rule)
    norms = {name: site.norm.init(width) for name in chosen.norms}
    return {**norms, **chosen.scalars(width, site)}


def residual(rule: str, branch: Branch, params: PyTree, h: Array, site: Site) -> Array:
    """One block: the stream and a branch joined by a rule.

    Args:
        rule: a name in `RULES`.
        branch: F, of the stream's shape to the stream's shape.
        params: of `residual_init`.
        h: the stream, (..., width).
        site: where the rule is applied.

    Returns:
        The stream after the block.
    """
    return rule_of(rule).apply(params, h, branch, site)


def branch_gains(rule: str, site: Site) -> Gains:
    """Factors by which the rule scales the branch's initializer."""
    return rule_of(rule).gains(site)
