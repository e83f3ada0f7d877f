"""Workers that die, hang and come back: every job ends, once, and no text is repeated or missing."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from gristmill.schemas.events import Delta, Done, End, Started
from gristmill.schemas.job import JobState

from ..support.stack import Stack
from ..support.waiting import wait_until

PROMPTS = [
    f"Write one sentence about the number {n} and {what}."
    for n, what in enumerate(
        ["rivers", "bread", "iron", "Ludwig van Beethoven", "snow", "algebra", "tea", "sleep"]
    )
]
TOKENS = 64


def submit_all(stack: Stack) -> list[str]:
    """Half greedy, half sampled with a seed; half streamed."""
    return [
        stack.client.submit(
            prompt,
            max_tokens=TOKENS,
            temperature=0.0 if n % 2 else 0.8,
            seed=n,
            ignore_eos=True,
            stream=n < 4,
        ).id
        for n, prompt in enumerate(PROMPTS)
    ]


def undisturbed(stack: Stack) -> dict[int, str]:
    """What the same requests give when nothing happens, by number."""
    ids = submit_all(stack)
    wait_until(lambda: all(stack.result(i) for i in ids), 120, "the undisturbed run ends")
    return {n: result.text for n, i in enumerate(ids) if (result := stack.result(i))}


def logged(stack: Stack, job_id: str) -> list[Started | Delta | Done | End]:
    return [event for _, event in stack.state.read_log(job_id)]


def tokens_so_far(stack: Stack, job_id: str) -> int:
    return sum(len(e.ids) for e in logged(stack, job_id) if isinstance(e, Delta))


def check_log(stack: Stack, job_id: str, text: str) -> int:
    """Offsets run on without gap or repetition, one Done, one End, and the text is the result's. Attempts."""
    events = logged(stack, job_id)
    position, shown = 0, ""
    for event in events:
        if isinstance(event, Delta):
            assert event.offset == position, f"{job_id}: token {position} expected, {event.offset} logged"
            position += len(event.ids)
        if isinstance(event, Delta | Done):
            shown += event.text
    kinds = Counter(type(e) for e in events)
    assert (kinds[Done], kinds[End]) == (1, 1)
    assert isinstance(events[-1], End)
    assert shown == text
    assert position == TOKENS
    return kinds[Started]


def test_a_killed_workers_jobs_go_on_from_their_last_token(stack: Stack) -> None:
    first = stack.worker()
    expected = undisturbed(stack)
    ids = submit_all(stack)
    with ThreadPoolExecutor() as threads:
        there_all_along = threads.submit(lambda: list(stack.client.get(ids[0]).stream(timeout_s=200)))
        wait_until(lambda: all(tokens_so_far(stack, i) >= 8 for i in ids), 60, "every job has some tokens")
        second = stack.worker(wait=False)
        first.kill()
        second.wait_ready()
        late = threads.submit(lambda: list(stack.client.get(ids[0]).stream(timeout_s=200)))
    wait_until(lambda: all(stack.result(i) for i in ids), 90, "every job ends")
    wait_until(lambda: all(isinstance(logged(stack, i)[-1], End) for i in ids), 10, "every log ends")

    resumed = 0
    for n, job_id in enumerate(ids):
        result = stack.result(job_id)
        assert result is not None
        assert result.state is JobState.SUCCEEDED
        assert result.text == expected[n]
        assert result.usage.completion_tokens == TOKENS
        resumed += check_log(stack, job_id, result.text) > 1
    assert resumed, "the kill came after every job had ended: nothing was tested"

    for follower in (there_all_along.result(), late.result()):
        assert "".join(chunk.text for chunk in follower) == expected[0]
        assert not any(chunk.reset for chunk in follower), "a resumed job repeats and replaces nothing"
    middle = len(there_all_along.result()) // 2
    rest = stack.client.get(ids[0]).stream(there_all_along.result()[middle].id)
    shown = there_all_along.result()[: middle + 1]
    assert "".join(chunk.text for chunk in [*shown, *rest]) == expected[0]


def test_a_zombie_can_neither_log_nor_commit_nor_ack(stack: Stack) -> None:
    zombie = stack.worker()
    ids = submit_all(stack)
    wait_until(lambda: all(tokens_so_far(stack, i) >= 8 for i in ids), 60, "every job has some tokens")
    zombie.freeze()
    stack.worker()
    wait_until(lambda: all(stack.result(i) for i in ids), 90, "the second worker ends every job")
    wait_until(lambda: all(isinstance(logged(stack, i)[-1], End) for i in ids), 10, "every log ends")
    before = {i: (stack.state.read_log(i), stack.result(i)) for i in ids}

    zombie.thaw()
    later = stack.client.submit("The zombie is alive again and", max_tokens=4, temperature=0.0)
    assert later.result(timeout_s=60).state is JobState.SUCCEEDED
    wait_until(lambda: zombie.said("job.fenced") or zombie.said("job.already_final"), 30, "it notices")
    for job_id in ids:
        log, result = before[job_id]
        assert stack.state.read_log(job_id) == log
        assert stack.result(job_id) == result
        assert result is not None
        check_log(stack, job_id, result.text)
