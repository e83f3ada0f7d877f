"""`gristmill batch …` and `plan` on a real server and a real store; nobody runs the rows."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends.joining import join
from gristmill.backends.state import State, WorkerInfo
from gristmill.backends.store import FileStore
from gristmill.producer import AsyncClient
from gristmill.producer.batch.cache import Cache
from gristmill.producer.batch.crew import Crew
from gristmill.producer.batch.cutting import Part
from gristmill.producer.batch.forecast import Forecast
from gristmill.producer.batch.run import latest
from gristmill.producer.batch.submission import CLIENT, OwnRows, Submission
from gristmill.producer.batches import BatchHandle, Wishes, describe, read
from gristmill.producer.link import Link
from gristmill.producer.settings import producer_settings
from gristmill.schemas.batch import Batch, BatchStatus, RequestCounts
from gristmill.schemas.batch_lines import OutputLine, Response
from gristmill.schemas.errors import EngineUnavailable, WaitTimeout
from gristmill.schemas.events import EntryId
from gristmill.schemas.result import ErrorInfo, Usage
from gristmill.schemas.settings import Settings

from ..support.batch_hand import Hand, answer
from ..support.command_line import Run

DAMAGED = ErrorInfo(code="results_damaged", message="it is gone")


def rows(count: int, **fields: Any) -> bytes:
    return b"".join(
        json.dumps({"custom_id": f"r{n}", "prompt": f"row {n}", "max_tokens": 100} | fields).encode() + b"\n"
        for n in range(count)
    )


def test_a_batch_is_submitted_once_however_often_it_is_asked_for(run: Run, state: State) -> None:
    code, out, err = run("batch", "submit", "-", "--meta", "team=search", stdin=rows(100))
    batch_id = out.strip()
    assert (code, batch_id[:6]) == (0, "batch_"), err
    assert run("batch", "submit", "-", "--meta", "team=search", stdin=rows(100))[1:] == (f"{batch_id}\n", "")
    asked = ("--meta", "team=ads", "--webhook", "https://example.com/hook")
    _, out, err = run("batch", "submit", "-", *asked, stdin=rows(100))
    assert out.strip() == batch_id
    assert f"{batch_id} was submitted before and keeps its own metadata and webhook; --fresh" in err
    found = json.loads(run("batch", "show", batch_id, "--json")[1])
    assert (found["status"], found["request_counts"]["total"]) == ("validating", 100)
    assert found["metadata"] == {"team": "search"}
    assert state.batches.unsent(batch_id) == {}, "a segment has no message"

    other = run("batch", "submit", "-", "--fresh", stdin=rows(100))[1].strip()
    listed = [json.loads(line)["id"] for line in run("batch", "list", "--json")[1].splitlines()]
    assert listed == [other, batch_id]
    assert run("batch", "list", "--after", other)[1].startswith(batch_id)

    assert "paused" in run("batch", "pause", batch_id)[2]
    assert "paused" not in run("batch", "resume", batch_id)[2]
    assert json.loads(run("batch", "cancel", batch_id, "--json")[1])["status"] == "cancelling"
    code, _, err = run("batch", "retry", "--failed", batch_id)
    assert (code, "wait for its end" in err) == (2, True)
    code, out, err = run("batch", "results", batch_id, "--json")
    assert (code, out, json.loads(err)["status"]) == (0, "", "cancelling"), "stdout is for the answers"


@pytest.mark.parametrize(
    ("args", "stdin", "word"),
    [
        (("batch", "show", "batch_nobody"), b"", "[job_not_found]"),
        (("batch", "follow", "batch_nobody"), b"", "[job_not_found]"),
        (("batch", "results", "batch_nobody"), b"", "[job_not_found]"),
        (("batch", "cancel", "batch_nobody"), b"", "[job_not_found]"),
        (("batch", "submit", "-"), b"\n", "[empty_file]"),
        (("batch", "submit", "-"), b"nonsense\n", "line 1: not JSON"),
        (("batch", "submit", "-", "--model", "nope"), rows(1), "[model_not_found]"),
        (("batch", "submit", "-"), rows(2) + rows(1, model="nope", custom_id="x"), "line 3 names a model"),
        (("batch", "submit", "-"), rows(2) + rows(1, model="nope", custom_id="x"), "'nope' is not served"),
        (("run", "-", "-o", "out.jsonl"), rows(1, model="nope"), "line 1 names a model that is not here"),
        (("batch", "submit", "-", "--webhook-every-percent", "5"), rows(1), "--webhook says where"),
        (("batch", "submit", "-", "--webhook", "https://127.1/"), rows(1), "webhook"),
        (("batch", "submit", "-", "--meta", "team"), rows(1), "write KEY=VALUE"),
        (("batch", "submit", "-", "--template", "{a}", "--prompt-column", "b"), rows(1), "not both"),
        (("batch", "submit", "nothing.jsonl"), b"", "cannot read"),
    ],
)
def test_an_error_is_one_line_with_its_code(run: Run, args: tuple[str, ...], stdin: bytes, word: str) -> None:
    code, out, err = run(*args, stdin=stdin)
    assert (code, out) == (2, "")
    assert word in err


def test_a_plan_tells_rows_tokens_time_and_money(run: Run) -> None:
    data = rows(100) + rows(1, custom_id="again")
    args = ("plan", "-", "--tokens-per-s", "101", "--price-per-hour", "36", "--dedupe", "--json")
    said = json.loads(run(*args, stdin=data)[1])
    assert (said["rows"], said["copies"], said["completion_tokens"]) == (101, 1, 10_100)
    assert said["seconds"] == pytest.approx(100, rel=0.05)
    assert said["price"] == pytest.approx(1.0, rel=0.05)
    code, out, _ = run("plan", "-", stdin=data)
    assert (code, "not known yet" in out) == (0, True)


def test_a_plan_rests_on_what_was_measured_once_a_twentieth_of_the_rows_have_run(
    run: Run, state: State, tmp_path: Path
) -> None:
    """Lines that were refused have ended, too, at once and without a token: they counted as measured."""
    (tmp_path / "home" / "results").mkdir(parents=True)
    store = FileStore(tmp_path / "home" / "results")
    data, args = rows(40) + b"bad\n" * 10, ("-", "--on-invalid", "skip")
    batch_id = run("batch", "submit", *args, stdin=data)[1].strip()
    hand = Hand(state, store, batch_id)

    def planned() -> Any:
        said = json.loads(run("plan", *args, "--json", stdin=data)[1].splitlines()[-1])
        return said["basis"], said["completion_tokens"]

    assert planned() == ("estimate", 4000)
    hand.validate(1)
    batch = state.batches.get(batch_id)
    assert batch is not None
    assert (batch.request_counts.failed, len(list(state.batches.segments(batch_id)))) == (10, 1)
    assert state.batches.begin(batch)
    hand.run(1, only=[1])
    assert planned() == ("estimate", 4000)
    hand.run(1, only=[2, 3])
    said = (f"measured on 3 rows of {batch_id}", 80)
    assert planned() == said, "two tokens each, and not a hundred"

    later = run("batch", "submit", *args, "--fresh", stdin=data)[1].strip()
    own = OwnRows(store, later)
    for line in range(1, 31):
        own.answer(line, OutputLine.from_json(answer(later, line)))
    (made,) = own.close()
    assert join(state.batches, store, later, made, CLIENT)
    assert planned() == said, "rows from a cache have ended, too, without a token"


def test_a_batch_tells_its_webhook_as_often_as_the_flag_says(run: Run, state: State, tmp_path: Path) -> None:
    flags = ("--webhook", "https://a.example/hook", "--webhook-every-percent", "25")
    batch_id = run("batch", "submit", "-", *flags, stdin=rows(2))[1].strip()
    batch = state.batches.get(batch_id)
    assert batch is not None
    assert (batch.options.webhook, batch.options.webhook_every_percent) == (flags[1], 25)


def test_a_run_whose_worker_does_not_start_leaves_nothing_behind(
    run: Run, state: State, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It left rows in the queue that the next `gristmill up` ran before anything else."""

    def fail(*_: object) -> bool:
        raise EngineUnavailable("the worker died 4 times in a row")

    monkeypatch.setattr(Crew, "ready", fail)
    code, _, err = run("run", "-", "-o", tmp_path / "out.jsonl", stdin=rows(3))
    assert (code, "[engine_unavailable]" in err) == (75, True), err
    assert "nothing was sent; once this is mended" in err
    assert state.batches.list() == []

    with monkeypatch.context() as patched:  # one that was killed is not even paused
        patched.setattr(Crew, "ready", lambda *_: True)
        patched.setattr(Crew, "watch", lambda *_: signal.raise_signal(signal.SIGINT))
        run("run", "-", "-o", tmp_path / "out.jsonl", stdin=rows(3))
    (left,) = state.batches.list()
    state.batches.resume(left.id)
    code, _, err = run("run", "-", "-o", tmp_path / "out.jsonl", stdin=rows(3))
    assert (code, f"gristmill batch resume {left.id}" in err) == (75, True), err
    assert [each.paused for each in state.batches.list()] == [True]


