"""The parts that networks are made of, and the cures, as pure functions.

Models are modules with `Config`, `init(key, config)` and `apply(params, x, config)`: `mlp`,
`resnet`, `transformer`, `recurrent`. Their layers are named scopes: embed, block0, ..., readout.

>>> import jax, jax.numpy as jnp
>>> from jaxgrad import nn
>>> config = nn.mlp.Config(n_in=3, n_out=2, width=8, depth=4, residual="pre_ln", norm="layer")
>>> params = nn.mlp.init(jax.random.key(0), config)
>>> nn.mlp.apply(params, jnp.ones((5, 3)), config).shape
(5, 2)
"""

from jaxgrad.nn import mlp as mlp
from jaxgrad.nn import recurrent as recurrent
from jaxgrad.nn import resnet as resnet
from jaxgrad.nn import transformer as transformer
from jaxgrad.nn.activations import ACTIVATIONS as ACTIVATIONS
from jaxgrad.nn.activations import activation as activation
from jaxgrad.nn.dense import conv as conv
from jaxgrad.nn.dense import linear as linear
from jaxgrad.nn.dense import stack as stack
from jaxgrad.nn.dense import through as through
from jaxgrad.nn.dense import unstack as unstack
from jaxgrad.nn.dense import weights_init as weights_init
from jaxgrad.nn.initializers import INITIALIZERS as INITIALIZERS
from jaxgrad.nn.initializers import Initializer as Initializer
from jaxgrad.nn.initializers import constant as constant
from jaxgrad.nn.initializers import initializer as initializer
from jaxgrad.nn.initializers import normal as normal
from jaxgrad.nn.initializers import variance_scaling as variance_scaling
from jaxgrad.nn.normalization import NORMS as NORMS
from jaxgrad.nn.normalization import Norm as Norm
from jaxgrad.nn.normalization import batch_norm as batch_norm
from jaxgrad.nn.normalization import batch_norm_init as batch_norm_init
from jaxgrad.nn.normalization import batch_norm_training as batch_norm_training
from jaxgrad.nn.normalization import layer_norm as layer_norm
from jaxgrad.nn.normalization import layer_norm_as_written as layer_norm_as_written
from jaxgrad.nn.normalization import rms_norm as rms_norm
from jaxgrad.nn.residual_rules import RULES as RULES
from jaxgrad.nn.residual_rules import Gains as Gains
from jaxgrad.nn.residual_rules import Rule as Rule
from jaxgrad.nn.residual_rules import Site as Site
from jaxgrad.nn.residual_rules import branch_gains as branch_gains
from jaxgrad.nn.residual_rules import residual as residual
from jaxgrad.nn.residual_rules import residual_init as residual_init
from jaxgrad.nn.self_attention import Heads as Heads
from jaxgrad.nn.self_attention import attention as attention
from jaxgrad.nn.self_attention import attention_init as attention_init
from jaxgrad.nn.self_attention import rotary as rotary
