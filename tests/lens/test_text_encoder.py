"""Text features: which states they are, what is not computed for them, and that nothing else has a say in them."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import GptOssForCausalLM, GptOssModel

from wellposed.lens.template import PUBLISHED_TEMPLATE, PromptTemplate
from wellposed.lens.text_encoder import (
    LensTextEncoder,
    TextFeatures,
    encode_prompts,
    join_features,
    load_text_model,
    no_text,
    read_taps,
)

SPEC = importlib.util.spec_from_file_location("tiny_gpt_oss", Path(__file__).with_name("tiny_gpt_oss.py"))
assert SPEC and SPEC.loader
tiny = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tiny)

PROMPTS = list(tiny.PROMPTS)
TAPS = tiny.TINY_TAPS
CPU = torch.device("cpu")

# What a code of four bits stands for in MXFP4, before its block's power of two.
FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture
def model():
    return tiny.tiny_gpt_oss()


@pytest.fixture
def tokens(tokenizer):
    return PUBLISHED_TEMPLATE.tokenize(tokenizer, PROMPTS)


def features_of(model, tokenizer, prompts=PROMPTS, **more):
    return encode_prompts(model, tokenizer, prompts, taps=TAPS, **more)


def in_double_precision(model):
    model.set_experts_implementation("eager")  # the grouped one knows no float64
    return model.double()


def same(left, right):
    return torch.equal(left.hidden_states, right.hidden_states) and torch.equal(left.mask, right.mask)


def largest_difference(left, right):
    assert torch.equal(left.mask, right.mask)
    return (left.hidden_states - right.hidden_states).abs().max().item()


@pytest.mark.parametrize("head", [True, False])
def test_taps_are_the_states_before_the_final_norm(model, tokens, head):
    """transformers' hidden states are the same but for the last, which is the norm of the tap."""
    network = model if head else model.model
    with torch.no_grad():
        reference = network(input_ids=tokens.ids, attention_mask=tokens.mask.long(), output_hidden_states=True)
    states = read_taps(network, tokens.ids, tokens.mask, TAPS)
    for tap in TAPS[:-1]:
        assert torch.equal(states[tap], reference.hidden_states[tap + 1])
    assert torch.equal(model.model.norm(states[-1]), reference.hidden_states[-1])
    assert (states[-1] - reference.hidden_states[-1]).abs().max() > 1
    assert not any(state.requires_grad for state in states)


def test_taps_come_in_the_order_asked_for(model, tokens):
    one, three = read_taps(model, tokens.ids, tokens.mask, (1, 3))
    again = read_taps(model, tokens.ids, tokens.mask, (3, 1))
    assert torch.equal(three, again[0]) and torch.equal(one, again[1])


def test_norm_head_and_layers_above_are_not_computed(model, tokens):
    expected = read_taps(model, tokens.ids, tokens.mask, (0, 1))
    for unread in (*model.model.layers[2:], model.model.norm, model.lm_head):
        for module in unread.modules():
            module._parameters.clear()
    states = read_taps(model, tokens.ids, tokens.mask, (0, 1))
    assert all(torch.equal(state, other) for state, other in zip(states, expected, strict=True))
    with pytest.raises(AttributeError):
        model(tokens.ids)


