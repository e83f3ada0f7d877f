"""Another rank than 0: does what it is told, in the order in which it is told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...schemas.errors import AdapterInvalid
from ..kv_cache import HostBlocks
from ..lora.adapter import Adapter, survey
from ..runner import Runner
from ..settings import EngineSettings
from .feed import heard
from .messages import Adapt, Feed, Load, Reserve, Save, Told


class Follower:
    """Knows no request, and keeps no books: those are rank 0's."""

    def __init__(self, runner: Runner, settings: EngineSettings) -> None:
        self._runner, self._max_rank = runner, settings.lora_max_rank
        self._adapters: dict[str, Adapter] = {}
        self._host: HostBlocks | None = None

    def serve(self, messages: Iterable[Told]) -> None:
        """Until they end."""
        for message in messages:
            self._obey(message)

    def _obey(self, message: Told) -> None:
        if isinstance(message, Feed):
            arrays, owners = heard(message, self._adapters)
            self._runner.follow(arrays, owners, message.scored)
        elif isinstance(message, Adapt):
            self._adapt(message)
        elif isinstance(message, Reserve):
            self._host = self._runner.room.reserve(message.slots)
        else:
            self._move(message)

    def _adapt(self, message: Adapt) -> None:
        """Raises AdapterInvalid if it is not what rank 0 has read: outputs would be of neither."""
        self._adapters = {key: each for key, each in self._adapters.items() if key in message.kept}
        blueprint = survey(Path(message.directory), self._runner.spec, self._max_rank)
        adapter = self._runner.adapter(blueprint)
        if adapter.digest != message.digest:
            raise AdapterInvalid(f"{message.directory} has changed while the ranks were reading it")
        self._adapters[message.digest] = adapter

    def _move(self, message: Save | Load) -> None:
        assert self._host is not None, "a block is to be moved, and there is no room for it"
        if isinstance(message, Save):
            self._host.save(message.block, message.slot)
        else:
            self._host.load(message.slot, message.block)
