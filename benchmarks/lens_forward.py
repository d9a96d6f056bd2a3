"""What a forward of Lens costs, what guidance without text saves, and what each way of loading needs in memory.

Claims measured:

* a block takes no longer than a dual-stream block of FLUX (diffusers) of the same width, which has the same number of
  FLOPs, in the same run; and FLOPs are those of the formula 2 W S + 4 S^2 d L, W = 1.359e9 weights that act on a token;
* guidance whose unconditional half has no text tokens takes the time that its number of tokens predicts, compared with
  the same half under a mask, as the published pipeline has it;
* bytes of weights that have to be on the device in each mode of offloading, counted from the published shapes.

With ``--device cuda`` also whole pictures: the transformer of 4.1e9 random weights and the autoencoder at
1024 x 1024, 20 steps with guidance and 4 without, compiled and not, beside the published 3.15 s and 0.84 s on an H100
(which of text encoder and autoencoder those include is not said). On a CPU the same code runs small, to show that it
runs.

    python benchmarks/lens_forward.py
    python benchmarks/lens_forward.py --device cuda --pixels 1024
"""

import argparse
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GptOssConfig, GptOssForCausalLM

from wellposed.evaluation.speed import Clock, comparable_clock, time_calls
from wellposed.lens.text_encoder import TAPS
from wellposed.lens.transformer import LensTransformer2DModel, LensTransformerBlock, rotary_tables
from wellposed.pipelines import LensPipeline
from wellposed.recipes.device import resolved_device
from wellposed.report.record import write_result
from wellposed.schedulers import LensFlowMatchScheduler

WIDTH, HEADS, HEAD_DIM, LAYERS = 1536, 24, 64, 48
ACTIVE_WEIGHTS = LAYERS * (4 * WIDTH**2 + 3 * 4096 * WIDTH)  # attention and MLP of one stream: 1.359e9
TEXT_TOKENS = 180
PUBLISHED_SECONDS = {"20 steps, guided": 3.15, "4 steps": 0.84}
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "inner_dim": 128,
    "enc_hidden_dim": 64,
}


def formula(num_tokens: int, layers: int = LAYERS) -> int:
    """FLOPs of a forward over S tokens, image and text; embeddings, modulations and the output are left out."""
    return 2 * ACTIVE_WEIGHTS * layers // LAYERS * num_tokens + 4 * num_tokens**2 * WIDTH * layers


def counted(text_tokens: int, pixels: Sequence[int]) -> dict[str, Any]:
    """The formula against FLOPs counted in a whole forward, without weights."""
    with torch.device("meta"):
        model: Any = LensTransformer2DModel().eval()
    found: dict[str, Any] = {}
    print(f"\nFLOPs of a forward, {text_tokens} text tokens")
    for side in pixels:
        grid = side // 16
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(
                torch.empty(1, grid**2, 128),
                [torch.empty(1, text_tokens, 2880) for _ in TAPS],
                timestep=torch.empty(1),
                img_shapes=[(1, grid, grid)],
            )
        count, predicted = counter.get_total_flops(), formula(grid**2 + text_tokens)
        found[str(side)] = {"counted": count, "formula": predicted, "ratio": count / predicted}
        print(f"  {side:5} px: {count:.3e} counted, {predicted:.3e} by the formula, ratio {count / predicted:.4f}")
    return found


