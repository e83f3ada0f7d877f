"""What a batch costs beside its engine, stage by stage: rows a second, peak memory, requests to the store.

``join``: finished rows, made up here, go to the store and join the batch by ``accept``, as a worker's do.
``finalize``: a keeper's Finisher makes the files. ``check``: every row is there once, under its custom_id.
``--life`` runs the command line instead: a file of requests, workers, a tiny model, answers.
Each stage is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from gristmill.backends.embedded import find_server
from gristmill.backends.object_lines import object_lines
from gristmill.backends.state import State, open_state
from gristmill.backends.store import ResultStore, open_store
from gristmill.keeper.finisher import Finisher
from gristmill.schemas import keys
from gristmill.schemas.batch import (
    Batch,
    BatchOptions,
    RequestCounts,
    ResultObject,
    SegmentInfo,
    pack_lines,
    segment_id,
)
from gristmill.schemas.batch_lines import OutputLine, Response
from gristmill.schemas.result import Usage
from gristmill.schemas.settings import Settings

BATCH = "batch_bench"
BUCKET = "bench"
WINDOW = 8
"""Segments whose lines are mixed, as rows of a window are put in the order in which they run."""
WRITES = (
    "PutObject",
    "CreateMultipartUpload",
    "UploadPart",
    "UploadPartCopy",
    "CompleteMultipartUpload",
)
"""What S3 charges for as a PUT."""
ID = re.compile(rb'\{"id":"batch_req_[^".]+\.([0-9]+)","custom_id":"row-([0-9]+)"')


def main() -> None:
    args = arguments()
    if args.stage:
        print(json.dumps(STAGES[args.stage](args)))
        return
    from engine_passes import circumstances

    for kind in args.store.split(","):
        for rows in map(int, args.rows.split(",")):
            with tempfile.TemporaryDirectory(prefix="gm-bulk-") as name, ExitStack() as stack:
                settings = stack.enter_context(servers(Path(name), kind))
                if args.life:
                    report = life(Path(name), rows, settings, args)
                else:
                    report = {stage: in_a_process(stage, rows, settings, args) for stage in STAGES}
            said = {"rows": rows, "store": kind, "rows_per_object": args.per_object, "order": args.order}
            print(json.dumps({"bench": "bulk", **said, **report, **circumstances()}), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="10000,100000,1000000", help="numbers of rows, with commas")
    parser.add_argument("--store", default="file,s3", help="file, s3")
    parser.add_argument("--per-object", type=int, default=2000, help="rows in an object; 20000 fill 8 MiB")
    parser.add_argument("--order", action="store_true", help="the output in the order of the input")
    parser.add_argument("--life", action="store_true", help="with a model that runs")
    parser.add_argument("--workers", type=int, default=1, help="of --life")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- servers


@contextmanager
def servers(directory: Path, kind: str) -> Iterator[dict[str, str]]:
    """A Valkey that writes its append-only file, and for S3 moto; both gone afterwards. Yields settings."""
    results = directory / "results"
    results.mkdir()
    path = directory / "v.sock"
    valkey = [find_server(), "--unixsocket", str(path), "--port", "0", "--dir", str(directory)]
    patient = {"GRISTMILL_COMMAND_TIMEOUT_S": "120"}  # on a machine that has other work
    found = patient | {
        "GRISTMILL_BROKER_URL": f"unix://{path}?db=0",
        "GRISTMILL_RESULTS_URL": results.as_uri(),
    }
    with ExitStack() as stack:
        stack.enter_context(process([*valkey, "--appendonly", "yes", "--save", "", "--loglevel", "warning"]))
        if kind == "s3":
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            moto = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
            stack.enter_context(process(moto))
            found |= {
                "GRISTMILL_RESULTS_URL": f"s3://{BUCKET}/runs",
                "GRISTMILL_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "GRISTMILL_S3_REGION": "us-east-1",
                "GRISTMILL_S3_ACCESS_KEY": "x",
                "GRISTMILL_S3_SECRET_KEY": "x",
            }
            make_bucket(found["GRISTMILL_S3_ENDPOINT_URL"])
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline, "Valkey did not start"
            time.sleep(0.02)
        yield found


@contextmanager
def process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            yield running
        finally:
            running.kill()


def make_bucket(endpoint: str) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="x",
        aws_secret_access_key="x",
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def in_a_process(stage: str, rows: int, settings: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-P", __file__, "--stage", stage, "--rows", str(rows)]
    command += ["--per-object", str(args.per_object), *(["--order"] if args.order else [])]
    done = subprocess.run(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, check=True)
    print(f"bench_bulk: {rows:,} rows, {stage}: {done.stdout.decode().strip()}", file=sys.stderr)
    return json.loads(done.stdout)


# ---- stages


class Bench:
    """What a stage works on, and how long it takes."""

    def __init__(self) -> None:
        self.settings = Settings()
        self.state: State = open_state(self.settings)
        self.store: ResultStore = open_store(self.settings.results, self.settings)
        self.asked: Counter[str] = Counter()
        client: Any = getattr(self.store, "_client", None)
        if client is not None:
            client.meta.events.register("before-call.s3", lambda model, **_: self.asked.update([model.name]))
        self.base_mib = rss_mib()
        self.began, self.cpu_began = time.monotonic(), time.process_time()

    def report(self, rows: int, **more: Any) -> dict[str, Any]:
        seconds = time.monotonic() - self.began
        writes = sum(count for name, count in self.asked.items() if name in WRITES)
        s3 = {"puts_per_1000_rows": round(1000 * writes / rows, 4), "s3": dict(self.asked)}
        return {
            "seconds": round(seconds, 2),
            "rows_per_s": round(rows / seconds),
            "cpu_s": round(time.process_time() - self.cpu_began, 2),
            "peak_rss_mib": rss_mib(),
            "rss_mib_before": self.base_mib,
            **(s3 if self.asked else {}),
            **more,
        }


def rss_mib() -> int:
    """The peak so far. ``ru_maxrss`` would be the parent's, where that was larger when it forked."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) // 1024


