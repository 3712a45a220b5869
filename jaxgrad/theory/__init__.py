"""What mean-field and random-matrix theory predict, for the quantities that jaxgrad measures.

Pure functions of numbers; nothing here looks at a model. Each names its paper and equation, and the
call that measures the same quantity.
"""

from jaxgrad.theory.activations import ACTIVATIONS as ACTIVATIONS
from jaxgrad.theory.activations import Activation as Activation
from jaxgrad.theory.activations import activation as activation
from jaxgrad.theory.activations import leaky_relu as leaky_relu
from jaxgrad.theory.constants import DeepNorm as DeepNorm
from jaxgrad.theory.constants import TFixup as TFixup
from jaxgrad.theory.constants import deep_norm as deep_norm
from jaxgrad.theory.constants import deep_norm_encoder_decoder as deep_norm_encoder_decoder
from jaxgrad.theory.constants import fixup_scale as fixup_scale
from jaxgrad.theory.constants import layer_scale_init as layer_scale_init
from jaxgrad.theory.constants import residual_scale as residual_scale
from jaxgrad.theory.constants import t_fixup_scales as t_fixup_scales
from jaxgrad.theory.finite_width import LogGain as LogGain
from jaxgrad.theory.finite_width import Standard as Standard
from jaxgrad.theory.finite_width import gain_kurtosis as gain_kurtosis
from jaxgrad.theory.finite_width import log_gain as log_gain
from jaxgrad.theory.finite_width import log_gain_of as log_gain_of
from jaxgrad.theory.finite_width import variance_fluctuation as variance_fluctuation
from jaxgrad.theory.gaussian import gaussian_mean as gaussian_mean
from jaxgrad.theory.gaussian import gaussian_pair_mean as gaussian_pair_mean
from jaxgrad.theory.mean_field import MeanField as MeanField
from jaxgrad.theory.mean_field import chi as chi
from jaxgrad.theory.mean_field import chi_1 as chi_1
from jaxgrad.theory.mean_field import correlation_fixed_point as correlation_fixed_point
from jaxgrad.theory.mean_field import correlation_map as correlation_map
from jaxgrad.theory.mean_field import depth_scale as depth_scale
from jaxgrad.theory.mean_field import edge_of_chaos as edge_of_chaos
from jaxgrad.theory.mean_field import mean_field as mean_field
from jaxgrad.theory.mean_field import slope_moment as slope_moment
from jaxgrad.theory.mean_field import variance_fixed_point as variance_fixed_point
from jaxgrad.theory.mean_field import variance_map as variance_map
from jaxgrad.theory.mean_field import variance_slope as variance_slope
from jaxgrad.theory.normalization import AttentionProfile as AttentionProfile
from jaxgrad.theory.normalization import StreamProfile as StreamProfile
from jaxgrad.theory.normalization import activation_then_norm_chi as activation_then_norm_chi
from jaxgrad.theory.normalization import last_weight_gradient as last_weight_gradient
from jaxgrad.theory.normalization import norm_then_activation_chi as norm_then_activation_chi
from jaxgrad.theory.normalization import post_ln_attention_profile as post_ln_attention_profile
from jaxgrad.theory.normalization import post_ln_profile as post_ln_profile
from jaxgrad.theory.normalization import pre_ln_profile as pre_ln_profile
from jaxgrad.theory.products import LogSingularValues as LogSingularValues
from jaxgrad.theory.products import gaussian_log_singular_values as gaussian_log_singular_values
from jaxgrad.theory.products import gaussian_lyapunov_exponents as gaussian_lyapunov_exponents
from jaxgrad.theory.residual import ResidualProfile as ResidualProfile
from jaxgrad.theory.residual import branch_log_gain as branch_log_gain
from jaxgrad.theory.residual import residual_profile as residual_profile
from jaxgrad.theory.residual import shrink_probability as shrink_probability
from jaxgrad.theory.spectra import SquaredSingularValues as SquaredSingularValues
from jaxgrad.theory.spectra import largest_squared_singular_value as largest_squared_singular_value
from jaxgrad.theory.spectra import second_moment_at_width as second_moment_at_width
from jaxgrad.theory.spectra import squared_singular_values as squared_singular_values
