"""A picture of a text, the same picture begun anew from its middle, and one with a hole painted in.

    python examples/lens_generate.py                                              # a tiny Lens, random weights: seconds
    python examples/lens_generate.py path/to/Lens-Turbo --release turbo --device cuda --size 1024
    python examples/lens_generate.py path/to/Lens --device cuda --size 1024 --encode-first      # a card of 16 GB

The path is a folder or a hub id in the published layout (transformer, text_encoder, tokenizer, vae, scheduler).
``--encode-first`` reads the prompt with GPT-OSS alone on the device, lets it go and only then loads the rest there.

What to expect of the tiny one: noise in colours, the same on every run, and the last line that it prints, "kept: 0.0",
the largest difference between latents of the first picture and of the inpainted one outside the hole. Random weights
show that everything runs, not what a trained model paints.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

from wellposed.lens.editing import repainted_channels
from wellposed.lens.template import PUBLISHED_TEMPLATE
from wellposed.models import LensTransformer2DModel
from wellposed.pipelines import LensPipeline
from wellposed.schedulers import LensFlowMatchScheduler

PROMPT = "a red lighthouse at dusk, waves breaking on black rocks"
CONTROL = ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>"]


def generate(pipe: Any, text: dict[str, Any], out: Path, *, size: int) -> float:
    """Three pictures; returns how far latents outside the hole moved, which is not at all.

    Args:
        pipe: the pipeline.
        text: ``{"prompt": ...}``, or features that were encoded before.
        out: folder for the pictures.
        size: pixels to a side.
    """
    out.mkdir(parents=True, exist_ok=True)
    first = pipe(**text, height=size, width=size, generator=torch.Generator().manual_seed(0)).images[0]
    again = pipe(**text, image=first, strength=0.5, generator=torch.Generator().manual_seed(1)).images[0]
    hole = Image.new("L", (size, size), 0)
    hole.paste(255, (size // 4, size // 4, 3 * size // 4, 3 * size // 4))
    inside: dict[str, Any] = {**text, "image": first, "generator": torch.Generator().manual_seed(2)}
    filled = pipe(**inside, mask_image=hole).images[0]
    for name, picture in (("text", first), ("image", again), ("hole", filled)):
        picture.save(out / f"{name}.png")
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1
    kept = ~repainted_channels(mask, pipe.transformer.config["in_channels"] // 4)
    tokens = [
        pipe(**inside, mask_image=one, num_inference_steps=2, output_type="latent").images.float().cpu()
        for one in (hole, Image.new("L", (size, size), 0))
    ]
    moved = float((tokens[0] - tokens[1])[kept].abs().max())
    print(f"pictures: {', '.join(sorted(path.name for path in out.glob('*.png')))} in {out}\nkept: {moved}")
    return moved


def tiny_pipeline() -> LensPipeline:
    """All parts of Lens, small and with random weights: nothing is downloaded."""
    transformer = LensTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        inner_dim=64,
        enc_hidden_dim=32,
        axes_dims_rope=(4, 14, 14),
        selected_layer_index=(0, 1),
    )
    text_encoder: Any = GptOssForCausalLM(
        GptOssConfig(
            num_hidden_layers=2,
            num_local_experts=2,
            num_experts_per_tok=1,
            vocab_size=512,
            hidden_size=32,
            intermediate_size=32,
            head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        )
    )
    vae: Any = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4
    )
    generator = torch.Generator().manual_seed(0)
    for part in (transformer, text_encoder, vae):
        for weight in part.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=generator)
    return LensPipeline(
        scheduler=LensFlowMatchScheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tiny_tokenizer(),
        transformer=transformer.eval(),
        release="turbo",
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """512 byte pairs of the template, and the control tokens of GPT-OSS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, min_frequency=1, initial_alphabet=alphabet, special_tokens=CONTROL, show_progress=False
    )
    tokenizer.train_from_iterator([PUBLISHED_TEMPLATE.prefix, PUBLISHED_TEMPLATE.suffix], trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=CONTROL[0], pad_token=CONTROL[1], eos_token=CONTROL[2]
    )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a Lens pipeline by hub id or folder")
    parser.add_argument("--release", choices=["base", "rl", "turbo"], default="rl")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--encode-first", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/lens_generate"))
    chosen = parser.parse_args()
    if chosen.model is None:
        pipe = tiny_pipeline()
    else:
        # The autoencoder's statistics lose two decimals in bfloat16.
        dtype = {"default": torch.bfloat16, "vae": torch.float32}
        pipe = LensPipeline.from_pretrained(chosen.model, dtype=dtype, release=chosen.release)
    text: dict[str, Any] = {"prompt": chosen.prompt}
    if chosen.encode_first:
        pipe.text_encoder.to(chosen.device)
        text = pipe.encode_then_free(**text)
    generate(pipe.to(chosen.device), text, chosen.out, size=chosen.size)


if __name__ == "__main__":
    main()
