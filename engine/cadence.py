"""Cadence: when those who only decode are made to wait for a prompt. Pure: no torch, no clock."""

from __future__ import annotations

import math


class Cadence:
    """A step with a prompt in it takes longer than one that only decodes, and everybody running feels it.

    So prompts may be let in together: once so many wait, measured against those served, or once those have
    decoded for so many steps. With a ratio of 0 whoever waits comes in at once.
    """

    def __init__(self, waiting_served_ratio: float = 0.0, max_waiting_tokens: int = 20) -> None:
        self._ratio, self._patience = waiting_served_ratio, max_waiting_tokens
        self._decoded = 0

    @property
    def off(self) -> bool:
        """Nobody is ever held back."""
        return self._ratio == 0.0 or self._patience == 0

    def may_interrupt(self, *, waiting: int, served: int) -> bool:
        """Whether ``waiting`` sequences are enough to slow ``served`` ones down now."""
        return self._decoded >= self._patience or waiting >= math.floor(self._ratio * served)

    def stepped(self, *, prompts: bool) -> None:
        """The model has run a step, in which there were ``prompts`` or only decodes."""
        self._decoded = 0 if prompts else self._decoded + 1
