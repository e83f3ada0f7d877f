"""Courier: delivers what stands in the outbox, on threads of its own.

A keeper's rounds never wait for it, and receivers never wait for each other: each has its own queue, a host
has a few deliveries at once, and who fails is asked with one event at a time, more and more rarely.

An event is tried until a receiver answers with a 2xx status, by ``SCHEDULE_S``. Being killed in the middle
costs nothing: the lease of what was under way runs out, and it comes again with the same id.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from urllib.parse import urlsplit

from ..backends.outbox import Counts, Limits, Outbox, Outcome, Sending
from ..schemas.errors import GristmillError, Misconfigured, Transient, WebhookFailed, WebhookRefused
from ..schemas.webhook import DeliveryState, EventType, WebhookTry, signed_headers
from .guard import Guard
from .post import Reply, post, tls_context
from .settings import KeeperSettings

log = logging.getLogger(__name__)

SCHEDULE_S = (0.0, 5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
"""Before each try, from the end of the one before it: three days in all."""
JITTER = 0.1
"""Pauses are drawn from this much below to this much above."""
GIVE_UP_S = 5 * 86_400.0
"""However rarely its endpoint could be asked, an event older than this is given up."""
RETRY_AFTER_MAX_S = max(SCHEDULE_S)
LEASE_S = 150.0
"""More than a try may take, slow resolvers included."""
EVERY_S, RETRY_S, COUNT_EVERY_S = 1.0, 1.0, 5.0
STOP_S = 5.0
GONE = 410
HOLDING = (429, 503)
"""What tells us to leave the whole endpoint alone, if it says for how long."""
REDIRECTS = range(300, 400)
REASON_CHARS = 300


class Courier:
    """``clock``: unix seconds, for signatures. ``draw``: 0 to 1, for pauses."""

    def __init__(
        self,
        outbox: Outbox,
        settings: KeeperSettings,
        *,
        guard: Guard | None = None,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._outbox, self._settings, self._draw, self._clock = outbox, settings, draw, clock
        self._guard = guard or Guard(settings.webhook_allow)
        self._tls = tls_context(settings.webhook_ca_file)
        self._changed = threading.Condition()
        self._under_way: Counter[str] = Counter()
        """Receivers that are being asked, by endpoint and by host: how many threads do."""
        self._asking = 0
        self._threads = 0
        """Those that ask, and those that still tell the outbox of it."""
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.totals: Counter[str] = Counter()
        """Tries by what came of them: ``delivered``, or the code of the failure."""
        self.counts: Counts | None = None
        """What stood in the outbox lately; None: not known here."""
        self._counted_at = -COUNT_EVERY_S

    # ---- life

    def start(self, active: Callable[[], bool]) -> None:
        """Deliver in the background, whenever ``active`` says so."""
        self._thread = threading.Thread(target=self._run, args=(active,), name="courier", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = STOP_S) -> None:
        """Take nothing more, and give what is under way a moment; what is left comes again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._wait_idle(timeout_s)

    def drain(self) -> int:
        """Deliver all that is due now. Returns how many tries that took. Raises as Outbox does."""
        tries = 0
        while True:
            taken, _ = self.step()
            tries += taken
            self._wait_idle(LEASE_S)
            if not taken:
                return tries

    def _run(self, active: Callable[[], bool]) -> None:
        failing = False
        while not self._stop.is_set():
            try:
                self._deliver_while(active)
                failing = False
            except (Transient, Misconfigured) as exc:
                if not failing:
                    log.warning("courier.unavailable", extra={"code": exc.code, "reason": exc.message})
                failing = True
            except Exception:  # the thread's edge
                log.critical("courier.crashed", exc_info=True)
            self._stop.wait(RETRY_S)

    def _deliver_while(self, active: Callable[[], bool]) -> None:
        with self._outbox.bell(self._settings.connect_timeout_s) as bell:
            while not self._stop.is_set():
                leads = active()
                next_s = self.step()[1] if leads else None
                self._count(leads)
                bell.get_raw(EVERY_S if next_s is None else min(EVERY_S, max(0.01, next_s)))

    def _count(self, leads: bool) -> None:
        now = time.monotonic()
        if not leads:
            self.counts = None
        elif now - self._counted_at >= COUNT_EVERY_S:
            self._counted_at, self.counts = now, self._outbox.counts()

    # ---- a step

    def step(self) -> tuple[int, float | None]:
        """Take what is due and may be sent now, each on a thread. Returns how many, and in how many seconds
        there is more (None: not known)."""
        with self._changed:
            under_way, free = dict(self._under_way), self._settings.webhook_threads - self._asking
        if free <= 0:
            return 0, None
        limits = Limits(free, self._settings.webhook_per_host, (free + 1) // 2, under_way)
        taken, next_s = self._outbox.claim(limits, LEASE_S, GIVE_UP_S)
        for sending in taken:
            self._begin(sending)
        return len(taken), next_s

    def _begin(self, sending: Sending) -> None:
        """On a thread. Where the system gives none, it comes again when its lease is over."""
        with self._changed:
            self._count_asking(sending, 1)
            self._threads += 1
        try:
            threading.Thread(target=self._send, args=(sending,), name="webhook", daemon=True).start()
        except RuntimeError as exc:
            log.warning("webhook.no_thread", extra={"event": sending.event.id, "reason": str(exc)})
            with self._changed:
                self._count_asking(sending, -1)
                self._threads -= 1

    def _count_asking(self, sending: Sending, more: int) -> None:
        self._asking += more
        self._under_way[sending.endpoint] += more
        self._under_way[sending.host] += more
        self._under_way += Counter()  # drops those at 0

    def _wait_idle(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._threads, timeout_s)

    def _send(self, sending: Sending) -> None:
        """One delivery, on its thread. Raises nothing."""
        try:
            try:
                outcome = self._outcome(sending, self._clock(), time.monotonic())
            finally:
                with self._changed:  # before the outbox tells of it: who looks then finds the place free
                    self._count_asking(sending, -1)
            self._settle(sending, outcome)
        except GristmillError as exc:  # it comes again when its lease is over
            log.warning("webhook.not_settled", extra={"event": sending.event.id, "code": exc.code})
        except Exception:  # the thread's edge
            log.critical("webhook.crashed", exc_info=True, extra={"event": sending.event.id})
        finally:
            with self._changed:
                self._threads -= 1
                self._changed.notify_all()

    def _settle(self, sending: Sending, outcome: Outcome) -> None:
        state, troubled = self._outbox.settle(sending, outcome)
        with self._changed:
            self.totals[outcome.log.code or "delivered"] += 1
        told = {
            "event": sending.event.id,
            "type": sending.event.type,
            "host": urlsplit(sending.url).hostname,
            "try": sending.tries,
            "status": outcome.log.status,
            "code": outcome.log.code,
        }
        if state is DeliveryState.FAILED:
            log.warning("webhook.given_up", extra=told)
        else:
            log.info("webhook.delivered" if outcome.verdict == "delivered" else "webhook.retried", extra=told)
        if troubled:
            log.warning("webhook.endpoint_in_trouble", extra=told)

    # ---- a try

    def _outcome(self, sending: Sending, at: float, began: float) -> Outcome:
        """Send it, and judge the answer."""
        try:
            reply = self._post(sending, at, began + self._settings.webhook_timeout_s)
        except WebhookRefused as exc:
            tried = _tried(sending, at, began, "refused", exc.message)
            return Outcome("refused", tried) if exc.final else self._failed(sending, tried)
        except WebhookFailed as exc:
            return self._failed(sending, _tried(sending, at, began, exc.why, exc.message))
        if 200 <= reply.status < 300:
            return Outcome("delivered", _tried(sending, at, began, status=reply.status))
        code = "redirect" if reply.status in REDIRECTS else "status"
        tried = _tried(sending, at, began, code, f"it answered {reply.status}", reply.status)
        if reply.status == GONE:
            return Outcome("gone", tried)
        return self._failed(sending, tried, min(RETRY_AFTER_MAX_S, reply.retry_after_s or 0.0))

    def _post(self, sending: Sending, at: float, deadline: float) -> Reply:
        keys = self._settings.webhook_keys(sending.url)
        if not keys:
            raise WebhookFailed(
                "no secret to sign it with: set GRISTMILL_WEBHOOK_SECRET for workers and keepers", "no_secret"
            )
        target = self._guard.check(sending.url)
        body = sending.event.body()
        headers = signed_headers(keys, sending.event.id, int(at), body)
        return post(target, headers, body, tls=self._tls, deadline=deadline)

    def _failed(self, sending: Sending, tried: WebhookTry, retry_after_s: float = 0.0) -> Outcome:
        """To be tried again, unless that was the last time. A test is tried once, and harms no endpoint."""
        step = sending.step + 1
        if sending.event.type == EventType.TEST:
            return Outcome("refused", tried)
        if step >= len(SCHEDULE_S):
            return Outcome("failed", tried, spread=self._spread())
        return Outcome(
            "retry",
            tried,
            again_s=max(SCHEDULE_S[step] * self._spread(), retry_after_s),
            hold_s=retry_after_s if tried.status in HOLDING else 0.0,
            spread=self._spread(),
        )

    def _spread(self) -> float:
        return 1 - JITTER + 2 * JITTER * self._draw()


def _tried(
    sending: Sending,
    at: float,
    began: float,
    code: str | None = None,
    reason: str = "",
    status: int | None = None,
) -> WebhookTry:
    ms = round((time.monotonic() - began) * 1000)
    return WebhookTry(
        n=sending.tries, at=round(at, 3), ms=ms, status=status, code=code, reason=reason[:REASON_CHARS]
    )
