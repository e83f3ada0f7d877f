"""Batches over SQS: segments are messages there, and all else of a batch is in Redis and in the store."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from gristmill.backends.segment_messages import SegmentSender
from gristmill.schemas.batch import BatchStatus
from gristmill.schemas.batch_manifest import BatchManifest

from ..support.sqs import SqsServer
from ..support.stack import Stack
from ..support.valkey import Valkey
from ..support.waiting import wait_until

WAIT_S = 120


def test_a_batch_goes_over_sqs_from_its_input_to_its_manifest_though_its_queue_was_purged(
    moto_sqs: SqsServer, valkey: Valkey, tmp_path: Path, tiny: Path
) -> None:
    settings = moto_sqs.settings(valkey, tmp_path)
    moto_sqs.create(settings)
    stack, queue = Stack(valkey, tmp_path, tiny, settings), moto_sqs.queues[2]
    stack.state.announce(moto_sqs.model, moto_sqs.queues)
    batches = stack.state.batches
    try:
        rows = [{"prompt": f"row {n}", "max_tokens": 2} for n in range(1, 9)]
        refused = [{"prompt": "too long", "max_tokens": 100_000}, {"prompt": ""}]
        handle = stack.client.batches.submit([*rows, *refused], on_invalid="skip", input_order=True)
        silent = batches.silent(handle.id)
        with closing(SegmentSender(settings)) as messages:
            assert messages.lacking(handle.status(), silent) == set()
            moto_sqs.client.purge_queue(QueueUrl=moto_sqs.queue_url(queue))
            assert messages.lacking(handle.status(), silent) == silent.keys() == {f"{handle.id}.s1"}
        assert batches.ask(handle.id, silent) == 1  # as a keeper does at the second look

        stack.worker("--dtype", "float32")
        ended = handle.wait(WAIT_S)
        assert (ended.status, ended.request_counts.completed) == (BatchStatus.COMPLETED, 8)
        assert [row.custom_id for row in handle.lines()] == [f"line-{n}" for n in range(1, 9)]
        assert len(list(handle.lines("errors"))) == 2
        manifest = BatchManifest.from_json(stack.store.get(ended.manifest or "") or b"")
        assert (manifest.total, manifest.failed) == (10, 2)
        wait_until(lambda: moto_sqs.counts(queue) == (0, 0), 30, "the messages are deleted")
    finally:
        stack.close()
