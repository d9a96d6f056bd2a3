"""What the full covariance costs: one Jacobian product and one whole step, as multiples of one forward pass.

Claims measured (this library's targets): a product by VJP on the retained graph takes at most 1.2 forward passes, a
step with m = 3 at most 4.7, an adaptive step at most 3 on average over 25 steps. Also the memory of the saved graph,
and how much of a step is spent outside the network (Gram-Schmidt, the small eigenproblem, waiting for it).

The networks have random weights, for which a cost is what it is; how many products an adaptive step takes is not, and
is counted on the 1/f^2 spectrum of images, where the denoiser is exact, and with ``--run`` on a trained network too.

    python benchmarks/lgs_cost.py --models unet-small dit --repeats 5
    python benchmarks/lgs_cost.py --device cuda --dtype bfloat16 --batch 64
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wellposed.denoisers import NetworkDenoiser, from_diffusers
from wellposed.evaluation.speed import Comparison, comparable_clock, saved_graph_bytes, time_calls
from wellposed.lgs.jacobian import ProductMethod, linearize
from wellposed.lgs.path_kl import lanczos_path_kl, stationary_image_spectrum
from wellposed.lgs.reverse import ReversePoint, reverse_step
from wellposed.lgs.sampler import LanczosCovariance, LanczosSettings, sample
from wellposed.paths import GaussianPath
from wellposed.recipes.ddpm_draw import linear_trajectory, load_denoiser
from wellposed.recipes.device import resolved_device
from wellposed.report.record import write_result

TARGETS = {"product": 1.2, "step m = 3": 4.7, "step adaptive, 25 steps": 3.0}
ADAPTIVE = LanczosSettings(num_lanczos_steps=3, tol=1e-2)
NOISY, CLEANER = 0.4, 0.36  # an ordinary step in the middle of a chain of 25
MIB = 2**20


def unet_cifar() -> nn.Module:
    """The network of google/ddpm-cifar10-32: 35.7 M parameters."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


def unet_small() -> nn.Module:
    """A U-Net of 4.4 M parameters on the same images."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )


def dit() -> nn.Module:
    """DiT-S/2 on latents of 32 x 32 (2212.09748), 39.8 M parameters with the embeddings."""
    return DiTTransformer2DModel(
        sample_size=32,
        num_layers=12,
        num_attention_heads=6,
        attention_head_dim=64,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_elementwise_affine=False,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"unet-cifar": unet_cifar, "unet-small": unet_small, "dit": dit}


class Bench:
    """A network with a state to take steps from."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.model: Any = MODELS[name]().eval().to(device)
        if dtype != torch.float32:
            self.model = self.model.to(dtype)
        self.device, self.dtype, self.batch = device, dtype, batch
        self.denoiser: NetworkDenoiser = from_diffusers(self.model, DDPMScheduler())
        shape = (batch, self.model.config.in_channels, 32, 32)
        self.x, self.z = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
        self.cond = {"class_labels": torch.zeros(batch, dtype=torch.long, device=device)} if name == "dit" else {}
        self.bridge = self.denoiser.path.bridge(NOISY, CLEANER)

    def predict(self, x: Tensor) -> Tensor:
        return self.denoiser.predict(x, NOISY, **self.cond)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.predict(self.x)

    def point(self, method: ProductMethod | None) -> ReversePoint:
        linear = None if method is None else linearize(self.predict, self.x, method=method, module=self.model)
        return ReversePoint(
            x_t=self.x,
            t=NOISY,
            bridge=self.bridge,
            prediction=self.forward() if linear is None else linear.output,
            prediction_type=self.denoiser.prediction_type,
            jacobian_product=None if linear is None else linear.product,
        )

    def step(self, m: int, method: ProductMethod = "vjp") -> Tensor:
        covariance = LanczosCovariance(LanczosSettings(num_lanczos_steps=m, method=method))
        return reverse_step(self.point(method if m else None), covariance, self.z, clip=1.0).x_s


