"""`python -m gristmill.worker` is `gristmill-worker`."""

from .cli import main

main()
