"""A GGUF file's vocabulary → tokenizer.json and tokenizer_config.json.

Two kinds: byte-level BPE, of whose pre-tokenizer the file has only a name, and SentencePiece's BPE, whose
merges are worked out from the pieces' scores.
"""

from pathlib import Path
from typing import Any

from ..schemas.errors import ModelInvalid
from ..schemas.gguf import Metadata

BYTE_LEVEL: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
DIGITS: dict[str, Any] = {"type": "Digits", "individual_digits": True}
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _split(pattern: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _sequence(cut, BYTE_LEVEL | {"use_regex": False})


# tokenizer.ggml.pre -> pre-tokenizers, in tokenizer.json's own form. GGUF keeps only the name. "smollm"
# splits each digit off before the byte-level pass; without it blanks before a digit would be cut elsewhere
# than in training.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": BYTE_LEVEL,
    "phi-2": BYTE_LEVEL,
    "smollm": _sequence(DIGITS, BYTE_LEVEL),
    "starcoder": _sequence(DIGITS, BYTE_LEVEL),
    "refact": _sequence(DIGITS, BYTE_LEVEL),
    "llama-bpe": _split(rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"),
    "qwen2": _split(rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"),
}
NORMALIZERS: dict[str, dict[str, Any]] = {"qwen2": {"type": "NFC"}}
WHOLE_WORDS = ("llama-bpe",)
"""A word that is a token is taken before any merge."""
NORMAL_TOKEN, UNKNOWN_TOKEN, CONTROL_TOKEN, USER_TOKEN = 1, 2, 3, 4
SPACE = "▁"


def tokenizer_of(path: Path, metadata: Metadata) -> dict[str, Any]:
    """``tokenizer.json``. Raises ModelInvalid naming the kind that is not known."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(path, metadata)
    if kind == "llama":
        return _sentencepiece(metadata)
    raise ModelInvalid(
        f"{path}: tokenizer {kind!r} is not supported, gpt2 and llama are; put a tokenizer.json beside it"
    )


def tokenizer_config_of(metadata: Metadata) -> dict[str, Any]:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    named: dict[str, Any] = {
        f"{name}_token": tokens[metadata[key]]
        for name, key in (
            ("bos", "tokenizer.ggml.bos_token_id"),
            ("eos", "tokenizer.ggml.eos_token_id"),
            ("pad", "tokenizer.ggml.padding_token_id"),
            ("unk", "tokenizer.ggml.unknown_token_id"),
        )
        if key in metadata
    }
    template = metadata.get("tokenizer.chat_template")
    rest: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    return rest | named | ({} if template is None else {"chat_template": template})


def _byte_level(path: Path, metadata: Metadata) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in PRE_TOKENIZERS:
        raise ModelInvalid(
            f"{path}: pre-tokenizer {pre!r} is not known, {', '.join(PRE_TOKENIZERS)} are; "
            "put its tokenizer.json beside the file"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    model = _bpe(
        tokens,
        [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        ignore_merges=pre in WHOLE_WORDS,
    )
    return _file(
        metadata,
        model,
        normalizer=NORMALIZERS.get(pre),
        pre_tokenizer=PRE_TOKENIZERS[pre],
        decoder=BYTE_LEVEL | {"add_prefix_space": True},
        adds_bos=False,
    )


def _sentencepiece(metadata: Metadata) -> dict[str, Any]:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    unknown: int = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    blanks: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        blanks = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, blanks]}
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = _bpe(
        tokens,
        _merges(tokens, metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    decoder = {"type": "Sequence", "decoders": back}
    return _file(metadata, model, normalizer=blanks, pre_tokenizer=None, decoder=decoder, adds_bos=True)


def _merges(tokens: list[str], scores: list[float], types: list[int]) -> list[list[str]]:
    """Every way to put a piece together of two, the best pieces first, as SentencePiece goes about it."""
    known = {token: index for index, token in enumerate(tokens)}
    found = [
        (-scores[index], index, known[token[:at]], known[token[at:]], token[:at], token[at:])
        for index, token in enumerate(tokens)
        if types[index] in (NORMAL_TOKEN, USER_TOKEN)
        for at in range(1, len(token))
        if token[:at] in known and token[at:] in known
    ]
    return [[left, right] for *_, left, right in sorted(found)]


def _bpe(tokens: list[str], merges: list[list[str]], **fields: Any) -> dict[str, Any]:
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges,
    }
    return model | fields


def _file(metadata: Metadata, model: dict[str, Any], *, adds_bos: bool, **parts: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(metadata),
        "post_processor": _post_processor(metadata, adds_bos),
        "model": model,
        **parts,
    }


def _added(metadata: Metadata) -> list[dict[str, Any]]:
    """Tokens that text is cut around."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [NORMAL_TOKEN] * len(tokens)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": token, **flags, "special": kind != USER_TOKEN}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN_TOKEN, CONTROL_TOKEN, USER_TOKEN)
    ]


def _post_processor(metadata: Metadata, adds_bos: bool) -> dict[str, Any] | None:
    """What is put around a text; ``adds_bos``: where the file does not say."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    around: dict[str, tuple[str, int] | None] = {}
    for name, default in (("bos", adds_bos), ("eos", False)):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        wanted = metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        around[name] = (tokens[index], index) if wanted and index is not None else None
    if not any(around.values()):
        return None

    def template(*sequences: str) -> list[dict[str, Any]]:
        single: list[dict[str, Any]] = []
        for type_id, sequence in enumerate(sequences):
            inner = {"Sequence": {"id": sequence, "type_id": type_id}}
            for place in (around["bos"], inner, around["eos"]):
                if isinstance(place, tuple):
                    single.append({"SpecialToken": {"id": place[0], "type_id": type_id}})
                elif place is not None:
                    single.append(place)
        return single

    special = {
        each[0]: {"id": each[0], "ids": [each[1]], "tokens": [each[0]]} for each in around.values() if each
    }
    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": special,
    }
