"""Captions say what they should and nothing else, in every language and every wording."""

import re
from itertools import product

import pytest
from jaxtyping import TypeCheckError

from wellposed.data.digit_captions import ALTERNATIVES, GRAMMARS, LANGUAGES, STYLES, caption, mentioned
from wellposed.data.digit_scenes import ATTRIBUTES, attributes, random_scenes

SCENES = random_scenes(40, split="train", seed=0)


def occurs(word: str, text: str, language: str) -> bool:
    if language in ("zh", "ja"):
        return word in text
    return re.search(rf"\b{word}\b", text, flags=re.IGNORECASE) is not None


def named(text: str, name: str, language: str) -> set[int]:
    """Classes of a property one of whose words is in the text."""
    slots = GRAMMARS[language].words[name].values()
    return {i for words in slots for i, word in enumerate(words) if occurs(word, text, language)}


@pytest.mark.parametrize(("style", "language"), list(product(STYLES, LANGUAGES)))
def test_captions_name_what_they_should_and_nothing_else(style, language):
    for scene, variant in product(SCENES, range(2)):
        text = caption(scene, style=style, language=language, variant=variant)
        assert not set("[]{}|") & set(text)
        for name, of_class in attributes(scene).items():
            found = named(text, name, language)
            if name == "digit":  # "one" is an article, too
                assert of_class in found
            else:
                assert found == ({of_class} if name in mentioned(style) else set()), text


@pytest.mark.parametrize("language", LANGUAGES)
def test_grammars_are_complete(language):
    grammar = GRAMMARS[language]
    assert set(grammar.words) == set(ATTRIBUTES)
    for name, slots in grammar.words.items():
        for words in slots.values():
            assert len(set(words)) == len(words) == len(ATTRIBUTES[name])
    for style, templates in grammar.templates.items():
        assert len(templates) >= {"dense": 6, "medium": 3, "brief": 4}[style]
        for template in templates:
            assert template[-1] in ".。"
            assert all("|" in alternatives for alternatives in ALTERNATIVES.findall(template))


def test_dense_captions_vary_in_order_and_wording():
    scenes = random_scenes(200)
    texts = [caption(scene) for scene in scenes]
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 25 and max(lengths) <= 40
    orders = set()
    for scene, text in zip(scenes, texts, strict=True):
        words = ATTRIBUTES["digit"][scene.digit], scene.colour, scene.position, scene.background
        lowered = text.lower()
        orders.add(tuple(sorted(range(4), key=lambda i: lowered.rindex(words[i]))))
    assert len(orders) >= 5
    assert len({re.sub(r"\W.*", "", text) for text in texts}) >= 5


def test_brief_captions_are_brief():
    assert {len(caption(scene, style="brief").split()) for scene in SCENES} <= {3, 4, 5, 6}


@pytest.mark.parametrize("language", LANGUAGES)
def test_same_scene_same_caption_and_variants_differ(language):
    scene = SCENES[0]
    assert caption(scene, language=language) == caption(scene, language=language)
    assert len({caption(scene, language=language, variant=variant) for variant in range(20)}) > 5


def test_words_agree():
    said = {
        language: {caption(scene, language=language, variant=v) for scene in SCENES for v in range(4)}
        for language in ("fr", "es")
    }
    assert not [text for text in said["fr"] if re.search(r"encre (?:est )?(?:vert|bleu|violet|blanc|noir)\b", text)]
    assert not [text for text in said["fr"] if re.search(r"traits (?:vert|bleu|violet|noir)\b", text)]
    assert not [text for text in said["es"] if re.search(r"[Tt]inta (?:es )?\w+o\b", text)]
    assert any("l'encre blanche" in text for text in said["fr"]) and any("traits noirs" in text for text in said["fr"])
    assert any("tinta amarilla" in text for text in said["es"])
    assert any("superior e izquierdo" in text for text in said["es"])


def test_sentences_begin_with_capitals():
    for scene, language in product(SCENES, ("en", "fr", "es")):
        assert all(sentence[0].isupper() for sentence in caption(scene, language=language).split(". "))


def test_bad_input():
    with pytest.raises((ValueError, TypeCheckError), match="'dense', 'medium', 'brief'"):
        caption(SCENES[0], style="long")
    with pytest.raises((ValueError, TypeCheckError), match="'en', 'zh', 'fr', 'ja', 'es'"):
        caption(SCENES[0], language="de")
    with pytest.raises((ValueError, TypeCheckError), match="'dense', 'medium', 'brief'"):
        mentioned("mixed")
