"""A job names a LoRA adapter of the worker's; one nobody has is that job's error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gristmill.producer.cli import cli
from gristmill.producer.console import run_guarded
from gristmill.schemas.errors import JobFailed, Misconfigured
from gristmill.worker.settings import load_worker_settings

from ..support.adapters import write_adapter
from ..support.stack import Stack


def test_jobs_of_one_batch_go_through_different_adapters(
    tiny_stack: Stack, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    formal = write_adapter(tmp_path / "formal", tiny_stack.model, seed=1)
    write_adapter(tmp_path / "all" / "terse", tiny_stack.model, seed=2)
    tiny_stack.worker("--lora-adapters", f"formal={formal}", "--lora-dir", str(tmp_path / "all"))
    client = tiny_stack.client
    names = (None, "formal", "terse", "formal")
    jobs = [
        client.submit(prompt_ids=[1, 2, 3], max_tokens=12, temperature=0.0, ignore_eos=True, adapter_id=name)
        for name in names
    ]
    missing = client.submit(prompt_ids=[1, 2, 3], max_tokens=12, adapter_id="../all/terse")
    plain, first, other, again = [job.result(timeout_s=120).text for job in jobs]
    assert first == again
    assert len({plain, first, other}) == 3
    with pytest.raises(JobFailed, match="formal") as caught:
        missing.result(timeout_s=120)
    assert caught.value.job_error_code == "adapter_not_found"

    rows = tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "a", "adapter_id": "terse"}))
    broker = ["--broker", tiny_stack.settings.broker_url, "--results", tiny_stack.settings.results_url]
    run = ["run", str(rows), "-o", str(tmp_path / "out.jsonl"), "--model", "m", "--adapter", "formal"]
    assert run_guarded(cli, [*run, "--temperature", "0", "--max-tokens", "12", *broker]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    one, two = [line["response"]["body"]["choices"][0]["text"] for line in lines]
    assert one != two


def test_adapters_without_a_name_are_refused_before_anything_starts() -> None:
    with pytest.raises(Misconfigured, match="a=/x,b=/y"):
        load_worker_settings(model="m", lora_adapters="/just/a/path")
