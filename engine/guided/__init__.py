"""Guided generation: a grammar says which tokens may come next. START HERE: ``state.py``."""
