"""Every failure has a name, an owner and a next step.

GristmillError                  internal mistake of ours                      exit 1
├── ResultsDamaged              stored results are gone or changed: a person must look
├── BadInput                    the caller's fault; never retried             exit 2
│   ├── InvalidRequest          a field is unknown or out of range
│   │   ├── MissingParameter    a required field is not there
│   │   ├── InvalidMethod       a batch line whose method is not POST
│   │   ├── UrlMismatch         a batch line for an endpoint that is not served
│   │   ├── InvalidSchema       a schema or grammar for the output that cannot be used
│   │   └── Unsupported         a known feature that this version does not have
│   ├── InvalidJson             not JSON, or not UTF-8
│   ├── EmptyFile               a bulk input with no rows
│   ├── TooManyTasks            a bulk input of more rows than this client takes
│   ├── FileTooLarge            … of more bytes
│   ├── DuplicateCustomId       two rows of one file share a custom_id
│   ├── PayloadTooLarge         the request is bigger than the broker should carry
│   ├── PromptTooLong           prompt + max_tokens do not fit the model
│   ├── ModelNotFound           nobody serves it, or it is not in the cache
│   ├── ModelInvalid            the model directory cannot be used
│   ├── ModelGated              its owner wants terms accepted, or a token
│   ├── AdapterNotFound         this worker has no LoRA adapter of that name
│   ├── AdapterInvalid          the adapter's directory cannot be used with this model
│   ├── JobNotFound             no state, no log and no result under this id
│   ├── JobFailed               waited for a result, and the job failed
│   ├── IdempotencyConflict     same key, another body
│   ├── WebhookRefused          an event's address is none that we may call
│   ├── WebhookNotFound         no event under this id
│   └── Misconfigured           a setting, a missing package, a missing bucket
├── Transient                   worth another attempt, after a wait           exit 75
│   ├── BrokerUnavailable       broker or state Redis does not answer
│   │   └── NotReplicated       too few replicas have confirmed a job
│   ├── StoreUnavailable        the result store does not answer
│   ├── DownloadFailed          the package index or the model hub does not answer
│   ├── WebhookFailed           a receiver does not answer, or not with a 2xx status
│   ├── EngineUnavailable       the engine process died, hangs or is starting
│   ├── WaitTimeout             the caller's own patience ran out
│   └── ResultChanged           a stream was shown text that is not the result's
└── Fenced                      a newer attempt owns the job: stop, write nothing
"""

from __future__ import annotations

from typing import ClassVar


def with_a_greater(knob: str) -> str:
    """What an operator may do about a limit of the worker's, for the end of a message."""
    flag = knob.replace("_", "-")
    return f"start workers with a greater --{flag} (GRISTMILL_{knob.upper()})"


class GristmillError(Exception):
    """Root of the tree. ``code`` is a stable contract; the message may change."""

    code: ClassVar[str] = "internal_error"
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    @property
    def message(self) -> str:
        """What happened, with numbers, and what to do next."""
        return str(self.args[0]) if self.args else type(self).__name__


class ResultsDamaged(GristmillError):
    """What the result store holds is not what was accepted: lost, changed, or written by somebody else."""

    code = "results_damaged"


class BadInput(GristmillError):
    """The caller's fault: sending it again changes nothing."""

    code = "bad_input"
    exit_code = 2


