"""What is asked for, what counts as a caption, and how a picture is shown."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base as ExifTag

from wellposed.lens.caption_writer import CAPTION_INSTRUCTIONS, CaptionWriter, decode_for_captioner, read_caption

FOX = "A red fox sleeps under a wooden bridge, and a sign above it says “SORRY, I CAN'T”."
PROMPT = CaptionWriter().prompt("0")


def encoded(picture: Image.Image, kind: str = "PNG", **fields: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind, **fields)
    return file.getvalue()


@pytest.mark.parametrize("style", ["dense", "brief"])
def test_instructions_name_language_and_words(style):
    asked = CaptionWriter(instructions=CAPTION_INSTRUCTIONS[style], max_words=77, languages=("French",)).prompt("0")
    assert "French" in asked and "77" in asked and "{" not in asked and "\n " not in asked
    assert len(CAPTION_INSTRUCTIONS["dense"]) > 3 * len(CAPTION_INSTRUCTIONS["brief"])


def test_a_users_instructions_may_hold_braces():
    writer = CaptionWriter(instructions='Fill {"colour": ...} in {language}.')
    assert writer.prompt("0") == 'Fill {"colour": ...} in English.'


def test_languages_are_spread_by_key():
    writer = CaptionWriter(languages=("English", "Chinese", "French", "Japanese", "Spanish"))
    chosen = {str(key): writer.language(str(key)) for key in range(2000)}
    assert all(340 < count < 460 for count in Counter(chosen.values()).values())
    assert all(writer.language(key) == language for key, language in reversed(chosen.items()))
    assert chosen["7"] in writer.prompt("7")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instructions": " "}, "write what is asked for"),
        ({"languages": ()}, "languages by name"),
        ({"languages": ("English", "")}, "languages by name"),
        ({"max_words": 0}, "give at least 1"),
        ({"image_side": 0}, "give at least 1"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        CaptionWriter(**fields)


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        (FOX, FOX),
        (f"  {FOX[:40]}\n\n{FOX[40:]} ", f"{FOX[:40]} {FOX[40:]}".replace("  ", " ")),
        (f"<think>A fox, I think.</think>{FOX}", FOX),
        (f"Sure! Here's a detailed caption of the picture: {FOX}", FOX),
        (f"Here is the description:\n\n{FOX}", FOX),
        (f"Caption: {FOX}", FOX),
        ("Here is a fox that sleeps.", "Here is a fox that sleeps."),
        ("一只红狐狸在木桥下睡觉。", "一只红狐狸在木桥下睡觉。"),
        ("Unfortunate foxes in the rain.", "Unfortunate foxes in the rain."),
        ("A painter who sees nothing could paint the picture.", "A painter who sees nothing could paint the picture."),
    ],
)
def test_captions(answer, caption):
    assert read_caption(answer, prompt=PROMPT, max_words=500) == caption
    assert read_caption(caption, prompt=PROMPT, max_words=500) == caption


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "^empty: "),
        (" \n", "^empty: "),
        ("<think>A fox", "^empty: "),
        ("Caption: ", "^empty: "),
        ("... 12 🦊", "^no letters: "),
        ("I'm sorry, but I can't help with that.", "^refused: "),
        ("I’m sorry, I can’t describe people.", "^refused: "),
        ("Sorry, I cannot identify who this is.", "^refused: "),
        ("I can't see any image.", "^refused: "),
        ("I am unable to view pictures.", "^refused: "),
        ("I do not see a picture. Could you attach it?", "^refused: "),
        ("Unfortunately, no picture came through.", "^refused: "),
        ("As an AI language model, I have no eyes.", "^refused: "),
        ("No image was provided.", "^refused: "),
        ("Please upload the picture.", "^refused: "),
        ("很抱歉，我无法描述这张图片。", "^refused: "),
        ("我无法查看图片。", "^refused: "),
        ("申し訳ありませんが、お手伝いできません。", "^refused: "),
        ("Je suis désolé, je ne peux pas décrire cette image.", "^refused: "),
        ("Lo siento, no puedo ayudar con eso.", "^refused: "),
        ("Es tut mir leid, das kann ich nicht.", "^refused: "),
        (PROMPT, "^repeats the instructions: "),
        (f"You asked: {PROMPT}", "^repeats the instructions: "),
        (PROMPT[: len(PROMPT) // 2], "^repeats the instructions: "),
        ("fox " * 1001, "^too long: 1001 words, where 500 were the limit"),
        ("狐" * 1001, "^too long: 1001 words"),
    ],
)
def test_nonsense(answer, message):
    with pytest.raises(ValueError, match=message):
        read_caption(answer, prompt=PROMPT, max_words=500)


def test_twice_the_words_are_still_a_caption():
    assert read_caption("fox " * 24, prompt=PROMPT, max_words=12) == " ".join(["fox"] * 24)
    with pytest.raises(ValueError, match="too long: 25"):
        read_caption("fox " * 25, prompt=PROMPT, max_words=12)


@pytest.mark.parametrize(
    ("size", "side", "shown"),
    [
        ((8, 6), 8, (8, 6)),
        ((8, 6), 100, (8, 6)),
        ((800, 200), 100, (100, 25)),
        ((200, 800), 100, (25, 100)),
        ((900, 1), 90, (90, 1)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_reduced_and_never_enlarged(size, side, shown, kind):
    picture = decode_for_captioner(encoded(Image.new("RGB", size, "red"), kind), side)
    assert (picture.size, picture.mode) == (shown, "RGB")
    np.testing.assert_allclose(np.asarray(picture), np.broadcast_to([255, 0, 0], (*shown[::-1], 3)), atol=2)


def test_pictures_are_shown_upright_and_on_white():
    exif = Image.Exif()
    exif[ExifTag.Orientation] = 6
    lying = Image.new("RGB", (6, 2), "red")
    lying.paste("blue", (0, 0, 3, 2))
    upright = np.asarray(decode_for_captioner(encoded(lying, exif=exif), 8))
    assert upright.shape == (6, 2, 3)
    assert (upright[:3] == (0, 0, 255)).all() and (upright[3:] == (255, 0, 0)).all()
    clear = decode_for_captioner(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0))), 8)
    assert (np.asarray(clear) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_broken_pictures(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    whole = encoded(noise, kind)
    decode_for_captioner(whole, 40)
    for broken in (b"", b"<html>", whole[:20], whole[: len(whole) // 2], whole[:8] + b"\0" * 100):
        with pytest.raises(ValueError, match="^no picture: "):
            decode_for_captioner(broken, 40)


def test_a_picture_that_unpacks_to_too_much(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="^no picture: too many pixels"):
        decode_for_captioner(encoded(Image.new("RGB", (8, 8))), 8)
