"""`gristmill-worker`: one model, one engine, as many queues as there are classes."""

from __future__ import annotations

import sys
from typing import Any, get_args

import click

from ..backends import logs
from ..engine.priority import step_aside
from ..engine.quick_torch import will_do
from ..engine.settings import KVDType, Quantize
from ..engine.spawn import begin_early, drop_early
from .settings import load_worker_settings

EXAMPLES = """\b
Examples:
  gristmill-worker run --model smollm2-135m
  gristmill-worker run --model Qwen/Qwen3-0.6B --broker redis://queue:6379/0 --results s3://bucket/results
  gristmill-worker run --model ./my-model --burst        # drain the queues, then exit 0
"""


@click.group(help="Drain generation jobs from a queue through one engine.\n\n" + EXAMPLES)
@click.version_option(package_name="gristmill")
def cli() -> None:
    """Root of the commands."""


@cli.command(help="Serve one model until told to stop.\n\n" + EXAMPLES)
@click.option("--model", help="Hub id, directory, GGUF file, s3://bucket/prefix, or smollm2-135m.")
@click.option("--revision", help="Hub revision.")
@click.option("--served-model-name", help="Name that jobs use; default: the model as given.")
@click.option("--broker", "broker_url", help="redis(s)://…, unix://…, embedded:DIR.")
@click.option("--state", "state_url", help="Redis for logs and state; default: the broker.")
@click.option("--results", "results_url", help="file:///dir or s3://bucket/prefix.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]))
@click.option(
    "--quantize",
    type=click.Choice(get_args(Quantize)),
    help="Weights in fewer bits. Made on load: nf4, fp4, int8, eetq, fp8 (bitsandbytes: eetq). awq, gptq and "
    "compressed-tensors only name what a checkpoint is stored as, and need not be said.",
)
@click.option(
    "--quantize-head/--no-quantize-head",
    default=None,
    help="CPU, --quantize int8: the output layer, too; default: yes.",
)
@click.option("--attention", type=click.Choice(["auto", "cpu", "torch", "triton", "flash"]))
@click.option("--max-num-seqs", type=int, help="Sequences that run together.")
@click.option("--max-batch-prefill-tokens", type=int, help="Token budget of one step.")
@click.option("--max-input-tokens", type=int, help="Prompt of one sequence; default: what the total leaves.")
@click.option("--max-total-tokens", type=int, help="Prompt + output of one sequence.")
@click.option("--max-batch-total-tokens", type=int, help="Tokens in the KV cache.")
@click.option("--max-concurrent-requests", type=int, help="Jobs of a class that are taken on at a time.")
@click.option(
    "--waiting-served-ratio",
    type=float,
    help="Let prompts in once so many wait for each sequence that decodes; default 0: at once.",
)
@click.option(
    "--max-waiting-tokens", type=int, help="… or once those have decoded for so many steps; default 20."
)
@click.option("--kv-block-size", type=int, help="Tokens per KV block.")
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(get_args(KVDType)),
    help="Keys and values in a byte each, so that nearly twice as many fit: int8 or fp8; default: auto.",
)
@click.option(
    "--prefix-cache/--no-prefix-cache",
    default=None,
    help="Keep what was computed for prompts that begin alike; default: yes.",
)
@click.option("--swap-gib", type=float, help="Host memory for KV blocks that had to make way; default 0.")
@click.option(
    "--overlap/--no-overlap",
    default=None,
    help="Work beside the device, a step ahead of what it is known to have said; default: on CUDA.",
)
@click.option(
    "--native-products/--no-native-products",
    default=None,
    help="CPU: multiply with our own kernels where the CPU has instructions for them; default: yes.",
)
@click.option(
    "--shared-attention/--no-shared-attention",
    default=None,
    help="CPU: sequences that begin alike read what they share together; default: yes.",
)
@click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=None,
    help="CUDA: replay the launches of a step that only decodes; default: yes.",
)
@click.option("--speculate", type=int, help="Guessed tokens a step may check for a sequence; 0: none.")
@click.option("--memory-fraction", type=float, help="CUDA: part of the card's memory to use.")
@click.option(
    "--tensor-parallel-size",
    "--num-shard",
    "tensor_parallel_size",
    type=int,
    help="Devices, or CPU processes, that the model is cut for; default 1.",
)
@click.option("--lora-adapters", metavar="NAME=DIR,…", help="LoRA adapters that jobs may name.")
@click.option("--lora-dir", metavar="DIR", help="Jobs may name every adapter directory in it, too.")
@click.option("--lora-memory-mib", type=int, help="What loaded adapters may take together; default 512.")
@click.option("--lora-max-rank", type=int, help="Adapters of a higher rank are refused; default 256.")
@click.option(
    "--deterministic",
    is_flag=True,
    default=None,
    help="CPU: a request's numbers are the same bits whatever else runs; slower.",
)
@click.option("--num-threads", type=int, help="CPU threads of the engine.")
@click.option("--max-stop-sequences", type=int, help="Stop strings of one request.")
@click.option("--max-top-n-tokens", type=int, help="Likely tokens told with each token.")
@click.option("--max-best-of", type=int, help="Choices of one request.")
@click.option("--watermark-gamma", type=float, help="Part of the vocabulary that a watermark favours.")
@click.option("--watermark-delta", type=float, help="By how much a watermark favours it.")
@click.option("--default-max-tokens", type=int, help="Output tokens for a request that names no number.")
@click.option("--health-host", help="Where /health and /metrics listen; default 127.0.0.1.")
@click.option("--health-port", type=int, help="0: any free port.")
@click.option("--drain-s", type=float, help="Seconds to finish running jobs after SIGTERM.")
@click.option("--keeper/--no-keeper", default=None, help="End jobs that nobody runs, besides; default: yes.")
@click.option("--burst", is_flag=True, default=None, help="Exit once the queues are empty and nothing runs.")
@click.option("--idle-exit-s", type=float, help="Exit after so many idle seconds.")
@click.option("--log-format", type=click.Choice(["text", "json"]))
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--debug", is_flag=True, help="Show a trace when something fails.")
def run(debug: bool, **flags: Any) -> None:
    """Start the engine, then take jobs."""
    with logs.last_words(debug=debug):
        settings = load_worker_settings(**flags)
        logs.install(settings.log_format, settings.log_level)
        if will_do(settings):
            begin_early()  # beside what follows
        step_aside()
        try:
            from .app import WorkerApp  # slow: only once the settings are right

            code = WorkerApp(settings).run()
        finally:
            drop_early()
    sys.exit(code)


def main() -> None:
    """Console entry point."""
    cli()


if __name__ == "__main__":
    main()