def test_a_stopped_run_says_how_to_go_on_and_goes_on_so(
    run: Run, state: State, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One with --fresh had an id that no other command line led to."""
    output, store = tmp_path / "out.jsonl", FileStore(tmp_path / "home" / "results")
    (tmp_path / "home" / "results").mkdir(parents=True)
    source = tmp_path / "in.jsonl"
    source.write_bytes(rows(3))

    def stopped(*args: str) -> str:
        """The id of a run that meets Ctrl-C before a row has ended."""
        monkeypatch.setattr(Crew, "watch", lambda *_: signal.raise_signal(signal.SIGINT))
        code, out, err = run("run", source, "-o", output, "--json", *args)
        said = json.loads(out)
        assert (code, said["complete"]) == (130, False), err
        batch_id: str = said["batch"]
        assert err.startswith(f"{batch_id}: 3 rows for tiny on ")
        again = "without --fresh" if args else "again"
        assert f"stopped with 3 rows to go; run the same command {again} to continue" in err
        assert f"gristmill batch resume {batch_id}\n" in err
        found = state.batches.get(batch_id)
        assert found is not None
        assert found.paused
        return batch_id

    first = stopped()
    assert stopped() == first
    fresh = stopped("--fresh")
    assert fresh != first
    assert stopped() == fresh, "the last one"
    assert run("batch", "resume", fresh)[0] == 0
    monkeypatch.setattr(Crew, "watch", lambda *_: state.batches.trouble(fresh, DAMAGED))
    code, _, err = run("run", source, "-o", output)
    assert (code, "cannot be finished: it is gone [results_damaged]" in err) == (1, True), err
    monkeypatch.setattr(Crew, "watch", lambda *_: Hand(state, store, fresh).finish())
    code, out, err = run("run", source, "-o", output, "--json")
    assert (code, json.loads(out)["batch"], len(output.read_text().splitlines())) == (0, fresh, 3), err


def test_the_run_that_was_begun_last_goes_on_whatever_was_taken_away_before_it(
    state: State, settings: Settings, tmp_path: Path
) -> None:
    """The first one's id was unknown, since it was old or had failed: everything ran again, and to continue
    that fetched the old answers of the one behind it."""
    (tmp_path / "results").mkdir()
    ours = producer_settings(settings.model_copy(update={"results_url": f"file://{tmp_path}/results"}))
    link, asked = Link(ours), Wishes(model="tiny")
    with read([{"prompt": "one"}], asked, ours) as intake:
        batch = describe(intake, asked, "tiny", ours, "run_", "")

        def begun(*, fresh: bool = False) -> str:
            chosen = latest(link, intake, batch, fresh=fresh)
            Submission(link, intake, chosen).run()
            return chosen.id

        first, second = begun(), begun(fresh=True)
        assert first == batch.id != second == begun()
        state.batches.delete(first)
        assert begun() == second
        Submission(link, intake, batch).run()
        assert begun() == first, "it was made after the one behind it"
        third = begun(fresh=True)
        assert third not in (first, second)
        assert begun() == third
    link.close()


def test_a_row_that_was_answered_before_is_taken_from_the_cache(
    run: Run, state: State, settings: Settings, tmp_path: Path
) -> None:
    """A batch of three rows, two of which an earlier batch has asked for. A model that was quantized since,
    or replaced under its name, gave its predecessor's answers."""
    (tmp_path / "results").mkdir()
    ours = producer_settings(settings.model_copy(update={"results_url": f"file://{tmp_path}/results"}))
    link, path = Link(ours), str(tmp_path / "cache.sqlite")

    def submit(count: int, *serving: str, **fields: Any) -> Batch:
        asked = Wishes(model="tiny", fresh=True)
        requests = [{"prompt": f"row {n}", "custom_id": f"{count}-{n}"} | fields for n in range(count)]
        with read(requests, asked, ours) as intake, Cache(path) as cache:
            batch = describe(intake, asked, "tiny", ours, "run_", "")
            own = OwnRows(link.store, batch.id)
            Submission(link, intake, batch).run(lambda row: cache.taken(batch, own, row, serving), own)
            return batch

    first = submit(2, "fp_a")
    lines = [
        OutputLine(
            id=f"batch_req_{first.id}.{n}",
            custom_id="x",
            response=Response(
                status_code=200, request_id="r", body={"choices": [f"answer {n}"], "system_fingerprint": by}
            ),
        ).to_line()
        for n, by in ((1, "fp_a"), (2, "fp_a"), (3, None))
    ]
    with Cache(path) as cache:
        cache.keep(first, lines)
    again = BatchHandle(link, submit(3, "fp_b", "fp_a").id)
    assert again.status().request_counts.completed == 2
    for serving, fields in ((("fp_b",), {}), ((), {}), (("fp_a",), {"adapter_id": "lora"})):
        other = submit(3, *serving, **fields)
        assert BatchHandle(link, other.id).status().request_counts.completed == 0, serving
    said = {row.custom_id: row.response and row.response.body["choices"] for row in again.lines()}
    assert said == {"3-0": ["answer 1"], "3-1": ["answer 2"]}
    link.close()


async def test_the_async_client_has_the_same_calls(state: State, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    state.register("w1", WorkerInfo(models=("tiny",), host="here", pid=1, version="0"), 600)
    ours = settings.model_copy(update={"results_url": f"file://{tmp_path}/results"})
    async with AsyncClient(ours) as client:
        handle = await client.batches.submit([{"prompt": "one"}, {"prompt": "two"}])
        assert (await handle.status()).request_counts.total == 2
        assert [each.id for each in await client.batches.list()] == [handle.id]
        with pytest.raises(WaitTimeout):
            await client.batches.get(handle.id).wait(0.1)
        await handle.pause()
        assert (await handle.status()).paused
        assert [line async for line in handle.lines()] == []
        assert await handle.cancel() is BatchStatus.CANCELLING


async def test_the_async_client_follows_a_batch_and_looks_at_its_webhooks(
    state: State, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "results").mkdir()
    state.register("w1", WorkerInfo(models=("tiny",), host="here", pid=1, version="0"), 600)
    ours = settings.model_copy(update={"results_url": f"file://{tmp_path}/results"})
    wishes: dict[str, Any] = {"webhook": "https://a.example/hook", "webhook_every_percent": 50}
    async with AsyncClient(ours) as client:
        handle = await client.batches.submit([{"prompt": "one"}, {"prompt": "two"}], **wishes)
        hand = Hand(state, FileStore(tmp_path / "results"), handle.id)
        begun, kinds = asyncio.Event(), list[str]()

        async def follow() -> EntryId:
            last = EntryId(0, 0)
            async for entry, event in handle.follow():
                last = entry
                kinds.append(event.kind)
                begun.set()
            return last

        following = asyncio.create_task(follow())
        await asyncio.wait_for(begun.wait(), 60)
        assert (kinds, following.done()) == (["status"], False), "the past, and then what comes"
        await asyncio.to_thread(hand.finish)
        last = await asyncio.wait_for(following, 60)
        assert {"rows", "status"} <= set(kinds)
        assert kinds == [event.kind for _, event in state.batches.read_events(handle.id)]
        assert [each async for each in client.batches.get(handle.id).follow(last)] == []

        told = {each.type: each async for each in client.webhooks.list(state="pending")}
        assert told.keys() == {"batch.in_progress", "batch.completed"}, "the first one only if so wished"
        found = await client.webhooks.get(told["batch.completed"].id)
        assert await client.webhooks.replay([found.id]) == [found.id]
        assert await client.webhooks.endpoints() == []
        assert await client.webhooks.enable(found.endpoint) == (False, 0)


def test_a_forecast_learns_how_long_outputs_are() -> None:
    """Long rows come first: by rows alone the rest would seem to take four times as long as it does."""
    parts = [Part(10, 0.0, 1000.0), Part(90, 0.0, 1000.0)]
    forecast = Forecast(parts)

    def after(seconds: float, ended: int, tokens: int) -> Any:
        counts = RequestCounts(total=100, completed=ended)
        usage = Usage(completion_tokens=tokens)
        batch = Batch(id="b", model="m", status=BatchStatus.IN_PROGRESS, request_counts=counts, usage=usage)
        return forecast.progress(batch, seconds)

    assert after(0.0, 0, 0).eta_s is None
    assert after(50.0, 0, 0).eta_s is None, "it waits for a worker"
    half = after(60.0, 10, 100)
    assert (half.tokens_per_s, half.eta_s, half.live) == (10.0, 10.0, True), "outputs are a tenth as long"
