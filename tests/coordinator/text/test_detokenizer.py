import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from coordinator.text.decoding import decoder_steps
from coordinator.text.detokenizer import Detokenizer
from protos.errors import ModelError


def detokenizer(tokenizer: Tokenizer) -> Detokenizer:
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    steps = decoder_steps(json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None)

    def spelling(token_id: int) -> str | None:
        token = tokenizer.id_to_token(token_id)
        return None if token in special else token

    return Detokenizer(spelling, steps())


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = detokenizer(tokenizer)
    return [*map(stream.push, ids), stream.flush()]


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_random_ids_decode_as_the_library_decodes_them(any_tokenizer: Tokenizer, data: st.DataObject) -> None:
    size = any_tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=40))
    assert "".join(pieces(any_tokenizer, ids)) == any_tokenizer.decode(ids, skip_special_tokens=True)


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_encoded_text_streams_whole_characters(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text).ids
    *emitted, rest = pieces(any_tokenizer, ids)
    whole = any_tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join([*emitted, rest]) == whole
    # A character that the text does not have can only be half of one.
    assert {"\ufffd"} & set("".join(emitted)) <= set(whole)


@given(data=st.binary(max_size=24))
@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("form", ["byte_level", "byte_fallback"])
def test_any_bytes_decode_as_the_library_decodes_them(form: str, data: bytes) -> None:
    if form == "byte_level":
        vocab = {f"{c}": n for n, c in enumerate(_byte_characters())}
        decoder: decoders.Decoder = decoders.ByteLevel()
    else:
        vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
        decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoder
    assert "".join(pieces(tokenizer, list(data))) == tokenizer.decode(list(data))


def _byte_characters() -> list[str]:
    from coordinator.text.decoding import _BYTES  # noqa: PLC0415

    return sorted(_BYTES, key=_BYTES.__getitem__)


def test_a_character_is_emitted_with_its_last_byte() -> None:
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    assert pieces(tokenizer, list("a🎉b".encode())) == ["a", "", "", "", "🎉", "b", ""]


def test_a_run_of_byte_tokens_is_emitted_with_the_token_after_it() -> None:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁x": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert pieces(tokenizer, [*"é".encode(), 256, 0xFF]) == ["", "", "é x", "", "\ufffd"]


@pytest.mark.parametrize("kind", ["CTC", "Strip"])
def test_a_decoder_that_cannot_be_streamed_is_refused_by_name(kind: str) -> None:
    part = json.loads({"CTC": decoders.CTC(), "Strip": decoders.Strip(" ", 0, 1)}[kind].__getstate__())
    with pytest.raises(ModelError, match=kind):
        decoder_steps({"type": "Sequence", "decoders": [{"type": "Fuse"}, part]})
