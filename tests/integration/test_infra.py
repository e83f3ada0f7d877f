"""infra/, as far as it can be proved without a container engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import redis
import yaml
from gristmill.backends.embedded import find_server
from gristmill.backends.supervisor import die_with_parent
from gristmill.worker.lifecycle import LEAVE_S
from gristmill.worker.settings import WorkerSettings
from moto.server import ThreadedMotoServer

from ..support.waiting import wait_until

INFRA = Path(__file__).resolve().parents[2] / "infra"
DOCKERFILES = sorted(INFRA.glob("Dockerfile.*"))
WORKERS = [path for path in DOCKERFILES if "worker" in path.name]
COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def last_stage(path: Path) -> str:
    return path.read_text().rsplit("\nFROM ", 1)[1]


def environment(text: str) -> set[str]:
    return {name.lower() for name in re.findall(r"\bGRISTMILL_([A-Z0-9_]+)\b", text)}


@pytest.mark.parametrize("path", [*DOCKERFILES, INFRA / "compose.yaml"], ids=lambda path: path.name)
def test_every_variable_that_is_set_is_a_setting(path: Path) -> None:
    own = {"valkey_password"}  # compose.yaml's, for the server itself
    assert environment(path.read_text()) - own <= set(WorkerSettings.model_fields)


@pytest.mark.parametrize("path", [*DOCKERFILES, INFRA.parent / ".dockerignore"], ids=lambda path: path.name)
def test_every_package_is_copied_and_inside_the_build_context(path: Path) -> None:
    """The image of a tree that lacks one does not build: keeper/ was forgotten in all of them."""
    project = tomllib.loads((INFRA.parent / "pyproject.toml").read_text())
    wanted = {folder.partition("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    assert wanted <= set(re.findall(r"^(?:!|COPY )(\w+)", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_run_as_nobody_special(path: Path) -> None:
    assert "USER gristmill" in last_stage(path).splitlines()
    assert "--uid 10001" in last_stage(path)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_signals_reach_the_program_and_not_a_shell(path: Path) -> None:
    [entrypoint] = re.findall(r"^ENTRYPOINT (.*)$", last_stage(path), re.MULTILINE)
    assert json.loads(entrypoint)[-1] in {"gristmill", "gristmill-worker"}


@pytest.mark.parametrize("path", WORKERS, ids=lambda path: path.name)
def test_the_health_check_asks_the_port_the_worker_listens_on(path: Path) -> None:
    port = WorkerSettings.model_fields["health_port"].default
    stage = last_stage(path)
    assert f"http://127.0.0.1:{port}/health/live" in stage
    assert f"EXPOSE {port}" in stage


def test_the_worker_gets_more_time_to_end_than_it_takes_to_drain() -> None:
    grace = int(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace > WorkerSettings.model_fields["drain_s"].default + LEAVE_S


def test_a_pods_grace_period_holds_its_drain_and_fits_a_spot_notice() -> None:
    pod = yaml.safe_load((INFRA / "k8s" / "worker.yaml").read_text())["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert environment(" ".join(variables)) <= set(WorkerSettings.model_fields)
    assert float(variables["GRISTMILL_DRAIN_S"]) + LEAVE_S < pod["terminationGracePeriodSeconds"] < 120


def test_ports_are_published_on_loopback_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert not [port for port in ports if not port.startswith("127.0.0.1:")]


def test_images_from_elsewhere_are_pinned_to_a_version() -> None:
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    assert images
    assert not [image for image in images if not re.search(r":\d", image)]


def test_the_server_may_use_less_memory_than_its_container_has() -> None:
    limit = int(SERVICES["valkey"]["mem_limit"].removesuffix("m"))
    [maxmemory] = re.findall(r"^maxmemory (\d+)gb$", (INFRA / "valkey.conf").read_text(), re.MULTILINE)
    assert int(maxmemory) * 1024 < limit


@pytest.fixture
def server(tmp_path: Path) -> Iterator[redis.Redis]:
    """A Valkey that runs infra/valkey.conf; only where it listens and writes is other."""
    socket = tmp_path / "s"
    where = [
        "--port",
        "0",
        "--dir",
        str(tmp_path),
        "--logfile",
        str(tmp_path / "log"),
        "--unixsocket",
        str(socket),
    ]
    command = [find_server(), str(INFRA / "valkey.conf"), *where, "--requirepass", "secret"]
    process = subprocess.Popen(command, preexec_fn=die_with_parent())
    client = redis.Redis(unix_socket_path=str(socket), password="secret", decode_responses=True)
    try:
        wait_until(socket.exists, 10.0, "valkey.conf to be accepted")
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(10)


def test_the_server_takes_every_line_and_loses_nothing_by_itself(server: redis.Redis) -> None:
    told: dict[str, str] = server.config_get("*")
    assert told["appendonly"] == "yes"
    assert told["appendfsync"] == "always"
    assert told["no-appendfsync-on-rewrite"] == "no"
    assert told["maxmemory-policy"] == "noeviction"
    assert told["maxmemory"] == str(1024**3)
    assert told["save"] == ""
    assert told["timeout"] == "0"


def test_a_server_that_is_full_refuses_a_write_and_keeps_what_it_has(server: redis.Redis) -> None:
    server.set("gm:job", "accepted")
    server.set("gm:large", "x" * 4_000_000)
    server.config_set("maxmemory", "1mb")
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        server.set("gm:next", "x")
    assert server.get("gm:job") == "accepted"


def test_making_the_bucket_twice_makes_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    endpoint = {"GRISTMILL_S3_ENDPOINT_URL": f"http://{host}:{port}", "GRISTMILL_S3_REGION": "us-east-1"}
    for name, text in {**endpoint, "GRISTMILL_S3_ACCESS_KEY": "k", "GRISTMILL_S3_SECRET_KEY": "s"}.items():
        monkeypatch.setenv(name, text)
    try:
        for _ in range(2):
            subprocess.run([sys.executable, str(INFRA / "make_bucket.py"), "gristmill"], check=True)
        client = boto3.client(
            "s3",
            endpoint_url=endpoint["GRISTMILL_S3_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="k",
            aws_secret_access_key="s",
        )
        # moto keeps one set of buckets a process: other tests' may be there.
        assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]].count("gristmill") == 1
    finally:
        s3.stop()
