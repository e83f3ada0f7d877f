"""Engine: START HERE. ``add`` requests, ``step`` until nothing is left: plan -> run -> sample -> record."""

from __future__ import annotations

import logging
import time
from itertools import islice

import torch

from ..schemas.errors import BadInput, InvalidRequest
from ..schemas.home import default_home
from .block_pool import BlockPool
from .cadence import Cadence
from .checks import check_request
from .device_sampler import UNSETTLED, DeviceSampler
from .flight import Flight, draws_alone, rows_of
from .guided.guide import Guide
from .logprobs import PromptScorer, Scores
from .memory import OUT_OF_MEMORY, is_out_of_memory
from .messages import EngineInfo, Output, Request, Stats
from .native.sampling import NativeSampling, load_sampling
from .parallel.ranks import ONE_RANK, Ranks
from .quant.stored import stored_weights
from .recorder import Recorder
from .runner import Runner, WeightsOf
from .sampler import Sampler
from .scheduler import Scheduler, StepPlan, Work
from .sequence import Sequence
from .settings import EngineSettings
from .speculation import MOST_SEQS_AHEAD, Speculation
from .swap import StepCosts, SwapSpace, swap_pays

log = logging.getLogger(__name__)

GROW_AFTER_STEPS = 1_000
"""After so many steps without a failure a shrunk engine asks for twice as much again: others on the machine
may have gone. Should it fail, that costs one step's time."""
ADAPTER_POLL_S = 0.05
"""How long a step waits for an adapter when there is nothing else to do: so often are commands heard then."""


