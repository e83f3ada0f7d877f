"""A row checked by the mold of an earlier one is what it is when it is checked for itself."""

from __future__ import annotations

import json
from typing import Any

from gristmill.producer.batch.molds import Made, Molds, made
from gristmill.schemas.batch_lines import parse_fields
from gristmill.schemas.errors import BadInput
from gristmill.schemas.settings import load_settings
from hypothesis import given, settings
from hypothesis import strategies as st

SETTINGS = load_settings()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TURN: Any = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT}),
    st.fixed_dictionaries({"content": TEXT, "role": st.sampled_from(["user", "developer", "elf"])}),
    st.fixed_dictionaries({"role": st.just("user"), "content": st.none() | st.just(5)}),
    st.fixed_dictionaries({"role": st.just("user"), "content": TEXT, "name": TEXT}),
    st.just("hello"),
)
REST: Any = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.sampled_from([1, 1.0, True, 0, None, 8]),
        "temperature": st.sampled_from([0, 0.0, 1, 0.5, "x"]),
        "metadata": st.sampled_from([None, {}, {"a": "b"}, 3]),
        "model": st.sampled_from(["m", "m:a", None]),
        "stop": st.sampled_from(["a", ["a"], []]),
        "seed": st.integers(0, 3),
        "custom_id": st.sampled_from(["", "x", None, 5]),
        "unknown": st.just(1),
    },
)
SAID: Any = st.tuples(
    REST,
    st.fixed_dictionaries(
        {},
        optional={"prompt": TEXT | st.just([1, 2]), "messages": st.lists(TURN, max_size=3) | st.just("hi")},
    ),
).map(lambda parts: parts[0] | parts[1])
LINE: Any = st.one_of(
    SAID,
    st.fixed_dictionaries(
        {
            "custom_id": st.sampled_from(["a", "", None, "x" * 600]),
            "method": st.sampled_from(["POST", "POST", "GET"]),
            "url": st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]),
            "body": SAID | st.just([]),
        },
        optional={"extra": st.just(1)},
    ),
)


def outcome(check: Any) -> Made | tuple[str, str]:
    try:
        return check()
    except BadInput as exc:
        return exc.code, exc.message


@given(st.lists(LINE, min_size=1, max_size=12))
@settings(max_examples=150, deadline=None)
def test_a_mold_makes_what_the_slow_way_makes(lines: list[Any]) -> None:
    molds = Molds(SETTINGS, {"max_tokens": 5})
    for number, fields in enumerate(json.loads(json.dumps(lines)) * 2, 1):
        slow = outcome(lambda: made(parse_fields(fields, number, {"max_tokens": 5}), SETTINGS))  # noqa: B023
        assert outcome(lambda: molds.make(number, fields)) == slow  # noqa: B023
