"""Strategies for every public record of ``schemas``: any value that may cross a process."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, get_args

from gristmill import schemas
from gristmill.schemas.batch import (
    Batch,
    BatchOptions,
    BatchStatus,
    LineProblem,
    OpenedBatch,
    Phase,
    RequestCounts,
    ResultObject,
    RowsEnded,
    RowTimes,
    Segment,
    SegmentInfo,
    StatusChanged,
    UnknownEvent,
    Validated,
)
from gristmill.schemas.batch_lines import OutputLine, Response
from gristmill.schemas.batch_manifest import BatchFile, BatchManifest
from gristmill.schemas.dead import DeadLetter
from gristmill.schemas.events import (
    Candidate,
    Crashed,
    Delta,
    Done,
    End,
    Prompt,
    Released,
    Started,
    Trial,
    Unknown,
)
from gristmill.schemas.grammar import GrammarKind, GrammarSpec
from gristmill.schemas.job import Endpoint, Job, JobState, Message, Priority
from gristmill.schemas.result import (
    Choice,
    Crash,
    ErrorInfo,
    FinishReason,
    Result,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from gristmill.schemas.sampling import SamplingParams
from gristmill.schemas.status import JobStatus, ModelInfo, WorkerInfo
from gristmill.schemas.tools import Function, PastCall, Toolbox, ToolCall
from gristmill.schemas.webhook import (
    DeliveryState,
    WebhookDelivery,
    WebhookEndpoint,
    WebhookEvent,
    WebhookTry,
)
from gristmill.schemas.wire import Answer, Record
from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)  # half a surrogate pair is not text
NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
COUNT = st.integers(0, 2**40)
IDS = st.lists(st.integers(0, 2**20), max_size=8).map(tuple)
TIME = st.floats(0, 4e9, allow_nan=False)
JOB_ID = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}(\.[0-9]{1,4})?", fullmatch=True)
TENANT = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True)
URL = st.from_regex(r"https?://[a-z]{1,9}(\.[a-z]{1,9})?(:[1-9][0-9]{1,3})?(/[a-z%-]{0,9})?", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)
EVENT_KINDS = {"started", "prompt", "delta", "candidate", "released", "trial", "crashed", "done", "end"}
FINAL_STATES = st.sampled_from([state for state in JobState if state.final])


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


error_infos = st.builds(ErrorInfo, code=NAME, message=TEXT, param=maybe(TEXT))
usages = st.builds(Usage, prompt_tokens=COUNT, completion_tokens=COUNT, cached_tokens=COUNT)
timings = st.builds(
    Timings, submitted_at=TIME, started_at=maybe(TIME), first_token_at=maybe(TIME), finished_at=TIME
)
tops = st.builds(TopLogprob, id=COUNT, token=TEXT, logprob=maybe(st.floats(-9999, 0)), raw=maybe(TEXT))
token_logprobs = st.builds(
    TokenLogprob,
    id=COUNT,
    token=TEXT,
    logprob=maybe(st.floats(-9999, 0)),
    raw=maybe(TEXT),
    top=st.lists(tops, max_size=2).map(tuple),
)


def calls(record: type[ToolCall]) -> st.SearchStrategy[Any]:
    return st.builds(record, id=TEXT, name=TEXT, arguments=TEXT)


tool_calls = st.lists(calls(ToolCall), max_size=2).map(tuple)
choices = st.builds(
    Choice,
    index=COUNT,
    text=TEXT,
    finish_reason=st.sampled_from(FinishReason),
    stop_reason=maybe(TEXT | COUNT),
    token_ids=maybe(IDS),
    echo=st.booleans(),
    tool_calls=maybe(tool_calls),
    logprobs=maybe(st.lists(token_logprobs, max_size=2).map(tuple)),
)


def crashes(record: type[Crash]) -> st.SearchStrategy[Any]:
    return st.builds(record, code=NAME, message=TEXT, worker=TEXT, alone=st.booleans(), tokens=COUNT, at=TIME)


messages = st.builds(
    Message,
    role=NAME,
    content=maybe(TEXT | st.lists(OBJECT, max_size=2).map(tuple)),
    name=maybe(TEXT),
    tool_calls=maybe(st.lists(calls(PastCall), max_size=2).map(tuple)),
    tool_call_id=maybe(TEXT),
)
functions = st.builds(
    Function,
    name=st.from_regex("[A-Za-z0-9_.-]{1,20}", fullmatch=True),
    description=maybe(TEXT),
    parameters=maybe(OBJECT),
    strict=maybe(st.booleans()),
)
toolboxes = st.builds(
    Toolbox,
    functions=st.lists(functions, min_size=1, max_size=3, unique_by=lambda each: each.name).map(tuple),
    mode=st.sampled_from(["auto", "required"]),
    parallel=st.booleans(),
)

grammars = st.builds(GrammarSpec, kind=st.sampled_from(get_args(GrammarKind)), text=TEXT, close=st.booleans())


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(maybe(st.integers(1, 2**31 - 1)))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(max_tokens or 100, 100))),
        temperature=draw(st.floats(0, 100)),
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        top_k=draw(st.integers(0, 2**31 - 1)),
        min_p=draw(st.floats(0, 1)),
        seed=draw(maybe(st.integers(0, 2**64 - 1))),
        stop=draw(st.lists(NAME, max_size=4).map(tuple)),
        stop_token_ids=draw(IDS),
        include_stop=draw(st.booleans()),
        ignore_eos=draw(st.booleans()),
        grammar=draw(maybe(grammars)),
        adapter_id=draw(maybe(NAME)),
        typical_p=draw(st.floats(0, 1, exclude_min=True)),
        repetition_penalty=draw(st.floats(0.1, 100)),
        frequency_penalty=draw(st.floats(-2, 2)),
        presence_penalty=draw(st.floats(-2, 2)),
        dry_multiplier=draw(st.floats(0, 100)),
        dry_sequence_breakers=draw(st.lists(NAME, max_size=4).map(tuple)),
        logit_bias=draw(st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=4)),
        allowed_token_ids=draw(maybe(IDS.filter(len))),
        bad_words=draw(st.lists(NAME, max_size=4).map(tuple)),
        logprobs=draw(maybe(st.integers(0, 2**31 - 1))),
        echo=draw(st.booleans()),
        truncate=draw(maybe(st.integers(1, 2**31 - 1))),
        skip_special_tokens=draw(st.booleans()),
    )


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    prompt = draw(
        st.one_of(
            st.fixed_dictionaries({"prompt": NAME}),
            st.fixed_dictionaries({"prompt_ids": IDS.filter(len)}),
            st.fixed_dictionaries({"messages": st.lists(messages, min_size=1, max_size=3).map(tuple)}),
        )
    )
    submitted_at = draw(TIME)
    return Job(
        id=draw(JOB_ID),
        model=draw(NAME),
        sampling=draw(sampling_params()),
        endpoint=draw(st.sampled_from(Endpoint)),
        priority=draw(st.sampled_from(Priority)),
        tenant=draw(TENANT),
        stream=draw(st.booleans()),
        submitted_at=submitted_at,
        expires_at=submitted_at + draw(st.floats(1, 1e7)),
        custom_id=draw(maybe(NAME)),
        idempotency_key=draw(maybe(NAME)),
        retry_of=draw(maybe(JOB_ID)),
        metadata=draw(st.dictionaries(TEXT, TEXT, max_size=4)),
        webhook=draw(maybe(URL)),
        **prompt,
    )


@st.composite
def results(draw: st.DrawFn) -> Result:
    state = draw(FINAL_STATES)
    return Result(
        job_id=draw(JOB_ID),
        model=draw(NAME),
        state=state,
        endpoint=draw(st.sampled_from(Endpoint)),
        choices=draw(st.lists(choices, max_size=3).map(tuple)),
        prompt_logprobs=draw(maybe(st.lists(token_logprobs, max_size=2).map(tuple))),
        usage=draw(usages),
        timings=draw(timings),
        error=draw(error_infos) if state is JobState.FAILED else None,
        attempts=draw(COUNT),
        seed=draw(maybe(COUNT)),
        custom_id=draw(maybe(TEXT)),
        retry_of=draw(maybe(JOB_ID)),
        metadata=draw(st.dictionaries(TEXT, TEXT, max_size=3)),
    )


EVENTS: dict[type[Record], st.SearchStrategy[Any]] = {
    Started: st.builds(Started, worker=TEXT, at=TIME),
    Prompt: st.builds(Prompt, offset=COUNT, ids=IDS, logprobs=TEXT, first=maybe(COUNT)),
    Delta: st.builds(
        Delta,
        choice=COUNT,
        offset=COUNT,
        ids=IDS,
        text=TEXT,
        at=maybe(TIME),
        max_tokens=maybe(COUNT),
        logprobs=maybe(TEXT),
    ),
    Candidate: st.builds(
        Candidate,
        choice=COUNT,
        offset=COUNT,
        ids=IDS,
        text=TEXT,
        at=maybe(TIME),
        max_tokens=maybe(COUNT),
        logprobs=maybe(TEXT),
        end=maybe(st.builds(Done, reason=st.sampled_from(FinishReason), stop_tokens=COUNT, at=TIME)),
    ),
    Released: st.builds(Released, at=TIME),
    Trial: st.builds(Trial, at=TIME),
    Crashed: crashes(Crashed),
    Done: st.builds(
        Done,
        reason=st.sampled_from(FinishReason),
        choice=COUNT,
        text=TEXT,
        stop_reason=maybe(TEXT | COUNT),
        tool_calls=maybe(tool_calls),
        error=maybe(error_infos),
        stop_tokens=COUNT,
        usage=usages,
        at=TIME,
    ),
    End: st.builds(
        End,
        state=st.sampled_from(JobState),
        finish_reason=maybe(st.sampled_from(FinishReason)),
        usage=usages,
        error=maybe(error_infos),
        result=maybe(NAME),
    ),
    Unknown: st.builds(Unknown, kind=NAME.filter(lambda kind: kind not in EVENT_KINDS)),
}

RECORDS: dict[type[Record], st.SearchStrategy[Any]] = {
    GrammarSpec: grammars,
    Function: functions,
    Toolbox: toolboxes,
    ToolCall: calls(ToolCall),
    PastCall: calls(PastCall),
    SamplingParams: sampling_params(),
    Message: messages,
    Job: jobs(),
    ErrorInfo: error_infos,
    Usage: usages,
    Timings: timings,
    Choice: choices,
    TopLogprob: tops,
    TokenLogprob: token_logprobs,
    Crash: crashes(Crash),
    Result: results(),
    **EVENTS,
    JobStatus: st.builds(
        JobStatus,
        job_id=JOB_ID,
        state=st.sampled_from(JobState),
        model=maybe(NAME),
        priority=maybe(st.sampled_from(Priority)),
        tenant=maybe(TENANT),
        submitted_at=maybe(TIME),
        expires_at=maybe(TIME),
        started_at=maybe(TIME),
        finished_at=maybe(TIME),
        attempt=COUNT,
        attempts=COUNT,
        tokens=COUNT,
        worker=maybe(NAME),
        cancel_requested=st.booleans(),
        finish_reason=maybe(st.sampled_from(FinishReason)),
        usage=maybe(usages),
        error=maybe(error_infos),
        result=maybe(NAME),
    ),
    DeadLetter: st.builds(
        DeadLetter,
        id=NAME,
        job_id=maybe(NAME),
        queue=NAME,
        tenant=TENANT,
        reason=TEXT,
        at=TIME,
        payload=TEXT,
    ),
    WorkerInfo: st.builds(
        WorkerInfo,
        models=st.lists(NAME, min_size=1, max_size=3).map(tuple),
        queues=st.lists(NAME, max_size=3).map(tuple),
        host=TEXT,
        pid=COUNT,
        version=TEXT,
        max_model_len=maybe(COUNT),
        trouble=maybe(TEXT),
        state=NAME,
        in_hand=COUNT,
        running=COUNT,
        waiting=COUNT,
        seen_at=maybe(TIME),
    ),
    ModelInfo: st.builds(
        ModelInfo,
        queues=st.lists(NAME, max_size=3).map(tuple),
        max_model_len=maybe(COUNT),
        seen_at=TIME,
    ),
}

responses = st.builds(Response, status_code=COUNT, request_id=TEXT, body=OBJECT)
request_counts = st.builds(RequestCounts, total=COUNT, completed=COUNT, failed=COUNT)
line_problems = st.builds(LineProblem, code=NAME, message=TEXT, param=maybe(TEXT), line=maybe(COUNT))
batch_options = st.builds(
    BatchOptions,
    on_invalid=st.sampled_from(["fail", "skip"]),
    max_errors=st.integers(1, 10_000),
    stop_after_failed=maybe(st.integers(1, 2**40)),
    stop_after_share=maybe(st.floats(0, 1, exclude_min=True)),
    input_order=st.booleans(),
    webhook=maybe(URL),
    webhook_every_percent=maybe(st.integers(1, 99)),
    retention_s=st.floats(0, 1e6, exclude_min=True),
)
row_times = st.builds(
    RowTimes,
    first_token_at=TIME,
    finished_at=TIME,
    completion_tokens=COUNT,
    ttft=st.dictionaries(st.integers(0, 200).map(str), COUNT, max_size=3),
)
batch_files = st.builds(BatchFile, name=NAME, rows=COUNT, bytes=COUNT, sha256=NAME)
RECORDS |= {
    Response: responses,
    OutputLine: st.builds(
        OutputLine, id=TEXT, custom_id=NAME, response=maybe(responses), error=maybe(OBJECT)
    ),
    RequestCounts: request_counts,
    LineProblem: line_problems,
    BatchOptions: batch_options,
    Batch: st.builds(
        Batch,
        id=TENANT,
        model=NAME,
        endpoint=TEXT,
        tenant=TENANT,
        input=TEXT,
        completion_window_s=st.floats(0, 1e6, exclude_min=True),
        metadata=st.dictionaries(TEXT, TEXT, max_size=2),
        options=batch_options,
        status=st.sampled_from(BatchStatus),
        paused=st.booleans(),
        reason=maybe(error_infos),
        trouble=maybe(error_infos),
        trouble_at=maybe(TIME),
        errors=st.lists(line_problems, max_size=2).map(tuple),
        request_counts=request_counts,
        usage=usages,
        created_at=maybe(TIME),
        output=maybe(NAME),
    ),
    OpenedBatch: st.builds(OpenedBatch, batch=st.builds(Batch, id=TENANT, model=NAME), segments=st.just(())),
    Segment: st.builds(Segment, phase=st.sampled_from(Phase), id=JOB_ID),
    SegmentInfo: st.builds(
        SegmentInfo,
        id=JOB_ID,
        input=NAME,
        rows=COUNT,
        first=COUNT,
        last=COUNT,
        lines=maybe(TEXT),
        parent=maybe(JOB_ID),
    ),
    ResultObject: st.builds(
        ResultObject,
        segment=NAME,
        attempt=COUNT,
        kind=st.sampled_from(["output", "errors"]),
        name=NAME,
        rows=COUNT,
        bytes=COUNT,
        sha256=NAME,
        lines=TEXT,
        cancelled=TEXT,
        expired=TEXT,
        usage=usages,
        times=maybe(row_times),
    ),
    RowTimes: row_times,
    StatusChanged: st.builds(
        StatusChanged,
        status=st.sampled_from(BatchStatus),
        paused=st.booleans(),
        reason=maybe(error_infos),
        at=TIME,
    ),
    Validated: st.builds(Validated, segment=NAME, rows=COUNT, problems=COUNT, at=TIME),
    RowsEnded: st.builds(
        RowsEnded,
        object=NAME,
        output=st.sampled_from(["output", "errors"]),
        rows=COUNT,
        counts=request_counts,
        at=TIME,
    ),
    UnknownEvent: st.builds(UnknownEvent, kind=NAME),
    BatchFile: batch_files,
    BatchManifest: st.builds(
        BatchManifest,
        batch=NAME,
        status=NAME,
        total=COUNT,
        completed=COUNT,
        failed=COUNT,
        usage=usages,
        input_order=st.booleans(),
        output=maybe(batch_files),
        errors=maybe(batch_files),
        created_at=TIME,
    ),
}

tries = st.builds(WebhookTry, n=COUNT, at=TIME, ms=COUNT, status=maybe(COUNT), code=maybe(NAME), reason=TEXT)
RECORDS |= {
    WebhookEvent: st.builds(WebhookEvent, id=NAME, type=NAME, created_at=COUNT, data=OBJECT),
    WebhookTry: tries,
    WebhookDelivery: st.builds(
        WebhookDelivery,
        id=NAME,
        type=NAME,
        endpoint=URL,
        state=st.sampled_from(DeliveryState),
        created_at=TIME,
        next_at=maybe(TIME),
        ended_at=maybe(TIME),
        tries=COUNT,
        why=TEXT,
        data=OBJECT,
        log=st.lists(tries, max_size=2).map(tuple),
    ),
    WebhookEndpoint: st.builds(
        WebhookEndpoint,
        url=URL,
        failures=COUNT,
        since=maybe(TIME),
        held_until=maybe(TIME),
        disabled_at=maybe(TIME),
        why=TEXT,
    ),
}


def public_records() -> set[type[Record]]:
    """Every subclass of Record that other modules may use."""
    for module in pkgutil.iter_modules(schemas.__path__):
        importlib.import_module(f"{schemas.__name__}.{module.name}")

    def below(cls: type[Record]) -> set[type[Record]]:
        return {cls}.union(*map(below, cls.__subclasses__()))

    ours = {cls for cls in below(Record) if cls.__module__.startswith(f"{schemas.__name__}.")}
    return {cls for cls in ours - {Record, Answer} if not cls.__name__.startswith("_")}
