"""What Lua files that queue or deliver webhook events are put behind: their names and ``outbox.lua``."""

from __future__ import annotations

from ..schemas import keys
from .script import Script, lua

_NAMES = {
    "webhook": keys.webhook("%s"),
    "webhook_queue": keys.webhook_queue("%s"),
    "webhook_endpoint": keys.webhook_endpoint("%s"),
    "webhook_host": keys.webhook_host("%s"),
    "hosts": keys.WEBHOOK_HOSTS,
    "troubled": keys.WEBHOOK_TROUBLED,
    "bell": keys.WEBHOOK_BELL,
    "pending": keys.WEBHOOKS_PENDING,
    "delivered": keys.WEBHOOKS_DELIVERED,
    "failed": keys.WEBHOOKS_FAILED,
}


def with_outbox(text: str) -> str:
    """A script that calls ``put_event``, behind what defines it; ``clock.lua`` comes before both."""
    outbox = lua("outbox")
    for placeholder, key in _NAMES.items():
        outbox = outbox.replace(f"'{{{placeholder}}}'", f"'{key}'")
    return outbox + text


def webhook_script(name: str) -> Script:
    """``lua/webhook_{name}.lua``."""
    return Script.of(lua("clock") + with_outbox(lua(f"webhook_{name}")), timed=True)
