"""SqsQueues: what we say to SQS, one method per operation, and botocore's exceptions as ours.

START HERE for SQS. ``sqs_receiver.py`` decides when to receive, ``sqs_claims.py`` keeps the leases,
``sqs_transport.py`` is kombu's view of both, ``sqs_admin.py`` creates queues, ``sqs_dead.py`` drains the dead
ones.

Every method raises BrokerUnavailable while SQS does not answer, and Misconfigured where only a change of
settings, rights or queues helps.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ..schemas.errors import BrokerUnavailable, Misconfigured
from ..schemas.settings import Settings
from .aws_errors import BUSY, botocore_errors
from .redis import redact

LONG_POLL_S = 20
"""The longest that SQS allows."""
BATCH = 10
"""Entries of one batch call, and messages of one receive, at most."""
MAX_NAME_CHARS = 80
CONNECTIONS = 32
_NO_QUEUE = {"QueueDoesNotExist", "NonExistentQueue"}


class NoQueue(Misconfigured):
    """There is no queue of that name."""


@dataclass(frozen=True, slots=True)
class SqsMessage:
    """A message as it was received. ``receives`` counts this time too."""

    queue: str
    message_id: str
    handle: str
    receives: int
    body: str

    @property
    def tag(self) -> str:
        """Ours for this delivery: each receive has its own, as its handle has."""
        return f"{self.message_id}#{self.receives}"


class SqsQueues:
    """All queues of one account and region. Thread-safe; connects when it is first used."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._address = _Address.of(settings)
        self.where = f"SQS at {self._address.endpoint or 'AWS'}"
        self._urls = dict(settings.sqs_queues)
        self._lock = threading.Lock()
        self._clients: dict[float, Any] = {}
        # A renewal must fail in time for another one to be tried before the lease runs out.
        self._patience_s = min(settings.command_timeout_s, max(1.0, settings.visibility_timeout_s / 6))

    @property
    def configured(self) -> dict[str, str]:
        """Queues whose URL the settings name."""
        return self._settings.sqs_queues

    def name(self, queue: str) -> str:
        """The queue's name in SQS. Raises Misconfigured if the prefix makes it too long."""
        name = self._settings.sqs_queue_prefix + queue
        if len(name) > MAX_NAME_CHARS:
            raise Misconfigured(
                f"SQS queue names have {MAX_NAME_CHARS} characters at most and {name} has {len(name)}; "
                "shorten GRISTMILL_SQS_QUEUE_PREFIX"
            )
        return name

    def url(self, queue: str) -> str:
        """The queue's URL: as configured, else asked for once. Raises Misconfigured: there is none."""
        if (known := self._urls.get(queue)) is not None:
            return known
        with self.errors(queue):
            url: str = self.client().get_queue_url(QueueName=self.name(queue))["QueueUrl"]
        self._urls[queue] = url
        return url

    def find(self, queue: str) -> str | None:
        """``url``, or None if there is no such queue."""
        try:
            return self.url(queue)
        except NoQueue:
            return None

    def put(self, queue: str, body: str, tenant: str) -> str:
        """Accept a message; durable on return. SQS shares a queue fairly among tenants. Returns its id."""
        url = self.url(queue)
        with self.errors(queue):
            sent = self.client().send_message(QueueUrl=url, MessageBody=body, MessageGroupId=tenant)
        return str(sent["MessageId"])

    def receive(self, queue: str, *, count: int, lease_s: float, wait_s: int = 0) -> list[SqsMessage]:
        """Up to ``count`` messages, leased to us; waits up to ``wait_s`` for the first one."""
        url = self.url(queue)
        with self.errors(queue):
            reply = self.client(wait_s).receive_message(
                QueueUrl=url,
                MaxNumberOfMessages=min(count, BATCH),
                VisibilityTimeout=whole_seconds(lease_s),
                WaitTimeSeconds=wait_s,
                MessageSystemAttributeNames=["ApproximateReceiveCount"],
            )
        return [
            SqsMessage(
                queue=queue,
                message_id=message["MessageId"],
                handle=message["ReceiptHandle"],
                receives=int(message.get("Attributes", {}).get("ApproximateReceiveCount", 1)),
                body=message["Body"],
            )
            for message in reply.get("Messages", ())
        ]

    def delete(self, messages: Sequence[SqsMessage]) -> list[SqsMessage]:
        """They are done with. Returns those whose handle was spent."""
        return self._batches("delete_message_batch", messages)

    def lease(self, messages: Sequence[SqsMessage], lease_s: float) -> list[SqsMessage]:
        """A lease from now for each; 0 hands them back. Returns those whose handle was spent."""
        return self._batches(
            "change_message_visibility_batch", messages, VisibilityTimeout=whole_seconds(lease_s)
        )

    def counts(self, queue: str) -> tuple[int, int]:
        """Messages that wait, and messages that are claimed; both approximate, as SQS says."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        url = self.url(queue)
        with self.errors(queue):
            got = self.client().get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
        waiting, claimed = (int(got.get(name, 0)) for name in names)
        return waiting, claimed

    def purge(self, queue: str) -> None:
        """Throw away what the queue holds, claimed messages too. SQS allows it once a minute."""
        url = self.url(queue)
        with self.errors(queue):
            self.client().purge_queue(QueueUrl=url)

    def client(self, wait_s: float = 0.0) -> Any:
        """boto3's client for calls that SQS answers ``wait_s`` late; one for each."""
        return self._client(wait_s + self._settings.command_timeout_s)

    def _client(self, limit_s: float) -> Any:
        with self._lock:
            if limit_s not in self._clients:
                with self.errors():
                    self._clients[limit_s] = self._connect(limit_s)
            return self._clients[limit_s]

    def close(self) -> None:
        """Close the connections; they open again when they are used again."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    def _batches(self, call: str, messages: Sequence[SqsMessage], **fields: Any) -> list[SqsMessage]:
        spent: list[SqsMessage] = []
        by_queue: dict[str, list[SqsMessage]] = {}
        for message in messages:
            by_queue.setdefault(message.queue, []).append(message)
        for queue, mine in by_queue.items():
            for start in range(0, len(mine), BATCH):
                spent += self._batch(call, queue, mine[start : start + BATCH], fields)
        return spent

    def _batch(
        self, call: str, queue: str, messages: list[SqsMessage], fields: dict[str, Any]
    ) -> list[SqsMessage]:
        entries = [{"Id": str(n), "ReceiptHandle": m.handle, **fields} for n, m in enumerate(messages)]
        url = self.url(queue)
        with self.errors(queue):
            reply = getattr(self._client(self._patience_s), call)(QueueUrl=url, Entries=entries)
        failed: Iterable[dict[str, Any]] = reply.get("Failed", ())
        for failure in failed:
            if not failure.get("SenderFault") or failure.get("Code") in BUSY:
                raise BrokerUnavailable(f"{self.where}, {queue}: {failure.get('Code')}")
        return [messages[int(failure["Id"])] for failure in failed]

    def _connect(self, read_timeout_s: float) -> Any:
        """boto3 is imported here: half a second that only users of AWS pay."""
        boto3: Any = import_module("boto3")
        config_class: Any = import_module("botocore.config").Config
        address = self._address
        session = boto3.session.Session(
            aws_access_key_id=address.key, aws_secret_access_key=address.secret, region_name=address.region
        )
        config = config_class(
            connect_timeout=min(self._settings.connect_timeout_s, read_timeout_s),
            read_timeout=read_timeout_s,
            retries={"total_max_attempts": 1},  # whoever calls has its own patience, and knows the lease
            max_pool_connections=CONNECTIONS,
            tcp_keepalive=True,
        )
        region = session.region_name or ("us-east-1" if address.endpoint else None)
        return session.client("sqs", endpoint_url=address.endpoint, region_name=region, config=config)

    @contextmanager
    def errors(self, queue: str | None = None) -> Generator[None]:
        """botocore's exceptions as ours. What network or service may mend unasked is BrokerUnavailable."""
        with botocore_errors(
            self.where + (f", {queue}" if queue else ""),
            away=BrokerUnavailable,
            missing=lambda code: self._no_queue(queue) if code in _NO_QUEUE else None,
            rights="check the credentials, the policy and the region",
            settings="write sqs://KEY:SECRET@, set GRISTMILL_SQS_REGION, or what AWS tools read",
            endpoint="GRISTMILL_SQS_ENDPOINT_URL",
        ):
            yield

    def _no_queue(self, queue: str | None) -> NoQueue:
        """The error for a queue that is gone. It may be created again, under another URL: forget this one."""
        if queue is not None and queue not in self.configured:
            self._urls.pop(queue, None)
        return NoQueue(
            f"{self.where}{f', {queue}' if queue else ''}: there is no such queue; run "
            "`gristmill queues create --model MODEL`, or name its URL in GRISTMILL_SQS_QUEUES"
        )


