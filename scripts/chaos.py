"""Kill, freeze and cut everything at random while jobs run, and count what became of them.

examples:
  scripts/chaos --seed 1 --jobs 2000 --minutes 8 --workers 3
  scripts/chaos --seed 1 --jobs 200 --minutes 1              a short form
  scripts/chaos --seed 5 --jobs 150 --minutes 8 --model smollm2
  scripts/chaos --seed 1 --jobs 300 --minutes 1 --stack celery   stock Celery and kombu, for comparison
  scripts/chaos --seed 1 --jobs 2000 --minutes 4 --bulk      one batch of so many rows; see below
  scripts/chaos --seed 7 --jobs 200 --minutes 1 --only kill_worker,cut_connections --keep

First all jobs run in an engine in this process: the undisturbed texts. Then they are submitted over the time
given to a broker (append-only file on, fsync always) and workers with a lease of 6 s, and from the seed
workers, engines and the broker are killed, frozen for less and for more than a lease, and delayed, and
all connections are cut. Then the faults stop, and what is left has a bounded time to end.

Prints one JSON line:
  jobs               accepted
  kills              SIGKILLs to workers, engines and the broker
  lost               accepted and not succeeded when the time to end is over
  finished_twice     more than one result object created, one change to a final state, one Done or one End
  different          text other than the undisturbed run's; a log or a follower's text other than the result's
  near_ties          apart from these: differences that begin where both tokens score within 1e-4
  resampled_share    samplings of a place in an output that had been sampled before / places in all outputs
  reprefilled_share  tokens of prompts and journals fed again to the model / all tokens fed
  recovery_s         from a worker's death until each of its jobs was claimed again; if the broker was away
                     meanwhile, from its return; once a lease is over, without the time in which no worker
                     had room for another job

Tokens are counted by the engines themselves, in a file, before they leave the process, so that those of
killed engines count too (GM_TEST_LEDGER in tests/support/faultpoints/sitecustomize.py). Keys that do not
apply to a stack are null. Exit status 1 if lost, finished_twice or different is not 0; the directory is
then kept.

With --bulk the jobs are the rows of one batch. It runs twice, in peace and under faults, and the checksums of
the sorted lines of both outputs must be equal: rows lost and doubled, kills, same_sha256, the time it took.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests.support
sys.path.insert(0, str(Path(__file__).resolve().parent))

import chaos_bulk
from chaos_celery import StockCelery
from chaos_clients import Crowd
from chaos_fleet import KINDS, Fault, Fleet, draw_faults
from chaos_jobs import Asked, Judge, Said, draw_jobs, undisturbed, write_model
from chaos_ledger import Ledger
from chaos_stacks import Gristmill, Outcome, Side

from tests.support.valkey import Valkey

ROOT = Path(__file__).resolve().parents[1]
STACKS: dict[str, Any] = {"gristmill": Gristmill, "celery": StockCelery}
LEASE_S = 6.0
SUBMIT_PART = 0.85
"""Of the time: then the last jobs are submitted, so that faults meet them too."""
START_S, DRAIN_S = 180.0, 90.0


def main() -> int:
    args = arguments()
    directory = Path(tempfile.mkdtemp(prefix="gm-chaos-"))
    faults = [
        fault
        for fault in draw_faults(args.seed, 60 * args.minutes, LEASE_S, args.every)
        if not args.only or fault.name in args.only
    ]
    if args.bulk:
        return bulk(args, directory, faults)
    asked, said, model = prepare(args, directory)
    run = Run(args, directory, model, asked)
    try:
        run.start()
        run.disturb(faults)
        run.drain()
        report, bad = run.judge(said)
    finally:
        run.close()
    print(json.dumps(report), flush=True)
    if bad or args.keep:
        explain(args, directory, bad, run)
    else:
        shutil.rmtree(directory, ignore_errors=True)
    return 1 if bad else 0


def bulk(args: argparse.Namespace, directory: Path, faults: Sequence[Fault]) -> int:
    """The other form: see chaos_bulk.py."""
    report, well = chaos_bulk.run(args, directory, faults)
    print(json.dumps(report | {"commit": commit()}), flush=True)
    if well and not args.keep:
        shutil.rmtree(directory, ignore_errors=True)
    else:
        say(f"kept: {directory} (logs/, results/, events.log)")
    return 0 if well else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, required=True, help="of jobs and faults")
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=8.0, help="of faults; submitting takes 85%% of it")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--model", choices=["tiny", "smollm2"], default="tiny")
    parser.add_argument("--stack", choices=sorted(STACKS), default="gristmill")
    parser.add_argument("--every", type=float, default=6.0, help="mean seconds between faults")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help=f"of {','.join(KINDS)}")
    parser.add_argument("--bulk", action="store_true", help="the jobs are rows of one batch")
    parser.set_defaults(lease_s=LEASE_S)
    parser.add_argument("--json", action="store_true", help="no progress on stderr")
    parser.add_argument("--keep", action="store_true", help="keep the directory with all logs")
    args = parser.parse_args()
    if unknown := set(args.only) - set(KINDS):
        parser.error(f"--only: no such fault: {', '.join(sorted(unknown))}")
    return args


def prepare(args: argparse.Namespace, directory: Path) -> tuple[list[Asked], dict[int, Said], Path]:
    """The jobs of the seed, what they say undisturbed, and the model."""

    def tell(text: str) -> None:
        if not args.json:
            say(text)

    model = write_model(args.model, directory / "model")
    started = time.monotonic()
    # The tiny model's kernels are over before a second thread has begun.
    threads = 1 if args.model == "tiny" else os.cpu_count() or 1
    asked, said = undisturbed(model, draw_jobs(args.seed, args.jobs), threads=threads, say=tell)
    tokens = sum(len(one.ids) for one in said.values())
    tell(f"undisturbed run: {len(said)} jobs, {tokens:,} tokens in {time.monotonic() - started:.0f} s")
    return asked, said, model


class Run:
    """One run: a broker, workers, submitters and followers, and the faults between them."""

    def __init__(
        self, args: argparse.Namespace, directory: Path, model: Path, asked: Sequence[Asked]
    ) -> None:
        self._args, self._asked = args, asked
        for name in ("broker", "results", "ledger", "logs"):
            (directory / name).mkdir()
        self._ledger_dir = directory / "ledger"
        self._broker = Valkey(directory / "broker", appendfsync="always").start()
        self._side: Side = STACKS[args.stack](
            self._broker, directory, model, lease_s=LEASE_S, small=args.model == "tiny"
        )
        self.fleet = Fleet(
            self._broker, self._side.launch, args.workers, args.seed, ready_word=self._side.ready_word
        )
        self._crowd = Crowd(self._side, asked)
        self._began = time.monotonic()
        self._told_at = 0.0
        self.recoveries: list[str] = []

    # ---- its three parts

    def start(self) -> None:
        """Wait until every worker takes jobs."""
        deadline = time.monotonic() + START_S
        while not self.fleet.all_ready:
            self.fleet.tick()
            if time.monotonic() > deadline or self.fleet.unasked:
                raise SystemExit(f"chaos: the workers did not start: {self.fleet.unasked or 'too slow'}")
            time.sleep(0.05)

    def disturb(self, faults: Sequence[Fault]) -> None:
        """Submit, and strike, until the time is over or everything has ended."""
        self._began = time.monotonic()
        seconds = 60 * self._args.minutes
        self._crowd.start(SUBMIT_PART * seconds)
        todo = list(faults)
        while (elapsed := time.monotonic() - self._began) < seconds and not self._crowd.all_ended:
            self.fleet.tick()
            while todo and todo[0].at_s <= elapsed:
                fault = todo.pop(0)
                getattr(self.fleet, fault.name)(fault.seconds)
            self._progress(seconds - elapsed)
            time.sleep(0.02)

    def drain(self) -> None:
        """No more faults; wait until everything has ended, or ``DRAIN_S`` and half the faults' time."""
        self.fleet.calm()
        deadline = time.monotonic() + DRAIN_S + 30 * self._args.minutes
        while not (self._crowd.all_ended and self._side.settled(self._asked)) and time.monotonic() < deadline:
            self.fleet.tick()
            self._progress(deadline - time.monotonic(), "draining, at most")
            time.sleep(0.05)
        self._crowd.finish(max(5.0, deadline - time.monotonic()))

    def close(self) -> None:
        self._crowd.close()
        self.fleet.close()
        self._side.close()
        self._broker.close()

    def _progress(self, left_s: float, what: str = "ETA") -> None:
        if self._args.json or time.monotonic() - self._told_at < 5:
            return
        self._told_at = time.monotonic()
        ended, accepted = self._side.count_ended(), self._crowd.accepted
        say(
            f"{ended}/{len(self._asked)} jobs ended, {accepted} accepted, {self.fleet.kills} kills, "
            f"{len(self.fleet.log)} events, {what} {left_s:.0f} s"
        )

    # ---- what became of it

    def judge(self, said: dict[int, Said]) -> tuple[dict[str, Any], dict[str, str]]:
        """The report, and what is wrong with which job."""
        ledger = Ledger.read(self._ledger_dir)
        bad: dict[str, str] = {}
        count: Counter[str] = Counter()
        judge: Judge | None = None
        for one in self._asked:
            if one.number not in self._crowd.accepted_numbers:
                continue
            outcome = self._side.outcome(one)
            wrong = self._wrong_with(one, outcome, ledger, said[one.number])
            if wrong and wrong[0] == "different" and outcome.ids:
                judge = judge or Judge(self._side.model)
                if judge.near_tie(one, said[one.number], outcome.ids):
                    count["near_ties"] += 1
                    continue
            if wrong:
                count[wrong[0]] += 1
                bad[one.job_id] = f"{wrong[0]}: {wrong[1]}"
        recoveries = self._recoveries(ledger)
        report = {
            "jobs": self._crowd.accepted,
            "kills": self.fleet.kills,
            "lost": count["lost"],
            "finished_twice": count["finished_twice"],
            "different": count["different"],
            "near_ties": count["near_ties"],
            "resampled_share": round(ledger.resampled / max(1, ledger.tokens), 5),
            "reprefilled_share": round(ledger.refed / max(1, ledger.fed), 5),
            "recovery_s": quantiles(recoveries),
            "seed": self._args.seed,
            "minutes": self._args.minutes,
            "workers": self._args.workers,
            "model": self._args.model,
            "stack": self._args.stack,
            "commit": commit(),
        }
        return report, bad

    def _wrong_with(self, one: Asked, outcome: Outcome, ledger: Ledger, said: Said) -> tuple[str, str] | None:
        job = one.job_id
        if outcome.text is None:
            return "lost", f"state {outcome.state}"
        if outcome.state != "succeeded":
            return "lost", f"state {outcome.state}, {outcome.trouble}"
        times = {"objects": ledger.puts[job], "finals": len(ledger.finals[job]), **outcome.records}
        if max(times.values()) > 1:
            return "finished_twice", ", ".join(f"{name} {n}" for name, n in times.items())
        if outcome.text != said.text:
            return "different", f"undisturbed {len(said.text)} characters, now {len(outcome.text)}"
        if outcome.trouble:
            return "different", outcome.trouble
        seam = self._crowd.seam(one, outcome.text)
        return ("different", seam) if seam else None

    def _recoveries(self, ledger: Ledger) -> list[float]:
        found: list[float] = []
        for member in self.fleet.members:
            if not member.killed:
                continue
            for job, claimed_at in ledger.taken_over(member.pid, member.dead_at):
                returns = [end for _, end in self.fleet.away if member.dead_at <= end <= claimed_at]
                begin = max([member.dead_at, *returns])
                without = self._without_room(ledger, begin + LEASE_S, claimed_at)
                found.append(claimed_at - begin - without)
                after = f"{claimed_at - member.dead_at:.2f} s after worker {member.worker.number} died"
                line = f"{found[-1]:6.2f} s {job} claimed at {claimed_at:.3f}, {after}"
                self.recoveries.append(f"{line}, {without:.2f} s without room")
        return found

    def _without_room(self, ledger: Ledger, begin: float, end: float) -> float:
        """Seconds of a span in which no worker that was ready and not frozen had room for another job."""
        members = self.fleet.members
        changes = [
            t for m in members for t in (m.ready_at, m.dead_at, *(t for span in m.frozen for t in span))
        ]
        changes += [t for m in members for t, _ in ledger.room.get(m.pid, ())]
        steps = sorted({begin, *(t for t in changes if begin < t < end), end})
        return (
            sum(
                after - before
                for before, after in itertools.pairwise(steps)
                if before < end
                and not any(m.usable(before) and ledger.has_room(m.pid, before) for m in members)
            )
            if begin < end
            else 0.0
        )


