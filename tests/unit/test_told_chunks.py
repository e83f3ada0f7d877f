"""A follower's pieces carry what the log tells of their tokens, and of how a choice ended."""

from __future__ import annotations

from gristmill.producer.replica import Chunk, Replica
from gristmill.schemas.events import Delta, Done, EntryId, Event
from gristmill.schemas.logprobs import TokenLogprobs, pack
from gristmill.schemas.result import FinishReason
from gristmill.schemas.tools import ToolCall

CALL = ToolCall(id="c", name="f", arguments="{}")


def told(*ids: int) -> list[TokenLogprobs]:
    return [TokenLogprobs(logprob=-float(i), top_ids=[i + 1], top_logprobs=[-0.5]) for i in ids]


def delta(offset: int, *ids: int, text: str) -> Delta:
    return Delta(offset=offset, ids=ids, text=text, logprobs=pack(told(*ids)))


DONE = Done(reason=FinishReason.STOP, text="!", stop_reason="!", tool_calls=(CALL,), at=1.0)


def read(replica: Replica, attempt: int, *events: Event) -> list[Chunk]:
    return [*replica.read([(EntryId(attempt, seq), event) for seq, event in enumerate(events, 1)])]


def test_pieces_tell_of_their_tokens_and_the_last_one_how_it_ended() -> None:
    first, second, last = read(Replica(), 1, delta(0, 1, text="a"), delta(1, 2, 3, text="bc"), DONE)
    assert (first.logprobs, second.logprobs) == (tuple(told(1)), tuple(told(2, 3)))
    assert (last.logprobs, last.tool_calls, last.stop_reason) == (None, (CALL,), "!")
    assert (second.tool_calls, second.finish_reason) == (None, None)
    assert read(Replica(), 1, Delta(offset=0, ids=(1,), text="a"))[0].logprobs is None, "nobody asked"


def test_a_text_that_begins_anew_tells_of_all_its_tokens() -> None:
    """Pieces are held back while a new attempt repeats what was shown; the one that differs has them all."""
    replica = Replica()
    read(replica, 1, delta(0, 1, text="a"), delta(1, 2, text="b"))
    (anew,) = read(replica, 2, delta(0, 1, text="a"), delta(1, 4, text="x"))
    assert (anew.reset, anew.text, anew.ids) == (True, "ax", (1, 4))
    assert anew.logprobs == tuple(told(1, 4))


def test_a_caller_whose_place_is_lost_is_told_of_everything_again() -> None:
    replica = Replica(EntryId(9, 9))
    read(replica, 1, delta(0, 1, text="a"), DONE)
    (whole,) = replica.caught_up()
    assert (whole.reset, whole.logprobs, whole.tool_calls) == (True, tuple(told(1)), (CALL,))
