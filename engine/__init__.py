"""Tokens in, tokens out. ``engine.py`` is the way in; ``process.py`` runs it beside you."""
