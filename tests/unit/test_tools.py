"""Tools: what a request says of them is checked, becomes a prompt and a grammar, and calls are read back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from gristmill.engine.guided.compiler import Compiler
from gristmill.engine.guided.tool_calls import grammar_of_calls
from gristmill.engine.messages import Grammar
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.errors import InvalidRequest, InvalidSchema, MissingParameter, Unsupported
from gristmill.schemas.job import Job, Message
from gristmill.schemas.openai import parse_chat, parse_messages, response_body
from gristmill.schemas.result import Choice, FinishReason
from gristmill.schemas.tools import calls_in, text_before_calls, toolbox, written

from ..support import tokenizers as made
from .test_openai import HI, chat, line, make_result, parse_line

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    described = {"name": name, "description": f"What {name} does.", "parameters": parameters}
    return {"type": "function", "function": described}


TOOLS = [tool("get_weather", WEATHER), tool("stop")]
CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
ASKED = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "stop", "arguments": "{}"}},
            {
                "id": "c2",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "X"}'},
            },
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "stopped"},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "rain"}]},
]

# ---- what a request says


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", None, True)),
        ("auto", ("auto", None, True)),
        ("required", ("required", None, True)),
        ({"type": "function", "function": {"name": "stop"}}, ("required", ("stop",), False)),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("stop")]}},
            ("auto", ("stop",), True),
        ),
    ],
)
def test_every_tool_choice_says_which_calls_may_be_made(choice: Any, expected: Any) -> None:
    box = parse_chat(chat(tools=TOOLS, tool_choice=choice)).tools
    assert box is not None
    assert (box.mode, box.only, box.parallel) == expected


def test_nothing_is_called_without_tools_or_with_the_choice_of_none() -> None:
    assert parse_chat(chat(tools=[], tool_choice="auto", parallel_tool_calls=False)).tools is None
    assert parse_chat(chat(tools=TOOLS, tool_choice="none")).tools is None
    single = parse_chat(chat(tools=TOOLS, parallel_tool_calls=False)).tools
    assert single is not None
    assert not single.parallel


DEEP: Any = {}
for _ in range(70):
    DEEP = {"properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"tools": "x"}, InvalidRequest, "tools"),
        ({"tools": [{"type": "web_search"}]}, Unsupported, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, MissingParameter, "tools.0.function"),
        (
            {"tools": [tool("a"), {"type": "function", "function": {}}]},
            MissingParameter,
            "tools.1.function.name",
        ),
        ({"tools": [tool("no blanks")]}, InvalidRequest, "tools.0.function.name"),
        ({"tools": [tool("a", "x")]}, InvalidRequest, "tools.0.function.parameters"),
        ({"tools": [tool("a", {"type": "string"})]}, InvalidSchema, "tools.0.function.parameters"),
        ({"tools": [tool("a", DEEP)]}, InvalidSchema, "tools.0.function.parameters"),
        ({"tools": [tool("a", {"x": "y" * 120_001})]}, InvalidSchema, "tools"),
        ({"tools": [tool("a"), tool("a")]}, InvalidRequest, "tools"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, InvalidRequest, "tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, InvalidRequest, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": tool("other")}, InvalidRequest, "tool_choice"),
        ({"tool_choice": "required"}, InvalidRequest, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, InvalidRequest, "parallel_tool_calls"),
        ({"tools": TOOLS, "guided_regex": "a+"}, Unsupported, "tools"),
    ],
)
def test_bad_tools_are_refused_by_their_name(fields: Any, error: type[InvalidRequest], param: str) -> None:
    with pytest.raises(error) as caught:
        parse_chat(chat(**fields))
    assert (type(caught.value), caught.value.param) == (error, param)
    assert len(caught.value.message) < 250


def test_tools_come_in_bare_lines_and_batch_lines_and_need_a_chat() -> None:
    bare = {"messages": HI, "tools": TOOLS, "tool_choice": "required"}
    box = parse_line(json.dumps(bare).encode(), 1).request.tools
    assert box is not None
    assert box == parse_line(line(body=bare), 1).request.tools
    with pytest.raises(InvalidRequest, match="need messages"):
        parse_line(json.dumps({"prompt": "x", "tools": TOOLS}).encode(), 1)
    with pytest.raises(InvalidRequest, match="need messages"):
        Job(id="a", model="m", prompt="x", tools=box, submitted_at=0.0, expires_at=1.0)


# ---- the conversation so far


def test_past_calls_and_their_outcomes_are_part_of_a_conversation() -> None:
    turns = parse_messages(ASKED)
    calls = turns[1].tool_calls
    assert calls is not None
    assert [(c.id, c.name, c.arguments) for c in calls] == [
        ("c1", "stop", "{}"),
        ("c2", "get_weather", '{"city": "X"}'),
    ]
    assert (turns[1].content, turns[2].tool_call_id, turns[3].content) == (None, "c1", "rain")


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "messages.0.tool_calls.0"),
        ({"role": "assistant", "tool_calls": "x"}, "messages.0.tool_calls"),
        ({"role": "assistant", "content": None}, "messages.0.content"),
        ({"role": "user", "content": "x", "tool_calls": ASKED[1]["tool_calls"]}, "messages.0.tool_calls"),
        ({"role": "user", "content": "x", "tool_call_id": "c"}, "messages.0.tool_call_id"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "messages.0.tool_call_id"),
    ],
)
def test_a_bad_turn_is_named(turn: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_messages([turn])
    assert caught.value.param == param


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}</tool_call>{% endfor %}{% endfor %}"
)
KNOWS = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>"
    'Write <tool_call>{"name": …, "arguments": …}</tool_call>{% endif %}' + CHATML
)
OTHER_FORM = '{% if tools %}{{ tools | tojson }}<tool_call><function=…>"arguments"{% endif %}' + CHATML
REFUSES = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + CHATML


def rendered(tmp_path: Path, template: str, turns: Any, *, tools: Any = TOOLS) -> str:
    tokenizer = Tokenizer(made.write(tmp_path / "m", made.byte_level(), {"chat_template": template}))
    box = toolbox({"tools": tools})
    return tokenizer.conversation(parse_messages(turns), box.functions if box else ())


def test_a_template_that_knows_tools_gets_them_and_arguments_as_objects(tmp_path: Path) -> None:
    prompt = rendered(tmp_path, KNOWS, ASKED)
    assert prompt.startswith("<tools>" + json.dumps(TOOLS[0]))
    assert '"parameters": {"type": "object", "properties": {}}' in prompt, "of a function that takes nothing"
    assert '<|assistant|><tool_call>stop{}</tool_call><tool_call>get_weather{"city": "X"}' in prompt
    assert prompt.endswith("<|tool|>stopped<|tool|>rain")


@pytest.mark.parametrize("template", [CHATML, OTHER_FORM, REFUSES])
def test_any_other_template_gets_tools_in_the_system_message_and_calls_as_text(
    tmp_path: Path, template: str
) -> None:
    for turns, begins in (
        (ASKED, "<|system|>You can call functions"),
        (
            [{"role": "system", "content": "Be brief."}, *ASKED],
            "<|system|>Be brief.\n\nYou can call functions",
        ),
    ):
        prompt = rendered(tmp_path, template, turns)
        assert prompt.startswith(begins)
        assert json.dumps(TOOLS[0]) in prompt
        assert prompt.endswith(
            '<|assistant|><tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "X"}}\n</tool_call>'
            "<|user|><tool_response>\nstopped\n</tool_response>\n<tool_response>\nrain\n</tool_response>"
        )


def test_a_conversation_without_tools_is_rendered_as_ever(tmp_path: Path) -> None:
    assert rendered(tmp_path, CHATML, HI, tools=None) == "<|user|>hi"
    assert "<tools>" not in rendered(tmp_path, KNOWS, HI, tools=None)


# ---- the grammar, and reading calls back


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    settings = {"eos_token": made.CHAT_SPECIALS[1]}
    path = made.write(tmp_path_factory.mktemp("model"), made.byte_level(), settings)
    return Compiler(path, 400)


def walk(compiler: Compiler, grammar: Grammar, seed: int, begin: str = "") -> str:
    """A text of the grammar after ``begin``, drawn as the highest temperature would."""
    matcher, draw = compiler.matcher(grammar), random.Random(seed)
    text = b""
    for byte in begin.encode():
        assert matcher.consume_token(compiler.closer._of_byte[byte]), begin  # pyright: ignore[reportPrivateUsage]
        text += bytes([byte])
    while not matcher.is_stopped():
        allowed = np.unpackbits(
            np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"
        ).nonzero()[0]
        token = int(draw.choice(allowed))
        if token in compiler.eos_token_ids:
            break
        assert matcher.consume_token(token)
        text += compiler.tokens.decode_bytes([token])
    return text.decode()


def box_of(choice: Any, **more: Any) -> Any:
    return toolbox({"tools": TOOLS, "tool_choice": choice, **more})


def test_a_required_call_is_made_and_its_arguments_fit(compiler: Compiler) -> None:
    names: set[str] = set()
    for seed in range(20):
        text = walk(compiler, grammar_of_calls(box_of("required"), None), seed)
        calls = calls_in(text, "job")
        assert written(calls) == text, "nothing but calls"
        for call in calls:
            names.add(call.name)
            schema = WEATHER if call.name == "get_weather" else {"type": "object", "maxProperties": 0}
            jsonschema.validate(json.loads(call.arguments), schema)
    assert names == {"get_weather", "stop"}


def test_a_named_function_is_called_once(compiler: Compiler) -> None:
    grammar = grammar_of_calls(box_of({"type": "function", "function": {"name": "stop"}}), None)
    (call,) = calls_in(walk(compiler, grammar, 0), "job")
    assert (call.name, call.arguments) == ("stop", "{}")


def test_arguments_that_never_end_are_refused_with_the_name_of_the_tool() -> None:
    endless = {"properties": {"again": {"$ref": "#"}}, "required": ["again"]}
    box = toolbox({"tools": [{"type": "function", "function": {"name": "loop", "parameters": endless}}]})
    assert box
    with pytest.raises(InvalidSchema, match="the schema of tool 'loop' cannot be used: '#' leads to itself"):
        grammar_of_calls(box, None)


def test_free_text_is_free_until_the_opening_tag_and_a_call_follows_it(compiler: Compiler) -> None:
    grammar = grammar_of_calls(box_of("auto", parallel_tool_calls=False), None)
    for begin in ("Let me see. <tool_call>", "<tool_call>"):
        text = walk(compiler, grammar, 1, begin)
        (call,) = calls_in(text, "job")
        assert text == begin.removesuffix("<tool_call>") + written([call])
    assert compiler.shortest(grammar) == 0
    matcher = compiler.matcher(grammar)
    assert matcher.consume_tokens([compiler.closer._of_byte[b] for b in b"{<tool_cal> }"])  # pyright: ignore[reportPrivateUsage]
    assert matcher.is_accepting()


def test_an_answer_that_must_fit_a_schema_stands_instead_of_calls(compiler: Compiler) -> None:
    grammar = grammar_of_calls(box_of("auto"), Grammar("json_schema", json.dumps(WEATHER)))
    jsonschema.validate(json.loads(walk(compiler, grammar, 2, "{")), WEATHER)
    assert calls_in(walk(compiler, grammar, 2, "<"), "job")
    with pytest.raises(InvalidSchema):
        grammar_of_calls(box_of("auto"), Grammar("json_schema", "{"))


def test_calls_are_found_with_the_same_ids_each_time_and_text_before_them_is_kept() -> None:
    text = f"Well.\n{CALLED}\n{CALLED}\n<tool_call>\n" + '{"name": "stop", "argum'
    calls = calls_in(text, "job", 1)
    assert [(c.name, json.loads(c.arguments)) for c in calls] == [
        ("get_weather", {"city": "Oslo", "days": 2})
    ] * 2
    assert calls == calls_in(text, "job", 1)
    ids = {call.id for job in "ab" for choice in (0, 1) for call in calls_in(text, job, choice)}
    assert len(ids) == 8
    assert text_before_calls(text) == "Well."
    assert calls_in("no call here", "job") == ()


def test_a_result_with_calls_has_openais_shape() -> None:
    calls = calls_in(CALLED, "job")
    for text, content in ((CALLED, None), (f"Well.\n{CALLED}", "Well.")):
        choice = Choice(text=text, finish_reason=FinishReason.STOP, tool_calls=calls)
        (body,) = response_body(make_result(choices=(choice,)))["choices"]
        assert body["finish_reason"] == "tool_calls"
        assert body["message"]["content"] == content
        assert body["message"]["tool_calls"] == [
            {
                "id": calls[0].id,
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Oslo", "days": 2}'},
            }
        ]
    # What was answered may be sent back as it is, for the next turn.
    (again,) = parse_messages([body["message"]])
    assert again == Message(role="assistant", content="Well.", tool_calls=again.tool_calls)
    cut = Choice(text=CALLED, finish_reason=FinishReason.LENGTH, tool_calls=calls, closed=True)
    assert response_body(make_result(choices=(cut,)))["choices"][0]["finish_reason"] == "length"
