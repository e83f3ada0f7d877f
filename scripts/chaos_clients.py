"""The users of a chaos run: they submit until a job is accepted, and follow what is streamed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field

from chaos_jobs import Asked
from chaos_stacks import Side, Streams
from gristmill.schemas.errors import GristmillError

SUBMITTERS, FOLLOWERS = 8, 48


@dataclass
class Followed:
    """What one follower was shown."""

    parts: list[str] = field(default_factory=list[str])
    trouble: str | None = None
    ended: bool = False


class Crowd:
    """Threads that submit in time, and one for each job that is followed."""

    def __init__(self, side: Side, asked: Sequence[Asked]) -> None:
        self._side, self._asked = side, asked
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(SUBMITTERS)
        self._following = ThreadPoolExecutor(FOLLOWERS)
        self._followed: dict[int, Followed] = {}
        self._followers: list[Future[None]] = []
        self.accepted_numbers: set[int] = set()

    @property
    def accepted(self) -> int:
        return len(self.accepted_numbers)

    @property
    def all_ended(self) -> bool:
        return self.accepted == len(self._asked) and self._side.count_ended() >= self.accepted

    def start(self, seconds: float) -> None:
        """Submit all jobs, each at its moment of the next ``seconds``."""
        threading.Thread(target=self._submit_all, args=(time.monotonic(), seconds), daemon=True).start()

    def finish(self, timeout_s: float) -> None:
        """Let followers read to the end."""
        wait_for(self._followers, timeout_s)

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._following.shutdown(wait=False, cancel_futures=True)

    def seam(self, one: Asked, text: str) -> str | None:
        """What is wrong with the text that a follower of this job was shown, or None."""
        shown = self._followed.get(one.number)
        if shown is None:
            return None
        if shown.trouble or not shown.ended:
            return f"follower ({one.follow}): {shown.trouble or 'never came to the end'}"
        if (joined := "".join(shown.parts)) != text:
            return f"follower ({one.follow}) was shown {len(joined)} characters, the result has {len(text)}"
        return None

    def _submit_all(self, began: float, seconds: float) -> None:
        for one in self._asked:
            if self._stop.wait(max(0.0, began + one.at * seconds - time.monotonic())):
                return
            self._pool.submit(self._submit, one)

    def _submit(self, one: Asked) -> None:
        """Until it is accepted: the same key makes it the same job."""
        while not self._stop.is_set():
            try:
                self._side.submit(one)
            except GristmillError:
                self._stop.wait(0.3)
                continue
            self.accepted_numbers.add(one.number)
            if one.follow and isinstance(self._side, Streams):
                self._followed[one.number] = shown = Followed()
                self._followers.append(self._following.submit(self._follow, self._side, one, shown))
            return

    def _follow(self, side: Streams, one: Asked, shown: Followed) -> None:
        draw = random.Random(one.key)
        if one.follow == "late" and self._stop.wait(draw.uniform(0.5, 8.0)):
            return
        leave_after = draw.randint(1, 30) if one.follow == "torn" else None
        last = None
        while not self._stop.is_set():
            try:
                for chunk in side.stream(one, last):
                    if chunk.reset:
                        shown.trouble = f"a reset at token {chunk.offset}"
                    shown.parts.append(chunk.text)
                    last = chunk.id
                    if leave_after is not None and len(shown.parts) >= leave_after:
                        leave_after = None
                        break
                else:
                    shown.ended = True
                    return
            except GristmillError as exc:
                if not exc.retryable:
                    shown.trouble = f"{exc.code}: {exc.message}"
                    return
                self._stop.wait(0.3)