class Engine:
    """Token ids in, token ids out; synchronous, one thread only.

    Every request that ``add`` accepted ends in exactly one output with ``finish``, unless it is aborted.
    What it generates depends on the request alone, not on who else is in the engine.
    """

    def __init__(
        self, settings: EngineSettings, weights_of: WeightsOf = stored_weights, ranks: Ranks = ONE_RANK
    ) -> None:
        """Load the model. Raises ModelNotFound, ModelInvalid, Misconfigured.

        ``ranks``: of several that hold the model, this is rank 0's.
        """
        started = time.monotonic()
        self._runner = runner = Runner(settings, weights_of, ranks)
        self._max_num_seqs = settings.max_num_seqs
        self._costs = StepCosts()
        self._scheduler = Scheduler(
            BlockPool(runner.num_blocks),
            block_size=runner.block_size,
            step_tokens=runner.step_tokens,
            max_num_seqs=settings.max_num_seqs,
            prefix_cache=settings.prefix_cache,
            swap=self._swap_space(settings),
            cadence=Cadence(settings.waiting_served_ratio, settings.max_waiting_tokens),
        )
        self._desk = runner.adapter_desk(settings)
        self._sampler = Sampler(runner.spec.vocab_size, runner.device, _native(settings, runner))
        self._device_sampler = DeviceSampler(runner.spec.vocab_size, runner.device)
        overlap = runner.device.type == "cuda" if settings.overlap is None else settings.overlap
        self._overlap = overlap and runner.ranks.size == 1  # tokens that are coming are on this rank alone
        self._flight: Flight | None = None
        self.fast_forward = True
        """Tokens that a grammar forces are not sampled; False is the slow way to the same."""
        self._guide = Guide(settings.model, runner.spec.vocab_size, runner.eos_token_ids)
        most_seqs = MOST_SEQS_AHEAD if self._overlap else None
        self._speculation = Speculation(settings.speculate, most_seqs) if settings.speculate else None
        self._recorder = Recorder(self._end)
        self._seqs: dict[str, Sequence] = {}
        self._number = 0
        self._ended: list[Output] = []
        self._step_s, self._loop_s, self._step_tokens = 0.0, 0.0, 0
        self._steps_since_shrunk = 0
        self._load_s = {**runner.load_s, "total": time.monotonic() - started}

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._seqs or self._ended)

    @property
    def info(self) -> EngineInfo:
        runner = self._runner
        return EngineInfo(
            vocab_size=runner.spec.vocab_size,
            max_model_len=runner.max_model_len,
            length_knob=runner.length_knob,
            num_blocks=runner.num_blocks,
            block_size=runner.block_size,
            max_num_seqs=self._scheduler.max_running,
            step_tokens=runner.step_tokens,
            dtype=runner.dtype_name,
            attention=runner.attention,
            eos_token_ids=list(runner.eos_token_ids),
            load_s=self._load_s,
        )

    @property
    def stats(self) -> Stats:
        scheduler = self._scheduler
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._desk.waiting) + len(self._guide.waiting),
            free_blocks=scheduler.pool.free,
            total_blocks=scheduler.pool.capacity,
            preemptions=scheduler.preemptions,
            step_s=self._step_s,
            loop_s=self._loop_s,
            tokens=self._step_tokens,
            step_tokens=scheduler.step_tokens,
            max_running=scheduler.max_running,
            drafted=self._speculation.drafted if self._speculation else 0,
            accepted=self._speculation.accepted if self._speculation else 0,
            prefix_queries=scheduler.cache.queries,
            prefix_hits=scheduler.cache.hits,
            adapters=len(self._desk.loaded),
            adapter_loads=self._desk.loads,
            blocks_saved=scheduler.cache.swap.saved,
            blocks_loaded=scheduler.cache.swap.loaded,
            firm_blocks=[scheduler.firm_blocks(priority) for priority in range(3)],
        )

    def add(self, request: Request) -> None:
        """Take ``request`` in; its tokens come out of later steps.

        Raises PromptTooLong, or InvalidRequest for anything else that cannot be run. Nothing is changed then.
        """
        if request.id in self._seqs:
            raise InvalidRequest(f"request {request.id} is running already", param="id")
        check_request(
            request,
            max_model_len=self._runner.max_model_len,
            length_knob=self._runner.length_knob,
            vocab_size=self._runner.spec.vocab_size,
        )
        seq = Sequence(
            request,
            limit=min(len(request.prompt_ids) + request.max_tokens, self._runner.max_model_len),
            end_ids=self._end_ids(request),
            number=self._number,
            # Log probabilities are made of logits, and a text may be forced from its first token to its last.
            fast_forward=self.fast_forward and request.logprobs is None and request.prompt_logprobs is None,
        )
        if len(seq.tokens) >= seq.limit and not request.grammar:  # an earlier attempt did not get to say so
            self._ended.append(Output(id=request.id, token_ids=[], finish="length"))
            return
        self._scheduler.check_fits(seq)
        if request.grammar:
            self._guide.begin(seq, request.grammar)
        else:
            self._queue(seq)
        self._seqs[request.id] = seq
        self._number += 1

    def _queue(self, seq: Sequence) -> None:
        """To the scheduler, at once or when its adapter is here."""
        if seq.adapter is None or self._desk.add(seq):
            self._scheduler.add(seq)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks; nothing more comes out of it. False: it is not here."""
        seq = self._seqs.get(request_id)
        if seq is None:
            return False
        self._end(seq)
        return True

    def step(self) -> list[Output]:
        """Feed the model once and return what came out of it, at most one output a request.

        Memory that runs out makes steps smaller. Raises whatever else the model raises: then the engine is
        broken and wants to be made anew.
        """
        started = time.monotonic()
        self._runner.away.take()
        outputs, self._ended = self._ended, []
        with self._runner.away:
            ready = self._guide.ready(patiently=not (self._scheduler.has_work or outputs))
        for seq, begins in ready:
            outputs += self._begin(seq, begins)
        outputs += self._attend_to_adapters()
        if self._scheduler.has_work or self._flight:  # what is coming is also for who left for the desk
            outputs += self._run()
        else:
            self._step_tokens = 0
            with self._runner.away:
                self._desk.wait(ADAPTER_POLL_S)
        self._step_s = time.monotonic() - started
        self._loop_s = self._step_s - self._runner.away.take()
        if self._step_tokens:
            self._costs.observe(self._step_tokens, self._step_s)
        return outputs

    def check(self) -> None:
        """Raise AssertionError unless all books balance. Between steps only. O(blocks)."""
        self._scheduler.check()
        self._desk.check()
        scheduled = {*self._scheduler.running, *self._scheduler.waiting}
        assert self._desk.scheduled == {seq for seq in scheduled if seq.adapter}, "pins and queues differ"
        queued = {seq.id for seq in (*scheduled, *self._desk.waiting, *self._guide.waiting)}
        assert queued == set(self._seqs), f"lost or unknown: {sorted(queued ^ set(self._seqs))}"
        self._sampler.processing.check(self._seqs.keys())
        if self._speculation:
            self._speculation.check(self._seqs.values())

    def _run(self) -> list[Output]:
        """What one step has drawn. The next one is on its way before anybody looks, where that can be."""
        flight, self._flight = self._flight, None
        if flight is None:
            flight = self._launch()
            if isinstance(flight, Output):
                return [flight]
        if self._may_go_ahead(flight):
            self._flight = self._launch_behind(flight)
        with self._runner.away:
            tokens = flight.tokens()
        if UNSETTLED in tokens:
            self._settle(flight, tokens)
        if self._speculation and flight.decodes and self._flight is None:
            self._speculation.times.add(flight.plan.tokens, time.monotonic() - flight.began)
        self._step_tokens = flight.plan.tokens
        self._grow()
        return self._record(flight, tokens)

    def _launch(self) -> Flight | Output:
        """A step, smaller and smaller until memory suffices. A failed try has computed nothing."""
        size = self._scheduler.step_tokens, self._scheduler.max_running
        while True:
            plan = self._plan(guess=True)
            try:
                flight = self._draw(plan)
                break
            except Exception as exc:
                if not is_out_of_memory(exc):
                    raise
            # Here the exception is gone, and with it the frames that held the failed step's tensors.
            self._runner.room.free_caches()
            self._scheduler.drop_guesses(plan)
            if not self._shrink(plan):
                self._step_tokens = 0
                self._scheduler.step_tokens, self._scheduler.max_running = size  # it was this one's doing
                return self._too_big(plan)
        self._advance(flight)
        return flight

    def _may_go_ahead(self, flight: Flight) -> bool:
        """Whether the next step can be launched before the host knows what ``flight`` draws.

        Guesses begin with the last token: where some might be made, it is waited for.
        """
        if flight.ahead is None:
            return False
        if self._speculation is None or not self._speculation.looks_at(len(self._scheduler.running)):
            return True
        return not self._scheduler.only_decodes

    def _launch_behind(self, flight: Flight) -> Flight | None:
        """The step after ``flight``. None: no memory, or nothing to do before its tokens are known."""
        plan = self._plan(guess=False)
        if not plan.work:
            return None
        try:
            following = self._draw(plan, flight)
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            following = None
        if following is None:
            self._runner.room.free_caches()
            self._shrink(plan)
            return None
        self._advance(following)
        return following

    def _advance(self, flight: Flight) -> None:
        """It has been launched: what it feeds is computed, and what it draws is coming."""
        self._scheduler.advance(flight.plan)
        for work in flight.works:
            work.seq.coming += 1

    def _draw(self, plan: StepPlan, before: Flight | None = None) -> Flight:
        """Run the model and the sampler behind what ``before`` draws; nothing is recorded yet."""
        began = time.monotonic()
        decodes = self._speculation is not None and self._scheduler.only_decodes
        works = [work for work in plan.work if work.samples]
        rows = rows_of(works)
        masks = self._guide.start([work.seq for work in works])
        try:
            scorer = PromptScorer.of(plan.work)
            coming = before.coming if before else None
            logits = self._runner.forward(plan, self._desk.loaded, scorer, coming)
            if self._overlap and scorer is None and all(map(draws_alone, works)):
                with self._runner.away:
                    drawn = self._device_sampler.draw(logits, rows)
                return Flight(plan, works, drawn, logits, None, None, None, began, decodes)
            with self._runner.away:
                scores = Scores.take(logits, rows)  # the model's own: before masks
                if masks:
                    masks.apply(logits)
                tokens = self._sampler.sample(logits, rows) if rows else []
        except Exception:
            if masks:
                masks.drop()
            raise
        return Flight(plan, works, tokens, logits, masks, scores, scorer, began, decodes)

    def _record(self, flight: Flight, tokens: list[int | None]) -> list[Output]:
        """Give everybody who is still here what was drawn. Who has ended since the launch gets nothing more:
        that was noticed a step late."""
        here = {work.seq.id for work in flight.plan.work if self._seqs.get(work.seq.id) is work.seq}
        here -= {seq.id for seq in flight.void}
        outputs: list[Output] = []
        behind = iter(tokens[len(flight.works) :])
        for row, (work, token) in enumerate(zip(flight.works, tokens, strict=False)):
            if work.seq in flight.void:
                outputs.append(Output(id=work.seq.id, token_ids=[]))
                continue
            work.seq.coming -= 1
            if work.seq.id not in here:
                outputs.append(Output(id=work.seq.id, token_ids=[]))
                continue
            known = len(work.seq.tokens)
            if flight.masks and work.seq.guided:
                output = self._recorder.record_guided(work.seq, token, flight.masks, row)
            else:
                output = self._recorder.record(work.seq, token)
            if work.guesses:
                output = self._check_guesses(work, output, [token, *islice(behind, len(work.guesses))])
            elif work.seq.computed > known and not output.finish:
                self._scheduler.learned(work.seq, known)
            outputs.append(output)
        if flight.scores:
            outputs = flight.scores.tell(outputs, flight.logits)
        if flight.scorer:
            outputs = flight.scorer.tell(outputs)
        return [output for output in outputs if output.id in here]

    def _settle(self, flight: Flight, tokens: list[int | None]) -> None:
        """Draw what the device could not decide, and take back what it computed upon its guess.

        From now on the host draws for these sequences: the next token may be as open.
        """
        behind = self._flight
        for row, work in enumerate(flight.works):
            seq = work.seq
            if tokens[row] != UNSETTLED or self._seqs.get(seq.id) is not seq:
                continue
            with self._runner.away:
                tokens[row] = self._sampler.sample(flight.logits[row : row + 1], [seq])[0]
            seq.plain = False
            if behind and any(following.seq is seq for following in behind.works):
                seq.computed -= 1
                seq.coming -= 1
                behind.void.add(seq)

    def _check_guesses(self, work: Work, output: Output, drawn: list[int | None]) -> Output:
        assert self._speculation is not None
        output, right = self._recorder.record_guessed(work.seq, work.guesses, drawn, output)
        if not output.finish:
            self._scheduler.settle(work.seq, min(right, work.seq.pending - 1))
            self._speculation.learn(work.seq, len(work.guesses), right)
        return output

    def _plan(self, *, guess: bool) -> StepPlan:
        """The scheduler's plan, sequences with the same adapter beside one another, and guesses that pay."""
        plan = self._scheduler.plan()
        if self._desk.loaded:
            plan = StepPlan(tuple(sorted(plan.work, key=lambda work: work.seq.adapter or "")))
        if guess and self._speculation and self._scheduler.only_decodes:
            room = self._scheduler.step_tokens - plan.tokens
            guesses = self._speculation.draft([work.seq for work in plan.work], room)
            plan = self._scheduler.add_guesses(plan, guesses) if guesses else plan
        return plan

    def _attend_to_adapters(self) -> list[Output]:
        """Sequences whose adapter has come go to the scheduler; those whose adapter is no good end."""
        turn = self._desk.turn()
        for seq in turn.withdrawn:
            self._scheduler.remove(seq)
            seq.preempted = True
        for seq in turn.ready:
            self._scheduler.add(seq)
        for seq, _ in turn.failed:
            self._forget(seq)
        return [Output.failed(seq.id, error.code, error.message) for seq, error in turn.failed]

    def _swap_space(self, settings: EngineSettings) -> SwapSpace | None:
        """Where blocks go that are wanted again, should that cost less than computing them."""
        made = self._runner.room.host_blocks(settings.swap_gib)
        if made is None:
            return None
        blocks, count = made
        costs, size, block_s = self._costs, self._runner.block_size, blocks.measure_s()
        log.info("engine.swap_space", extra={"blocks": count, "block_s": block_s})
        return SwapSpace(
            count,
            blocks,
            lambda: swap_pays(block_tokens=size, token_s=costs.token_s, block_s=block_s),
        )

    def _shrink(self, plan: StepPlan) -> bool:
        self._steps_since_shrunk = 0
        if not self._scheduler.shrink():
            return False
        self._report("engine.shrunk", failed_tokens=plan.tokens, failed_seqs=len(plan.work))
        return True

    def _grow(self) -> None:
        self._steps_since_shrunk += 1
        if self._steps_since_shrunk % GROW_AFTER_STEPS == 0 and self._scheduler.grow():
            self._report("engine.grown")

    def _report(self, event: str, **more: int) -> None:
        sizes = {"step_tokens": self._scheduler.step_tokens, "max_running": self._scheduler.max_running}
        log.warning(event, extra={**sizes, **more})

    def _too_big(self, plan: StepPlan) -> Output:
        """End the one sequence for which not even the smallest step has memory."""
        seq = plan.work[0].seq
        self._end(seq)
        return Output.failed(
            seq.id,
            OUT_OF_MEMORY,
            f"memory ran out for {plan.tokens} tokens of this sequence of {len(seq.tokens):,}, alone "
            "in the engine; lower max_batch_total_tokens to leave more for a step, or add memory",
        )

    def _begin(self, seq: Sequence, begins: list[int] | BadInput) -> list[Output]:
        """Queue a sequence whose grammar is ready, with the tokens that are forced from the start."""
        if isinstance(begins, BadInput):
            self._end(seq)
            return [Output.failed(seq.id, begins.code, begins.message)]
        output = self._recorder.append(seq, begins)
        if output.finish:
            return [output]
        try:
            self._queue(seq)
        except BadInput as exc:  # there is no such adapter, or it has gone meanwhile
            self._end(seq)
            return [Output.failed(seq.id, exc.code, exc.message)]
        self._guide.forget(seq)
        seq.said -= len(begins)  # they come out with the first sampled one: a step has one output each
        return []

    def _end(self, seq: Sequence, *, spoiled: bool = False) -> None:
        self._forget(seq)
        if self._guide.forget(seq):
            return
        if seq.adapter is None or not self._desk.remove(seq):
            self._scheduler.remove(seq, spoiled=spoiled)

    def _forget(self, seq: Sequence) -> None:
        """Strike it from the engine's own books, not from those of whoever holds it."""
        del self._seqs[seq.id]
        self._sampler.processing.forget(seq.id)
        if self._speculation:
            self._speculation.forget(seq)

    def _end_ids(self, request: Request) -> frozenset[int]:
        model = () if request.ignore_eos else self._runner.eos_token_ids
        return frozenset((*request.stop_token_ids, *model))


def _native(settings: EngineSettings, runner: Runner) -> NativeSampling | None:
    """The built sampler, where the model's kernels are built ones too."""
    if runner.attention != "cpu":
        return None
    return load_sampling(settings.kernel_cache or default_home() / "kernels", torch.get_num_threads())
