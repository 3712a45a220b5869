"""jaxgrad: where does the gradient of a JAX function go?

>>> import jax, jax.numpy as jnp
>>> import jaxgrad as jg
>>> def f(x):
...     return jnp.tanh(jnp.tanh(x @ w1) @ w2)
>>> w1, w2 = jnp.eye(3), 2 * jnp.eye(3)
>>> chain = jg.factorize(f, jnp.zeros(3))
>>> chain.names
('w1', 'w2')
>>> print(jg.jacobian_product(chain, jnp.zeros(3)).to_dense().diagonal())
[2. 2. 2.]
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxgrad.chain import Chain as Chain
from jaxgrad.chain import Layer as Layer
from jaxgrad.chain import factorize as factorize
from jaxgrad.flow import Flow as Flow
from jaxgrad.flow import value_and_grad_flow as value_and_grad_flow
from jaxgrad.graded import Certificate as Certificate
from jaxgrad.graded import Graded as Graded
from jaxgrad.graded import Spectrum as Spectrum
from jaxgrad.graded import graded_product as graded_product
from jaxgrad.graded import graded_products as graded_products
from jaxgrad.graded import log_singular_values_mp as log_singular_values_mp
from jaxgrad.jacobian import jacobian_product as jacobian_product
from jaxgrad.jacobian import jacobian_products as jacobian_products
from jaxgrad.jacobian import layer_jacobians as layer_jacobians
from jaxgrad.spectrum import bottom_singular_values as bottom_singular_values
from jaxgrad.spectrum import gradient_alignment as gradient_alignment
from jaxgrad.spectrum import log_singular_values as log_singular_values
from jaxgrad.spectrum import lyapunov_exponents as lyapunov_exponents
from jaxgrad.spectrum import scaled_singular_moments as scaled_singular_moments
from jaxgrad.spectrum import singular_moments as singular_moments
from jaxgrad.spectrum import top_singular_values as top_singular_values
from jaxgrad.taps import tap as tap

if TYPE_CHECKING:
    from jaxgrad import checks as checks
    from jaxgrad import data as data
    from jaxgrad import monitor as monitor
    from jaxgrad import nn as nn
    from jaxgrad import optim as optim
    from jaxgrad import precision as precision
    from jaxgrad import recurrent as recurrent
    from jaxgrad import store as store
    from jaxgrad import theory as theory
    from jaxgrad import tree as tree
    from jaxgrad.calibration import Calibration as Calibration
    from jaxgrad.calibration import calibrate as calibrate
    from jaxgrad.diagnosis import Finding as Finding
    from jaxgrad.diagnosis import Report as Report
    from jaxgrad.diagnosis import diagnose as diagnose
    from jaxgrad.diagnosis import diagnose_run as diagnose_run
    from jaxgrad.stability import Stability as Stability
    from jaxgrad.stability import max_stable_learning_rate as max_stable_learning_rate
    from jaxgrad.stability import top_hessian_eigenvalue as top_hessian_eigenvalue

# Imported when first used: optax and its friends cost a third of the start.
_ROOMS = (
    "checks", "data", "monitor", "nn", "optim", "precision", "recurrent", "store", "theory", "tree",
)  # fmt: skip
_NAMES = {
    "Calibration": "calibration",
    "calibrate": "calibration",
    "diagnose": "diagnosis",
    "diagnose_run": "diagnosis",
    "Finding": "diagnosis",
    "Report": "diagnosis",
    "Stability": "stability",
    "max_stable_learning_rate": "stability",
    "top_hessian_eigenvalue": "stability",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"jaxgrad.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"jaxgrad.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'jaxgrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_NAMES})