def quantiles(values: list[float]) -> dict[str, float | None]:
    """p50, p95 and the largest; None where there was none."""
    ordered = sorted(values)

    def at(q: float) -> float | None:
        return round(ordered[int(q * (len(ordered) - 1))], 2) if ordered else None

    return {"p50": at(0.5), "p95": at(0.95), "max": at(1.0)}


def explain(args: argparse.Namespace, directory: Path, bad: dict[str, str], run: Run) -> None:
    """Leave what is needed to look at it, and say where."""
    (directory / "events.log").write_text("\n".join(run.fleet.log) + "\n")
    (directory / "recoveries.log").write_text("\n".join(sorted(run.recoveries, reverse=True)) + "\n")
    (directory / "bad.json").write_text(json.dumps(bad, indent=1))
    for job_id, what in list(bad.items())[:20]:
        say(f"{job_id}: {what}")
    if len(bad) > 20:
        say(f"… {len(bad) - 20} more in {directory}/bad.json")
    again = f"--seed {args.seed} --jobs {args.jobs} --minutes {args.minutes:g} --workers {args.workers}"
    say(f"kept: {directory} (logs/, ledger/, results/, events.log, bad.json, recoveries.log)")
    say(f"same jobs and faults: scripts/chaos {again} --every {args.every:g} --model {args.model}")


def commit() -> str:
    found = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def say(text: str) -> None:
    print(f"chaos: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
