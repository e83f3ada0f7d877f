"""Another rank than 0: does what it is told, in the order in which it is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..lora.adapter import Adapter
from ..runner import Runner
from ..settings import EngineSettings
from .feed import heard
from .messages import Told


class Follower:
    """Knows no request, and keeps no books: those are rank 0's."""

    def __init__(self, runner: Runner, settings: EngineSettings) -> None:
        self._runner, self._settings = runner, settings
        self._adapters: Mapping[str, Adapter] = {}

    def serve(self, messages: Iterable[Told]) -> None:
        """Until they end."""
        for message in messages:
            arrays, owners = heard(message, self._adapters)
            self._runner.follow(arrays, owners, message.scored)
