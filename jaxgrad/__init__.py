"""jaxgrad: where does the gradient of a JAX function go?"""

from jaxgrad.chain import Chain as Chain
from jaxgrad.chain import Layer as Layer
from jaxgrad.chain import factorize as factorize
from jaxgrad.flow import Flow as Flow
from jaxgrad.flow import value_and_grad_flow as value_and_grad_flow
from jaxgrad.graded import Graded as Graded
from jaxgrad.jacobian import jacobian_product as jacobian_product
from jaxgrad.jacobian import jacobian_products as jacobian_products
from jaxgrad.jacobian import layer_jacobians as layer_jacobians
from jaxgrad.taps import tap as tap
