"""`gristmill`: the command line of the submitting side. Its commands live in ``commands_*.py``."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from .console import run_guarded

HELP = """Batch and streaming generation through a queue.

\b
Examples:
  gristmill models pull smollm2-135m                     # a small model to try things with
  gristmill run prompts.jsonl -o answers.jsonl           # everything embedded; stop and continue at will
  gristmill up --model smollm2-135m                      # broker and worker in the foreground …
  gristmill submit "Why is the sky blue?" --chat --stream    # … and a second terminal
  gristmill doctor                                       # what is missing, and the next step

Settings are GRISTMILL_* variables: GRISTMILL_BROKER_URL, …_RESULTS_URL, …_MODEL, …_HOME.
Exit codes: 0 done, 1 internal error, 2 bad input, 75 try again later, 130 interrupted.
"""

COMMANDS = {
    "run": ("commands_run", "Run a file of requests, everything embedded."),
    "up": ("commands_up", "Broker and workers in the foreground; others connect to it."),
    "batch": ("commands_batch", "Submit a file and leave; look, steer and fetch later."),
    "plan": ("commands_plan", "What a file would take: rows, tokens, time, money."),
    "submit": ("commands_jobs", "Send one job."),
    "follow": ("commands_jobs", "Show a job's text as it is made."),
    "status": ("commands_jobs", "Where a job stands."),
    "result": ("commands_jobs", "Print a job's result."),
    "cancel": ("commands_jobs", "Stop jobs."),
    "dead": ("commands_dead", "Messages that are not delivered again: look, send again, throw away."),
    "webhooks": ("commands_webhooks", "Events sent to webhooks: look, send again, try a receiver out."),
    "workers": ("commands_workers", "Who is alive, and what they do."),
    "queues": ("commands_queues", "Create, list, pause and resume queues."),
    "models": ("commands_models", "Fetch, list and check models."),
    "quantize": ("commands_quantize", "Write a quantized copy of a model."),
    "gc": ("commands_gc", "Take away what is old in the result store."),
    "doctor": ("commands_doctor", "What is installed, reachable and missing."),
}
"""Command → its module and its line in the overview: `--help` and `--version` load none of them."""


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module: Any = importlib.import_module(f".{COMMANDS[cmd_name][0]}", __package__)
        return getattr(module, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=_Lazy, help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gristmill", prog_name="gristmill")
def cli() -> None:
    """Root of the commands."""


def main() -> None:
    """Console entry point."""
    sys.exit(run_guarded(cli))


if __name__ == "__main__":
    main()
