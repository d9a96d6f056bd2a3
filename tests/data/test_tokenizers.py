import json
import random

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from wellposed.data.tokenizers import (
    boundary_tokens,
    byte_tokenizer,
    character_tokenizer,
    gpt2_tokenizer,
    pretrained_tokenizer,
    text8_tokenizer,
    tokenizer_fingerprint,
    train_bpe,
)

AWKWARD = [
    "",
    " ",
    "a",
    "  two  spaces \t tabs \r\n line ends \n\n",
    "do n't , 's . ? ! clean ' up",
    "<|bos|> <|eos|> <|pad|> <unk> [MASK]",
    "naïve Straße 日本語 \U0001f600 \u200b\u202e é e\u0301",
    "".join(chr(i) for i in range(128)),
]
PROSE = [
    "the cat sat on the mat, and the other cat sat on the other mat.",
    "a cat is a cat is a cat; nothing else would do\n",
] * 20


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(PROSE, 285, special_tokens=("bos", "eos", "pad"))


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """GPT-2's two files for a tiny vocabulary: bytes, the pairs of ``train_bpe``, the end of text last."""
    learned = json.loads(train_bpe(PROSE, 290, special_tokens=()).backend_tokenizer.to_str())["model"]
    folder = tmp_path_factory.mktemp("gpt2")
    vocabulary = learned["vocab"] | {"<|endoftext|>": len(learned["vocab"])}
    (folder / "encoder.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(pair) for pair in learned["merges"])
    (folder / "vocab.bpe").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return folder


def random_text(seed):
    rng = random.Random(seed)
    ranges = [(32, 127), (0, 32), (0xA0, 0x250), (0x4E00, 0x4F00), (0x1F300, 0x1F600)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(200))


@pytest.mark.parametrize("text", [*AWKWARD, random_text(0), random_text(1)])
@pytest.mark.parametrize("kind", ["byte", "byte and specials", "bpe", "gpt2"])
def test_decoding_inverts_encoding(text, kind, bpe, gpt2_folder):
    tokenizer = {
        "byte": byte_tokenizer,
        "byte and specials": lambda: byte_tokenizer(special_tokens=("bos", "eos", "pad")),
        "bpe": lambda: bpe,
        "gpt2": lambda: gpt2_tokenizer(gpt2_folder),
    }[kind]()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", AWKWARD)
def test_ids_of_bytes_are_the_bytes(text):
    assert byte_tokenizer(special_tokens=("eos",)).encode(text) == list(text.encode())


def test_special_tokens_follow_the_bytes():
    tokenizer = byte_tokenizer(special_tokens=("eos", "bos"))
    assert (len(byte_tokenizer()), len(tokenizer)) == (256, 258)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, None)
    assert byte_tokenizer().eos_token_id is None


def test_text_never_becomes_a_special_token(bpe):
    for tokenizer in (byte_tokenizer(special_tokens=("bos", "eos", "pad")), bpe):
        assert not set(tokenizer.encode("<|bos|>x<|eos|><|pad|>")) & set(tokenizer.all_special_ids)
        assert tokenizer.decode([tokenizer.eos_token_id]) == "<|eos|>"


def test_byte_pairs_are_learned(bpe):
    assert len(bpe) == 285
    assert [bpe.bos_token_id, bpe.eos_token_id, bpe.pad_token_id] == [0, 1, 2]
    assert len(bpe.encode(PROSE[0])) < len(PROSE[0].encode()) / 2
    assert len(train_bpe(["ab"], 1000)) == 257, "no more than there is to learn"
    again = train_bpe(iter(PROSE), 285, special_tokens=("bos", "eos", "pad"))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(bpe)


@pytest.mark.parametrize("alphabet", ["cab", ["a cab", "bac"]])
def test_characters(alphabet):
    tokenizer = character_tokenizer(alphabet)
    characters = sorted(set("".join(alphabet)))
    assert len(tokenizer) == len(characters) + 1
    assert tokenizer.encode("".join(characters)) == list(range(len(characters)))
    assert tokenizer.decode(tokenizer.encode("cabba")) == "cabba"
    assert tokenizer.encode("aéb") == [characters.index("a"), tokenizer.unk_token_id, characters.index("b")]


def test_characters_that_mean_something_to_a_regular_expression():
    alphabet = "^]-[\\.$a \n&"
    tokenizer = character_tokenizer(alphabet, unknown="^")
    assert tokenizer.decode(tokenizer.encode(alphabet)) == alphabet
    assert tokenizer.decode(tokenizer.encode("axé\x00a")) == "a^^^a"


