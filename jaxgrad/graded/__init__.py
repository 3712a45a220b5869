"""Products of matrices in logarithmic scale: every singular value, at any depth."""

from jaxgrad.graded.fold import graded_product, graded_products, multiplied_by_stack
from jaxgrad.graded.multiprecision import log_singular_values_mp
from jaxgrad.graded.product import Graded
from jaxgrad.graded.spectrum import Certificate, Evidence, Spectrum

__all__ = [
    "Certificate",
    "Evidence",
    "Graded",
    "Spectrum",
    "graded_product",
    "graded_products",
    "log_singular_values_mp",
    "multiplied_by_stack",
]
