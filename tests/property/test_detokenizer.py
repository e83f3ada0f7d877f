"""Detokenizer: however ids are cut, the pieces join to the tokenizer's own decode, and no piece is half a
character."""

from pathlib import Path

import pytest
from gristmill.engine.detokenizer import Detokenizer
from gristmill.engine.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from ..support import tokenizers as made

MAKERS = {
    "byte level": made.byte_level,
    "sentencepiece": made.sentencepiece,
    "sentencepiece without strip": lambda: made.sentencepiece(strip=False),
    "metaspace": made.metaspace,
}
TEXTS = st.text(
    st.characters(codec="utf-8") | st.sampled_from("aé東🙂 \n▁�\u0301\u200d👩👧🏽 ḱ0"), max_size=30
)


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(made.write(tmp_path_factory.mktemp("tokenizer"), MAKERS[request.param]()))


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


def check(tokenizer: Tokenizer, ids: list[int], data: st.DataObject) -> str:
    """Push ``ids`` cut at random; assert the law; return the text."""
    skip = data.draw(st.booleans(), "skip_special_tokens")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids)), "cuts"))
    detokenizer = Detokenizer(tokenizer, skip)
    whole, shown = tokenizer.decode(ids, skip), ""
    for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        shown += detokenizer.push(ids[begin:end])
        assert whole.startswith(shown), "showed what is not in the final text"
    shown += detokenizer.finish()
    assert shown == whole
    return shown


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_ids_in_any_pieces_give_the_text_of_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Ids at random: invalid bytes, special tokens and ids beyond the vocabulary among them."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40), "ids")
    check(tokenizer, ids, data)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_bytes_in_any_pieces_give_the_text_of_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Only tokens of one byte each, where characters are split most."""
    single = [token for token in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(token)) == 1]
    check(tokenizer, data.draw(st.lists(st.sampled_from(single), max_size=24), "ids"), data)


@given(data=st.data(), text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_from_the_real_model_s_tokens(
    real: Tokenizer, data: st.DataObject, text: str
) -> None:
    """But for a few control characters, which this model's vocabulary does not have."""
    known = "".join(char for char in text if real.decode(real.encode(char)) == char)
    assert check(real, real.encode(known), data) == known


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_ids_of_the_real_vocabulary(real: Tokenizer, data: st.DataObject) -> None:
    check(real, data.draw(st.lists(st.integers(0, real.vocab_size + 3), max_size=30), "ids"), data)


@given(data=st.data(), words=st.lists(st.sampled_from(" ".join(made.CORPUS).split()), max_size=20))
@settings(max_examples=100, deadline=None)
def test_an_unknown_kind_of_decoder_gives_the_text_of_decode(
    word_piece: Tokenizer, data: st.DataObject, words: list[str]
) -> None:
    check(word_piece, word_piece.encode(" ".join(words)), data)


@pytest.fixture(scope="module")
def word_piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(made.write(tmp_path_factory.mktemp("tokenizer"), made.word_piece()))


def test_a_family_emoji_of_many_tokens_appears_character_by_character(real: Tokenizer) -> None:
    detokenizer = Detokenizer(real)
    pieces = [detokenizer.push([token]) for token in real.encode("👩‍👩‍👧🏽 e\u0301")]
    assert "".join(pieces) == "👩‍👩‍👧🏽 e\u0301"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces


def test_bytes_that_never_become_a_character_are_shown_at_the_end(real: Tokenizer) -> None:
    first = real.encode("東")[0]
    detokenizer = Detokenizer(real)
    assert (detokenizer.push([first]), detokenizer.finish()) == ("", "\ufffd")


def test_a_completion_keeps_its_first_blank_and_an_answer_drops_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer(made.write(tmp_path, made.sentencepiece()))
    ids = tokenizer.encode("slowly", add_special_tokens=False)
    answer, completion = Detokenizer(tokenizer), Detokenizer(tokenizer, continues=True)
    assert answer.push(ids) + answer.finish() == "slowly"
    assert completion.push(ids) + completion.finish() == " slowly"
