import json

import numpy as np
import pytest
import torch

from wellposed.batches import TextBatch
from wellposed.data import text
from wellposed.data.text import (
    Corpus,
    GivenMasks,
    PaddedTexts,
    PromptedText,
    TextDataset,
    TokenBlocks,
    counter_uniforms,
    pack,
    pad_texts,
)
from wellposed.data.tokenizers import byte_tokenizer, character_tokenizer, train_bpe

TEXTS = ["To be, or not to be:\n", "", "that is the question. ", "Ötzi <|eos|> 日本", "x"] * 7
KINDS = ("prefix", "suffix", "around", "spans", "scattered")


def corpus(texts=TEXTS, identity="speech"):
    return Corpus(name="speech", read=lambda: iter(texts), identity=identity)


def blocks(n=50, dtype=torch.uint8, **kwargs):
    settings = {"block_length": 8, "vocab_size": 64, **kwargs}
    return TokenBlocks(name="numbers", tokens=torch.arange(n).to(dtype), **settings)


def body(batch, dataset):
    """The stream's part of every block."""
    first = int(dataset.bos is not None)
    return batch.tokens[:, first : first + dataset.body_length]


@pytest.fixture(scope="module")
def bounded():
    return byte_tokenizer(special_tokens=("bos", "eos", "pad"))


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 280, special_tokens=("bos", "eos"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("ends", [(None, None), (60, None), (None, 61), (60, 61)])
def test_blocks_are_the_stream(dtype, ends):
    bos, eos = ends
    dataset = blocks(dtype=dtype, bos=bos, eos=eos)
    batch = dataset.batch(range(len(dataset)))
    stream = body(batch, dataset).flatten()
    assert stream.tolist() == list(range(50 // dataset.body_length * dataset.body_length))
    assert batch.tokens.shape == (len(dataset), 8)
    assert batch.tokens.dtype == torch.int64
    assert bos is None or batch.tokens[:, 0].tolist() == [bos] * len(dataset)
    assert eos is None or batch.tokens[:, -1].tolist() == [eos] * len(dataset)
    assert batch.given is None
    assert batch.valid is None


@pytest.mark.parametrize("wrap", ["bos_eos", "eos", "plain"])
@pytest.mark.parametrize("kind", ["bytes", "pairs"])
def test_packing_loses_nothing_but_the_end(wrap, kind, bounded, bpe):
    tokenizer = {"bytes": bounded, "pairs": bpe}[kind]
    dataset = pack(TEXTS, tokenizer, 16, wrap=wrap)
    stream = body(dataset.batch(range(len(dataset))), dataset).flatten().tolist()
    end = [] if wrap == "plain" else [tokenizer.eos_token_id]
    expected = [token for text in TEXTS for token in tokenizer.encode(text) + end]
    assert stream == expected[: len(stream)]
    assert len(expected) - len(stream) < dataset.body_length
    assert (dataset.bos, dataset.eos) == (
        (tokenizer.bos_token_id, tokenizer.eos_token_id) if wrap == "bos_eos" else (None, None)
    )
    assert dataset.vocab_size == len(tokenizer)
    assert dataset.tokens.dtype == torch.uint16


def test_packed_bytes_are_the_text():
    dataset = pack(TEXTS, byte_tokenizer(), 1, wrap="plain")
    assert dataset.tokens.dtype == torch.uint8
    assert bytes(dataset.batch(range(len(dataset))).tokens.flatten().tolist()).decode() == "".join(TEXTS)


def test_texts_are_read_a_few_at_a_time(monkeypatch, bounded):
    whole = pack(TEXTS, bounded, 16)
    monkeypatch.setattr(text, "CHARACTERS_AT_ONCE", 30)
    assert torch.equal(pack(TEXTS, bounded, 16).tokens, whole.tokens)
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield "ten bytes."

    pieces = text._streamed(endless(), bounded, None)
    for _ in range(3):
        count, tokens = next(pieces)
        assert len(tokens) == 10 * count
    assert taken == 9, "three texts fill thirty characters"


def test_text_never_yields_a_special_token(bounded):
    dataset = pack(["<|eos|><|bos|>"] * 3, bounded, 4, wrap="plain")
    assert not torch.isin(dataset.tokens.long(), torch.tensor(bounded.all_special_ids)).any()


def test_settings_of_earlier_calls_do_not_matter(bounded):
    before = pack(TEXTS, bounded, 16)
    bounded(TEXTS[0], truncation=True, max_length=2)
    assert torch.equal(pack(TEXTS, bounded, 16).tokens, before.tokens)


def test_boundaries_of_a_bert():
    tokenizer = character_tokenizer("ab")
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    dataset = pack(["ab", "ba"], tokenizer, 5)
    assert dataset.batch([0, 1]).tokens.tolist() == [[3, 0, 1, 4, 4], [3, 1, 0, 4, 4]]


def test_batch_follows_its_indices_alone():
    for dataset in (blocks(), blocks(shifted=True, seed=2), PromptedText(dataset=blocks())):
        order = [3, 0, 3, 2]
        together = dataset.batch(order, epoch=5)
        alone = [dataset.batch(torch.tensor([i]), epoch=5) for i in order]
        assert torch.equal(together.tokens, torch.cat([batch.tokens for batch in alone]))
        if together.given is not None:
            assert torch.equal(together.given, torch.cat([batch.given for batch in alone]))


def test_an_epoch_shifts_all_blocks_alike():
    dataset = blocks(n=60, shifted=True, bos=63)
    offsets = set()
    for epoch in range(40):
        stream = body(dataset.batch(range(len(dataset)), epoch=epoch), dataset).flatten()
        assert torch.equal(stream, torch.arange(len(stream)) + stream[0])
        offsets.add(int(stream[0]))
    assert offsets == set(range(7)), "every offset comes up, within the stream"
    assert torch.equal(blocks().batch([0], epoch=1).tokens, blocks().batch([0], epoch=2).tokens)


def test_split_parts_share_nothing():
    for shifted in (False, True):
        dataset = blocks(n=64, shifted=shifted)
        first, last = dataset.split(0.25)
        seen = [
            {
                token
                for epoch in range(9)
                for token in part.batch(range(len(part)), epoch=epoch).tokens.flatten().tolist()
            }
            for part in (first, last)
        ]
        assert not seen[0] & seen[1]
        assert shifted or (seen[0], seen[1]) == (set(range(48)), set(range(48, 64)))
        assert len({dataset.fingerprint(), first.fingerprint(), last.fingerprint()}) == 3
    with pytest.raises(ValueError, match="nothing on one side"):
        dataset.split(0.01)


def test_fingerprint_sees_what_a_batch_depends_on(bounded):
    base = blocks()
    others = [
        blocks(n=51),
        blocks(dtype=torch.int32),
        blocks(block_length=7),
        blocks(vocab_size=65),
        blocks(bos=1),
        blocks(eos=1),
        blocks(shifted=True),
        blocks(shifted=True, seed=1),
        PromptedText(dataset=base),
        PromptedText(dataset=base, masks=GivenMasks(seed=1)),
        PromptedText(dataset=blocks(n=51)),
        pad_texts(TEXTS, bounded, 16),
        pad_texts(TEXTS, bounded, 17),
        pad_texts(TEXTS, bounded, 16, wrap="plain"),
        pad_texts(TEXTS[1:], bounded, 16),
    ]
    assert len({base.fingerprint(), *(dataset.fingerprint() for dataset in others)}) == len(others) + 1
    assert blocks().fingerprint() == blocks(seed=1).fingerprint(), "a seed without shifts changes nothing"
    changed = torch.arange(50).to(torch.uint8)
    changed[33] += 1
    assert base.fingerprint() != TokenBlocks(name="n", tokens=changed, block_length=8, vocab_size=64).fingerprint()
    assert all(isinstance(dataset, TextDataset) for dataset in [base, *others])


def test_on_disk_as_in_memory(tmp_path, bounded):
    in_memory = pack(corpus(), bounded, 16, shifted=True, seed=3)
    on_disk = pack(corpus(), bounded, 16, shifted=True, seed=3, folder=tmp_path / "a" / "speech")
    assert on_disk.content_hash is not None
    assert on_disk.fingerprint() == in_memory.fingerprint()
    assert on_disk.name == "speech"
    for epoch in range(2):
        ours, theirs = (data.batch(range(len(in_memory)), epoch=epoch).tokens for data in (in_memory, on_disk))
        assert torch.equal(ours, theirs)
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "speech" / "tokens.npy"), in_memory.tokens.numpy())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["speech"], "nothing is left over"
    first, last = on_disk.split(0.2)
    assert first.fingerprint() != last.fingerprint()


def test_a_folder_serves_every_block_length_and_is_not_written_again(tmp_path, bounded):
    def once():
        yield from TEXTS
        texts.clear()

    texts = [1]
    speech = Corpus(name="speech", read=lambda: once() if texts else pytest.fail("read again"), identity="speech")
    long = pack(speech, bounded, 32, folder=tmp_path / "f")
    short = pack(speech, bounded, 8, wrap="eos", folder=tmp_path / "f")
    assert torch.equal(long.tokens, short.tokens)
    assert (long.block_length, short.block_length) == (32, 8)


def test_writing_goes_on_where_it_was_cut_short(tmp_path, bounded, monkeypatch):
    monkeypatch.setattr(text, "CHARACTERS_AT_ONCE", 10)
    monkeypatch.setattr(text, "TOKENS_BETWEEN_NOTES", 40)
    folder, partial = tmp_path / "speech", tmp_path / ".speech.partial"

    def broken():
        for number, line in enumerate(TEXTS):
            if number == 20:
                raise OSError("the network is gone")
            yield line

    failing = Corpus(name="speech", read=broken, identity="speech")
    with pytest.raises(OSError, match="network is gone"):
        pack(failing, bounded, 16, folder=folder)
    assert not folder.exists()
    note = json.loads((partial / "progress.json").read_text())
    assert 0 < note["documents"] < 20
    written = (partial / "tokens.npy").read_bytes()[128 : 128 + 2 * note["tokens"]]
    # Whatever was written after the note is not trusted, and what was noted is not tokenized again.
    with (partial / "tokens.npy").open("ab") as file:
        file.write(b"rubbish")
    encoded = []
    original = text._encoded
    monkeypatch.setattr(text, "_encoded", lambda texts, tokenizer: original(tee(texts, encoded), tokenizer))
    dataset = pack(corpus(), bounded, 16, folder=folder)
    assert encoded == TEXTS[note["documents"] :]
    assert (folder / "tokens.npy").read_bytes()[128:].startswith(written)
    assert not partial.exists()
    monkeypatch.undo()
    assert dataset.fingerprint() == pack(TEXTS, bounded, 16).fingerprint()
    assert torch.equal(dataset.tokens, pack(TEXTS, bounded, 16).tokens)


def tee(texts, seen):
    for line in texts:
        seen.append(line)
        yield line


def test_a_note_about_something_else_starts_afresh(tmp_path, bounded, monkeypatch):
    monkeypatch.setattr(text, "CHARACTERS_AT_ONCE", 10)
    monkeypatch.setattr(text, "TOKENS_BETWEEN_NOTES", 40)

    def broken():
        yield from TEXTS[:20]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        pack(Corpus(name="speech", read=broken, identity="another"), bounded, 16, folder=tmp_path / "speech")
    other = ["quite another text, and longer"] * 9
    dataset = pack(corpus(other), bounded, 16, folder=tmp_path / "speech")
    assert torch.equal(dataset.tokens, pack(other, bounded, 16).tokens)


def test_a_folder_with_something_else_in_it(tmp_path, bounded, bpe):
    pack(corpus(), bounded, 16, folder=tmp_path / "speech")
    for arguments in ((corpus(identity="other"), bounded), (corpus(), bpe)):
        with pytest.raises(ValueError, match="holds another token stream"):
            pack(*arguments, 16, folder=tmp_path / "speech")
    with pytest.raises(ValueError, match="its separator is not"):
        pack(corpus(), bounded, 16, wrap="plain", folder=tmp_path / "speech")
    (tmp_path / "note.txt").touch()
    with pytest.raises(ValueError, match="holds no token stream"):
        pack(corpus(), bounded, 16, folder=tmp_path)
    with pytest.raises(ValueError, match="give a Corpus"):
        pack(TEXTS, bounded, 16, folder=tmp_path / "new")
    np.save(tmp_path / "speech" / "tokens.npy", np.zeros(3, np.uint16))
    with pytest.raises(ValueError, match="is damaged"):
        pack(corpus(), bounded, 16, folder=tmp_path / "speech")


def test_an_empty_folder_is_as_good_as_none(tmp_path, bounded):
    assert len(pack(corpus(), bounded, 16, folder=tmp_path)) == len(pack(TEXTS, bounded, 16))


def test_large_vocabularies_take_four_bytes():
    assert [text._compact(k).itemsize for k in (2, 256, 257, 50257, 65536, 65537)] == [1, 1, 2, 2, 2, 4]


def test_padding(bounded):
    bos, eos, pad = bounded.bos_token_id, bounded.eos_token_id, bounded.pad_token_id
    dataset = pad_texts(["ab", "", "abcdef", "c"], bounded, 6)
    a, b, c, d = (ord(letter) for letter in "abcd")
    batch = dataset.batch([0, 1, 2])
    assert batch.tokens.tolist() == [
        [bos, a, b, eos, pad, pad],
        [bos, a, b, c, d, eos],
        [bos, c, eos, pad, pad, pad],
    ]
    assert batch.valid.tolist() == [[True] * 4 + [False] * 2, [True] * 6, [True] * 3 + [False] * 3]
    plain = pad_texts(["ab", "abcdef"], bounded, 4, wrap="plain").batch([1, 0])
    assert plain.tokens.tolist() == [[a, b, c, d], [a, b, pad, pad]]
    assert plain.valid.sum(1).tolist() == [4, 2]


def test_padded_texts_are_the_texts(bpe):
    dataset = pad_texts(TEXTS, bpe, 64)
    batch = dataset.batch(range(len(dataset)))
    texts = [bpe.decode(row[keep][1:-1]) for row, keep in zip(batch.tokens, batch.valid, strict=True)]
    assert texts == [text for text in TEXTS if text]


@pytest.mark.parametrize("kind", KINDS)
def test_share_of_what_is_given(kind):
    """floor(f n) tokens are given, one at least is not, and nothing outside the text."""
    lengths = torch.tensor([1, 2, 7, 40]).repeat(100)
    valid = torch.arange(40) < lengths[:, None]
    for share in (0.0, 0.3, 0.5, 1.0):
        masks = GivenMasks(kinds=(kind,), fraction=(share, share), none=0, span_length=3, seed=4)
        given = masks.draw(torch.arange(len(lengths)), epoch=2, valid=valid)
        assert not (given & ~valid).any()
        assert torch.equal(given.sum(1), torch.minimum((share * lengths.double()).floor().long(), lengths - 1))


def draws(kind, n=3000, length=24, **kwargs):
    masks = GivenMasks(kinds=(kind,), none=0, **kwargs)
    return masks.draw(torch.arange(n), epoch=0, valid=torch.ones(n, length, dtype=torch.bool))


def edges(given):
    """How many times a row changes from hidden to given."""
    return (given[:, 1:] & ~given[:, :-1]).sum(1)


def test_where_the_given_tokens_are():
    assert (edges(draws("prefix")) == 0).all()
    suffix = draws("suffix")
    assert torch.equal(suffix, suffix.sort(1).values), "from some place to the end"
    around = draws("around")
    hidden = ~around
    first, last = hidden.long().argmax(1), 23 - hidden.flip(1).long().argmax(1)
    assert torch.equal(last - first + 1, hidden.sum(1)), "one gap"
    half = draws("around", fraction=(0.5, 0.5))
    starts = (~half).long().argmax(1).bincount(minlength=13)
    assert starts.shape == (13,)
    assert ((starts / 3000 - 1 / 13).abs() < 5 * (1 / 13 / 3000) ** 0.5).all(), "the gap lies anywhere, equally often"
    scattered = draws("scattered", fraction=(0.25, 0.25))
    assert ((scattered.double().mean(0) - 0.25).abs() < 5 * (0.1875 / 3000) ** 0.5).all()
    spans = draws("spans", fraction=(0.5, 0.5), span_length=6)
    assert (edges(spans) <= 3).all(), "twelve tokens are at most two spans, one cut at the edge and one cut short"
    assert edges(spans).double().mean() < edges(draws("scattered", fraction=(0.5, 0.5))).double().mean() / 2
    assert ((spans.double().mean(0) - 0.5).abs() < 0.1).all()
    begins = (spans[:, 1:] & ~spans[:, :-1]).double().mean(0)
    assert begins.min() > begins.max() / 3, "a span may begin anywhere"


def test_what_is_given_depends_on_seed_epoch_and_index_alone():
    dataset = PromptedText(dataset=blocks(n=60), masks=GivenMasks(seed=7))
    order = [5, 1, 1, 0, 6]
    together = dataset.batch(order, epoch=3).given
    assert torch.equal(together, torch.cat([dataset.batch([i], epoch=3).given for i in order]))
    everything = range(len(dataset))
    assert not torch.equal(dataset.batch(everything, epoch=3).given, dataset.batch(everything, epoch=4).given)
    other = PromptedText(dataset=dataset.dataset, masks=GivenMasks(seed=8))
    assert not torch.equal(dataset.batch(everything).given, other.batch(everything).given)
    assert torch.equal(dataset.batch(everything).tokens, dataset.dataset.batch(everything).tokens)


def test_kinds_shares_and_nothing_come_as_often_as_asked():
    masks = GivenMasks(kinds=("prefix", "suffix"), fraction=(0.25, 0.75), none=0.2)
    n, length = 20_000, 40
    given = masks.draw(torch.arange(n), epoch=0, valid=torch.ones(n, length, dtype=torch.bool))
    nothing, prefix, suffix = ~given.any(1), given[:, 0], given[:, -1]
    for share, expected in ((nothing, 0.2), (prefix, 0.4), (suffix, 0.4)):
        assert share.double().mean().item() == pytest.approx(expected, abs=5 * (0.25 / n) ** 0.5)
    counts = given[~nothing].sum(1)
    assert (int(counts.min()), int(counts.max())) == (10, 29)
    assert ((counts.bincount(minlength=30)[10:] / len(counts) - 0.05).abs() < 0.01).all()
    certain = GivenMasks(none=1.0).draw(torch.arange(9), epoch=0, valid=torch.ones(9, 5, dtype=torch.bool))
    assert not certain.any()


def test_tokens_that_the_set_gives_itself_stay_given():
    class Clued:
        name = "clued"

        def __len__(self):
            return 4

        def batch(self, indices, *, epoch=0):
            given = torch.zeros(len(indices), 6, dtype=torch.bool)
            given[:, 4] = True
            return TextBatch(tokens=torch.zeros(len(indices), 6, dtype=torch.int64), given=given)

        def fingerprint(self):
            return "clued"

    batch = PromptedText(dataset=Clued(), masks=GivenMasks(kinds=("prefix",), fraction=(0.5, 0.5), none=0)).batch([0])
    assert batch.given.tolist() == [[True, True, True, False, True, False]]


def test_prompts_on_padded_texts(bounded):
    dataset = PromptedText(
        dataset=pad_texts(["abcd", "a"], bounded, 8),
        masks=GivenMasks(kinds=("suffix",), fraction=(0.5, 0.5), none=0),
    )
    assert dataset.batch([0, 1]).given.tolist() == [
        [False] * 3 + [True] * 3 + [False] * 2,
        [False] * 2 + [True] + [False] * 5,
    ]


def test_counter_numbers_are_uniform_and_independent():
    n = 100_000
    index = np.arange(n)
    base = counter_uniforms(0, 0, index)
    assert ((base >= 0) & (base < 1)).all()
    assert np.abs(np.histogram(base, bins=20, range=(0, 1))[0] / n - 0.05).max() < 5 * (0.05 / n) ** 0.5
    others = {
        "next index": np.roll(base, 1),
        "next epoch": counter_uniforms(0, 1, index),
        "next seed": counter_uniforms(1, 0, index),
        "words exchanged": counter_uniforms(0, index, 0),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base[2:], other[2:])[0, 1]) < 5 / n**0.5, name
    np.testing.assert_array_equal(
        counter_uniforms(0, 0, index[:, None], np.arange(3))[:, 2], counter_uniforms(0, 0, index, 2)
    )
    assert counter_uniforms(-1).shape == (1,)


