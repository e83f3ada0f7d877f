"""Webhooks: the events that receivers are sent, as users handle them: look, send again, try one out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence

from ..schemas.errors import InvalidRequest, Misconfigured, WaitTimeout, WebhookFailed, WebhookNotFound
from ..schemas.webhook import (
    DeliveryState,
    EventType,
    WebhookDelivery,
    WebhookEndpoint,
    check_url,
    endpoint_of,
    event_data,
)
from ..schemas.wire import shown
from .link import Link

POLL_S = 0.1


class Webhooks:
    """``client.webhooks``. Every call raises BrokerUnavailable and Misconfigured."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def list(
        self,
        *,
        state: DeliveryState | str | None = None,
        endpoint: str | None = None,
        since: float | None = None,
    ) -> Iterator[WebhookDelivery]:
        """Events and what became of them, the newest first. Delivered ones are kept for 3 days (the last
        10,000), failed ones for 30 (the last 100,000). ``since``: unix seconds, of an event's making.
        """
        states = tuple(DeliveryState) if state is None else (DeliveryState(state),)
        wanted = None if endpoint is None else endpoint_of(endpoint)
        for found in self._link.outbox.list(states):
            if wanted not in (None, found.endpoint) or (since is not None and found.created_at < since):
                continue
            yield found

    def get(self, event_id: str) -> WebhookDelivery:
        """One event, with its tries. Raises WebhookNotFound."""
        found = self._link.outbox.get(event_id)
        if found is None:
            raise WebhookNotFound(f"no event {shown(event_id)}: its time is over, or it is of another broker")
        return found

    def replay(self, event_ids: Sequence[str]) -> Sequence[str]:
        """Send events again, with the ids they have, from the first try on; those that wait are tried now.

        Returns those that are known; raises WebhookNotFound if none is.
        """
        known = self._link.outbox.replay(list(event_ids))
        if event_ids and not known:
            raise WebhookNotFound(
                f"no event {shown(event_ids[0])}: its time is over, or it is of another broker"
            )
        return known

    def endpoints(self) -> Sequence[WebhookEndpoint]:
        """Receivers that fail or are switched off, the last one first."""
        return self._link.outbox.endpoints()

    def enable(self, url: str) -> tuple[bool, int]:
        """A receiver is back: switch it on, forget its failures, and try now what waits for it.

        Returns whether there was anything to forget, and how many events were waiting.
        """
        return self._link.outbox.enable(url)

    def test(self, url: str, timeout_s: float = 60.0) -> WebhookDelivery:
        """Have a ``webhook.test`` event sent the way all others go, and wait for what comes of it. It is sent
        once. Raises InvalidRequest (the URL), Misconfigured (there is no secret to sign with), WebhookFailed,
        WaitTimeout.
        """
        try:
            check_url(url)
        except ValueError as exc:
            raise InvalidRequest(f"the URL {exc}", param="url") from exc
        name, deadline = f"evt_{secrets.token_hex(16)}", time.monotonic() + timeout_s
        self._link.outbox.put(name, EventType.TEST, url, event_data({"id": name.replace("evt", "test")}, {}))
        while (found := self.get(name)).state is DeliveryState.PENDING:
            if time.monotonic() >= deadline:
                raise WaitTimeout(self._nobody_tried(url, timeout_s))
            time.sleep(POLL_S)
        if found.state is DeliveryState.DELIVERED:
            return found
        reason = (
            found.log[-1].reason if found.log else f"{found.why}; `gristmill webhooks enable` switches it on"
        )
        if found.why == "no_secret":
            raise Misconfigured(f"nothing was sent: {reason}")
        raise WebhookFailed(f"{found.endpoint} did not take it: {reason}", found.why)

    def _nobody_tried(self, url: str, timeout_s: float) -> str:
        trouble = next((each for each in self.endpoints() if each.url == endpoint_of(url)), None)
        if trouble is not None:
            return (
                f"not tried within {timeout_s:g} s: the receiver failed {trouble.failures:,} times and "
                f"is asked rarely; `gristmill webhooks enable {trouble.url}` has it asked at once"
            )
        return (
            f"nobody tried it within {timeout_s:g} s; is there a worker, or a `gristmill-keeper`? "
            "`gristmill-keeper --once` does it now"
        )