class InvalidRequest(BadInput):
    """A field is missing, unknown or out of range. ``param`` names it where there is one."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class MissingParameter(InvalidRequest):
    """A required field is not there."""

    code = "missing_required_parameter"


class InvalidMethod(InvalidRequest):
    """A batch line whose ``method`` is not POST."""

    code = "invalid_method"


class UrlMismatch(InvalidRequest):
    """A batch line for an endpoint that is not served."""

    code = "url_mismatch"


class InvalidSchema(InvalidRequest):
    """A JSON schema, regex or grammar for the output that is wrong, too big, or not to be satisfied."""

    code = "invalid_schema"


class Unsupported(InvalidRequest):
    """A feature of the API that this version does not have; refused rather than ignored."""

    code = "unsupported"


class InvalidJson(BadInput):
    """A line or a body that is not JSON, or not UTF-8."""

    code = "invalid_json_line"


class EmptyFile(BadInput):
    """A bulk input without a single row."""

    code = "empty_file"


class TooManyTasks(BadInput):
    """A bulk input of more rows than this client takes."""

    code = "too_many_tasks"

    def __init__(self, *, rows: int, line: int) -> None:
        super().__init__(
            f"line {line:,}: the input has more than {rows:,} rows; split it, or raise "
            "GRISTMILL_BATCH_MAX_ROWS"
        )
        self.rows, self.line = rows, line


class FileTooLarge(BadInput):
    """A bulk input of more bytes than this client takes."""

    code = "file_too_large"

    def __init__(self, *, limit_bytes: int, line: int) -> None:
        super().__init__(
            f"line {line:,}: the input has more than {limit_bytes:,} bytes of requests; split it, or raise "
            "GRISTMILL_BATCH_MAX_BYTES"
        )
        self.limit_bytes, self.line = limit_bytes, line


class DuplicateCustomId(BadInput):
    """Two rows of one file share a custom_id, the only join key of the output."""

    code = "duplicate_custom_id"


class PayloadTooLarge(BadInput):
    """The request is larger than a broker message should be."""

    code = "payload_too_large"

    def __init__(self, *, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"the request is {size_bytes:,} bytes and the limit is {limit_bytes:,}; "
            "shorten the prompt, or raise GRISTMILL_MAX_PAYLOAD_BYTES on both sides"
        )
        self.size_bytes, self.limit_bytes = size_bytes, limit_bytes


class PromptTooLong(BadInput):
    """The prompt, or the prompt and the tokens asked for, do not fit the model or a limit of the worker's.

    ``knob``: the setting that ``limit`` comes from; None: the model.
    """

    code = "context_length_exceeded"

    def __init__(
        self,
        *,
        prompt_tokens: int,
        max_tokens: int | None,
        limit: int,
        asked_by: str = "max_tokens",
        knob: str | None = None,
    ) -> None:
        other = with_a_greater(knob) if knob else "use a model with a longer context"
        takes = f"this worker takes {limit:,} in all" + (f" ({knob})" if knob else "")
        if knob == "max_input_tokens":
            text = (
                f"prompt is {prompt_tokens:,} tokens and this worker takes {limit:,} of a prompt ({knob}); "
                f"shorten it by {prompt_tokens - limit:,}, or {other}"
            )
        elif max_tokens is None or prompt_tokens >= limit:
            text = (
                f"prompt is {prompt_tokens:,} tokens and {takes}; "
                f"shorten it by at least {prompt_tokens - limit + 1:,}, or {other}"
            )
        else:
            text = (
                f"prompt ({prompt_tokens:,} tokens) + {asked_by} ({max_tokens:,}) is "
                f"{prompt_tokens + max_tokens:,} and {takes}; "
                f"lower {asked_by} to {limit - prompt_tokens:,}, or {other}"
            )
        super().__init__(text)
        self.prompt_tokens, self.max_tokens, self.limit = prompt_tokens, max_tokens, limit
        fits_alone = knob != "max_input_tokens" and max_tokens is not None and prompt_tokens < limit
        self.param = asked_by if fits_alone else "prompt"


class ModelNotFound(BadInput):
    """Nobody serves the model, or it is not in the model cache."""

    code = "model_not_found"


class ModelInvalid(BadInput):
    """A model directory that cannot be used; the message names the file or the tensor."""

    code = "model_invalid"


class ModelGated(BadInput):
    """The model's owner wants its terms accepted, or a token that may read it."""

    code = "model_gated"


class AdapterNotFound(BadInput):
    """The worker that serves the model has no LoRA adapter of that name."""

    code = "adapter_not_found"
    param = "adapter_id"


class AdapterInvalid(BadInput):
    """The adapter's directory cannot be used: broken, for another model, or of a kind not supported."""

    code = "adapter_invalid"


class JobNotFound(BadInput):
    """No state, no log and no result under this id."""

    code = "job_not_found"


class JobFailed(BadInput):
    """Raised to whoever waits for the result of a job that did not succeed.

    ``job_error_code`` is the job's own error code.
    """

    code = "job_failed"

    def __init__(self, job_id: str, code: str, message: str) -> None:
        super().__init__(f"job {job_id}: {message} [{code}]")
        self.job_id, self.job_error_code = job_id, code


class IdempotencyConflict(BadInput):
    """The same idempotency key with another body."""

    code = "idempotency_conflict"


class WebhookRefused(BadInput):
    """An event's URL, or an address that its host has, is none that we may call.

    ``final``: asking again changes nothing; a name may lead elsewhere tomorrow.
    """

    code = "webhook_refused"

    def __init__(self, message: str, *, final: bool) -> None:
        super().__init__(message)
        self.final = final


class WebhookNotFound(BadInput):
    """No event under this id (any more)."""

    code = "webhook_not_found"


class Misconfigured(BadInput):
    """A setting that cannot work, a missing package, a missing bucket."""

    code = "misconfigured"


class Transient(GristmillError):
    """Worth another attempt, after a wait."""

    code = "transient"
    exit_code = 75
    retryable = True


class BrokerUnavailable(Transient):
    """The broker or the state Redis does not answer, or refuses to write."""

    code = "broker_unavailable"


class NotReplicated(BrokerUnavailable):
    """The broker has the job, and fewer replicas than ``broker_replicas`` do: a failover now may lose it."""

    code = "not_replicated"

    def __init__(self, *, confirmed: int, wanted: int, wait_s: float) -> None:
        super().__init__(
            f"{confirmed} of {wanted} replicas confirmed the job within {wait_s:g} s; it is queued, and a "
            "failover now may lose it. Submit it again once they are back (with an idempotency key it runs "
            "once), or lower GRISTMILL_BROKER_REPLICAS"
        )
        self.confirmed, self.wanted = confirmed, wanted


class StoreUnavailable(Transient):
    """The result store does not answer."""

    code = "store_unavailable"


class DownloadFailed(Transient):
    """The package index or the model hub does not answer, or stopped half-way."""

    code = "download_failed"


class WebhookFailed(Transient):
    """A receiver did not take an event. ``why``: see ``WebhookTry.code``."""

    code = "webhook_failed"

    def __init__(self, message: str, why: str = "status") -> None:
        super().__init__(message)
        self.why = why


class EngineUnavailable(Transient):
    """The engine process died, hangs, or is still starting."""

    code = "engine_unavailable"


class WaitTimeout(Transient):
    """The caller's own timeout ran out; the job goes on."""

    code = "wait_timeout"


class ResultChanged(Transient):
    """A stream without a form for it was shown text which a lost log has since been replaced by another."""

    code = "result_changed"


class Fenced(GristmillError):
    """A newer attempt owns the job. Not a failure: stop, and write nothing more."""

    code = "fenced"
