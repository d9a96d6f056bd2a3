"""A Lens learns somebody's own pictures: by a low-rank adapter, or in all its weights.

    python examples/lens_finetune.py                                                  # tiny parts, painted pictures
    python examples/lens_finetune.py --out runs/again                                 # the same once more
    python examples/lens_finetune.py path/to/Lens-Base path/to/pictures --device cuda
    python examples/lens_finetune.py path/to/Lens-Base path/to/pictures --rank 16 --steps 500 --device cuda
    python examples/lens_finetune.py path/to/Lens-Base path/to/pictures --full --device cuda
    python examples/lens_finetune.py path/to/Lens-Base path/to/pictures --resume --device cuda      # after Ctrl-C

Beside each picture ``name.jpg`` lies its caption, ``name.txt``. It is what ``wellposed train lens_lora`` and
``wellposed train lens_full`` do, with the folders on the command line. What is left in ``--out`` draws by
``wellposed sample``, and its adapter loads into any pipeline of the same network::

    pipe = LensPipeline.from_pretrained("path/to/Lens-Base")
    pipe.load_lora_weights("runs/lens_finetune/pipeline")            # comfyui_lora.safetensors beside it is for ComfyUI

What to expect of the tiny one, from one run of half a minute: a Lens with random weights learns to draw a meadow and
sand, by 100 steps for all weights, and an adapter (of rank 16, for the MLPs too) on top of it learns sea and wall. The
loss falls from 1.9 to 0.5, and then from 1.3 to 0.4. The table that it prints last has, for each caption, the squared
distance of drawn latents to those of either picture: 0.2 to its own, 1.8 to the other. The pictures themselves look
like noise, because the tiny autoencoder has learned nothing.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from wellposed.data.buckets import Buckets, Size
from wellposed.lens.latents import encode_images
from wellposed.models import LensTransformer2DModel
from wellposed.pipelines import LensPipeline
from wellposed.recipes.device import resolved_device
from wellposed.recipes.lens_finetune import lens_full, lens_lora, with_adapter, with_folders
from wellposed.recipes.small_flux_vae import FluxVaeShape, keep_latent_statistics
from wellposed.recipes.small_gpt_oss import GptOssShape, small_gpt_oss
from wellposed.recipes.t2i_draw import load_lens
from wellposed.recipes.t2i_recipe import LoraSettings, TextToImageRecipe
from wellposed.schedulers import LensFlowMatchScheduler

# A colour and its light above and below, and what is said of it.
PAINTED = {
    "meadow": ((40, 180, 60), (0.4, 1.0), "a green meadow, brighter below"),
    "sand": ((230, 210, 40), (1.0, 0.4), "sand, yellow and darker below"),
    "sea": ((30, 60, 200), (0.4, 1.0), "the sea, blue and darker above"),
    "wall": ((220, 40, 30), (1.0, 0.4), "a red wall, brighter above"),
}


def learn(recipe: TextToImageRecipe, out: Path, *, steps: int | None, device: str, resume: bool = False) -> list[float]:
    """Trains; returns the losses in the order of the steps that were logged."""
    recipe.train(out, steps=steps, device=device, resume=resume)
    losses = [json.loads(line)["network/loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    some = max(1, len(losses) // 5)
    first, last = (sum(part) / some for part in (losses[:some], losses[-some:]))
    print(f"{recipe.name}: loss {first:.2f} at first, {last:.2f} at last; see {out}")
    return losses


def tiny(recipe: TextToImageRecipe, learning_rate: float) -> TextToImageRecipe:
    """The recipe for pictures of 16 x 16 pixels, eight a step, in float32."""
    stage = recipe.stages[0]
    training = replace(
        stage.training, batch_size=8, learning_rate=learning_rate, warmup_steps=0, precision="fp32", log_every=1
    )
    stage = replace(
        stage,
        buckets=lambda: Buckets.fixed(Size(16, 16), batch_size=8),
        shares=1,
        training=training,
        gradient_checkpointing=False,
        sample_posterior=False,
    )
    sampling = replace(recipe.sampling, size=(16, 16), num_inference_steps=8, guidance_scale=2.0)
    return replace(recipe, stages=(stage,), sampling=sampling, shown_captions=2)


def paint(folder: Path, names: tuple[str, ...]) -> Path:
    """A folder of pictures with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        colour, (above, below), caption = PAINTED[name]
        light = np.linspace(above, below, 16)[:, None, None]
        pixels = np.broadcast_to(light * np.array(colour), (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    return folder


def tiny_base(folder: Path) -> Path:
    """All parts of Lens, small and with random weights."""
    if (folder / "model_index.json").is_file():
        return folder
    encoder = small_gpt_oss(folder.with_name("encoder"), [text for *_, text in PAINTED.values()], GptOssShape(), seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        vae: Any = FluxVaeShape(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4).build().eval()
        network = LensTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            enc_hidden_dim=64,
            axes_dims_rope=(4, 6, 6),
            selected_layer_index=encoder.taps,
        )
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                is_modulation = "mod" in name or "norm_out" in name
                torch.nn.init.normal_(weight, std=(0.1 if is_modulation else 0.7) * weight.shape[1] ** -0.5)
        coarse = 2 * torch.rand(64, 3, 2, 2) - 1
    keep_latent_statistics(vae, [torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")])
    pipe = LensPipeline(
        scheduler=LensFlowMatchScheduler(),
        vae=vae,
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        transformer=network.eval(),
        release="base",
    )
    pipe.save_pretrained(folder)
    return folder


@torch.no_grad()
def distances(pipeline: Path, pictures: Path, names: tuple[str, ...], device: str) -> dict[str, list[float]]:
    """Squared distances of latents drawn by each caption to those of each picture."""
    pipe = load_lens(pipeline, resolved_device(device))
    images = [torch.from_numpy(np.array(Image.open(pictures / f"{name}.png"))).movedim(-1, 0) for name in names]
    true = encode_images(pipe.vae, torch.stack(images).to(pipe.device) / 127.5 - 1)
    found = {}
    for name in names:
        generator = [torch.Generator(pipe.device).manual_seed(seed) for seed in range(4)]
        how: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 8, "guidance_scale": 2.0}
        drawn = pipe([PAINTED[name][2]] * 4, generator=generator, output_type="latent", **how).images
        found[name] = (drawn[:, None] - true).square().mean((0, 2, 3)).tolist()
        print(f"{name}: " + ", ".join(f"{d:.2f} to {other}" for d, other in zip(found[name], names, strict=True)))
    return found


def show(
    out: Path, *, steps: int, device: str = "cpu", resume: bool = False, full: bool = False
) -> dict[str, list[float]]:
    """The tiny one, from nothing: all weights learn two pictures, then an adapter, or all weights again, two others."""
    how: dict[str, Any] = {"steps": steps, "device": device}
    base = tiny_base(out / "base")
    grounds, others = paint(out / "grounds", ("meadow", "sand")), paint(out / "others", ("sea", "wall"))
    first = with_folders(tiny(lens_full(), 3e-3), pictures=grounds, base=base)
    learn(first, out / "full", resume=resume and (out / "full").exists(), **how)
    taught = out / "taught"
    if not taught.exists():
        shutil.copytree(base, taught, ignore=shutil.ignore_patterns("transformer"))
        shutil.copytree(out / "full" / "pipeline" / "transformer", taught / "transformer")
    recipe = tiny(lens_full(), 3e-3)
    if not full:
        recipe = with_adapter(tiny(lens_lora(), 1e-2), LoraSettings(rank=16, alpha=16, mlps=True))
    last = out / ("again" if full else "adapter")
    learn(with_folders(recipe, pictures=others, base=taught), last, resume=resume and last.exists(), **how)
    return distances(last / "pipeline", others, ("sea", "wall"), device)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", type=Path, help="the folder of a Lens pipeline; none shows tiny parts")
    parser.add_argument("pictures", nargs="?", type=Path, help="the folder of pictures with captions")
    parser.add_argument("--rank", type=int, default=64, help="of the adapter")
    parser.add_argument("--full", action="store_true", help="all weights, without adapter")
    parser.add_argument("--steps", type=int, help="of training; 1500, or 3000 for all weights")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/lens_finetune"))
    chosen = parser.parse_args()
    if chosen.base is not None and chosen.pictures is None:
        parser.error("give the folder of pictures after that of the pipeline")
    if not chosen.resume and chosen.out.exists() and any(chosen.out.iterdir()):
        parser.error(f"{chosen.out} is there already; add --resume to go on with it, or choose another --out")
    if chosen.base is None:
        show(chosen.out, steps=chosen.steps or 100, device=chosen.device, resume=chosen.resume, full=chosen.full)
        return
    recipe = (
        lens_full() if chosen.full else with_adapter(lens_lora(), LoraSettings(rank=chosen.rank, alpha=chosen.rank))
    )
    recipe = with_folders(recipe, pictures=chosen.pictures, base=chosen.base)
    learn(recipe, chosen.out, steps=chosen.steps, device=chosen.device, resume=chosen.resume)
    print(f"draw with it: wellposed sample {chosen.out} --prompt TEXT")


if __name__ == "__main__":
    main()
