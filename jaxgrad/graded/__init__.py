"""Products of matrices in logarithmic scale: every singular value, at any depth."""

from jaxgrad.graded.fold import graded_product, graded_products, multiplied_by_stack
from jaxgrad.graded.product import Certificate, Evidence, Graded, Spectrum

__all__ = [
    "Certificate",
    "Evidence",
    "Graded",
    "Spectrum",
    "graded_product",
    "graded_products",
    "multiplied_by_stack",
]
