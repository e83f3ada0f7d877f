"""Gristmill beside the engines people run on CPUs, on the same rows, in one run, taking turns.

Each peer comes from the package index into an environment of its own (build/peers) and runs in its own
process, with the best settings known for it, the same number of threads, and exact output lengths. Only one
runs at a time: the others are stopped (SIGSTOP), so that a library that spins while it is idle costs nobody
anything. Every round has fresh rows; who begins changes from round to round.

  w1   128 requests of mixed lengths at once            tokens out per second
  w2   128 requests that share 512 tokens               tokens out per second
  w3   one request, 128 in and 128 out                  time to the first token, and between tokens
  w4   a fresh process, 16 in and 1 out                 from its start to the token

examples:
  scripts/bench_peers                                    everything that can be installed: an hour and more
  scripts/bench_peers --quick                            a quarter of the rows, two rounds: ten minutes
  scripts/bench_peers --peers gristmill,vllm --workloads w1 --rounds 10
  scripts/bench_peers --list                             peers, and whether they can run here
"""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_pairs import interval
from engine_passes import circumstances
from gristmill.backends.models import pull
from peer_setups import PEERS, CannotRun, Launch, prepare
from peers.serving import family
from roofline import Limits, least_seconds, measure
from tokenizers import Tokenizer
from workload import Row, cold, single, w1, w2

ANSWER_S = 1800.0
RUNNERS = Path(__file__).resolve().parent / "peers"
OURS = ("gristmill", "gristmill-int8")
IN_INT8 = ("gristmill-int8", "vllm-w8a8", "openvino-int8")