def filled(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """With random weights, made where they are needed."""
    with torch.device("meta"):
        model = build()
    model = nn.Module.to(model, dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in (*model.parameters(), *model.buffers()):
            if weight.is_floating_point():
                weight.uniform_(-0.02, 0.02, generator=generator)
            else:
                weight.zero_()
    for name, norm in model.named_modules():
        if name.endswith("bn"):
            norm.running_var.fill_(1.0)
    return model


def one_block(
    pixels: int, text_tokens: int, device: torch.device, dtype: torch.dtype, clock: Clock, repeats: int
) -> dict[str, Any]:
    """A block of Lens beside one of FLUX of the same width."""
    grid = pixels // 16
    num_image = grid**2
    lens = filled(lambda: LensTransformerBlock(WIDTH, HEADS, HEAD_DIM, rms_norm=True, gate_mlp=True), device, dtype)
    flux = filled(lambda: FluxTransformerBlock(WIDTH, HEADS, HEAD_DIM), device, dtype)
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    image, text, temb = noise(1, num_image, WIDTH), noise(1, text_tokens, WIDTH), noise(1, WIDTH)
    positions = torch.randint(-32, 32, (num_image + text_tokens, 3), generator=generator).float()
    tables = tuple(table.to(device) for table in rotary_tables(positions, (8, 28, 28)))

    def call(block: Any) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            block(image, text, temb=temb, image_rotary_emb=tables)

        return run

    flops = {}
    for name, block in (("lens", lens), ("flux", flux)):
        with FlopCounterMode(display=False) as counter:
            call(block)()
        flops[name] = counter.get_total_flops()
    timed = time_calls({"flux": call(flux), "lens": call(lens)}, repeats=repeats, warmup=1, device=device)
    seconds = {name: timed.timings[name].seconds(clock).median for name in ("flux", "lens")}
    ratio = timed.ratio("lens", clock=clock)
    print(f"\none block, {pixels} px: {num_image} image and {text_tokens} text tokens")
    for name, took in seconds.items():
        print(f"  {name}: {1000 * took:8.2f} ms, {flops[name]:.3e} FLOPs, {flops[name] / took / 1e9:.1f} GFLOP/s")
    speed_up = f"{1 / ratio.median:.3f}x [{1 / ratio.high:.3f}, {1 / ratio.low:.3f}]"
    print(f"  lens is {speed_up} as fast as flux  target >= 1.0x: {'met' if ratio.median <= 1 else 'missed'}")
    return {"seconds": seconds, "flops": flops, "speed_up": 1 / ratio.median, "timings": timed.to_dict()}


def guidance(
    pixels: int, text_tokens: Sequence[int], device: torch.device, dtype: torch.dtype, clock: Clock, repeats: int
) -> dict[str, Any]:
    """Two blocks of full width: a guided step without text in its second half, and with text under a mask."""
    grid = pixels // 16
    model = filled(lambda: LensTransformer2DModel(num_layers=2, enc_hidden_dim=64), device, dtype)
    generator = torch.Generator().manual_seed(2)
    print(f"\na guided step, {pixels} px: no text tokens in the unconditional half, against masked ones")
    found: dict[str, Any] = {}
    for length in text_tokens:
        tokens = torch.randn(1, grid**2, 128, generator=generator).to(device, dtype)
        features = [torch.randn(1, length, 64, generator=generator).to(device, dtype) for _ in TAPS]
        seen = torch.ones(1, length, dtype=torch.bool)
        shape = [(1, grid, grid)]

        @torch.no_grad()
        def cheap() -> None:
            time = torch.full((1,), 0.5)
            model(tokens, features, seen, timestep=time, img_shapes=shape)  # noqa: B023
            model(tokens, None, timestep=time, img_shapes=shape)  # noqa: B023

        @torch.no_grad()
        def masked() -> None:
            twice = [torch.cat([feature, torch.zeros_like(feature)]) for feature in features]  # noqa: B023
            mask = torch.cat([seen, ~seen])  # noqa: B023
            model(torch.cat([tokens] * 2), twice, mask, timestep=torch.full((2,), 0.5), img_shapes=shape * 2)  # noqa: B023

        timed = time_calls({"masked": masked, "no text": cheap}, repeats=repeats, warmup=1, device=device)
        ratio = timed.ratio("no text", clock=clock)
        whole, image = formula(grid**2 + length, 2), formula(grid**2, 2)
        predicted = (whole + image) / (2 * whole)
        found[str(length)] = {"ratio": ratio.median, "predicted": predicted, "timings": timed.to_dict()}
        print(
            f"  {length:4} text tokens: {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of the time, "
            f"{predicted:.3f} by FLOPs"
        )
    return found


def weights_in_memory() -> dict[str, Any]:
    """Bytes of weights, by part and by mode; a picture's activations come on top."""
    with torch.device("meta"):
        transformer: Any = LensTransformer2DModel()
        vae: Any = AutoencoderKLFlux2()
        text: Any = GptOssForCausalLM(GptOssConfig(num_hidden_layers=24, num_local_experts=32))
    experts = sum(p.numel() for name, p in text.named_parameters() if "experts" in name and p.ndim == 3)
    others = sum(p.numel() for p in text.parameters()) - experts
    block = sum(p.numel() for p in transformer.transformer_blocks[0].parameters())
    sizes = {
        "text encoder, MXFP4": experts * 17 // 32 + 2 * others,  # 32 numbers of 4 bits share a byte
        "text encoder, bfloat16": 2 * (experts + others),
        "transformer, bfloat16": 2 * sum(p.numel() for p in transformer.parameters()),
        "autoencoder, float32": 4 * sum(p.numel() for p in vae.parameters()),
    }
    encoder, network, autoencoder = (
        sizes[name] for name in ("text encoder, MXFP4", "transformer, bfloat16", "autoencoder, float32")
    )
    fp8 = network // 2
    unpacked = sizes["text encoder, bfloat16"]
    modes = {
        "all on the device, MXFP4": encoder + network + autoencoder,
        "all on the device, bfloat16": unpacked + network + autoencoder,
        "enable_model_cpu_offload, MXFP4": max(encoder, network, autoencoder),
        "enable_model_cpu_offload, bfloat16": max(unpacked, network, autoencoder),
        "encode_then_free, MXFP4, the rest still on the CPU": max(encoder, network + autoencoder),
        "encoder on the CPU, the rest on the device": network + autoencoder,
        "encoder on the CPU, transformer stored in fp8": fp8 + autoencoder,
        "encoder on the CPU, transformer offloaded in groups of a block": 2 * 2 * block + autoencoder,
    }
    print("\nweights, GB")
    for name, size in {**sizes, **modes}.items():
        print(f"  {name:66}{size / 1e9:6.1f}")
    return {"parts": sizes, "modes": modes}


def pictures(device: torch.device, dtype: torch.dtype, repeats: int, compiled: bool) -> dict[str, Any]:
    """Whole pictures from features: the network as published on a GPU, a small one elsewhere."""
    on_gpu = device.type == "cuda"
    fields, side = ({}, 1024) if on_gpu else (SMALL, 64)
    transformer = filled(lambda: LensTransformer2DModel(**fields), device, dtype)
    vae = filled(AutoencoderKLFlux2 if on_gpu else small_vae, device, dtype)
    pipe = LensPipeline(LensFlowMatchScheduler(), vae, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        transformer.compile_repeated_blocks(fullgraph=True)
    generator = torch.Generator().manual_seed(3)
    length = 16 * -(-TEXT_TOKENS // 16)
    features = torch.randn(1, len(TAPS), length, transformer.config["enc_hidden_dim"], generator=generator)
    usual: dict[str, Any] = {"prompt_embeds": features.to(device, dtype), "height": side, "width": side}
    settings = {
        "20 steps, guided": {"num_inference_steps": 20, "guidance_scale": 5.0},
        "4 steps": {"num_inference_steps": 4, "guidance_scale": 1.0},
    }

    def call(kind: dict[str, Any], output_type: str) -> Callable[[], Any]:
        return lambda: pipe(**usual, **kind, output_type=output_type, generator=torch.Generator().manual_seed(4))

    calls = {name: call(kind, "pt") for name, kind in settings.items()}
    calls |= {f"{name}, tokens only": call(kind, "latent") for name, kind in settings.items()}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    timed = time_calls(calls, repeats=repeats, warmup=2, device=device)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    print(f"\npictures of {side} px, {'compiled' if compiled else 'not compiled'}")
    found: dict[str, Any] = {}
    for name in calls:
        seconds = timed.timings[name].seconds("wall")
        found[name] = {"seconds": seconds.median, "published_h100": PUBLISHED_SECONDS.get(name)}
        beside = f"; published {PUBLISHED_SECONDS[name]} s on an H100" if on_gpu and name in PUBLISHED_SECONDS else ""
        print(f"  {name:32}{seconds.median:8.3f} s{beside}")
    if peak is not None:
        print(f"  peak memory {peak / 1e9:.1f} GB")
    return {"pixels": side, "fields": fields, "peak_bytes": peak, "pictures": found, "timings": timed.to_dict()}


def small_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", nargs="+", type=int, default=[512], help="of blocks and guided steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args(arguments)
    started = datetime.now(UTC)
    device = resolved_device(chosen.device)
    on_gpu = device.type == "cuda"
    clock = comparable_clock(device)
    dtype = getattr(torch, chosen.dtype) if chosen.dtype else (torch.bfloat16 if on_gpu else torch.float32)
    print(f"{device}, {dtype}, {clock} time")
    metrics: dict[str, Any] = {"memory": weights_in_memory(), "flops": counted(TEXT_TOKENS, (512, 768, 1024, 1440))}
    timing = (device, dtype, clock, chosen.repeats)
    metrics["block"] = {str(side): one_block(side, TEXT_TOKENS, *timing) for side in chosen.pixels}
    metrics["guidance"] = {str(side): guidance(side, (TEXT_TOKENS, 415), *timing) for side in chosen.pixels}
    metrics["pictures"] = {"not compiled": pictures(device, dtype, chosen.repeats, compiled=False)}
    if on_gpu:
        metrics["pictures"]["compiled"] = pictures(device, dtype, chosen.repeats, compiled=True)
    name = f"lens-forward-{str(dtype).removeprefix('torch.')}"
    print(write_result(name, metrics, vars(chosen) | {"dtype": dtype, "clock": clock}, seed=0, started=started))


if __name__ == "__main__":
    main()