def whole_seconds(seconds: float) -> int:
    """SQS counts whole seconds; a lease is never shorter than asked for."""
    return math.ceil(seconds)


@dataclass(frozen=True, slots=True)
class _Address:
    endpoint: str | None
    region: str | None
    key: str | None
    secret: str | None

    @classmethod
    def of(cls, settings: Settings) -> _Address:
        """Out of ``sqs://[KEY:SECRET@][host:port][?region=…]`` and the settings. Raises Misconfigured."""
        url = settings.broker
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise Misconfigured(f"{redact(url)}: not a URL") from exc
        options = parse_qs(parts.query, keep_blank_values=True)
        if parts.path.strip("/") or options.keys() - {"region"}:
            raise Misconfigured(
                f"{redact(url)}: write sqs://, sqs://KEY:SECRET@ or sqs://host:port?region=NAME "
                "(GRISTMILL_BROKER_URL)"
            )
        if (parts.username is None) != (parts.password is None):
            raise Misconfigured(f"{redact(url)}: KEY and SECRET go together (GRISTMILL_BROKER_URL)")
        own = f"http://{host}" + (f":{port}" if port else "") if host else None
        return cls(
            endpoint=settings.sqs_endpoint_url or own,
            region=options.get("region", [None])[0] or settings.sqs_region,
            key=unquote(parts.username) if parts.username else None,
            secret=unquote(parts.password) if parts.password else None,
        )
