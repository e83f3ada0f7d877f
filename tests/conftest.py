"""Fixtures that every kind of test may ask for; they live in ``support``, by what they provide."""

from .support.model import smollm2
from .support.valkey import valkey

__all__ = ["smollm2", "valkey"]
