"""Batches as a user has them, with a real worker: every bad line is named, every good row is answered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends.batches import NoClaim
from gristmill.producer.batch import following, submission
from gristmill.producer.batch.answers import find
from gristmill.producer.batch.intake import InvalidInput
from gristmill.producer.batch.submission import Submission
from gristmill.producer.batches import BatchHandle, Wishes, describe, read
from gristmill.producer.link import Link
from gristmill.producer.settings import producer_settings
from gristmill.schemas import keys
from gristmill.schemas.batch import Batch, BatchStatus, Phase, StatusChanged, segment_id
from gristmill.schemas.batch_lines import OutputLine
from gristmill.schemas.batch_manifest import BatchManifest
from gristmill.schemas.errors import EmptyFile, InvalidRequest

from ..support.stack import Stack
from ..support.waiting import wait_until

WAIT_S = 120
PATIENT = {"GRISTMILL_VISIBILITY_TIMEOUT_S": "300", "GRISTMILL_LEASE_RENEW_EVERY_S": "20"}
"""A worker that misses its leases on a busy machine would begin again."""

FOR_THE_CLIENT: list[tuple[str | dict[str, Any], str]] = [
    ("nonsense", "invalid_json_line"),
    ('{"prompt": "hi"', "invalid_json_line"),
    ({"custom_id": "a", "method": "POST", "url": "/v1/completions"}, "missing_required_parameter"),
    (
        {"custom_id": "b", "method": "GET", "url": "/v1/completions", "body": {"prompt": "x"}},
        "invalid_method",
    ),
    ({"custom_id": "c", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}, "url_mismatch"),
    ({"custom_id": "good-1", "prompt": "again"}, "duplicate_custom_id"),
    ({"prompt": "hi", "model": "other"}, "model_not_found"),
    ({"prompt": "hi", "regex": 7}, "invalid_request"),
    ({"prompt": "hi", "structured_outputs": {"regex": 7}}, "invalid_schema"),
    ({"prompt": "hi", "max_tokens": 0}, "invalid_request"),
]
FOR_THE_WORKER: list[tuple[str | dict[str, Any], str]] = [
    ({"prompt": "hi", "max_tokens": 100_000}, "context_length_exceeded"),
    ({"prompt": "hi", "structured_outputs": {"json": {"type": "nothing"}}}, "invalid_schema"),
]


def write(path: Path, bad: list[tuple[str | dict[str, Any], str]]) -> dict[int, str]:
    """Good and bad lines by turns, with an empty one at the top. Returns the codes by line."""
    lines, codes = [""], dict[int, str]()
    for n, (line, code) in enumerate(bad, 1):
        lines.append(json.dumps({"custom_id": f"good-{n}", "prompt": f"row {n}", "max_tokens": 2}))
        lines.append(line if isinstance(line, str) else json.dumps(line))
        codes[len(lines)] = code
    path.write_text("\n".join(lines))
    return codes


def line_of(row: OutputLine) -> int:
    return int(row.id.rpartition(".")[2])


def code_of(row: OutputLine) -> str:
    assert row.response is not None
    return row.response.body["error"]["code"]


def test_every_kind_of_bad_line_is_named_and_every_good_row_answered(
    tiny_stack: Stack, tmp_path: Path
) -> None:
    tiny_stack.worker("--dtype", "float32")
    batches, path = tiny_stack.client.batches, tmp_path / "in.jsonl"

    codes = write(path, FOR_THE_CLIENT)
    with pytest.raises(InvalidInput) as caught:
        batches.submit(path)
    assert {each.line: each.problem.code for each in caught.value.errors} == codes
    assert batches.list() == [], "nothing was sent"

    codes = write(path, FOR_THE_WORKER)
    failed = batches.submit(path).wait(WAIT_S)
    assert failed.status is BatchStatus.FAILED
    assert {each.line: each.code for each in failed.errors} == codes
    assert failed.usage.completion_tokens == 0, "nothing ran"

    codes = write(path, FOR_THE_CLIENT + FOR_THE_WORKER)
    handle = batches.submit(path, on_invalid="skip", input_order=True)
    assert batches.submit(path, on_invalid="skip", input_order=True).id == handle.id, "submitted twice"
    ended = handle.wait(WAIT_S)
    assert ended.status is BatchStatus.COMPLETED
    assert (ended.request_counts.completed, ended.request_counts.failed) == (len(codes), len(codes))
    good, bad = list(handle.lines()), list(handle.lines("errors"))
    assert [row.custom_id for row in good] == [f"good-{n}" for n in range(1, len(codes) + 1)]
    assert [(line_of(row), code_of(row)) for row in bad] == list(codes.items())
    told = {each.line for each in ended.errors}
    assert told == {line for line, code in codes.items() if line > 2 * len(FOR_THE_CLIENT) + 1}

    kinds = [event.kind for _, event in handle.follow()]
    assert kinds.count("rows") >= 2
    assert kinds[-1] == "status"

    again = handle.retry()
    assert handle.retry().id == again.id
    assert again.wait(WAIT_S).request_counts.total == len(FOR_THE_WORKER), "what was refused here cannot run"
    assert [row.custom_id for row in again.lines()] == [row.custom_id for row in good]
    assert {line_of(row): code_of(row) for row in again.lines("errors")} == codes


def test_rows_from_a_program_become_a_batch_and_equal_ones_are_computed_once(
    tiny_stack: Stack, tmp_path: Path
) -> None:
    batches = tiny_stack.client.batches
    worker = tiny_stack.worker("--dtype", "float32", "--no-prefix-cache", "--speculate", "0", env=PATIENT)

    def rows() -> Any:
        for n in range(100):
            row: Mapping[str, Any] = {"text": f"say {n % 5}", "id": n}
            yield row

    shape = {"template": "Please {text}.", "id_column": "id", "defaults": {"max_tokens": 2, "seed": 1}}
    handle: BatchHandle = batches.submit(rows(), dedupe=True, **shape)
    ended = handle.wait(WAIT_S)
    assert (ended.status, ended.request_counts.completed) == (BatchStatus.COMPLETED, 100)
    assert handle.download(str(tmp_path / "out.jsonl.gz")) == (100, 0)
    objects = tiny_stack.state.batches.objects(handle.id)
    times = [each.times for each in objects if each.times is not None]
    assert sum(sum(each.ttft.values()) for each in times) == 5, "five were computed, the others are copies"
    assert sum(each.completion_tokens for each in times) == ended.usage.completion_tokens
    assert all(each.first_token_at <= each.finished_at for each in times)
    answered = list(handle.lines())

    def succeeded() -> float:
        return worker.metric("requests_finished_total", 'state="succeeded"')

    wait_until(lambda: succeeded() >= 5, 60, "they are counted")
    assert succeeded() == 5
    fed = worker.metric("engine_tokens_total")
    used = batches.submit(islice(rows(), 5), **shape).wait(WAIT_S).usage
    wait_until(lambda: succeeded() == 10, 60, "and five alone")
    assert worker.metric("engine_tokens_total") == 2 * fed > 0, "a hundred rows cost what five do"
    assert (ended.usage.prompt_tokens, used.completion_tokens) == (used.prompt_tokens, 10)
    assert {row.custom_id for row in answered} == {str(n) for n in range(100)}
    (who,) = tiny_stack.state.alive("m")
    assert who.fingerprint is not None
    assert {row.response and row.response.body["system_fingerprint"] for row in answered} == {who.fingerprint}
    with pytest.raises(InvalidRequest, match="no failed row"):
        handle.retry()
    with pytest.raises(EmptyFile):
        batches.submit([])


def test_a_batch_that_somebody_opened_meanwhile_is_left_alone(tiny_stack: Stack) -> None:
    link = Link(tiny_stack.settings)
    settings = producer_settings(link.settings)
    with read([{"prompt": "a"}], Wishes(), settings) as intake:
        batch = describe(intake, Wishes(), "m", settings, "batch_", "")
        one, other = Submission(link, intake, batch), Submission(link, intake, batch)
        one.run()
        name = keys.segment_object(segment_id(batch.id, 1))
        there = link.store.get(name)
        other.run()
        assert link.store.get(name) == there, "a worker may be reading it"

        manifest = BatchManifest(batch=batch.id, status="completed", total=1, completed=1, created_at=1.0)
        link.store.put_new(keys.batch_file(batch.id, "manifest.json"), manifest.to_json().encode())
        assert link.state.batches.delete(batch.id)
        again = Submission(link, intake, batch)
        again.run()
        assert link.state.batches.get(batch.id) is None, "its output stands already"
        assert again.known is not None
        assert again.known.status is BatchStatus.COMPLETED
    link.close()


def test_a_paused_batchs_messages_are_sent_once_and_its_end_is_told(
    tiny_stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Link(tiny_stack.settings)
    batches, settings, sent = link.state.batches, producer_settings(link.settings), list[str]()

    def send(_app: Any, batch: Batch, segment: str, _phase: Phase) -> None:
        """A worker has it at once."""
        sent.append(segment)
        assert len(sent) < 3, "again and again"
        batches.pause(batch.id)
        assert batches.claim_segment(segment, "w1") == NoClaim("paused")

    monkeypatch.setattr(submission, "send_segment", send)
    with read([{"prompt": "a"}], Wishes(), settings) as intake:
        batch = describe(intake, Wishes(), "m", settings, "batch_", "")
        Submission(link, intake, batch).run()
    assert len(sent) == 1
    assert list(batches.unsent(batch.id)) == sent, "a keeper sends it when the batch goes on"

    def found(link: Link, batch_id: str) -> Batch:
        """It ends after its log was read, and before its status is."""
        if batches.cancel(batch.id) is BatchStatus.CANCELLING and batches.begin_finalize(batch.id, "k", 60):
            batches.complete(batch, "k")
        return find(link, batch_id)

    events = following.follow(link, batch.id, None)
    heard = [next(events)[1]]
    monkeypatch.setattr(following, "find", found)
    heard += [event for _, event in events]
    assert isinstance(heard[-1], StatusChanged)
    assert heard[-1].status is BatchStatus.CANCELLED
    link.close()
