"""Captions from a tiny real Llava, taught on the spot to tell red from blue, loaded from a folder."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from wellposed.lens.captioning import Captioner, CaptionRequest, CaptionStatistics
from wellposed.lens.local_captioner import LocalCaptioner

WORDS = (
    *("<pad>", "<end>", "<image>", "<unk>", "ASSISTANT:", "Say", "the", "colour", "in", "English", "French"),
    *("a", "red", "blue", "square", "un", "carré", "rouge"),
)
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
INSTRUCTIONS = "Say the colour in {language}"


def processor() -> LlavaProcessor:
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    side = {"height": 8, "width": 8}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def untaught() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, vision_feature_layer=-1)
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says what it has learnt to say of a red and of a blue picture."""
    asks, model = processor(), untaught()
    lessons = [
        ("red", "Say the colour in English", "a red square"),
        ("blue", "Say the colour in English", "a blue square"),
        ("red", "Say the colour in French", "un carré rouge"),
    ]
    batch: Any = asks(
        text=[f"<image> {asked} ASSISTANT: {said} <end>" for _, asked, said in lessons],
        images=[[Image.new("RGB", (8, 8), colour)] for colour, _, _ in lessons],
        return_tensors="pt",
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == 2, -100)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("llava")
    model.save_pretrained(path)
    asks.save_pretrained(path)
    return path


@pytest.fixture
def load(folder: Path) -> Any:
    def captioner(**fields: Any) -> LocalCaptioner:
        return LocalCaptioner.from_pretrained(
            folder, **{"instructions": INSTRUCTIONS, "max_words": 6, "max_new_tokens": 6, **fields}
        )

    return captioner


def request(colour: str, key: str = "0", size: tuple[int, int] = (8, 8)) -> CaptionRequest:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return CaptionRequest(key=key, picture=file.getvalue(), metadata={})


def test_a_model_says_what_it_sees(load):
    caption: Captioner = load(batch_size=2)
    colours = ["red", "blue", "blue", "red", "blue"]
    results = caption([request(colour, key=str(place)) for place, colour in enumerate(colours)])
    assert [result.text for result in results] == [f"a {colour} square" for colour in colours]
    assert [result.key for result in results] == list("01234")
    # Four for the picture, five of the instructions, one that hands over; three words and the end.
    assert all((result.prompt_tokens, result.completion_tokens) == (10, 4) for result in results)
    assert all(result.seconds > 0 and result.cost == 0 for result in results)
    assert CaptionStatistics.of(results).words == {3: 5}
    assert caption([]) == []


def test_results_are_told_after_their_batch(load, folder):
    caption, told = load(batch_size=2), []
    results = caption.ask([request(colour, key=str(n)) for n, colour in enumerate(["red", "blue", "red"])], told.append)
    assert results == told and caption.at_a_time == 2
    assert caption.identity["model"] == str(folder)
    assert load(batch_size=1, max_new_tokens=9).identity == caption.identity != load(max_words=7).identity


def test_languages_and_sizes_of_one_batch(load):
    caption = load(languages=("English", "French"))
    keys = [str(place) for place in range(8)]
    assert len({caption.language(key) for key in keys}) == 2
    results = caption([request("red", key, size=(8 + 4 * int(key), 8)) for key in keys])
    said = {"English": "a red square", "French": "un carré rouge"}
    assert [result.text for result in results] == [said[caption.language(key)] for key in keys]


def test_dtype_and_device(load):
    caption = load(dtype=torch.bfloat16, device="cpu")
    assert caption.model.dtype == torch.bfloat16
    assert caption([request("red")])[0].text == "a red square"


def test_a_broken_picture_costs_no_other(load):
    broken = CaptionRequest(key="x", picture=b"no picture", metadata={})
    results = load()([request("red"), broken, request("blue")])
    assert [result.text for result in results] == ["a red square", None, "a blue square"]
    assert results[1].reason == "no picture" and load()([broken])[0].reason == "no picture"


def test_answers_that_are_no_captions(load):
    (short,) = load(max_new_tokens=2)([request("red")])
    assert (short.reason, short.completion_tokens) == ("cut off", 2)
    (long,) = load(max_words=1)([request("red")])
    assert (long.reason, long.completion_tokens) == ("too long", 4)


def test_a_picture_on_which_the_model_fails_costs_no_other(load, caplog):
    caption, sizes = load(), []

    def fails_on_green(module: Any, args: Any, inputs: Any) -> None:
        pixels = inputs["pixel_values"] if "pixel_values" in inputs else args[0]
        sizes.append(len(pixels))
        if (pixels[:, 1] > pixels[:, [0, 2]].amax(1)).any():
            raise torch.OutOfMemoryError("out of memory")

    caption.model.model.vision_tower.register_forward_pre_hook(fails_on_green, with_kwargs=True)
    results = caption([request(colour) for colour in ("red", "lime", "blue", "red")])
    assert [result.text for result in results] == ["a red square", None, "a blue square", "a red square"]
    assert results[1].error == "failed: OutOfMemoryError: out of memory"
    assert sizes == [4, 2, 1, 1, 2] and len(caplog.records) == 3


def test_models_that_cannot_caption(load, folder):
    asks, model = processor(), untaught()
    with pytest.raises(ValueError, match="give at least 1"):
        load(batch_size=0)
    with pytest.raises(ValueError, match="languages by name"):
        load(languages=())
    asks.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"tokenizer.pad_token = tokenizer.eos_token"):
        LocalCaptioner(model=model, processor=asks)
    asks.chat_template = None
    with pytest.raises(ValueError, match="LlavaProcessor reads no pictures or has no chat template"):
        LocalCaptioner(model=model, processor=asks)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="knows no token for the end"):
        LocalCaptioner(model=model, processor=processor())
