"""The example prompts are what they are said to be: valid, mixed, and quickly done."""

import json
from pathlib import Path

from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.batch_lines import Row, parse_line
from gristmill.schemas.job import Endpoint

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts.jsonl"


def prompt_tokens(row: Row, tokenizer: Tokenizer) -> int:
    request = row.request
    if request.messages is None:
        return len(tokenizer.encode(request.prompt or ""))
    messages = [each.model_dump(exclude_none=True) for each in request.messages]
    return len(tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False))


def test_the_example_prompts_are_valid_mixed_and_quickly_done(smollm2: Path) -> None:
    lines = PROMPTS.read_bytes().splitlines()
    rows = [parse_line(line, number) for number, line in enumerate(lines, start=1)]
    assert len({row.custom_id for row in rows}) == len(rows) >= 60
    urls = [json.loads(line).get("url") for line in lines]  # a bare line has none
    assert all(urls.count(each) >= 5 for each in (None, Endpoint.CHAT, Endpoint.COMPLETIONS))
    assert all((row.request.sampling.max_tokens or 1024) <= 96 for row in rows)
    tokenizer = Tokenizer(smollm2)
    sizes = [prompt_tokens(row, tokenizer) for row in rows]
    assert sum(size > 500 for size in sizes) >= 5
    assert max(sizes) < 2000
