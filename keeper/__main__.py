"""`python -m gristmill.keeper` is `gristmill-keeper`."""

from .cli import main

main()