def timings(bench: Bench, methods: list[ProductMethod], repeats: int) -> Comparison:
    """Forward pass, products, steps, all taking turns."""
    retained = bench.point("vjp").jacobian_product
    assert retained is not None
    # Entries of an operator that costs nothing: what is left of a step is what happens outside the network.
    scale = torch.rand(bench.x.shape, generator=torch.Generator().manual_seed(1)).to(bench.device, bench.dtype)
    idle = replace(bench.point(None), jacobian_product=lambda v: scale * v)
    three = LanczosCovariance(LanczosSettings(num_lanczos_steps=3))
    products = {method: bench.point(method).jacobian_product for method in methods if method != "vjp"}
    products["vjp"] = retained
    calls: dict[str, Callable[[], object]] = {
        "forward": bench.forward,
        "forward with graph": lambda: linearize(bench.predict, bench.x, module=bench.model),
        **{f"product {method}": (lambda p=p: p(bench.z)) for method, p in products.items() if p is not None},
        **{f"step m = {m}": (lambda m=m: bench.step(m)) for m in range(4)},
        "outside, m = 3": lambda: three.draw(bench.z.float(), idle),
    }
    return time_calls(calls, repeats=repeats, warmup=2, baseline="forward", device=bench.device)


class CheckpointInputs:
    """Gradient checkpointing that counts what it keeps."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return checkpoint(block, *inputs, use_reentrant=False)

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def graph_mib(bench: Bench) -> dict[str, float]:
    """MiB a sample that autograd keeps for the products."""

    def kept() -> float:
        def run() -> Tensor:
            return bench.predict(bench.x.clone().requires_grad_())

        return saved_graph_bytes(run, exclude=bench.model.parameters()) / bench.batch / MIB

    found = {"with parameter gradients": kept()}
    bench.model.requires_grad_(False)
    found["frozen"] = kept()
    inputs = CheckpointInputs()
    bench.model.enable_gradient_checkpointing(inputs)
    # The inputs of checkpointed blocks are kept by closures, out of sight of autograd's hooks.
    found["frozen, gradient checkpointing"] = kept() + inputs.bytes() / bench.batch / MIB
    bench.model.disable_gradient_checkpointing()
    if bench.device.type == "cuda":
        found |= peak_mib(bench)
    bench.model.requires_grad_(True)
    return found


def peak_mib(bench: Bench) -> dict[str, float]:
    """Peak of a step with m = 3 beyond that of a forward pass, per sample, without and with gradient checkpointing."""
    found: dict[str, float] = {}
    for name in ("peak", "peak, gradient checkpointing"):
        if name != "peak":
            bench.model.enable_gradient_checkpointing()
        measured = time_calls(
            {"forward": bench.forward, "step": lambda: bench.step(3)}, repeats=3, warmup=1, device=bench.device
        )
        forward, step = (measured.timings[call].peak_bytes or 0 for call in ("forward", "step"))
        found[name] = (step - forward) / bench.batch / MIB
    bench.model.disable_gradient_checkpointing()
    return found


def checkpointed(bench: Bench, repeats: int) -> Comparison:
    """A product and a step when the graph is recomputed instead of kept."""
    bench.model.enable_gradient_checkpointing()
    product = bench.point("vjp").jacobian_product
    assert product is not None
    calls = {"forward": bench.forward, "product vjp": lambda: product(bench.z), "step m = 3": lambda: bench.step(3)}
    found = time_calls(calls, repeats=repeats, warmup=1, baseline="forward", device=bench.device)
    bench.model.disable_gradient_checkpointing()
    return found


def times_of(path: GaussianPath, steps: int) -> list[float]:
    """The linear trajectory."""
    count = path.num_train_timesteps
    assert count is not None
    return [(index + 1) / count for index in linear_trajectory(count, steps)]


def products_on_image_spectrum(path: GaussianPath, steps: int, draws: int = 16) -> dict[str, float]:
    """Products of an adaptive step, averaged over a chain, on a colour image's spectrum with the exact denoiser."""
    spectrum = stationary_image_spectrum(32, channel_shares=(0.9, 0.07, 0.03))
    settings = replace(ADAPTIVE, max_variance=None)
    generator = torch.Generator().manual_seed(0)
    found = lanczos_path_kl(spectrum, path, times_of(path, steps), settings, generator=generator, num_draws=draws)
    # The step to t = 0 takes none.
    return {"products": float(found.products.sum()) / steps, "path_kl": found.total}


