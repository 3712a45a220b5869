"""Every difference between JAX versions that jaxgrad meets, and nothing else.

JAX's jaxpr classes are not a stable interface: between 0.10 and 0.12 `ClosedJaxpr` merged with
`Jaxpr` and the parameters of `scan` changed. Each function here asks what the object at hand can do
(a capability probe) instead of comparing version numbers, and raises a clear error where it does
not know the answer: a reader of jaxprs that guesses is wrong in silence.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax import core as jax_core
from jax.extend import core as jex_core

try:  # keeps profiler names and error tracebacks of the user's own lines; optional
    from jax._src import source_info_util as _source_info
except ImportError:  # pragma: no cover - a future JAX without the module
    _source_info = None

Literal = jex_core.Literal
Tracer = jax_core.Tracer
DropVar = getattr(jex_core, "DropVar", ())


def make_jaxpr(fun, *args) -> tuple[Any, list[Any]]:
    """Trace `fun` on `args` and return `(jaxpr, constant values)`."""
    return open_jaxpr(jax.make_jaxpr(fun)(*args))


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Split a jaxpr, closed or open, into `(jaxpr, constant values)`."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, list(getattr(jaxpr, "consts", ()) or ())


def called_jaxpr(eqn: Any) -> Any:
    """The one program that a call (`jit`, `remat`, `scan`) runs."""
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def is_jaxpr(value: Any) -> bool:
    """Whether a parameter of an equation is a jaxpr."""
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def sub_jaxprs(params: dict[str, Any]) -> list[tuple[str, Any]]:
    """All jaxprs among an equation's parameters, with the parameter's name, also inside tuples."""
    found = []
    for key, value in params.items():
        if is_jaxpr(value):
            found.append((key, value))
        elif isinstance(value, (tuple, list)):
            found += [(f"{key}[{i}]", item) for i, item in enumerate(value) if is_jaxpr(item)]
    return found


def inner_eqns(params: dict[str, Any]) -> Iterator[Any]:
    """All equations inside an equation's sub-programs, at any depth."""
    for _, closed in sub_jaxprs(params):
        jaxpr, _ = open_jaxpr(closed)
        for eqn in jaxpr.eqns:
            yield eqn
            yield from inner_eqns(eqn.params)


def argument_names(jaxpr: Any) -> tuple[str, ...]:
    """The trace's names of its arguments, such as `p['layer']['w']`, or nothing."""
    info = getattr(jaxpr, "debug_info", None)
    return tuple(getattr(info, "arg_names", None) or ())


def scan_counts(params: dict[str, Any], num_inputs: int) -> tuple[int, int]:
    """`(number of constants, number of carried values)` of a scan equation."""
    if "num_consts" in params and "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    if (
        "ft_in" in params
    ):  # jax >= 0.11 packs the structure of (constants, carry, xs) into a flat tree
        consts, carry, _ = params["ft_in"].update(range(num_inputs)).unpack()
        return len(list(consts)), len(list(carry))
    raise NotImplementedError(
        f"jaxgrad cannot read the scan equations of jax {jax.__version__}: expected the parameters "
        f"'num_consts' and 'num_carry' or 'ft_in', got {sorted(params)}. Please report this."
    )


def scopes(eqn: Any) -> tuple[str, ...]:
    """The `jax.named_scope`s around an equation, outermost first, without transformations."""
    stack = getattr(eqn.source_info.name_stack, "stack", ())
    return tuple(part.name for part in stack if type(part).__name__ == "Scope")


def derivative(eqn: Any) -> str:
    """Whether an equation belongs to a derivative that the traced function takes itself.

    JAX marks what `jvp` and the backward pass make in the name stack, next to the scopes.

    Returns:
        "backward" for a transposed operation (of whatever order of derivative), "forward" for what
        was run in order to be differentiated, its tangents included, else "".
    """
    stack = getattr(eqn.source_info.name_stack, "stack", ())
    marks = {part.name for part in stack if type(part).__name__ == "Transform"}
    if "transpose" in marks:
        return "backward"
    return "forward" if "jvp" in marks else ""


def source_line(eqn: Any) -> str:
    """`file:line (function)` of the user's line that made the equation, or an empty string."""
    return _source_info.summarize(eqn.source_info) if _source_info else ""


@contextlib.contextmanager
def _context(eqn: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if _source_info:
            name_stack = _source_info.current_name_stack() + eqn.source_info.name_stack
            stack.enter_context(
                _source_info.user_context(eqn.source_info.traceback, name_stack=name_stack)
            )
        if hasattr(eqn, "ctx"):  # matmul precision, compute_on: the numbers depend on it
            stack.enter_context(eqn.ctx.manager)
        yield


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Run one equation on values (arrays or tracers), under the context in which it was traced."""
    params = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(params, tuple):  # jax < 0.9.2: (sub-functions, parameters)
        functions, params = params
        args = [*functions, *args]
    with _context(eqn):
        out = eqn.primitive.bind(*args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def bind_shared(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """`bind`, by way of a call that JAX differentiates once for all equations like this one.

    JAX derives the rule of a bare primitive anew at every equation, and that of a call once. Its
    own `jax.numpy` functions are such calls too; a trace has them inlined, as this one will be.
    """
    if eqn.effects or any(_is_program(v) for v in eqn.params.values()):
        return bind(eqn, args)  # a cached call would keep the function and what it closes over
    try:
        call = _call_of(eqn.primitive, tuple(eqn.params.items()))
    except TypeError:  # parameters that cannot be compared
        return bind(eqn, args)
    with _context(eqn):
        return call(*args)


def _is_program(value: Any) -> bool:
    if isinstance(value, (int, float, str, tuple, type(None), type)):
        return False
    return callable(value) or is_jaxpr(value)


@functools.lru_cache(maxsize=4096, typed=True)
def _call_of(primitive: Any, params: tuple[tuple[str, Any], ...]) -> Any:
    def run(*args: Any) -> list[Any]:
        out = primitive.bind(*args, **dict(params))
        return list(out) if primitive.multiple_results else [out]

    run.__name__ = run.__qualname__ = primitive.name
    return jax.jit(run, inline=True)


@contextlib.contextmanager
def context_of(eqn: Any) -> Iterator[None]:
    """The scope and numeric context of an equation, for code that stands in for it."""
    with _context(eqn):
        yield
