"""What the protocol promises, as predicates of a world or of a step. Names appear in counterexamples."""

from __future__ import annotations

from .checker import Label, Property
from .model import DONE, END, FINAL, SUCCEEDED, TOKENS, Job, Model, World

Step = tuple[World, Label, World]


def _one_result(_: Model, step: Step) -> bool:
    before, _label, after = step
    return all(b.result is None or b.result == a.result for b, a in zip(before.jobs, after.jobs, strict=True))


def _final_agrees(_: Model, w: World) -> bool:
    return all(
        job.state not in FINAL or (job.result is not None and job.result.state == job.state) for job in w.jobs
    )


def _fenced(_: Model, step: Step) -> bool:
    before, label, after = step
    if label.name not in ("publish", "publish reply lost", "late publish arrives"):
        return True
    job, was = after.jobs[label.at[0]], before.jobs[label.at[0]]
    return all(entry.attempt == job.begun for entry in job.log[len(was.log) :])


def _log_is_whole(_: Model, w: World) -> bool:
    return all(_whole(job) for job in w.jobs)


def _whole(job: Job) -> bool:
    """Ids rise; tokens are 0, 1, 2, …; nothing but the end follows done, and nothing the end."""
    expected, last, ended = 0, (0, -1), ""
    for entry in job.log:
        if (entry.attempt, entry.seq) <= last or ended == END:
            return False
        last = (entry.attempt, entry.seq)
        if entry.kind == TOKENS:
            if ended or entry.tokens != tuple(range(expected, expected + len(entry.tokens))):
                return False
            expected += len(entry.tokens)
        elif entry.kind in (DONE, END):
            if entry.kind == ended:
                return False
            ended = entry.kind
    return True


def _result_is_the_output(model: Model, w: World) -> bool:
    for job in w.jobs:
        if job.result is not None:
            length = len(job.result.tokens)
            if job.result.tokens != tuple(range(length)) or length > model.size.tokens:
                return False
            if job.result.state == SUCCEEDED and length != model.size.tokens:
                return False
    return True


def _stream_is_the_result(_: Model, w: World) -> bool:
    """Not where the log was lost: then a second one may have been cancelled, and the first one counts."""
    for job in w.jobs:
        if job.result is not None and not job.forgotten:
            tokens = tuple(token for entry in job.log for token in entry.tokens)
            reasons = {entry.state for entry in job.log if entry.kind == DONE}
            if tokens != job.result.tokens or reasons != {job.result.state}:
                return False
    return True


def _nothing_lost(_: Model, w: World) -> bool:
    there = {m.job for m in w.waiting} | {lease.job for lease in w.claims}
    there |= {d.job for worker in w.workers for d in worker.hand if d.step == "popped"}
    return all(job.result or job.resubmit or index in there for index, job in enumerate(w.jobs))


def _durable_first(_: Model, step: Step) -> bool:
    """Or somebody else's message stands for the job."""
    _before, label, after = step
    index = label.at[0] if label.name == "acknowledge" else None
    return index is None or bool(after.jobs[index].result) or _nothing_lost(_, after)


def _nothing_after_final(_: Model, step: Step) -> bool:
    before, _label, after = step
    for was, job in zip(before.jobs, after.jobs, strict=True):
        if was.state in FINAL and (job.begun > was.begun or job.log[len(was.log) :]):
            return False
    return True


def _done_is_done(_: Model, w: World) -> bool:
    for worker in w.workers:
        for d in worker.hand:
            if d.step == "run" and not d.done:
                job = w.jobs[d.job]
                if d.attempt == job.attempt and any(entry.kind == DONE for entry in job.log):
                    return False
    return True


def _owners_keep_claims(_: Model, step: Step) -> bool:
    """A claim whose owner is alive and renews ends by its owner's doing only, or with all of the broker."""
    before, label, after = step
    gone = {c[:3] for c in before.claims} - {c[:3] for c in after.claims}
    if label.name in ("acknowledge", "requeue"):
        gone -= {label.at}
    if not gone or label.name == "redis loses everything":
        return True
    return not any(d[:3] in gone for worker in before.workers if not worker.stalled for d in worker.hand)


PROPERTIES = (
    Property("one result: the object never changes", of_step=_one_result),
    Property("the final state says what the object says", of_world=_final_agrees),
    Property("nobody journals after a newer attempt began", of_step=_fenced),
    Property("the log is whole: no token missing, none twice", of_world=_log_is_whole),
    Property("the result is the undisturbed output", of_world=_result_is_the_output),
    Property("the stream is the result", of_world=_stream_is_the_result),
    Property("nothing lost: without a result there is a message", of_world=_nothing_lost),
    Property("acknowledged only when durable", of_step=_durable_first),
    Property("nothing runs after the end", of_step=_nothing_after_final),
    Property("what is done is not run again", of_world=_done_is_done),
    Property("living owners keep their claims", of_step=_owners_keep_claims),
)


def ended(w: World) -> bool:
    """Every job has its result and says so (or its state is gone since), and nothing is left in the queue."""
    return not (w.waiting or w.claims) and all(
        job.result is not None and job.state in ("", job.result.state) for job in w.jobs
    )
