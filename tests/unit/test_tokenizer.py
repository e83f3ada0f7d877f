"""Tokenizer: the same ids and texts as transformers, from files of every kind, and clear errors for bad
ones."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.errors import InvalidRequest, ModelInvalid, ModelNotFound

from ..support import tokenizers as made

TEXTS = [
    "",
    " ",
    "Hello, world!  It's 3 pm\nin Zürich — 東京 🙂",
    "def f(x):\n\treturn 12345 * x  # 0.5\n\n\n",
    "👩‍👩‍👧‍👦 e\u0301 \u200d ﷽ 𝔘𝔫𝔦 \x00 \r\n",
    "<s>a</s> <|begin|>b<|end|>  <0x41>",
    "नमस्ते " * 50,
]
BOS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MAKERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "byte level": (made.byte_level, {}),
    "byte level, bos and eos in the config": (
        made.byte_level,
        {"bos_token": "<|begin|>", "eos_token": "<|end|>", "add_bos_token": True, "add_eos_token": True},
    ),
    "sentencepiece": (made.sentencepiece, BOS),
    "sentencepiece, no bos in the config": (made.sentencepiece, {**BOS, "add_bos_token": False}),
    "sentencepiece without strip": (lambda: made.sentencepiece(strip=False), BOS),
    "more tokens in the config": (
        made.byte_level,
        {
            "eos_token": {"__type": "AddedToken", "content": "<|later|>", "special": True},
            "added_tokens_decoder": {"500": {"content": "<|later|>", "special": True, "normalized": False}},
        },
    ),
    "metaspace": (made.metaspace, BOS),
    "word piece": (made.word_piece, BOS),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_ids_and_texts_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import PreTrainedTokenizerFast

    make, config = MAKERS[kind]
    path = made.write(tmp_path, make(), config)
    ours, theirs = Tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path)
    assert set(ours.special_ids) == {
        index for index, token in theirs.added_tokens_decoder.items() if token.special
    }
    assert ours.vocab_size == len(theirs)
    for text in [*TEXTS, "a<|later|>b"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_the_real_model_s_tokenizer_reads_back_what_it_wrote(smollm2: Path) -> None:
    tokenizer = Tokenizer(smollm2)
    assert (tokenizer.vocab_size, tokenizer.max_length) == (49_152, 8192)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize("strip", [True, False])
def test_bytes_of_sentencepiece_tokens_join_to_the_text(tmp_path: Path, strip: bool) -> None:
    tokenizer = Tokenizer(made.write(tmp_path, made.sentencepiece(strip=strip)))
    text = "slowly ü 東 🙂\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert any(tokenizer.token_bytes(token) == b"\n" for token in ids)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == (" " if strip else "") + text


def test_an_id_that_the_vocabulary_does_not_have_is_no_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(made.write(tmp_path, made.byte_level()))
    assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""
    assert tokenizer.decode([tokenizer.vocab_size + 7]) == ""


def test_end_tokens_come_from_all_three_files(tmp_path: Path) -> None:
    path = made.write(
        tmp_path,
        made.byte_level(),
        {"eos_token": "<|end|>"},
        config={"eos_token_id": 5},
        generation_config={"eos_token_id": [7, 1]},
    )
    assert Tokenizer(path).eos_token_ids == (7, 1, 5)


def test_a_model_without_any_end_token_has_none(tmp_path: Path) -> None:
    path = made.write(tmp_path, made.byte_level(), config={"eos_token_id": None})
    assert Tokenizer(path).eos_token_ids == ()


def test_half_a_surrogate_pair_is_refused_with_a_reason(smollm2: Path) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        Tokenizer(smollm2).encode(json.loads('"a\\ud83d b"'))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"version": "1.0"'),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", "not json"),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str | bytes) -> None:
    path = made.write(tmp_path, made.byte_level())
    (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelInvalid, match=name):
        Tokenizer(path)


def test_a_missing_directory_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such directory"):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(ModelInvalid, match=r"tokenizer\.json: missing"):
        Tokenizer(tmp_path)


def test_neither_torch_nor_transformers_is_imported(smollm2: Path) -> None:
    script = (
        "import sys; from gristmill.engine.detokenizer import Detokenizer\n"
        "from gristmill.engine import stopping; from gristmill.engine.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer(sys.argv[1]); Detokenizer(tokenizer).push([1])\n"
        "tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}])\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, str(smollm2)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
