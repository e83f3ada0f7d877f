"""The jobs of a seed, the model that runs them, and what it says when nothing happens."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gristmill.backends.models import pull
from gristmill.engine import noise
from gristmill.engine.engine import Engine
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.reference import Reference
from gristmill.engine.settings import EngineSettings
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.job import DEFAULT_TENANT, Job, idempotent_job_id
from gristmill.schemas.sampling import SamplingParams
from gristmill.worker import intake
from gristmill.worker.generation import Generation

MIN_TOKENS, MAX_TOKENS = 96, 160
NEAR_TIE = 1e-4
SLICE = 100
"""Jobs that a process of the undisturbed run takes at a time."""
BURST = 12
MODEL = "m"
WORDS = [
    "mill",
    "river",
    "stone",
    "grain",
    "wheel",
    "water",
    "flour",
    "bread",
    "iron",
    "snow",
    "tea",
    "algebra",
    "sleep",
    "letter",
    "ship",
    "garden",
    "winter",
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "that",
    "is",
    "was",
    "for",
    "under",
    "between",
    "without",
    "because",
    "although",
    "never",
    "always",
    "perhaps",
    "Ångström",
    "naïve",
    "東京",
    "мельница",
    "🙂",
    "x=y+1",
    "{'k':",
    "2}",
    "3.14159",
    "HTTP/1.1",
]


@dataclass(frozen=True)
class Asked:
    """One job: what is asked for, when (0 to 1 of the time of submission), and how it is followed."""

    number: int
    key: str
    prompt: str
    sampling: dict[str, Any]
    at: float
    follow: str | None
    """live; torn: leaves in the middle and comes back with the last id; late: attaches a few seconds on."""
    wants_stop: bool

    @property
    def job_id(self) -> str:
        return idempotent_job_id(DEFAULT_TENANT, self.key)

    def job(self) -> Job:
        """As the client will send it, but for the times."""
        return Job(
            id=self.job_id,
            model=MODEL,
            prompt=self.prompt,
            sampling=SamplingParams(**self.sampling),
            stream=self.follow is not None,
            submitted_at=0.0,
            expires_at=1.0,
        )


@dataclass
class Said:
    """What came out of one job undisturbed."""

    text: str
    ids: list[int]
    prompt_ids: list[int] = field(default_factory=list[int])


def draw_jobs(seed: int, count: int) -> list[Asked]:
    """Half greedy, half sampled with a seed; a sixth with a stop string; a sixth followed. By time.

    They come in bursts, a dozen at once on average, so that a kill finds several jobs in hand.
    """
    draw = random.Random(f"jobs {seed}")
    bursts = [draw.random() for _ in range(max(1, count // BURST))]
    times = sorted(draw.choice(bursts) for _ in range(count))
    return [_draw_job(draw, seed, number, at) for number, at in enumerate(times)]


def _draw_job(draw: random.Random, seed: int, number: int, at: float) -> Asked:
    sampling: dict[str, Any] = {"max_tokens": draw.randint(MIN_TOKENS, MAX_TOKENS), "min_tokens": MIN_TOKENS}
    if number % 2:
        sampling["temperature"] = 0.0
    else:
        sampling |= {"temperature": draw.choice([0.7, 1.0]), "seed": draw.getrandbits(64)}
        sampling |= draw.choice([{}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.02}])
    wants_stop = draw.random() < 1 / 6
    if wants_stop:
        sampling["max_tokens"] = 2 * MAX_TOKENS
    return Asked(
        number=number,
        key=f"chaos-{seed}-{number}",
        prompt=f"{number}: " + " ".join(draw.choices(WORDS, k=draw.randint(6, 40))),
        sampling=sampling,
        at=at,
        follow=draw.choice(["live", "torn", "late"]) if draw.random() < 1 / 6 else None,
        wants_stop=wants_stop,
    )


def write_model(name: str, directory: Path) -> Path:
    """``smollm2``: the real one. ``tiny``: Llama's architecture, random weights, the real one's tokenizer."""
    real = pull("smollm2-135m")
    if name == "smollm2":
        return real
    shape = {
        "vocab_size": 49_152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    write_tiny(directory, "llama", **shape)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(real / file, directory / file)
    return directory


def undisturbed(
    model: Path, asked: Sequence[Asked], *, threads: int, say: Any = lambda _text: None
) -> tuple[list[Asked], dict[int, Said]]:
    """Run all jobs in engines of ``threads`` each, as many as there are cores for. Those that want a stop
    string get one, out of their text.

    The stop string is taken from behind the first 96 tokens, and the job is run again with it.
    """
    final: list[Asked] = []
    said: dict[int, Said] = {}
    slices = [asked[start : start + SLICE] for start in range(0, len(asked), SLICE)]
    processes = max(1, (os.cpu_count() or 1) // threads)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for some, theirs in pool.map(partial(_undisturbed, model, threads), slices):
            final += some
            said |= theirs
            say(f"undisturbed run: {len(said)}/{len(asked)} jobs")
    return final, said


def _undisturbed(model: Path, threads: int, asked: Sequence[Asked]) -> tuple[list[Asked], dict[int, Said]]:
    engine = Engine(EngineSettings(model=str(model), dtype="float32", num_threads=threads, max_num_seqs=64))
    tokenizer = Tokenizer(model)
    said = _run(engine, tokenizer, asked)
    final: list[Asked] = []
    for one in asked:
        stop = _stop_in(tokenizer, said[one.number]) if one.wants_stop else None
        final.append(replace(one, sampling=one.sampling | {"stop": (stop,)}) if stop else one)
    said |= _run(engine, tokenizer, [one for one in final if "stop" in one.sampling])
    return final, said


def _run(engine: Engine, tokenizer: Tokenizer, asked: Iterable[Asked]) -> dict[int, Said]:
    running: dict[str, tuple[int, Generation]] = {}
    for one in asked:
        job = one.job()
        generation = Generation(job, 1, 1, 0.0, tokenizer)
        prompt_ids = intake.encode(job, tokenizer, engine.info.vocab_size)
        generation.admit(prompt_ids, job.sampling.max_tokens or 0, 0.0)
        running[generation.request_id] = one.number, generation
        engine.add(*intake.engine_requests(generation))
    said: dict[int, Said] = {}
    while engine.has_work:
        for output in engine.step():
            number, generation = running[output.id]
            if generation.push(output, 0.0):
                engine.abort(output.id)
            if generation.done is not None:
                (one,) = generation.completions
                said[number] = Said(one.text, one.ids, generation.prompt_ids)
    return said


def _stop_in(tokenizer: Tokenizer, said: Said) -> str | None:
    """A few characters of the text that come behind token 96, and not before."""
    early = len(tokenizer.decode(said.ids[: MIN_TOKENS + 8]))
    for start in range(early, len(said.text) - 4):
        candidate = said.text[start : start + 4]
        if "\ufffd" not in candidate and candidate.strip() == candidate:
            return candidate
    return None


class Judge:
    """Tells a near tie from a difference: the two tokens' scores by the slow reference, noise included."""

    def __init__(self, model: Path) -> None:
        self._reference = Reference(model)

    def near_tie(self, asked: Asked, said: Said, ids: Sequence[int]) -> bool:
        """Whether ``ids`` first leave the undisturbed ones where both tokens score within 1e-4."""
        at = next((i for i, pair in enumerate(zip(said.ids, ids, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            return False
        scores = self._reference.logits([*said.prompt_ids, *said.ids[:at]])[-1].double()
        temperature = float(asked.sampling["temperature"])
        ours, theirs = ids[at], said.ids[at]
        if temperature == 0:
            return bool(abs(scores[ours] - scores[theirs]) <= NEAR_TIE)
        key = noise.noise_key(int(asked.sampling["seed"]), 0, at)
        noisy = [
            float(scores[t]) / temperature + noise.gumbel(noise.noise_bits(key, t)) for t in (ours, theirs)
        ]
        return abs(noisy[0] - noisy[1]) <= NEAR_TIE