def test_first_documents_of_a_corpus():
    speech = corpus()
    assert list(speech.first(3)) == TEXTS[:3]
    assert list(speech) == list(speech) == TEXTS
    assert len({speech.fingerprint(), speech.first(3).fingerprint(), speech.first(4).fingerprint()}) == 3
    with pytest.raises(ValueError, match="at least one"):
        speech.first(0)


def test_bad_indices(bounded):
    for dataset, last in ((blocks(), 5), (pad_texts(TEXTS, bounded, 16), 27)):
        for indices, message in (([], "empty"), ([0, last + 1], f"0 to {last}"), ([-1], f"0 to {last}")):
            with pytest.raises(ValueError, match=message):
                dataset.batch(indices)


def test_bad_blocks():
    for settings, message in (
        ({"vocab_size": 49}, "the token 49, outside the vocabulary of 49"),
        ({"eos": 64}, "special token 64 is outside"),
        ({"block_length": 2, "bos": 1, "eos": 1}, "give at least 3"),
        ({"block_length": 51}, "too few for one block of 51"),
        ({"block_length": 26, "shifted": True}, "at every offset"),
    ):
        with pytest.raises(ValueError, match=message):
            blocks(**settings)
    with pytest.raises(ValueError, match="the token -1"):
        TokenBlocks(name="n", tokens=torch.tensor([0, -1]), block_length=2, vocab_size=3)
    with pytest.raises(ValueError, match="int16"):
        blocks(dtype=torch.int16)


