"""What queries cost: encoding, a training step and a generator's step, with and without, in one run.

At the published shapes: DINOv2-B with registers at 224 pixels, eight queries at taps 0, 3, 6, 9. Decoders have one of
RAE's three sizes; the published one is XL. Multiply-adds are what torch counts as it runs. Targets: encoding and
training within 1.06 times the plain autoencoder's.

    python benchmarks/decq_cost.py                                             # a CPU, minutes
    python benchmarks/decq_cost.py --device cuda --dtype bfloat16 --batch 32 --decoder XL --generator XL
"""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
from diffusers import AutoencoderRAE
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from wellposed.decq.condenser import AbsorbedCondenserAttnProcessor, CondenserAttention, CondenserAttnProcessor
from wellposed.evaluation.speed import Comparison, saved_graph_bytes, time_calls
from wellposed.models import AutoencoderDecQ, DecQTransformer2DModel
from wellposed.report.record import write_result

DECODERS = {
    "B": {"decoder_hidden_size": 768, "decoder_num_hidden_layers": 12, "decoder_num_attention_heads": 12},
    "L": {"decoder_hidden_size": 1024, "decoder_num_hidden_layers": 24, "decoder_num_attention_heads": 16},
    "XL": {"decoder_hidden_size": 1152, "decoder_num_hidden_layers": 28, "decoder_num_attention_heads": 16},
}
WIDTHS = {"B": 3072, "L": 4096, "XL": 4096}
TARGET = 1.06
# torch counts the attention kernels of GPUs only.
CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def multiply_adds(call: Callable[[], object]) -> float:
    """In units of 10^9."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        call()
    return counter.get_total_flops() / 2e9


def show(name: str, measured: Comparison, counts: dict[str, float]) -> dict[str, Any]:
    """Prints and returns ratios to the first."""
    clock = "process" if measured.device == "cpu" else "wall"
    first = next(iter(counts))
    print(f"{name}:")
    for one, count in counts.items():
        ratio = measured.ratio(one, clock=clock)
        print(f"  {one:32} {ratio} of the time, {count / counts[first]:.4f} of {counts[first]:.2f} G multiply-adds")
    return {"timing": measured.to_dict(), "multiply_adds_G": counts}


def main() -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--decoder", choices=list(DECODERS), default="B")
    parser.add_argument("--generator", choices=["S", "B", "L", "XL"], default="S")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    started = datetime.now(UTC)
    device, dtype = torch.device(chosen.device), getattr(torch, chosen.dtype)
    shape: dict[str, Any] = {
        **DECODERS[chosen.decoder],
        "decoder_intermediate_size": WIDTHS[chosen.decoder],
        "noise_tau": 0.8,
    }
    torch.manual_seed(0)
    rae = AutoencoderRAE(**shape).to(device, dtype)
    plain = AutoencoderDecQ.from_rae(rae)
    ours = AutoencoderDecQ.from_rae(rae, num_queries=8)
    projected = AutoencoderDecQ.from_rae(rae, num_queries=8)
    for condenser in (module for module in projected.modules() if isinstance(module, CondenserAttention)):
        condenser.processor = CondenserAttnProcessor()
    models: dict[str, Any] = {"AutoencoderRAE": rae, "K = 0": plain, "K = 8": ours, "K = 8, projected keys": projected}
    assert any(isinstance(getattr(m, "processor", None), AbsorbedCondenserAttnProcessor) for m in ours.modules())
    images = torch.rand(chosen.batch, 3, 256, 256, device=device, dtype=dtype)
    timing: dict[str, Any] = {"repeats": chosen.repeats, "warmup": 1, "device": device}
    metrics: dict[str, Any] = {}

    def encoding(model: nn.Module) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return model.eval().encode(images)

        return call

    calls = {name: encoding(model) for name, model in models.items()}
    counts = {name: multiply_adds(call) for name, call in calls.items()}
    metrics["encode"] = show("encoding", time_calls(calls, **timing), counts)

    def training(model: nn.Module) -> Callable[[], Tensor]:
        def call() -> Tensor:
            loss = (model.train()(images).sample - images).abs().mean()
            loss.backward()
            model.zero_grad()
            return loss.detach()

        return call

    # AutoencoderRAE keeps its encoder's graph for a loss on features, which no one asked for here.
    steps = {name: training(model) for name, model in models.items() if name != "AutoencoderRAE"}
    counts = {name: multiply_adds(call) for name, call in steps.items()}
    metrics["train"] = show("a training step of stage one (L1)", time_calls(steps, **timing), counts)
    for name in ("K = 0", "K = 8"):
        model = models[name]
        kept = saved_graph_bytes(lambda model=model: model(images).sample.sum(), exclude=model.parameters())
        metrics[f"graph_bytes, {name}"] = kept
        print(f"  {name:32} keeps {kept / 1e6:.0f} MB for the backward pass")

    latents = torch.randn(chosen.batch, 768, 16, 16, device=device, dtype=dtype)
    queries = torch.randn(chosen.batch, 8, 768, device=device, dtype=dtype)
    t, labels = torch.full((chosen.batch,), 0.5, device=device), torch.zeros(chosen.batch, dtype=torch.long).to(device)
    generators = {
        name: DecQTransformer2DModel.of_size(chosen.generator, num_queries=count).to(device, dtype).eval()
        for name, count in (("256 tokens", 0), ("264 tokens", 8))
    }

    def generating(name: str) -> Callable[[], object]:
        network = generators[name]
        given = queries if network.config["num_queries"] else None

        def call() -> object:
            with torch.no_grad():
                return network(latents, t, labels, query_hidden_states=given)

        return call

    calls = {name: generating(name) for name in generators}
    counts = {name: multiply_adds(call) for name, call in calls.items()}
    metrics["generate"] = show(f"a step of DiT^DH-{chosen.generator}", time_calls(calls, **timing), counts)
    print(f"targets: encoding and training within {TARGET} of the plain autoencoder's")
    settings = {**vars(chosen), "threads": torch.get_num_threads(), "target": TARGET}
    name = f"decq-cost-{chosen.dtype}-batch{chosen.batch}-decoder{chosen.decoder}"
    print(write_result(name, metrics, settings, seed=0, started=started))


if __name__ == "__main__":
    main()
