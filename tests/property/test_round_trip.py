"""Every record comes back from JSON as it went in; requests refuse what is new to them, answers drop it."""

from __future__ import annotations

import json

import pytest
from gristmill.backends import calls
from gristmill.schemas.errors import BadInput, InvalidRequest
from gristmill.schemas.events import EntryId, event_from_json
from gristmill.schemas.job import Job, Priority, idempotent_job_id
from gristmill.schemas.queues import queue_name
from gristmill.schemas.wire import Answer, Record, shown
from hypothesis import given, settings
from hypothesis import strategies as st

from ..support.records import EVENTS, JOB_ID, JSON, NAME, RECORDS, TENANT, TEXT, jobs, public_records

QUICK = settings(max_examples=25, deadline=None)
KINDS = sorted(RECORDS, key=lambda cls: cls.__name__)
ANSWERS = [cls for cls in KINDS if issubclass(cls, Answer)]
REQUESTS = [cls for cls in KINDS if not issubclass(cls, Answer)]


def test_no_public_record_is_left_out() -> None:
    assert public_records() == set(RECORDS)


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
@QUICK
@given(data=st.data())
def test_a_record_round_trips(cls: type[Record], data: st.DataObject) -> None:
    record = data.draw(RECORDS[cls])
    text = record.to_json()
    assert cls.from_json(text) == record
    assert cls.from_json(text.encode()) == record
    assert cls.from_json(text).to_json() == text
    assert "\n" not in text


@pytest.mark.parametrize("cls", REQUESTS, ids=lambda cls: cls.__name__)
@QUICK
@given(data=st.data())
def test_an_unknown_field_of_a_request_is_refused_by_name(cls: type[Record], data: st.DataObject) -> None:
    body = json.loads(data.draw(RECORDS[cls]).to_json())
    name = data.draw(NAME.filter(lambda name: name not in cls.model_fields))
    with pytest.raises(InvalidRequest) as caught:
        cls.from_python(body | {name: 1})
    assert caught.value.param == shown(name)
    assert f"'{shown(name)}'" in caught.value.message


@pytest.mark.parametrize("cls", ANSWERS, ids=lambda cls: cls.__name__)
@QUICK
@given(data=st.data())
def test_an_answer_of_a_newer_version_is_read_without_what_is_new(
    cls: type[Record], data: st.DataObject
) -> None:
    record = data.draw(RECORDS[cls])
    name = data.draw(NAME.filter(lambda name: name not in cls.model_fields))
    newer = {**json.loads(record.to_json()), name: data.draw(JSON)}
    assert cls.from_python(newer) == record


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
@QUICK
@given(body=JSON)
def test_whatever_comes_in_is_a_record_or_one_of_our_errors(cls: type[Record], body: object) -> None:
    try:
        record = cls.from_json(json.dumps(body))
    except BadInput:
        return
    assert cls.from_json(record.to_json()) == record


@QUICK
@given(data=st.data())
def test_an_event_finds_its_class_by_its_kind(data: st.DataObject) -> None:
    cls = data.draw(st.sampled_from(list(EVENTS)))
    event = data.draw(EVENTS[cls])
    assert event_from_json(event.to_json()) == event
    assert type(event_from_json(event.to_json().encode())) is cls


@pytest.mark.parametrize("body", ["[]", "{}", '{"kind":1}', '"end"'])
def test_what_has_no_kind_is_no_event(body: str) -> None:
    with pytest.raises(InvalidRequest):
        event_from_json(body)


@QUICK
@given(st.integers(0, 2**63), st.integers(0, 2**63), st.integers(0, 2**63), st.integers(0, 2**63))
def test_entry_ids_order_as_numbers(a: int, b: int, c: int, d: int) -> None:
    one, two = EntryId(a, b), EntryId(c, d)
    assert EntryId.parse(str(one)) == EntryId.parse(str(one).encode()) == one
    assert (EntryId.parse(str(one)) < EntryId.parse(str(two))) == ((a, b) < (c, d))


@pytest.mark.parametrize("text", [f"{2**64}-0", f"0-{2**64}", "9" * 5000 + "-1"])
def test_a_number_that_no_entry_can_have_is_refused(text: str) -> None:
    """A resume token comes from outside: Python reads no integer of 5,000 digits, Redis none of 65 bits."""
    with pytest.raises(InvalidRequest):
        EntryId.parse(text)


@QUICK
@given(TEXT.filter(lambda text: not text.replace("-", "").isdigit()))
def test_no_other_text_is_an_entry_id(text: str) -> None:
    with pytest.raises(InvalidRequest):
        EntryId.parse(text)


@QUICK
@given(jobs(), st.floats(0, 4e9), st.booleans(), JOB_ID)
def test_when_a_job_is_sent_again_and_who_reads_it_is_not_in_its_digest(
    job: Job, submitted_at: float, stream: bool, job_id: str
) -> None:
    later = {"submitted_at": submitted_at, "expires_at": submitted_at + 1, "stream": stream, "id": job_id}
    assert calls.body_digest(job.model_copy(update=later)) == calls.body_digest(job)


@QUICK
@given(jobs(), jobs())
def test_two_digests_are_equal_only_for_one_request(one: Job, two: Job) -> None:
    same = {
        "id": two.id,
        "submitted_at": two.submitted_at,
        "expires_at": two.expires_at,
        "stream": two.stream,
    }
    assert (calls.body_digest(one) == calls.body_digest(two)) == (one.model_copy(update=same) == two)


@QUICK
@given(TENANT, NAME, TENANT, NAME)
def test_an_idempotent_id_is_valid_and_belongs_to_one_tenant_and_key(a: str, x: str, b: str, y: str) -> None:
    assert (idempotent_job_id(a, x) == idempotent_job_id(b, y)) == ((a, x) == (b, y))
    Job(id=idempotent_job_id(a, x), model="m", prompt="p", submitted_at=0.0, expires_at=1.0)


@QUICK
@given(NAME, NAME, st.sampled_from(Priority))
def test_two_models_never_share_a_queue(one: str, two: str, priority: Priority) -> None:
    name = queue_name(one, priority)
    assert (name == queue_name(two, priority)) == (one == two)
    assert len(name) <= 80
    assert name.replace("-", "").replace("_", "").isascii()