def test_operations_that_are_saved(model, tokens):
    def operations(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    mask = tokens.mask.long()
    whole = operations(lambda: model(tokens.ids, attention_mask=mask))
    features = operations(lambda: read_taps(model, tokens.ids, tokens.mask, TAPS))
    half = operations(lambda: read_taps(model, tokens.ids, tokens.mask, (0, 1)))
    assert whole - features == 2 * tokens.ids.numel() * model.config.hidden_size * model.config.vocab_size
    # Early releases of transformers 5 find the angles of the rotation, once for all layers, by a product.
    assert 0 <= 2 * half - features < 1e-4 * features


def test_the_model_is_left_as_it_was(model, tokens):
    logits = model(tokens.ids).logits
    read_taps(model, tokens.ids, tokens.mask, (0, 1))
    with pytest.raises(IndexError):
        read_taps(model, tokens.ids + model.config.vocab_size, tokens.mask, (0, 1))
    assert torch.equal(model(tokens.ids).logits, logits)
    for module in model.modules():
        assert not module._forward_hooks and "forward" not in vars(module)


def test_the_precision_of_a_run_is_not_that_of_its_text(model, tokenizer):
    """Features are kept by the model's format; a run in bfloat16 must find and leave the same."""
    expected = features_of(model, tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        found = features_of(model, tokenizer)
    assert same(found, expected)


def test_a_batch_is_as_its_prompts_alone(model, tokenizer):
    in_double_precision(model)
    together = features_of(model, tokenizer)
    alone = join_features([features_of(model, tokenizer, [prompt]) for prompt in PROMPTS])
    assert together.hidden_states.abs().max() > 1
    assert largest_difference(together, alone) < 1e-12


def test_padding_is_seen_by_nobody(model, tokenizer, tokens):
    in_double_precision(model)
    noise = torch.randint(9, 512, tokens.ids.shape, generator=torch.Generator().manual_seed(0))
    scrambled = torch.where(tokens.mask, tokens.ids, noise)
    for state, other in zip(
        read_taps(model, tokens.ids, tokens.mask, TAPS),
        read_taps(model, scrambled, tokens.mask, TAPS),
        strict=True,
    ):
        # Experts take the tokens of a batch in groups, whose sizes the padding changes; hence no equality of bits.
        torch.testing.assert_close(state[tokens.mask], other[tokens.mask], atol=1e-12, rtol=0)
    features = features_of(model, tokenizer)
    assert not features.hidden_states.transpose(1, 2)[~features.mask].any()


def test_what_is_kept_begins_with_the_prompt(model, tokenizer, tokens):
    features = features_of(model, tokenizer)
    states = read_taps(model, tokens.ids, tokens.mask, TAPS)
    assert torch.equal(features.mask, tokens.mask[:, tokens.offset :])
    for layer, state in zip(features.layers, states, strict=True):
        assert torch.equal(layer[features.mask], state[:, tokens.offset :][features.mask])


def test_later_words_do_not_change_earlier_features(model, tokenizer):
    in_double_precision(model)
    short, long = "un phare rouge", "un phare rouge au crépuscule"
    shared = len(tokenizer.encode(short)) - 1
    left, right = (features_of(model, tokenizer, [prompt]).hidden_states[:, :, :shared] for prompt in (short, long))
    assert shared > 1
    torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


def test_the_date_is_seen_although_it_is_dropped(model, tokenizer):
    today, tomorrow = (
        features_of(model, tokenizer, template=PromptTemplate(date=date)) for date in ("2026-05-23", "2026-05-24")
    )
    assert torch.equal(today.mask, tomorrow.mask)
    assert largest_difference(today, tomorrow) > 1e-3
    assert same(today, features_of(model, tokenizer))


def test_an_empty_prompt_is_not_no_text(model, tokenizer):
    empty = features_of(model, tokenizer, [""])
    assert empty.mask.tolist() == [[True] * 22] and bool((empty.hidden_states != 0).any())
    nothing = no_text(3, num_taps=4, width=64, dtype=torch.float32)
    assert nothing.hidden_states.shape == (3, 4, 0, 64) and nothing.mask.shape == (3, 0)
    joined = join_features([empty, nothing])
    assert joined.mask.sum(1).tolist() == [22, 0, 0, 0]
    assert not joined.hidden_states[1:].any() and torch.equal(joined.hidden_states[:1], empty.hidden_states)
    assert same(nothing.padded(5), TextFeatures(hidden_states=torch.zeros(3, 4, 5, 64), mask=torch.zeros(3, 5) > 0))


def test_features_as_a_record(model, tokenizer):
    features = features_of(model, tokenizer, PROMPTS[2:5])
    assert len(features) == 3 and len(features.layers) == 4
    twice = features.repeat(2)
    assert torch.equal(twice.hidden_states[0], twice.hidden_states[1]) and torch.equal(twice.mask[::2], features.mask)
    assert features.to(dtype=torch.bfloat16).hidden_states.dtype == torch.bfloat16
    padded = features_of(model, tokenizer, PROMPTS[2:5], pad_to_multiple_of=16)
    length = features.mask.shape[1]
    assert padded.mask.shape[1] % 16 == 0 and 0 < padded.mask.shape[1] - length < 16
    assert same(padded, features.padded(padded.mask.shape[1]))
    assert same(join_features([padded], pad_to_multiple_of=16), padded)


def test_offloaded_weights(tokenizer):
    """The head stays where it is; everything else comes when it is needed."""
    expected = features_of(tiny.tiny_gpt_oss(), tokenizer)
    offloaded = tiny.tiny_gpt_oss()
    accelerate.cpu_offload(offloaded, execution_device=CPU)
    assert offloaded.device.type == "meta" and same(features_of(offloaded, tokenizer), expected)
    for settings in ({"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}):
        grouped = tiny.tiny_gpt_oss()
        apply_group_offloading(grouped, onload_device=CPU, **settings)
        for _ in range(2):
            assert same(features_of(grouped, tokenizer), expected)


class TextOnly(DiffusionPipeline):
    def __init__(self, text_encoder, tokenizer):
        super().__init__()
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)


def test_inside_a_pipeline(model, tokenizer, tmp_path):
    """It holds stock classes, so it is saved and loaded without a class of ours."""
    TextOnly(model, tokenizer).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "GptOssForCausalLM"] and index["tokenizer"][0] == "transformers"
    loaded = TextOnly.from_pretrained(tmp_path)
    expected = features_of(model, tokenizer)
    assert same(features_of(loaded.text_encoder, loaded.tokenizer), expected)
    parts = {"subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer"}
    encoder = LensTextEncoder.from_pretrained(tmp_path, taps=TAPS, dtype=torch.float32, **parts)
    assert same(encoder(PROMPTS), expected)


@pytest.mark.parametrize("head", [True, False])
def test_from_one_folder(model, tokenizer, tmp_path, head):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    template = replace(PUBLISHED_TEMPLATE, reasoning_effort="low")
    encoder = LensTextEncoder.from_pretrained(
        tmp_path, taps=(1, 3), template=template, dtype=torch.float32, head=head, device_map="cpu"
    )
    assert type(encoder.model) is (GptOssForCausalLM if head else GptOssModel)
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())
    expected = encode_prompts(model, tokenizer, PROMPTS, template=template, taps=(1, 3), pad_to_multiple_of=16)
    assert same(encoder(PROMPTS, pad_to_multiple_of=16), expected)


@pytest.fixture
def mxfp4(model, tmp_path):
    """A folder with experts in MXFP4, and the model that it stands for."""
    generator = torch.Generator().manual_seed(1)
    stored, state = {}, model.state_dict()
    for name, value in state.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = value.to(torch.bfloat16)
            state[name] = stored[name].float()
            continue
        experts, width, outputs = value.shape
        # Two codes in a byte, the lower half first; one exponent for each 32 codes.
        codes = torch.randint(16, (experts, outputs, width // 32, 32), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, (experts, outputs, width // 32), generator=generator, dtype=torch.uint8)
        stored[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        stored[f"{name}_scales"] = scales
        values = FP4[codes.long()] * 2.0 ** (scales.float() - 127)[..., None]
        state[name] = values.reshape(experts, outputs, width).transpose(1, 2).contiguous()
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = model.config.to_dict() | {
        "architectures": ["GptOssForCausalLM"],
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model.load_state_dict(state)
    return tmp_path, model


def test_experts_in_mxfp4_are_unpacked(mxfp4, tokenizer):
    folder, expected = mxfp4
    loaded = load_text_model(folder, dtype=torch.float32, experts="bf16")
    for (name, weight), other in zip(loaded.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, other), name
    assert same(features_of(loaded, tokenizer), features_of(expected, tokenizer))
    half = features_of(load_text_model(folder, experts="bf16", head=False), tokenizer)
    assert half.hidden_states.dtype == torch.bfloat16
    # Where two experts score alike, rounding picks the other one.
    differences = (half.layers[0].float() - features_of(expected, tokenizer).layers[0]).abs()
    assert (differences < 0.1).float().mean() > 0.99


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may keep them")
def test_what_becomes_of_mxfp4_is_not_silent(mxfp4):
    folder, _ = mxfp4
    with pytest.warns(UserWarning, match=r"stored in MXFP4, but there is no GPU: they are unpacked to bfloat16"):
        load_text_model(folder)
    with pytest.raises(ValueError, match='there is no GPU; experts="bf16" unpacks them'):
        load_text_model(folder, experts="mxfp4")


def test_bad_arguments(model, tokenizer, tokens, tmp_path):
    for taps in ((), (1, 1), (0, 4), (-1,)):
        with pytest.raises(ValueError, match="different indices of the model's 4 layers, 0 to 3"):
            read_taps(model, tokens.ids, tokens.mask, taps)
    with pytest.raises(ValueError, match="taps are"):
        LensTextEncoder(model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="float16"):
        load_text_model(tmp_path, dtype=torch.float16)
    features = features_of(model, tokenizer, ["a"])
    with pytest.raises(ValueError, match="give at least those"):
        features.padded(3)
    with pytest.raises(ValueError, match="at least one"):
        join_features([])
    with pytest.raises(ValueError, match=r"\(2, 64\), \(4, 64\)"):
        join_features([features, no_text(1, num_taps=2, width=64)])
    with pytest.raises(ValueError, match="16 for a compiled transformer"):
        features_of(model, tokenizer, ["a"], pad_to_multiple_of=0)
