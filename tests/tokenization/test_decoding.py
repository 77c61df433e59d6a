"""Incremental decoding: piece by piece the same text as all at once, and never half a character."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ullm.testing import tiny_tokenizer
from ullm.tokenization.decoding import (
    HELD_TOKENS,
    REPLACEMENT,
    ByteLevelDecoder,
    TokenBytes,
    WindowDecoder,
    byte_alphabet,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SPECIAL = frozenset({0, 1, 2})
WORDS = 50
"""Tokens of the byte-fallback tokenizer that are not single bytes."""
CORPUS = ["the capital of France is Paris, and a capital it is", "Größe façade naïve Ελλάδα Москва 東京"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte_level")
    tiny_tokenizer(folder)
    return Backend.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def byte_fallback():
    """As Llama 2's: blanks are ▁, one is put before the text, unknown characters are byte tokens."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS[:1], trainer)
    content = json.loads(backend.to_str())
    vocab = content["model"]["vocab"]
    assert len(vocab) == WORDS
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    content["model"]["byte_fallback"] = True
    backend = Backend.from_str(json.dumps(content))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


@pytest.fixture(scope="module")
def word_piece():
    """As BERT's: words are separated by blanks that no token holds."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


def pieces(decoder, token_ids):
    return [*(decoder.push([token_id]) for token_id in token_ids), decoder.flush()]


def ids_up_to(limit):
    return st.lists(st.integers(0, limit), max_size=40)


# --- byte-level ---


def test_alphabet_is_that_of_the_library():
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


@given(token_ids=ids_up_to(520), skip=st.booleans())
@settings(max_examples=400)
def test_byte_level_equals_full_decoding_for_any_tokens(byte_level, token_ids, skip):
    """Broken characters and ids beyond the vocabulary included."""
    decoder = ByteLevelDecoder(TokenBytes(byte_level), SPECIAL if skip else frozenset(), ())
    assert "".join(pieces(decoder, token_ids)) == byte_level.decode(token_ids, skip_special_tokens=skip)


@given(text=TEXTS)
def test_byte_level_pieces_are_whole_characters(byte_level, text):
    decoder = ByteLevelDecoder(TokenBytes(byte_level), SPECIAL, ())
    parts = pieces(decoder, byte_level.encode(text, add_special_tokens=False).ids)
    assert "".join(parts) == text
    assert REPLACEMENT in text or not any(REPLACEMENT in part for part in parts)


@given(token_ids=ids_up_to(511), data=st.data())
@settings(max_examples=300)
def test_byte_level_goes_on_in_the_middle(byte_level, token_ids, data):
    cut = data.draw(st.integers(0, len(token_ids)))
    token_bytes = TokenBytes(byte_level)
    first = ByteLevelDecoder(token_bytes, SPECIAL, ())
    begun = first.push(token_ids[:cut])
    second = ByteLevelDecoder(token_bytes, SPECIAL, token_ids[:cut])
    assert begun + "".join(pieces(second, token_ids[cut:])) == byte_level.decode(token_ids)


@given(token_ids=ids_up_to(520), size=st.integers(1, 7))
def test_tokens_may_come_several_at_a_time(byte_level, byte_fallback, token_ids, size):
    batches = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
    for make in (
        lambda: ByteLevelDecoder(TokenBytes(byte_level), SPECIAL, ()),
        lambda: WindowDecoder(byte_fallback, SPECIAL, ()),
    ):
        decoder = make()
        text = "".join(map(decoder.push, batches)) + decoder.flush()
        assert text == "".join(pieces(make(), token_ids))


def test_byte_level_token_bytes(byte_level):
    token_bytes = TokenBytes(byte_level)
    ids = byte_level.encode("naïve 東京 😀", add_special_tokens=False).ids
    assert b"".join(map(token_bytes.__getitem__, ids)).decode() == "naïve 東京 😀"
    assert token_bytes[1] == b"<|im_start|>"
    assert token_bytes[10**6] == b""


def test_added_tokens_with_foreign_letters_stand_for_themselves(byte_level):
    backend = Backend.from_str(byte_level.to_str())
    backend.add_tokens(["two words", "▁東"])
    token_bytes = TokenBytes(backend)
    ids = [backend.token_to_id("two words"), backend.token_to_id("▁東")]
    assert [token_bytes[token_id].decode() for token_id in ids] == ["two words", "▁東"]
    assert "".join(pieces(ByteLevelDecoder(token_bytes, SPECIAL, ()), ids)) == backend.decode(ids)


# --- byte fallback ---


@given(text=TEXTS)
@settings(max_examples=300)
def test_byte_fallback_equals_full_decoding_of_texts(byte_fallback, text):
    ids = byte_fallback.encode(text, add_special_tokens=False).ids
    parts = pieces(WindowDecoder(byte_fallback, SPECIAL, ()), ids)
    assert "".join(parts) == byte_fallback.decode(ids)
    assert REPLACEMENT in text or not any(REPLACEMENT in part for part in parts)


@given(token_ids=ids_up_to(WORDS - 1))
@settings(max_examples=300)
def test_byte_fallback_equals_full_decoding_of_any_words(byte_fallback, token_ids):
    decoder = WindowDecoder(byte_fallback, SPECIAL, ())
    assert "".join(pieces(decoder, token_ids)) == byte_fallback.decode(token_ids)


@given(token_ids=ids_up_to(WORDS + 255))
@settings(max_examples=300)
def test_byte_fallback_survives_any_tokens(byte_fallback, token_ids):
    """Where bytes make no characters, the library's own reading depends on what follows them."""
    text = "".join(pieces(WindowDecoder(byte_fallback, SPECIAL, ()), token_ids))
    words = byte_fallback.decode([token_id for token_id in token_ids if token_id < WORDS])
    kept = iter(text)
    assert all(character in kept for character in words.strip())


