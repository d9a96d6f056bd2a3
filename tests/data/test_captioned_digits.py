"""Captioned digits: the same pictures whatever is said of them, in memory and as a folder."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import Image

from wellposed.data.buckets import Size
from wellposed.data.captioned_digits import CaptionedDigits, caption_name, captioned_digits, write_captioned_folder
from wellposed.data.digit_captions import LANGUAGES, STYLES, caption
from wellposed.data.digit_scenes import draw, random_scenes


def test_batches_are_drawn_scenes_with_their_captions():
    pictures = captioned_digits(60, (32, 32), seed=3)
    batch = pictures.batch([7, 0, 7])
    scenes = random_scenes(60, seed=3)
    assert batch.images.shape == (3, 3, 32, 32)
    assert batch.weight == 1
    for image, text, i in zip(batch.images, batch.captions, (7, 0, 7), strict=True):
        assert torch.equal(image, draw(scenes[i], 32, 32) / 127.5 - 1)
        assert text == caption(scenes[i])


def test_style_and_language_change_no_picture():
    plain = captioned_digits(40, (24, 32))
    other = captioned_digits(40, (24, 32), style={"medium": 1.0, "brief": 3.0}, languages=("ja", "es"))
    one, two = plain.batch(range(40)), other.batch(range(40))
    assert torch.equal(one.images, two.images)
    assert not set(one.captions) & set(two.captions)
    assert plain.fingerprint() != other.fingerprint()
    assert plain.fingerprint() == captioned_digits(40, (24, 32)).fingerprint()


def test_mixture_is_drawn_anew_in_every_epoch_by_its_shares():
    pictures = captioned_digits(250, (16, 16), style={"dense": 1.0, "brief": 3.0}, seed=2)
    scenes = pictures.scenes
    dense = np.array(
        [
            [text == caption(scene) for text, scene in zip(pictures.captions(range(250), epoch=e), scenes, strict=True)]
            for e in range(2)
        ]
    )
    assert dense.mean() == pytest.approx(0.25, abs=0.06)
    agree = (dense[0] == dense[1]).mean()
    assert agree == pytest.approx(0.25**2 + 0.75**2, abs=0.1)
    order = [5, 3, 5]
    assert pictures.captions(order, epoch=2) == tuple(pictures.captions([i], epoch=2)[0] for i in order)


def test_a_picture_keeps_its_language():
    pictures = captioned_digits(100, (16, 16), style={"dense": 1.0, "brief": 1.0}, languages=LANGUAGES)
    spoken = []
    for epoch in range(2):
        texts = pictures.captions(range(100), epoch=epoch)
        spoken.append(
            [
                {lang for lang in LANGUAGES if text in {caption(scene, style=s, language=lang) for s in STYLES}}
                for text, scene in zip(texts, pictures.scenes, strict=True)
            ]
        )
    assert all(len(languages) == 1 for epoch in spoken for languages in epoch)
    assert spoken[0] == spoken[1]
    for language in LANGUAGES:
        assert sum(language in languages for languages in spoken[0]) > 8


def test_sizes_take_turns_and_batches_have_any_size():
    pictures = captioned_digits(5, (32, 32), (32, 64))
    assert pictures.sizes.tolist() == [[32, 32], [32, 64], [32, 32], [32, 64], [32, 32]]
    assert pictures.batch([1, 3]).images.shape == (2, 3, 32, 64)
    assert pictures.batch([0, 1], Size(48, 24)).images.shape == (2, 3, 48, 24)
    with pytest.raises(ValueError, match="32 x 32, 32 x 64"):
        pictures.batch([0, 1])


def test_folder_holds_pictures_and_what_is_said_of_them(tmp_path):
    write_captioned_folder(tmp_path, 6, sizes=[(32, 32), (48, 32)], split="test", seed=1)
    assert len(list(tmp_path.iterdir())) == 12
    pictures = captioned_digits(6, (32, 32), (48, 32), split="test", seed=1)
    for i, scene in enumerate(pictures.scenes):
        stored = torch.from_numpy(np.array(Image.open(tmp_path / f"{i:05}.png"))).permute(2, 0, 1)
        assert torch.equal(stored, draw(scene, *pictures.sizes[i].tolist()))
        told = json.loads((tmp_path / f"{i:05}.json").read_text(encoding="utf-8"))
        assert [told["height"], told["width"]] == pictures.sizes[i].tolist()
        assert told["scene"]["colour"] == scene.colour
        assert told["captions"] == {
            caption_name(style, language): caption(scene, style=style, language=language)
            for style, language in product(STYLES, LANGUAGES)
        }
        assert told["captions"]["dense"] == caption(scene)
        assert told["captions"]["brief_fr"] == caption(scene, style="brief", language="fr")


def test_folder_is_resumed_with_the_same_bytes(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    write_captioned_folder(whole, 5, sizes=[(24, 24)])
    write_captioned_folder(stopped, 5, sizes=[(24, 24)])
    for name in ("00003.json", "00004.json", "00004.png"):
        (stopped / name).unlink()
    (stopped / "00003.png").write_bytes(b"half a picture")
    kept = (stopped / "00002.png").stat().st_mtime_ns
    write_captioned_folder(stopped, 5, sizes=[(24, 24)])
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {p.name: p.read_bytes() for p in stopped.iterdir()}
    assert (stopped / "00002.png").stat().st_mtime_ns == kept


def test_folder_of_other_scenes_is_refused(tmp_path):
    write_captioned_folder(tmp_path, 3, sizes=[(24, 24)])
    with pytest.raises(ValueError, match="another picture"):
        write_captioned_folder(tmp_path, 3, sizes=[(24, 24)], seed=1)
    (tmp_path / "00001.png").unlink()
    with pytest.raises(ValueError, match="its picture is gone"):
        write_captioned_folder(tmp_path, 3, sizes=[(24, 24)])


def test_bad_input():
    pictures = captioned_digits(4, (16, 16))
    with pytest.raises(ValueError, match="at least one picture"):
        pictures.batch([])
    with pytest.raises(ValueError, match="pictures 0 to 3"):
        pictures.batch([4])
    with pytest.raises(ValueError, match="0 sizes"):
        captioned_digits(4)
    with pytest.raises(ValueError, match="0 scenes"):
        CaptionedDigits(name="none", scenes=(), native_sizes=(Size(16, 16),))
    for style in ("long", {}, {"dense": 0.0}, {"dense": 1.0, "long": 1.0}):
        with pytest.raises((ValueError, TypeCheckError), match="'dense', 'medium', 'brief'"):
            replace(pictures, style=style)
    for languages in ((), ("de",)):
        with pytest.raises((ValueError, TypeCheckError), match="'en', 'zh', 'fr', 'ja', 'es'"):
            replace(pictures, languages=languages)
