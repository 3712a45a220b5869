"""The cuts of a function by brute force: take a variable out; does x still reach the output?

This shares no idea with a walk along the equations that keeps the live variables; it is quadratic.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

OPENED = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}


def count_layers(f: Callable[..., Any], *args: Any, argnum: int = 0) -> int:
    """How many layers there are between all cuts; scans, conds and custom rules are taken whole.

    Args:
        f: any function of `args`.
        *args: its arguments; all but one are held fixed.
        argnum: the one that is followed. Where it is of integers, the first float cut is h_0.
    """
    flow = _Dataflow(f, args, argnum)
    live = _reach(flow.edges, flow.sources) & _reach(_reversed(flow.edges), flow.outputs)
    sources, outputs = flow.sources & live, flow.outputs & live

    def separates(v: int) -> bool:
        return not _reach(flow.edges, sources - {v}, without=v) & (outputs - {v})

    # a complex variable carries the flow, but what is between two cuts is a real function
    cuts = sum(separates(v) for v in live - flow.complex)
    # several outputs are together the last cut, several leaves of x together the first
    return cuts - 1 + (len(outputs) > 1) + (len(sources) > 1 and not flow.from_integers)


class _Dataflow:
    """Edges between the float variables that hang on x, as numbers; where they start and end."""

    def __init__(self, f: Callable[..., Any], args: tuple, argnum: int):
        self.number = itertools.count()
        self.edges: dict[int, set[int]] = {}
        self.floats: set[int] = set()
        self.complex: set[int] = set()
        self.integers: set[int] = set()

        def call(*args: Any) -> Any:  # some modules can be called, and cannot be hashed
            return f(*args)

        jaxpr = _plain(jax.make_jaxpr(call)(*args))
        counts = [len(jax.tree.leaves(arg)) for arg in args]
        start = sum(counts[:argnum])
        env = {v: next(self.number) for v in jaxpr.invars[start : start + counts[argnum]]}
        self.floats |= {env[v] for v in env if _is_float(v)}
        self.from_integers = not self.floats
        self.sources = set(self.floats)
        # integers beside floats in x are a side input
        self.integers |= set(env.values()) if self.from_integers else set()
        self.walk(jaxpr, env)
        self.outputs = set(_known(jaxpr.outvars, env)) & self.floats

    def walk(self, jaxpr: Any, env: dict) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in OPENED:
                body = _plain(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
                outer = dict(zip(body.invars, eqn.invars, strict=True))
                scope = {i: env[o] for i, o in outer.items() if not _is_literal(o) and o in env}
                self.walk(body, scope)
                inner = zip(eqn.outvars, body.outvars, strict=True)
                env |= {o: scope[i] for o, i in inner if not _is_literal(i) and i in scope}
            elif inputs := set(_known(eqn.invars, env)):
                self.visit(eqn, inputs, env)

    def visit(self, eqn: Any, inputs: set[int], env: dict) -> None:
        before = inputs & self.floats
        for out in eqn.outvars:
            env[out] = site = next(self.number)
            if before and _is_float(out) and eqn.primitive.name != "stop_gradient":
                self.floats.add(site)
                if jnp.issubdtype(out.aval.dtype, jnp.complexfloating):
                    self.complex.add(site)
                for i in before:
                    self.edges.setdefault(i, set()).add(site)
            elif inputs <= self.integers:
                if _is_float(out):
                    self.floats.add(site)
                    self.sources.add(site)
                else:
                    self.integers.add(site)


def _plain(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _is_float(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)


def _is_literal(v: Any) -> bool:
    return hasattr(v, "val")


def _known(variables: Iterable, env: dict) -> list[int]:
    return [env[v] for v in variables if not _is_literal(v) and v in env]


def _reach(edges: dict, starts: set, without: Any = None) -> set:
    seen, todo = set(starts), list(starts)
    while todo:
        for after in edges.get(todo.pop(), ()):
            if after != without and after not in seen:
                seen.add(after)
                todo.append(after)
    return seen


def _reversed(edges: dict) -> dict:
    back: dict[Any, set] = {}
    for before, afters in edges.items():
        for after in afters:
            back.setdefault(after, set()).add(before)
    return back
