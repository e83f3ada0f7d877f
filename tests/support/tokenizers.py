"""Small tokenizers of each kind that causal language models come with, trained here in milliseconds."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The mill grinds slowly, yet it grinds exceedingly fine; 3 sacks of grist by 10 o'clock.",
    "def grind(sacks: int) -> list[str]:\n    return ['flour'] * sacks  # done\n",
    "Die Mühle mahlt langsam, aber gründlich. Łódź, naïve café, Ελληνικά, русский текст.",
    "東京の水車は回る。你好，世界！ 한국어 문장입니다. नमस्ते दुनिया",
    '{"name": "grist", "count": 3, "tags": ["a", "b"]}',
]
SPECIALS = ["<unk>", "<s>", "</s>"]
CHAT_SPECIALS = ["<|begin|>", "<|end|>"]


def byte_level() -> Tokenizer:
    """GPT-2's, Llama 3's and Qwen's kind: byte-level BPE, all 256 bytes in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=CHAT_SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["東京タワー"])  # an added token whose characters stand for no bytes
    return tokenizer


def sentencepiece(*, strip: bool = True) -> Tokenizer:
    """Llama 2's and Mistral's kind (``strip``), or Gemma's: BPE with a mark for blanks and tokens for
    single bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS)
    trained.train_from_iterator([text.split("東")[0] for text in CORPUS], trainer)
    model = json.loads(trained.to_str())["model"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    order = SPECIALS + bytes_ + [token for token in model["vocab"] if token not in SPECIALS]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(order)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps if strip else steps[1:])
    last = [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """T5's and XGLM's kind: a Unigram model whose decoder is Metaspace."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's kind, of which the detokeniser knows nothing."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS))
    return tokenizer


def write(path: Path, tokenizer: Tokenizer, settings: dict[str, Any] | None = None, **files: Any) -> Path:
    """A directory with the tokenizer; ``settings`` go into its tokenizer_config.json, ``files`` are further
    JSON files by name without ending."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **(settings or {})}
    for name, content in {"tokenizer_config": settings, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path
