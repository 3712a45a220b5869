"""Singular values of a whole chain's Jacobian: all, the extreme ones, their moments, by depth."""

from jaxgrad.spectrum.alignment import GradientAlignment, gradient_alignment
from jaxgrad.spectrum.complete import LyapunovExponents, log_singular_values, lyapunov_exponents
from jaxgrad.spectrum.extremes import bottom_singular_values, top_singular_values
from jaxgrad.spectrum.moments import (
    ScaledMoments,
    SingularMoments,
    scaled_singular_moments,
    singular_moments,
)

__all__ = [
    "GradientAlignment",
    "LyapunovExponents",
    "ScaledMoments",
    "SingularMoments",
    "bottom_singular_values",
    "gradient_alignment",
    "log_singular_values",
    "lyapunov_exponents",
    "scaled_singular_moments",
    "singular_moments",
    "top_singular_values",
]
