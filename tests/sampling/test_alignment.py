"""Tokens to steps: with canonical and non-canonical token sequences, and characters cut in two."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.io.records import StepSpan
from ssrctl.sampling.alignment import step_of_tokens, token_starts
from ssrctl.text.segment import segment


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def starts_by_bytes(tokenizer, ids, text):
    """Start of every token by counting bytes: each byte-level token is a known string of bytes.

    A token that begins inside a character starts where that character does.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {shown: byte for byte, shown in bytes_to_unicode().items()}
    special = set(tokenizer.all_special_ids)
    character_of_byte = [place for place, character in enumerate(text) for _ in character.encode()]
    starts, count = [], 0
    for token in ids:
        starts.append(character_of_byte[count] if count < len(character_of_byte) else len(text))
        if token not in special:
            count += len(bytes(byte_of[shown] for shown in tokenizer.convert_ids_to_tokens(token)))
    assert count == len(character_of_byte)
    return starts


TEXTS = [
    "12+30=42\n42*2=84\n#### 84",
    "½ plus ¼ ergibt ¾.\n次に、三を足す。答えは七です。\n#### 7",
    "🙂🚀 déjà vu\n\nthe answer is 🙂\n",
    "a�b\n�",
    " ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_starts_agree_with_a_count_of_bytes(bpe_tokenizer, text):
    ids = encode(bpe_tokenizer, text)
    assert token_starts(bpe_tokenizer, ids, text) == starts_by_bytes(bpe_tokenizer, ids, text)


@pytest.mark.parametrize("text", TEXTS[:3])
def test_starts_of_a_non_canonical_sequence_agree_with_a_count_of_bytes(bpe_tokenizer, text):
    # One token per byte decodes to the same text, but the tokenizer would never cut it so.
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    shown = bytes_to_unicode()
    ids = [bpe_tokenizer.convert_tokens_to_ids(shown[byte]) for byte in text.encode()]
    assert decode(bpe_tokenizer, ids) == text
    assert ids != encode(bpe_tokenizer, text)
    assert token_starts(bpe_tokenizer, ids, text) == starts_by_bytes(bpe_tokenizer, ids, text)


def test_special_tokens_start_where_the_text_before_them_ends(bpe_tokenizer):
    end = bpe_tokenizer.eos_token_id
    first, second = encode(bpe_tokenizer, "12+30=42\n"), encode(bpe_tokenizer, "#### 84")
    ids = [*first, end, *second, end]
    text = decode(bpe_tokenizer, ids)
    starts = token_starts(bpe_tokenizer, ids, text)
    assert starts[len(first)] == 9
    assert starts[-1] == len(text) == 16


@given(seed=st.integers(0, 10**6), length=st.integers(0, 60))
def test_every_token_is_in_exactly_one_step(bpe_tokenizer, seed, length):
    """Sampled tokens are arbitrary: broken characters, special tokens in the middle, no canonical form."""
    rng = random.Random(seed)
    ids = [rng.randrange(len(bpe_tokenizer)) for _ in range(length)]
    text = decode(bpe_tokenizer, ids)
    starts = token_starts(bpe_tokenizer, ids, text)
    assert len(starts) == length
    assert starts == sorted(starts)
    assert all(0 <= start <= len(text) for start in starts)
    steps = segment(text)
    owners = step_of_tokens(starts, steps)
    assert len(owners) == length
    assert owners == sorted(owners)
    assert set(owners) <= set(range(len(steps))) if steps else set(owners) <= {-1}
    for owner, start in zip(owners, starts, strict=True):
        if steps and start < len(text):
            assert steps[owner].start <= start < steps[owner].end


@pytest.fixture(scope="module")
def space_tokenizer():
    """As SentencePiece does it: a space before each word, dropped before the first, and a token per odd byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<pad>", "<end>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    made.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


@pytest.mark.parametrize("name", ["bpe_tokenizer", "space_tokenizer"])
@pytest.mark.parametrize("span", [(0, 1.0), (3, 0.7)])  # all tokens, and mostly single bytes
def test_starts_agree_with_decoding_every_prefix(request, name, span):
    tokenizer = request.getfixturevalue(name)
    rng = random.Random(0)
    for _ in range(100):
        ids = [rng.randrange(span[0], int(span[1] * len(tokenizer))) for _ in range(rng.randrange(50))]
        text = decode(tokenizer, ids)
        expected = [0]
        for count in range(1, len(ids)):
            prefix = decode(tokenizer, ids[:count]).rstrip("\ufffd")
            expected.append(min(len(text), max(expected[-1], len(prefix))))
        assert token_starts(tokenizer, ids, text) == expected[: len(ids)]


def test_every_step_of_a_canonical_text_owns_the_tokens_that_start_in_it(bpe_tokenizer):
    text = "12+30=42\n42*2=84\n#### 84"
    ids = encode(bpe_tokenizer, text)
    owners = step_of_tokens(token_starts(bpe_tokenizer, ids, text), segment(text))
    pieces = [
        decode(bpe_tokenizer, [token for token, owner in zip(ids, owners, strict=True) if owner == i]) for i in range(3)
    ]
    # No token of this tokenizer reaches over a line break here, so the pieces are the lines.
    assert pieces == ["12+30=42\n", "42*2=84\n", "#### 84"]


def test_a_token_belongs_to_the_step_it_starts_in():
    steps = [StepSpan(start=0, end=3), StepSpan(start=3, end=4), StepSpan(start=4, end=9, kind="final")]
    assert step_of_tokens([0, 2, 3, 4, 8, 9], steps) == [0, 0, 1, 2, 2, 2]
    # A token that starts at 2 and ends beyond the one-character step leaves that step without tokens.
    assert step_of_tokens([0, 2, 5], steps) == [0, 0, 2]
    assert step_of_tokens([0, 0], []) == [-1, -1]
    assert step_of_tokens([], steps) == []
