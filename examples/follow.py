"""Follow a job with nothing but redis-py: the protocol of schemas/README.md, step by step.

    python examples/follow.py redis://localhost:6379/0 job_0193…  [--from LAST_ID]

Text goes to stdout as it is made; where we stand goes to stderr, so that you can resume with --from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

import redis

IDLE_S = 15.0
PAGE = 1000


def entries(server: redis.Redis, job_id: str, last: str) -> Iterator[tuple[str, dict]]:
    """Yield (id, event) after ``last`` ("0-0": all), up to and including the ``end`` event."""
    name = f"gm:{{{job_id}}}:out"  # the log, a stream, and the channel of the same name
    with server.pubsub() as channel:
        # 1. Subscribe first, and wait for the confirmation: what is published from now on is not missed.
        channel.subscribe(name)
        while (message := channel.get_message(timeout=5)) is None or message["type"] != "subscribe":
            pass
        read = True
        while True:
            # 2. Read the log from where we are. Again after a gap, a reconnection, or a long silence.
            while read:
                page = server.xrange(name, min=f"({last}" if last != "0-0" else "-", count=PAGE)
                for entry_id, fields in page:
                    last = entry_id
                    yield last, json.loads(fields["d"])
                read = len(page) == PAGE
            # 3. Go on live.
            message = channel.get_message(timeout=IDLE_S)
            if message is None:
                require_known(server, job_id)
                read = True
            elif message["type"] == "subscribe":  # redis-py reconnected
                read = True
            elif message["type"] == "message":
                entry_id, _, event = message["data"].partition(" ")
                if numbers(entry_id) <= numbers(last):
                    continue  # we had it from the log
                attempt, seq = numbers(last)
                if numbers(entry_id) == (attempt, seq + 1):
                    last = entry_id
                    yield last, json.loads(event)
                else:
                    read = True  # something is missing before it, or a new attempt began


def numbers(entry_id: str) -> tuple[int, int]:
    """Ids compare as two numbers, not as text."""
    attempt, _, seq = entry_id.partition("-")
    return int(attempt), int(seq)


def require_known(server: redis.Redis, job_id: str) -> None:
    """Do not wait for a job that nobody knows (any more)."""
    if not server.exists(f"gm:{{{job_id}}}:state"):
        sys.exit(
            f"{job_id} is unknown here: it never was, or its time is over. Its result may still be stored."
        )


def follow(server: redis.Redis, job_id: str, last: str) -> dict:
    """Print the first choice's text; return the ``end`` event."""
    have: int | None = None if last != "0-0" else 0  # tokens; after a resume the first delta tells
    for entry_id, event in entries(server, job_id, last):
        match event["kind"]:
            case "delta" if event.get("choice", 0) == 0:
                if have is not None and event["offset"] < have:
                    print(f"\n[{job_id} starts over]", file=sys.stderr)
                have = event["offset"] + len(event["ids"])
                print(event.get("text", ""), end="", flush=True)
            case "done" if event.get("choice", 0) == 0:
                print(event.get("text", ""), end="", flush=True)
            case "end":
                print(f"{entry_id} end: {event['state']}", file=sys.stderr)
                return event
        print(f"{entry_id} {event['kind']}", file=sys.stderr)
    raise AssertionError("entries() ends with the end event")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("job_id")
    parser.add_argument("--from", dest="last", default="0-0", metavar="LAST_ID")
    args = parser.parse_args()
    server = redis.Redis.from_url(args.url, decode_responses=True, socket_timeout=10)
    require_known(server, args.job_id)
    end = follow(server, args.job_id, args.last)
    return 0 if end["state"] == "succeeded" else 1


if __name__ == "__main__":
    sys.exit(main())