def join(args: argparse.Namespace) -> dict[str, Any]:
    rows, bench = int(args.rows), Bench()
    hands = list(deal(rows, args.per_object))
    infos = [
        SegmentInfo(
            id=segment_id(BATCH, number), input="none", rows=len(lines), first=lines[0], last=lines[-1]
        )
        for number, lines in enumerate(hands, 1)
    ]
    options = BatchOptions(input_order=args.order)
    batch = Batch(id=BATCH, model="tiny", request_counts=RequestCounts(total=rows), options=options)
    batches = bench.state.batches
    batches.open(batch, infos)
    batches.sent(BATCH, batches.unsent(BATCH, len(infos)))
    for info in infos:
        claim: Any = batches.claim_segment(info.id, "w1")
        said: Any = {"rows": info.rows, "tokens": 0, "problems": (), "count": 0, "told": 1}
        batches.validated(info.id, claim.attempt, **said)
    batches.begin(batch)
    bench.began, bench.cpu_began = time.monotonic(), time.process_time()
    for info, lines in zip(infos, hands, strict=True):
        claim = batches.claim_segment(info.id, "w1")
        made = put(bench.store, info.id, claim.attempt, lines)
        assert batches.accept(info.id, claim.attempt, [made])
        batches.end_segment(info.id, claim.attempt)
    return bench.report(rows, objects=len(infos))


def deal(rows: int, per_object: int) -> Iterator[range]:
    """Lines of each segment: neighbours in a window of segments, mixed, sorted within a segment."""
    step = per_object * WINDOW
    for start in range(1, rows + 1, step):
        end = min(start + step, rows + 1)
        for offset in range(min(WINDOW, end - start)):
            yield range(start + offset, end, WINDOW)


def put(store: ResultStore, segment: str, attempt: int, lines: range) -> ResultObject:
    body = b"".join(map(row, lines))
    name = keys.rows_object(segment, attempt, 1, "output")
    assert store.put_new(name, body)
    return ResultObject(
        segment=segment,
        attempt=attempt,
        kind="output",
        name=name,
        rows=len(lines),
        bytes=len(body),
        sha256=hashlib.sha256(body).hexdigest(),
        lines=pack_lines(lines),
        usage=Usage(prompt_tokens=8 * len(lines), completion_tokens=4 * len(lines)),
    )


def template() -> bytes:
    """A finished row as OutputLine writes it, but for its line: to make up a million must be cheap."""
    job = f"{BATCH}.LINE"
    usage = {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12}
    choice = {"index": 0, "text": " LINE and so on", "logprobs": None, "finish_reason": "length"}
    body = {"id": f"cmpl-{job}", "object": "text_completion", "created": 1_790_000_000, "model": "tiny"}
    response = Response(
        status_code=200, request_id=f"req_{job}", body={**body, "choices": [choice], "usage": usage}
    )
    line = OutputLine(id=f"batch_req_{job}", custom_id="row-LINE", response=response).to_line()
    return line.replace(b"LINE", b"%(n)d")


