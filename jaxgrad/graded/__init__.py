"""Products of matrices in logarithmic scale: every singular value, at any depth."""

from jaxgrad.graded.product import Certificate, Evidence, Graded, Spectrum

__all__ = ["Certificate", "Evidence", "Graded", "Spectrum"]
