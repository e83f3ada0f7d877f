"""What is called by somebody who dies before a given call: nothing that it does then arrives, tidying up
included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self


class Died(BaseException):
    """As SIGKILL: no handler of ours may get in its way."""


class Dying:
    """A store, say, or an object writer of it: the ``calls``-th call and all later ones do nothing. Those
    with the same ``life`` count together."""

    def __init__(self, real: Any, calls: int, life: list[int] | None = None) -> None:
        self._real, self._life = real, [calls] if life is None else life

    @property
    def dead(self) -> bool:
        return self._life[0] <= 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        return self._counted(found) if callable(found) else found

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._life[0] -= 1
            if self.dead:
                raise Died
            answer = call(*args, **kwargs)
            return Dying(answer, 0, self._life) if hasattr(answer, "commit") else answer

        return counted

    def __enter__(self) -> Self:
        self._real.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.dead:
            self._real.__exit__(*exc)