def test_bad_padded_texts():
    tokens = torch.arange(4)
    for starts in ([0], [0, 3], [1, 4], [0, 2, 2, 4]):
        with pytest.raises(ValueError, match="starts must rise"):
            PaddedTexts(name="n", tokens=tokens, starts=torch.tensor(starts), block_length=4, vocab_size=4)
    with pytest.raises(ValueError, match="no room"):
        PaddedTexts(name="n", tokens=tokens, starts=torch.tensor([0, 4]), block_length=1, vocab_size=4, bos=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ()}, "kinds is"),
        ({"fraction": (0.5, 0.2)}, "fraction is"),
        ({"fraction": (0, 1.5)}, "fraction is"),
        ({"none": 1.5}, "probability"),
        ({"span_length": 0}, "at least one token"),
    ],
)
def test_bad_masks(settings, message):
    with pytest.raises(ValueError, match=message):
        GivenMasks(**settings)


def test_unknown_words(bounded):
    # ValueErrors, or the errors of the executed annotations.
    with pytest.raises(Exception, match="middle"):
        GivenMasks(kinds=("middle",))
    for call in (pack, pad_texts):
        with pytest.raises(Exception, match="wrap"):
            call(TEXTS, bounded, 16, wrap="none")


def test_what_cannot_be_packed(bounded):
    with pytest.raises(ValueError, match="needs a tokenizer with BOS and EOS"):
        pack(TEXTS, byte_tokenizer(special_tokens=("eos",)), 16)
    with pytest.raises(ValueError, match="needs a tokenizer with EOS"):
        pack(TEXTS, byte_tokenizer(), 16, wrap="eos")
    with pytest.raises(ValueError, match="0 tokens, too few"):
        pack([], bounded, 16)
    with pytest.raises(ValueError, match="surrogate"):
        pack(["\ud800"], bounded, 16)
    with pytest.raises(ValueError, match="no text with a token"):
        pad_texts(["", ""], bounded, 16)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        pad_texts(TEXTS, byte_tokenizer(), 16)
