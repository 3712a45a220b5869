"""jaxgrad: where does the gradient of a JAX function go?"""

from jaxgrad.flow import Flow as Flow
from jaxgrad.flow import value_and_grad_flow as value_and_grad_flow
from jaxgrad.taps import tap as tap
