"""From a delivered message to something the engine can run, or to the error that says why not."""

from __future__ import annotations

from datetime import UTC, datetime

from ..engine.guided.checker import GrammarChecker
from ..engine.guided.tool_calls import grammar_of_calls
from ..engine.messages import Grammar, Request
from ..engine.tokenizer import Tokenizer
from ..schemas.errors import InvalidRequest, InvalidSchema, PromptTooLong
from ..schemas.job import Job
from .completion import Completion
from .generation import Generation


def encode(job: Job, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The job's prompt as token ids, the last ones if it is to be truncated.

    Raises BadInput (no chat template, template error, id out of range).
    """
    ids = _encode(job, tokenizer, vocab_size)
    return ids if job.sampling.truncate is None else ids[-job.sampling.truncate :]


def _encode(job: Job, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    if job.prompt_ids is not None:
        worst = max(job.prompt_ids)
        if worst >= vocab_size:
            raise InvalidRequest(
                f"prompt_ids holds {worst:,} and this model's vocabulary ends at {vocab_size - 1:,}; "
                "was it made with another model's tokenizer?",
                param="prompt_ids",
            )
        return list(job.prompt_ids)
    if job.messages is not None:
        submitted = datetime.fromtimestamp(job.submitted_at, UTC)  # the same prompt on every attempt
        functions = () if job.tools is None else job.tools.functions
        prompt = tokenizer.conversation(job.messages, functions, submitted)
        return tokenizer.encode(prompt, add_special_tokens=False)
    assert job.prompt is not None, f"job {job.id}: validated without a prompt"
    return tokenizer.encode(job.prompt, add_special_tokens=True)


def budget(
    job: Job,
    prompt_tokens: int,
    limit: int,
    default_max_tokens: int,
    *,
    max_input_tokens: int | None = None,
    knob: str | None = None,
) -> int:
    """How many tokens of output the job may have. Raises PromptTooLong with the numbers.

    ``limit`` is what a sequence may hold in all, and ``knob`` the setting that says so. Who names no number
    gets the default, or what is left.
    """
    if max_input_tokens is not None and prompt_tokens > max_input_tokens:
        raise PromptTooLong(
            prompt_tokens=prompt_tokens, max_tokens=None, limit=max_input_tokens, knob="max_input_tokens"
        )
    asked = job.sampling.max_tokens
    room = limit - prompt_tokens
    if room < 1 or (asked is not None and asked > room):
        raise PromptTooLong(prompt_tokens=prompt_tokens, max_tokens=asked, limit=limit, knob=knob)
    if job.sampling.min_tokens > room:
        raise PromptTooLong(
            prompt_tokens=prompt_tokens,
            max_tokens=job.sampling.min_tokens,
            limit=limit,
            asked_by="min_tokens",
            knob=knob,
        )
    return asked if asked is not None else max(job.sampling.min_tokens, min(default_max_tokens, room))


def grammar_of(job: Job) -> Grammar | None:
    """What the job's output must look like, as the engine takes it. Raises InvalidSchema."""
    spec = job.sampling.grammar
    grammar = None if spec is None else Grammar(spec.kind, spec.text, spec.close)
    return grammar if job.tools is None else grammar_of_calls(job.tools, grammar)


def check_grammar(job: Job, checker: GrammarChecker, max_tokens: int) -> None:
    """Raises InvalidSchema for a grammar that is wrong, too big, or whose texts do not fit ``max_tokens``."""
    try:
        grammar = grammar_of(job)
        if grammar is not None:
            checker.check(grammar, max_tokens)
    except InvalidSchema as exc:
        param = "grammar" if job.tools is None else "tools"
        raise InvalidSchema(exc.message, param=exc.param or param) from exc


def group_of(job: Job) -> str:
    """Whose outputs may tell what this job will say: those of its bulk run, or its tenant's that stand alone.

    Never another tenant's: ids of runs are whatever their submitters chose.
    """
    return f"{job.tenant}/{job.batch_id or ''}"  # no tenant's name holds a slash


def engine_requests(generation: Generation) -> list[Request]:
    """What the engine must know to continue the choices that have not ended, from the tokens they have."""
    running = list(generation.running)
    return [
        _engine_request(generation, name, one, tells_of_prompt=one is running[0][1]) for name, one in running
    ]


def _engine_request(generation: Generation, name: str, one: Completion, *, tells_of_prompt: bool) -> Request:
    job, sampling, tokenizer = generation.job, generation.job.sampling, generation.tokenizer
    tells_of_prompt = tells_of_prompt and not generation.prompt_told
    return Request(
        id=name,
        prompt_ids=generation.prompt_ids,
        output_ids=list(one.ids),
        max_tokens=generation.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        processors=generation.processors,
        logprobs=0 if sampling.logprobs is None and sampling.ranked else sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs if tells_of_prompt else None,
        seed=job.seed,
        choice=one.index,
        # The tokenizer knows end tokens of chats that a model's own config may not name.
        stop_token_ids=[*sampling.stop_token_ids, *(() if sampling.ignore_eos else tokenizer.eos_token_ids)],
        ignore_eos=sampling.ignore_eos,
        grammar=grammar_of(job),
        adapter=sampling.adapter_id,
        priority=job.priority.rank,
        arrival=generation.started_at,
        cache_salt=job.tenant,
        group=group_of(job),
    )
