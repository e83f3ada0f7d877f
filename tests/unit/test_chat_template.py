# ruff: noqa: E501  # the lines of templates
"""Chat templates render what transformers renders, inside bounds, and say in words what is wrong."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from gristmill.engine import chat_template
from gristmill.engine.chat_template import ChatTemplate
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.errors import InvalidRequest, ModelInvalid
from jinja2 import TemplateError

from ..support import tokenizers as made

# Written here in the manner of the families' own: the same constructs, the same white space rules.
CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if tools is not none and loop.last %}{{- "tools: " + (tools | map(attribute='function.name') | join(', ')) }}
    {%- endif %}
    {%- if 'tool_calls' in message %}
        {{- message.tool_calls[0].function | tojson }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}
{% for message in messages %}
  {% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('Only user and assistant roles!') }}
  {% endif %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {% endif %}
  {% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
  {% else %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
  {% endif %}
{% endfor %}
"""
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n\\nYou may call:\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- macro shown(content) %}{{ content if content is string else '' }}{%- endmacro %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = shown(message.content) %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query_index %}{{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson(indent=2) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
    {%- if loop.index > 100 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA_3, "mistral": MISTRAL, "qwen": QWEN}

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "q": "<é & 'x'>"}}},
    {"type": "function", "function": {"name": "grind", "description": 'Grind "it"\nfine', "parameters": {}}},
]
CHATS: dict[str, list[dict[str, Any]]] = {
    "one question": [{"role": "user", "content": "  What is a gristmill? <b>&amp;</b> {{ 7 * 7 }}\n"}],
    "three turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nHello 東京 🙂"},
        {"role": "user", "content": "Bye"},
    ],
    "system first": [{"role": "system", "content": "Be terse. "}, {"role": "user", "content": "Hi"}],
    "tools": [
        {"role": "user", "content": "Weather in Zürich?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}],
        },
        {"role": "tool", "content": '{"t": 3}'},
        {"role": "tool", "content": "cold"},
    ],
}
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def rendered_by_transformers(source: str, chat: list[dict[str, Any]], **variables: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template(conversations=[chat], chat_template=source, **variables)[0][0]


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_are_those_of_transformers(template: str, chat: str, prompted: bool) -> None:
    source, messages = TEMPLATES[template], CHATS[chat]
    tools = TOOLS if chat == "tools" else None
    try:
        expected = rendered_by_transformers(
            source, messages, tools=tools, add_generation_prompt=prompted, enable_thinking=False, **NAMED
        )
    except (TemplateError, TypeError):  # this kind of conversation is not for this template
        expected = None
    try:
        ours = ChatTemplate(source, NAMED, "there").render(
            messages, add_generation_prompt=prompted, tools=tools, enable_thinking=False
        )
    except InvalidRequest:
        ours = None
    assert ours == expected


def test_each_template_above_renders_some_chat_and_one_refuses() -> None:
    """Or the comparison could pass with nothing compared."""
    for source in TEMPLATES.values():
        assert ChatTemplate(source, NAMED, "there").render(CHATS["three turns"])
    with pytest.raises(InvalidRequest, match="refuses these messages: Only user and assistant roles!"):
        ChatTemplate(MISTRAL, NAMED, "there").render(CHATS["system first"])
    prompt = ChatTemplate(LLAMA_3, NAMED, "there").render(CHATS["one question"])
    assert f"{datetime.now():%Y}" in prompt  # noqa: DTZ005  # local time, as templates expect


def test_text_parts_are_joined_and_others_refused() -> None:
    template = ChatTemplate(CHATML, {}, "there")
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "user\none\ntwo<|im_end|>" in template.render([{"role": "user", "content": parts}])
    assert "user\none\ntwo<|im_end|>" in template.render([{"role": "user", "content": tuple(parts)}])
    for part in ({"type": "image_url", "image_url": {}}, {"text": "x"}, "text"):
        with pytest.raises(InvalidRequest, match="part"):
            template.render([{"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ messages[0].content.name }}{{ messages[0].content.name.x }}", "needs more"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "more than 50,000 steps",
        ),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
            "more than 50,000 steps",
        ),
        ("{{ 'a' * 10 ** 10 }}", "repeated"),
        ("{{ [0] * 10 ** 10 }}", "repeated"),
        ("{{ 10 ** (10 ** 10) }}", "power"),
        ("{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "more than 32,000,000 characters"),
        ("{{ ''.__class__.__mro__ }}", "not allowed|needs more"),
        ("{{ messages.append(1) }}", "not allowed"),
        ("{{ dict.__init__ }}{{ dict.mro() }}", "needs more|not allowed"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "not allowed"),
        ("{{ namespace(__class__=1) }}", "not allowed"),
        ("{% include 'other' %}", "cannot render|refuses"),
    ],
)
def test_a_template_that_does_what_it_must_not_is_stopped(
    source: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "MAX_STEPS", 50_000)
    with pytest.raises(InvalidRequest, match=says):
        ChatTemplate(source, {}, "there").render([{"role": "user", "content": "Hi"}])


def test_each_rendering_has_its_own_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_STEPS", 10)
    template = ChatTemplate("{% for m in messages %}{% endfor %}", {}, "there")
    for _ in range(3):
        template.render([{"role": "user", "content": "Hi"}] * 8)
    with pytest.raises(InvalidRequest, match="steps"):
        template.render([{"role": "user", "content": "Hi"}] * 11)


def test_messages_nested_without_end_are_refused() -> None:
    nested: Any = "x"
    for _ in range(100):
        nested = [nested]
    with pytest.raises(InvalidRequest, match="nested"):
        ChatTemplate(CHATML, {}, "there").render([{"role": "user", "extra": nested}])


def test_a_template_that_does_not_compile_names_its_file_and_line() -> None:
    with pytest.raises(ModelInvalid, match=r"there: .* line 2"):
        ChatTemplate("a\n{% for %}", {}, "there").render([])
    with pytest.raises(ModelInvalid, match=r"1,000,001 characters"):
        ChatTemplate("a" * 1_000_001, {}, "there")


def test_a_model_without_template_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = Tokenizer(made.write(tmp_path, made.byte_level()))
    with pytest.raises(InvalidRequest, match="no chat template: send a plain prompt"):
        tokenizer.apply_chat_template(CHATS["one question"])


def test_the_jinja_file_goes_before_the_config_and_tools_have_their_own(tmp_path: Path) -> None:
    several = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with {{ bos_token }}"},
    ]
    path = made.write(
        tmp_path, made.byte_level(), {"chat_template": several, "bos_token": {"content": "<|begin|>"}}
    )
    assert Tokenizer(path).apply_chat_template(CHATS["one question"]) == "plain"
    assert Tokenizer(path).apply_chat_template(CHATS["tools"], tools=TOOLS) == "with <|begin|>"
    (path / "chat_template.jinja").write_text("file")
    assert Tokenizer(path).apply_chat_template(CHATS["tools"], tools=TOOLS) == "file"


def test_the_real_model_s_prompt_is_that_of_transformers(smollm2: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ours, theirs = Tokenizer(smollm2), PreTrainedTokenizerFast.from_pretrained(smollm2)
    for chat in ("one question", "three turns", "system first"):
        prompt = ours.apply_chat_template(CHATS[chat])
        expected = theirs.apply_chat_template(CHATS[chat], add_generation_prompt=True, return_dict=False)
        assert ours.encode(prompt, add_special_tokens=False) == expected