def test_unknown_characters_with_a_stand_in_cost_no_id():
    tokenizer = character_tokenizer("abc ", unknown=" ", special_tokens=("pad",))
    assert len(tokenizer) == 5
    assert tokenizer.unk_token is None
    assert tokenizer.decode(tokenizer.encode("a😀b<|pad|>")) == "a b   a   "


def test_text8():
    tokenizer = text8_tokenizer()
    assert len(tokenizer) == 27
    assert tokenizer.encode(" abcdefghijklmnopqrstuvwxyz") == list(range(27))
    assert tokenizer.decode(tokenizer.encode("The Cat, é9")) == "the cat    "


def test_gpt2_files_by_either_name(gpt2_folder, tmp_path):
    tokenizer = gpt2_tokenizer(gpt2_folder)
    for old, new in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (tmp_path / new).write_bytes((gpt2_folder / old).read_bytes())
    assert gpt2_tokenizer(tmp_path).encode(PROSE[0]) == tokenizer.encode(PROSE[0])
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    assert max(tokenizer.encode(PROSE[0])) > 256, "merges are used"


@pytest.mark.parametrize("text", AWKWARD)
def test_gpt2_agrees_with_transformers(gpt2_folder, text):
    vocabulary = json.loads((gpt2_folder / "encoder.json").read_text())
    lines = (gpt2_folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    theirs = GPT2Tokenizer(vocab=vocabulary, merges=[tuple(line.split()) for line in lines])
    assert gpt2_tokenizer(gpt2_folder).encode(text) == theirs.encode(text)


@pytest.mark.parametrize("kind", ["byte", "bpe", "character", "text8", "gpt2"])
def test_saved_and_loaded(kind, bpe, gpt2_folder, tmp_path):
    tokenizer = {
        "byte": lambda: byte_tokenizer(special_tokens=("eos", "pad")),
        "bpe": lambda: bpe,
        "character": lambda: character_tokenizer("abc", special_tokens=("bos",)),
        "text8": text8_tokenizer,
        "gpt2": lambda: gpt2_tokenizer(gpt2_folder),
    }[kind]()
    tokenizer.save_pretrained(tmp_path)
    for loaded in (
        PreTrainedTokenizerFast.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
        pretrained_tokenizer(tmp_path),
    ):
        assert len(loaded) == len(tokenizer)
        assert boundary_tokens(loaded) == boundary_tokens(tokenizer)
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
        for text in AWKWARD:
            ids = tokenizer.encode(text)
            assert loaded.encode(text) == ids
            assert loaded.decode(ids) == tokenizer.decode(ids)


def test_boundaries_of_a_bert(tmp_path):
    tokenizer = character_tokenizer("ab")
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    assert boundary_tokens(tokenizer) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert boundary_tokens(byte_tokenizer()) == (None, None)


def test_fingerprint_sees_what_ids_depend_on(bpe):
    tokenizers = [
        bpe,
        train_bpe(PROSE, 280, special_tokens=("bos", "eos", "pad")),
        byte_tokenizer(),
        byte_tokenizer(special_tokens=("eos",)),
        byte_tokenizer(special_tokens=("bos",)),
        character_tokenizer("abc"),
        character_tokenizer("abd"),
        character_tokenizer("abc", unknown="a"),
        text8_tokenizer(),
    ]
    prints = [tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers]
    assert len(set(prints)) == len(prints)
    bpe(PROSE[0], truncation=True, max_length=3)
    assert tokenizer_fingerprint(bpe) == prints[0], "a call leaves no trace"


def test_what_cannot_be_made():
    with pytest.raises(ValueError, match="special_tokens is"):
        byte_tokenizer(special_tokens=("eos", "eos"))
    with pytest.raises(ValueError, match="need 257 ids"):
        train_bpe(["a"], 100)
    with pytest.raises(ValueError, match="alphabet is empty"):
        character_tokenizer([])
    with pytest.raises(ValueError, match="a character of the alphabet"):
        character_tokenizer("abc", unknown="x")


def test_what_cannot_be_read(tmp_path, gpt2_folder):
    with pytest.raises(FileNotFoundError, match=r"encoder\.json and vocab\.bpe"):
        gpt2_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("[]")
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(ValueError, match="no byte-pair vocabulary"):
        gpt2_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"has no <\|endoftext\|>"):
        gpt2_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="hf download no-such/tokenizer"):
        pretrained_tokenizer("no-such/tokenizer")