def test_blank_between_prompt_and_text_is_kept(byte_fallback):
    prompt, rest = (byte_fallback.encode(text).ids for text in ("the capital is", "Paris"))
    assert "".join(pieces(WindowDecoder(byte_fallback, SPECIAL, prompt), rest)) == " Paris"
    assert "".join(pieces(WindowDecoder(byte_fallback, SPECIAL, ()), rest)) == "Paris"
    assert "".join(pieces(WindowDecoder(byte_fallback, SPECIAL, [1]), [1, *rest])) == "Paris"


def test_character_in_bytes_comes_whole(byte_fallback):
    ids = byte_fallback.encode("a😀b😀").ids
    parts = pieces(WindowDecoder(byte_fallback, SPECIAL, ()), ids)
    assert [part for part in parts if part] == ["a", "😀", "b", "😀"]


def test_unfinished_character_comes_out_at_the_end(byte_fallback):
    ids = byte_fallback.encode("a😀").ids[:-1]
    assert pieces(WindowDecoder(byte_fallback, SPECIAL, ()), ids)[-1] == REPLACEMENT * 3


def test_endless_broken_bytes_are_not_held_for_ever(byte_fallback):
    bad = byte_fallback.token_to_id("<0xFF>")
    decoder = WindowDecoder(byte_fallback, SPECIAL, ())
    parts = [decoder.push([bad]) for _ in range(10 * HELD_TOKENS)]
    assert "".join(parts) == REPLACEMENT * 10 * HELD_TOKENS


def test_byte_fallback_token_bytes(byte_fallback):
    token_bytes = TokenBytes(byte_fallback)
    assert token_bytes[byte_fallback.token_to_id("<0xFF>")] == b"\xff"
    ids = byte_fallback.encode("the 😀").ids
    assert b"".join(map(token_bytes.__getitem__, ids)).decode() == " the 😀"


# --- others ---


@given(token_ids=ids_up_to(119), data=st.data())
def test_words_are_separated(word_piece, token_ids, data):
    cut = data.draw(st.integers(0, len(token_ids)))
    decoder = WindowDecoder(word_piece, frozenset(), ())
    text = "".join(pieces(decoder, token_ids))
    assert text == word_piece.decode(token_ids, skip_special_tokens=False)
    rest = "".join(pieces(WindowDecoder(word_piece, frozenset(), token_ids[:cut]), token_ids[cut:]))
    assert text.endswith(rest)


def test_tokenizer_without_a_decoder():
    backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert "".join(pieces(WindowDecoder(backend, frozenset(), ()), [0, 1, 0])) == backend.decode([0, 1, 0])
    assert TokenBytes(backend)[1] == b"b"
