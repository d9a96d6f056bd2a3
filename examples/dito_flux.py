"""The same FLUX with and without token reduction: what to expect, the time it takes, how far the pictures are apart.

    python examples/dito_flux.py                                         # a tiny FLUX with random weights: seconds
    python examples/dito_flux.py black-forest-labs/FLUX.1-dev --size 1024 --steps 28 --dtype bfloat16 --device cuda
    python examples/dito_flux.py black-forest-labs/FLUX.1-schnell --size 1024 --steps 4 --dtype bfloat16 --device cuda

What to expect of the tiny one, from one run (1024 image tokens, 12 steps of which 8 are reduced): 1.38x by FLOPs, 1.3x
to 1.6x by the clock of a CPU, and 37.2 dB to the dense picture. A network with random weights shows that everything
runs and what it saves, not what a trained model loses.
"""

import argparse
import time
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from wellposed.dito.forecast import recommend
from wellposed.evaluation.image_quality import psnr
from wellposed.hooks import apply_token_reduction

PROMPT = "a red lighthouse at dusk, waves breaking on black rocks"
CHARACTERS = ["<pad>", "<end>", "<unknown>", *map(chr, range(32, 127))]


class Comparison(NamedTuple):
    """Seconds of a picture, decibels between the two, and the speed-up that FLOPs predict."""

    dense_seconds: float
    reduced_seconds: float
    psnr: float
    predicted_speed_up: float


def compare(pipe: FluxPipeline, *, size: int, steps: int, ratio: float = 0.5, text_tokens: int = 512) -> Comparison:
    """One picture dense and one with token reduction, from the same noise; prints everything."""
    advice = recommend(
        pipe.transformer,
        height=size,
        width=size,
        ratio=ratio,
        num_inference_steps=steps,
        text_tokens=text_tokens,
        vae_scale_factor=pipe.vae_scale_factor,
    )
    print(advice, end="\n\n")
    pipe.set_progress_bar_config(disable=True)

    def generate(steps: int) -> tuple[Tensor, float]:
        generator = torch.Generator().manual_seed(0)
        start = time.perf_counter()
        images = pipe(
            PROMPT,
            height=size,
            width=size,
            num_inference_steps=steps,
            max_sequence_length=text_tokens,
            generator=generator,
            output_type="pt",
        ).images
        images = images.float().cpu()  # waits for the device
        return images, time.perf_counter() - start

    generate(2)  # pays for caches and allocations
    dense, dense_seconds = generate(steps)
    reduction = apply_token_reduction(pipe, advice.config)
    reduced, reduced_seconds = generate(steps)
    modes = [record.mode for record in reduction.steps]
    reduction.remove()
    quality = float(psnr(reduced, dense, data_range=1.0).mean())
    print(f"steps: {' '.join(modes)}")
    print(f"dense {dense_seconds:.2f} s, reduced {reduced_seconds:.2f} s: {dense_seconds / reduced_seconds:.2f}x")
    print(f"PSNR to the dense picture {quality:.1f} dB")
    return Comparison(dense_seconds, reduced_seconds, quality, advice.forecast.speed_up)


def tiny_flux() -> FluxPipeline:
    """All parts of FLUX, small and with random weights: nothing is downloaded."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(16, 24, 24),
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )
    sizes = {"vocab_size": len(CHARACTERS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    clip = CLIPTextModel(
        CLIPTextConfig(**sizes, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    t5 = T5EncoderModel(T5Config(**sizes, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2))
    generator = torch.Generator().manual_seed(0)
    for model in (transformer, vae, clip, t5):
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(weight)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=letters(77),
        text_encoder_2=t5.eval(),
        tokenizer_2=letters(512),
        transformer=transformer.eval(),
    )


def letters(max_length: int) -> PreTrainedTokenizerFast:
    """A token for each character."""
    tokenizer = Tokenizer(WordLevel({text: index for index, text in enumerate(CHARACTERS)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unknown>",
    )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a FLUX.1 pipeline by hub id or folder")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    chosen = parser.parse_args()
    if chosen.model is None:
        compare(tiny_flux(), size=chosen.size, steps=chosen.steps, ratio=chosen.ratio, text_tokens=64)
        return
    pipe = FluxPipeline.from_pretrained(chosen.model, dtype=getattr(torch, chosen.dtype)).to(chosen.device)
    schnell = not pipe.transformer.config.guidance_embeds
    compare(pipe, size=chosen.size, steps=chosen.steps, ratio=chosen.ratio, text_tokens=256 if schnell else 512)


if __name__ == "__main__":
    main()