def chains(run: Path, device: torch.device, batch: int, steps: int, repeats: int) -> tuple[Comparison, float]:
    """Whole chains of a trained network against as many forward passes, and the products of an adaptive step."""
    denoiser = load_denoiser(run / "pipeline", device)
    times = times_of(denoiser.path, steps)
    size = int(denoiser.model.config["sample_size"])
    x = torch.randn(batch, int(denoiser.model.config["in_channels"]), size, size, device=device)

    def chain(settings: LanczosSettings) -> Any:
        generator = torch.Generator(device).manual_seed(0)
        return sample(denoiser, x, times, LanczosCovariance(settings), generator=generator, clip=1.0)[1]

    calls = {
        "m = 0": lambda: chain(LanczosSettings(num_lanczos_steps=0)),
        "adaptive": lambda: chain(ADAPTIVE),
        "m = 3": lambda: chain(LanczosSettings(num_lanczos_steps=3)),
    }
    record = chain(ADAPTIVE)
    return time_calls(calls, repeats=repeats, warmup=1, device=device), sum(record.products) / steps


def measure(name: str, bench: Bench, chosen: argparse.Namespace, products: dict[str, float]) -> dict[str, Any]:
    """Everything about one network; prints it."""
    clock = comparable_clock(bench.device)
    comparison = timings(bench, chosen.methods, chosen.repeats)
    seconds = comparison.timings["forward"].seconds(clock).median
    count = sum(parameter.numel() for parameter in bench.model.parameters()) / 1e6
    print(f"\n{name}: {count:.1f} M parameters, batch {bench.batch}, {bench.dtype}, forward {1000 * seconds:.1f} ms")
    for call in comparison.timings:
        print(
            f"  {call:22} {comparison.ratio(call, clock=clock)!s:>24} forwards by {clock} time, "
            f"{comparison.ratio(call)!s:>24} by the wall"
        )

    def ratio(call: str) -> float:
        return comparison.ratio(call, clock=clock).median

    kept = checkpointed(bench, max(3, chosen.repeats // 2))
    memory = graph_mib(bench)
    outside = ratio("outside, m = 3")
    adaptive = ratio("forward with graph") + products["products"] * (ratio("product vjp") + outside / 3)
    results = {
        "product": ratio("product vjp"),
        "step m = 3": ratio("step m = 3"),
        "step adaptive, 25 steps": adaptive,
        "outside share of m = 3": outside / ratio("step m = 3"),
        "checkpointed product": kept.ratio("product vjp", clock=clock).median,
        "checkpointed step m = 3": kept.ratio("step m = 3", clock=clock).median,
    }
    for what, value in results.items():
        target = TARGETS.get(what)
        verdict = "" if target is None else f"  target <= {target}: {'met' if value <= target else 'missed'}"
        print(f"  {what:24} {value:6.3f}{verdict}")
    print("  saved graph, MiB a sample: " + ", ".join(f"{what} {mib:.1f}" for what, mib in memory.items()))
    return {
        "timings": comparison.to_dict(),
        "summary": results,
        "graph_mib": memory,
        "parameters": count,
        "clock": clock,
    }


def main() -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=["vjp", "jvp", "difference"], default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--run", type=Path, help="a run of lgs_tiny: whole chains of a trained network")
    chosen = parser.parse_args()
    started = datetime.now(UTC)
    device, dtype = resolved_device(chosen.device), getattr(torch, chosen.dtype)
    if chosen.methods is None:
        # Differences of half-precision numbers are refused by the library.
        chosen.methods = ["vjp", "jvp", "difference"] if dtype == torch.float32 else ["vjp", "jvp"]
    path = from_diffusers(unet_small(), DDPMScheduler()).path
    products = {steps: products_on_image_spectrum(path, steps) for steps in (10, 25, 50)}
    for steps, found in products.items():
        print(
            f"image spectrum, T = {steps}: {found['products']:.2f} products a step at tol {ADAPTIVE.tol:g}, "
            f"path KL {found['path_kl']:.2f} nats"
        )
    metrics: dict[str, Any] = {"adaptive_products": products, "targets": TARGETS}
    for name in chosen.models:
        metrics[name] = measure(name, Bench(name, device, dtype, chosen.batch), chosen, products[25])
    if chosen.run is not None:
        comparison, mean = chains(chosen.run, device, 64, 25, max(3, chosen.repeats // 3))
        clock = comparable_clock(device)
        print(f"\ntrained digits, T = 25, batch 64: {mean:.2f} products an adaptive step")
        for call in comparison.timings:
            print(f"  {call:10} {comparison.ratio(call, clock=clock)!s:>24} times a chain of plain steps")
        metrics["trained"] = {"products": mean, "timings": comparison.to_dict()}
    settings = {name: value for name, value in vars(chosen).items() if name != "run"}
    print(write_result(f"lgs-cost-{chosen.dtype}-batch{chosen.batch}", metrics, settings, seed=0, started=started))


if __name__ == "__main__":
    main()