@dataclass
class Peer:
    """A peer's process, stopped unless it is its turn, and what it has shown."""

    name: str
    launch: Launch
    threads: int
    rates: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """By workload and round: tokens out per second."""
    first_ms: list[float] = field(default_factory=list[float])
    between_ms: list[float] = field(default_factory=list[float])
    cold_s: list[float] = field(default_factory=list[float])
    peak_gib: float = 0.0
    about: dict[str, Any] = field(default_factory=dict[str, Any])
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Returns once it is loaded. Raises CannotRun."""
        self.process = subprocess.Popen(
            [*self.launch.command],
            env=os.environ | self.launch.env | {"BENCH_THREADS": str(self.threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.launch.log.open("a"),
            text=True,
            start_new_session=True,
        )
        self.about = self._answer()["ready"]

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Its answer; it runs for so long and no longer."""
        assert self.process
        assert self.process.stdin
        self.wake()
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.rest()
        self.peak_gib = max(self.peak_gib, answer["peak_gib"])
        return answer

    def rest(self) -> None:
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        if self.process is not None:
            self.wake()
            self._signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _signal(self, number: signal.Signals) -> None:
        """To the process and all that it started, whatever sessions those made for themselves."""
        assert self.process
        for pid in family(self.process.pid):
            os.kill(pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self.process
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise CannotRun(f"it ended with status {self.process.wait()}; its log: {self.launch.log}")
        return json.loads(line)


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopped processes are not left behind
    if args.list:
        for name, setup in PEERS.items():
            print(f"{name:18} {setup.about}")
        return
    model = pull("smollm2-135m")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    missing: dict[str, str] = {}
    peers: list[Peer] = []
    for name in args.peers:
        say(f"{name}: setting up")
        try:
            peers.append(Peer(name, prepare(name, model), args.threads))
        except CannotRun as exc:
            missing[name] = str(exc)
            say(f"{name} cannot run here: {exc}")
    limits = measure(args.threads)
    say(f"this machine: {limits}")
    try:
        if "w4" in args.workloads:
            cold_starts(peers, missing, tokenizer, args)
        warm_up(peers, missing, tokenizer, args)
        for turn in range(args.rounds):
            one_round(turn, peers, tokenizer, args)
    finally:
        for peer in peers:
            peer.close()
    report = {
        "bench": "peers",
        **summary(peers, limits, tokenizer, args),
        "missing": missing,
        "limits": limits.rounded(),
        "seed": args.seed,
        "rounds": args.rounds,
        "requests": args.requests,
        "threads": args.threads,
        **circumstances(),
    }
    if not args.json:
        print(table(report), file=sys.stderr)
    print(json.dumps(report))


def cold_starts(peers: list[Peer], missing: dict[str, str], tokenizer: Tokenizer, args: Any) -> None:
    """Each starts twice; the first start fills caches and is not counted, and finds out who cannot run."""
    for turn in range(1 + args.cold_starts):
        for peer in list(peers):
            row = cold(tokenizer, args.seed + turn)
            started = time.monotonic()
            try:
                peer.start()
                peer.ask({"row": pair(row)})
            except CannotRun as exc:
                missing[peer.name] = str(exc)
                say(f"{peer.name} cannot run here: {exc}")
                peers.remove(peer)
                continue
            if turn:
                peer.cold_s.append(time.monotonic() - started)
                say(f"w4 {turn} of {args.cold_starts}: {peer.name} {peer.cold_s[-1]:.2f} s")
            peer.close()


def warm_up(peers: list[Peer], missing: dict[str, str], tokenizer: Tokenizer, args: Any) -> None:
    """All are started and have run something of every kind."""
    for peer in list(peers):
        say(f"{peer.name}: starting")
        try:
            peer.start()
            peer.ask({"rows": [pair(row) for row in w1(tokenizer, args.seed - 1, 16)]})
            peer.ask({"row": pair(single(tokenizer, args.seed - 1))})
        except CannotRun as exc:
            missing[peer.name] = str(exc)
            say(f"{peer.name} cannot run here: {exc}")
            peers.remove(peer)


def one_round(turn: int, peers: Sequence[Peer], tokenizer: Tokenizer, args: Any) -> None:
    order = [*peers[turn % len(peers) :], *peers[: turn % len(peers)]]
    seed = args.seed + 1000 * (turn + 1)
    for name, make in (("w1", w1), ("w2", w2)):
        if name not in args.workloads:
            continue
        rows = make(tokenizer, seed, args.requests)
        asked = sum(row.max_tokens for row in rows)
        for peer in order:
            answer = peer.ask({"rows": [pair(row) for row in rows]})
            assert answer["tokens"] == asked, f"{peer.name}: {answer['tokens']} tokens instead of {asked}"
            peer.rates.setdefault(name, []).append(asked / answer["seconds"])
            say(f"round {turn + 1} of {args.rounds}, {name}: {peer.name} {peer.rates[name][-1]:.0f} tok/s")
    if "w3" in args.workloads:
        row = single(tokenizer, seed)
        for peer in order:
            times = peer.ask({"row": pair(row)})["times_s"]
            assert len(times) == row.max_tokens, f"{peer.name}: {len(times)} tokens"
            peer.first_ms.append(1000 * times[0])
            peer.between_ms.append(1000 * (times[-1] - times[0]) / (len(times) - 1))


def pair(row: Row) -> tuple[list[int], int]:
    return row.prompt_ids, row.max_tokens


def summary(peers: Sequence[Peer], limits: Limits, tokenizer: Tokenizer, args: Any) -> dict[str, Any]:
    """Medians, and the ratio of each of ours to each other: of the same round's passes, and its spread."""
    found: dict[str, Any] = {"peers": {}, "ratios": {}, "roofline": {}}
    for peer in peers:
        found["peers"][peer.name] = {
            **{f"{name}_tok_s": round(median(rates), 1) for name, rates in peer.rates.items()},
            **{f"{name}_all": [round(rate, 1) for rate in rates] for name, rates in peer.rates.items()},
            "w3_first_ms": peer.first_ms and round(median(peer.first_ms), 1),
            "w3_between_ms": peer.between_ms and round(median(peer.between_ms), 2),
            "w4_s": peer.cold_s and round(median(peer.cold_s), 2),
            "peak_gib": peer.peak_gib,
            "about": peer.about,
        }
    for ours in (peer for peer in peers if peer.name in OURS):
        for other in (peer for peer in peers if peer is not ours):
            found["ratios"][f"{ours.name} / {other.name}"] = {
                name: ratio(rates, other.rates[name]) for name, rates in ours.rates.items()
            }
    for name, make, shared in (("w1", w1, 0), ("w2", w2, 512)):
        if name not in args.workloads:
            continue
        rows = make(tokenizer, args.seed + 1000, args.requests)
        asked = sum(row.max_tokens for row in rows)
        for peer in peers:
            bound = least_seconds(
                rows, limits, int8="int8" in peer.name or "w8a8" in peer.name, shared=shared
            )
            share = median(peer.rates[name]) / (asked / bound)
            found["roofline"].setdefault(name, {})[peer.name] = round(share, 3)
    return found


def ratio(ours: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    logs = [math.log(a / b) for a, b in zip(ours, others, strict=True)]
    within = interval(logs)
    return {
        "median": round(math.exp(median(logs)), 3),
        "mean": round(math.exp(fmean(logs)), 3),
        "spread": [round(math.exp(end), 3) for end in (min(logs), max(logs))],
        "interval_95": within and [round(math.exp(end), 3) for end in within],
    }


def table(report: dict[str, Any]) -> str:
    """For people, as Markdown."""
    heads = ["w1_tok_s", "w2_tok_s", "w3_first_ms", "w3_between_ms", "w4_s", "peak_gib"]
    lines = ["| peer | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, one in report["peers"].items():
        lines.append(f"| {name} | " + " | ".join(str(one.get(head) or "–") for head in heads) + " |")
    for pair_name, ratios in report["ratios"].items():
        for workload, one in ratios.items():
            lines.append(
                f"{pair_name}, {workload}: {one['median']} ({one['spread'][0]} to {one['spread'][1]})"
            )
    for workload, shares in report["roofline"].items():
        lines.append(f"{workload}, share of the roofline without overlap: {shares}")
    lines += [f"{name}: not run: {why}" for name, why in report["missing"].items()]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--peers", type=names, default=list(PEERS), help=f"of {','.join(PEERS)}")
    parser.add_argument("--workloads", type=names, default=["w1", "w2", "w3", "w4"])
    parser.add_argument("--rounds", type=int, help="5; with --quick 2")
    parser.add_argument("--cold-starts", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="32 requests instead of 128, two rounds")
    parser.add_argument("--seed", default="random", help="a number, or 'random' for a fresh one (printed)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", action="store_true", help="no table on stderr")
    parser.add_argument("--list", action="store_true", help="name the peers and end")
    args = parser.parse_args()
    if unknown := set(args.peers) - set(PEERS):
        parser.error(f"--peers: no such peer: {', '.join(sorted(unknown))}; of {', '.join(PEERS)}")
    args.seed = secrets.randbelow(2**31) if args.seed == "random" else int(args.seed)
    args.requests = 32 if args.quick else 128
    args.rounds = args.rounds or (2 if args.quick else 5)
    return args


def say(text: str) -> None:
    print(f"bench_peers: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