ROW = template()


def row(line: int) -> bytes:
    return ROW % {b"n": line}


def finalize(args: argparse.Namespace) -> dict[str, Any]:
    rows, bench = int(args.rows), Bench()
    status = Finisher(bench.state.batches, bench.store, "keeper", 15.0).finish(BATCH)
    assert status == "completed", status
    return bench.report(rows)


def check(args: argparse.Namespace) -> dict[str, Any]:
    rows, bench = int(args.rows), Bench()
    batch = bench.state.batches.get(BATCH)
    assert batch is not None
    assert batch.output is not None
    in_order = check_lines(object_lines(bench.store, batch.output), rows)
    assert in_order or not args.order, "not in the order of the input"
    return bench.report(rows, in_order=in_order)


def check_lines(lines: Iterator[bytes], rows: int) -> bool:
    """Raises AssertionError unless each row is there once and has its own custom_id. Are they in order?"""
    seen, last, in_order = bytearray(rows + 1), 0, True
    for line in lines:
        found = ID.match(line)
        assert found, "a line without its id"
        number = int(found[1])
        assert number == int(found[2]), f"line {number} has the custom_id of row {int(found[2])}"
        assert not seen[number], f"line {number} is there twice"
        seen[number] = 1
        in_order, last = in_order and number > last, number
    assert sum(seen) == rows, f"{rows - sum(seen):,} rows are missing"
    return in_order


STAGES = {"join": join, "finalize": finalize, "check": check}


# ---- the whole life


def life(directory: Path, rows: int, settings: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """`gristmill run` over so many rows; peak memory of each process by what it is."""
    from gristmill.engine.models.tiny import write_tiny

    model = write_tiny(directory / "tiny", tokenizer=True)
    source, output = directory / "in.jsonl", directory / "out.jsonl"
    with source.open("w") as file:
        for n in range(1, rows + 1):
            fields = {"custom_id": f"row-{n}", "prompt": f"{n}", "max_tokens": 2, "ignore_eos": True}
            file.write(json.dumps(fields) + "\n")
    command = [sys.executable, "-m", "gristmill.producer.cli", "run", str(source), "-o", str(output)]
    command += ["--model", str(model), "--workers", str(args.workers)]
    env = {**os.environ, **settings, "GRISTMILL_HOME": str(directory / "home")}
    env["GRISTMILL_BROKER_URL"] = f"embedded:{directory}/embedded"
    began = time.monotonic()
    with (
        (directory / "run.log").open("wb") as log,
        subprocess.Popen(command, env=env, stderr=log, start_new_session=True) as running,
    ):
        try:
            peaks = watch(running)
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
    said = (directory / "run.log").read_text()
    assert running.returncode == 0, said[-2000:]
    seconds = time.monotonic() - began
    with output.open("rb") as file:
        in_order = check_lines(iter(file), rows)
    return {
        "life": {
            "seconds": round(seconds, 1),
            "rows_per_s": round(rows / seconds),
            "in_order": in_order,
            "peak_rss_mib": peaks,
            "said": said.strip().splitlines()[-6:],
        }
    }


def watch(running: subprocess.Popen[bytes]) -> dict[str, int]:
    """Until it ends: the highest peak, in MiB, of it and of what it started."""
    peaks: dict[str, int] = {}
    over = threading.Event()
    while running.poll() is None:
        for pid in family(running.pid):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            peak = re.search(r"VmHWM:\s+(\d+)", status)
            if peak:
                role = role_of(command)
                peaks[role] = max(peaks.get(role, 0), int(peak[1]) // 1024)
        over.wait(0.25)
    return peaks


def family(root: int) -> list[int]:
    """It, and its session: workers and engines; and what those put elsewhere, by their parents."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found, new = [root], [root]
    while new:
        new = [child for parent in new for child in parents.get(parent, ())]
        found += new
    return found


def role_of(command: str) -> str:
    for word, role in (
        ("gristmill.engine", "engine"),
        ("gristmill.worker", "worker"),
        ("supervisor", "supervisor"),
        ("producer.cli", "producer"),
    ):
        if word in command:
            return role
    return "other"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
