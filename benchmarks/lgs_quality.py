"""Quality against wall-clock and network evaluations, for every covariance on one trained network.

Claims measured (arXiv 2605.22723, and this library's own target): LGS beats the diagonal covariances at equal time; its
amortised form (l = 2) keeps the advantage over OCM at OCM's wall-clock. The published LGSb is not known in detail; two
readings are run: ``lgs_amortized`` (m = 1 plus an extrapolated coefficient, re-measured every second step) and
``lgs_shared`` (two consecutive steps share one linearisation).

    python benchmarks/lgs_quality.py                                         # the library's own digits
    python benchmarks/lgs_quality.py --data FOLDER --device cuda             # a pretrained MNIST U-Net and its data

FOLDER holds ``loaders.py`` with functional networks, ``mnist/`` and ``mnist_ddpm_unet/``.
"""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from wellposed.data.bundled import digits
from wellposed.data.images import ImageDataset, StoredPixels
from wellposed.denoisers import NetworkDenoiser, from_diffusers
from wellposed.evaluation.features import FeatureExtractor, hash_weights, unit_images
from wellposed.evaluation.frechet import feature_statistics, frechet_floor
from wellposed.lgs.sampler import LanczosSettings
from wellposed.recipes.ddpm_draw import load_denoiser
from wellposed.recipes.device import resolved_device
from wellposed.recipes.digit_features import digit_features
from wellposed.recipes.lgs import lgs_tiny
from wellposed.recipes.lgs_comparison import (
    Contender,
    Outcome,
    analytic_contender,
    compare,
    deterministic_contenders,
    fixed_contenders,
    head_contender,
    lanczos_contender,
    train_head,
)
from wellposed.report.record import write_result


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A trained network with what it is judged by."""

    name: str
    denoiser: NetworkDenoiser
    scheduler: Any
    images: Tensor
    clip: float | Callable[[Tensor], Tensor]
    max_variance: float
    scale: Callable[[Tensor], Tensor]
    extractor: FeatureExtractor
    data: Any


def own_run(run: Path, device: torch.device) -> Bench:
    """The digits of ``wellposed train lgs_tiny``."""
    if not (run / "pipeline").is_dir():
        lgs_tiny().train(run, device=str(device), resume=run.exists())
    dataset = digits(8, split="train")
    return Bench(
        name="digits",
        denoiser=load_denoiser(run / "pipeline", device),
        scheduler=DDPMScheduler(),
        images=dataset.batch(range(len(dataset))).images.to(device),
        clip=1.0,
        max_variance=1.0,
        scale=unit_images,
        extractor=digit_features(run / "features", device=str(device)),
        data=replace(dataset, labels=None),
    )


class Functional(nn.Module):
    """A network given as a function of a dictionary of weights."""

    def __init__(self, function: Callable[..., Tensor], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            self.register_buffer(name.replace(".", "/"), weight.float())

    def weights(self) -> dict[str, Tensor]:
        """By their own names, on the module's device."""
        return {name.replace("/", "."): weight for name, weight in self.named_buffers()}

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The function at (x, timestep)."""
        return self.function(self.weights(), x, timestep.long())


def pretrained_mnist(folder: Path, device: torch.device) -> Bench:
    """A DDPM U-Net that nobody here trained; epsilon, linear betas, data in [0, 1]."""
    loaders = _module(folder / "loaders.py")
    network = Functional(loaders.mnist_ddpm_unet, load_file(folder / "mnist_ddpm_unet/mnist_ddpm_unet.safetensors"))
    classifier = Functional(
        lambda weights, x, _: loaders.small_clf(weights, x, feats=True),
        load_file(folder / "mnist/classifier_selftrained.safetensors"),
    )
    # Parameters would make load_denoiser's device discovery work; buffers alone do not.
    network.place = nn.Parameter(torch.zeros(1), requires_grad=False)
    network, classifier = network.to(device).eval(), classifier.to(device).eval()
    with np.load(folder / "mnist/mnist.npz") as arrays:
        key = next(name for name in arrays.files if arrays[name].ndim == 3)
        pixels = torch.from_numpy(arrays[key][:10_000].copy())[:, None]
    images = pixels.to(device).float() / 255
    scheduler = DDPMScheduler(clip_sample=False)
    return Bench(
        name="mnist-pretrained",
        denoiser=from_diffusers(network, scheduler),
        scheduler=scheduler,
        images=images,
        clip=lambda x_0: x_0.clamp(0, 1),
        max_variance=0.25,
        scale=lambda x: x.clamp(0, 1),
        extractor=FeatureExtractor(
            function=lambda x: classifier(x, torch.zeros(len(x), device=x.device)),
            name="MNIST classifier (98.96% of test digits)",
            weights_hash=hash_weights(classifier),
            device=device,
        ),
        data=_UnitRange(ImageDataset(name="MNIST", source=StoredPixels(pixels=pixels))),
    )


@dataclass(frozen=True)
class _UnitRange:
    """A data set in [0, 1], the range that this network was trained on."""

    dataset: ImageDataset

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Any, *, epoch: int = 0) -> Any:
        batch = self.dataset.batch(indices, epoch=epoch)
        return type(batch)(images=unit_images(batch.images), labels=None)

    def fingerprint(self) -> str:
        return f"unit range of {self.dataset.fingerprint()}"


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contenders(bench: Bench, folder: Path, head_steps: int, seed: int) -> list[Contender]:
    """All of them; heads are trained on the spot, or left out if ``head_steps`` is 0."""
    denoiser, limits = bench.denoiser, {"clip": bench.clip, "max_variance": bench.max_variance}
    device = str(bench.images.device)
    heads = [
        train_head(
            kind,
            denoiser,
            bench.data,
            folder / kind,
            channels=bench.images.shape[1],
            steps=head_steps,
            batch_size=64,
            seed=seed,
            device=device,
        )
        for kind in (("npr", "sn", "ocm") if head_steps > 0 else ())
    ]

    def lanczos(name: str, share: int = 1, **settings: Any) -> Contender:
        chosen = LanczosSettings(max_variance=bench.max_variance, **settings)
        return lanczos_contender(name, denoiser, chosen, clip=bench.clip, share_linearization=share)

    return [
        *fixed_contenders(denoiser, clip=bench.clip),
        analytic_contender(denoiser, bench.images[:512], seed=seed, **limits),
        *(head_contender(denoiser, head, **limits) for head in heads),
        lanczos("lgs_1", num_lanczos_steps=1),
        lanczos("lgs_2", num_lanczos_steps=2),
        lanczos("lgs_3", num_lanczos_steps=3),
        lanczos("lgs", num_lanczos_steps=3, tol=1e-2),
        lanczos("lgs_loose", num_lanczos_steps=3, tol=5e-2),
        lanczos("lgs_amortized", num_lanczos_steps=1, amortize=2),
        lanczos("lgs_shared", share=2, num_lanczos_steps=1),
        *deterministic_contenders(denoiser, bench.scheduler, clip=bench.clip),
    ]


def main() -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/lgs_tiny"), help="a run of lgs_tiny; trained if missing")
    parser.add_argument("--data", type=Path, help="folder with the pretrained MNIST network")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 25, 50, 100])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--head-steps", type=int, default=500)
    parser.add_argument("--heads", type=Path, default=Path("runs/heads"))
    chosen = parser.parse_args()
    started = datetime.now(UTC)
    device = resolved_device(chosen.device)
    bench = own_run(chosen.run, device) if chosen.data is None else pretrained_mnist(chosen.data, device)
    reference = feature_statistics(bench.scale(bench.images), bench.extractor)
    features = torch.cat(list(bench.extractor.batches(bench.scale(bench.images))))
    count = min(chosen.samples, len(features) // 2)
    floor = frechet_floor(features, num_images=count, generator=torch.Generator().manual_seed(0))
    print(f"{bench.name}: floor {floor:.2f} ({count} real images), {bench.extractor.name}")

    def show(outcome: Outcome, first: Tensor) -> None:
        spread = " ".join(f"{value:.2f}" for value in outcome.frechet)
        print(
            f"T = {outcome.steps:<4} {outcome.name:>14}  {spread:>20}  {1000 * outcome.seconds:8.2f} ms wall  "
            f"{1000 * outcome.cpu_seconds:8.2f} ms CPU  "
            f"{outcome.evaluations:6.1f} evaluations",
            flush=True,
        )

    outcomes = compare(
        contenders(bench, chosen.heads / bench.name, chosen.head_steps, seed=0),
        denoiser=bench.denoiser,
        shape=tuple(bench.images.shape[1:]),
        step_counts=chosen.steps,
        num_samples=chosen.samples,
        batch_size=chosen.batch,
        seeds=chosen.seeds,
        extractor=bench.extractor,
        reference=reference,
        scale=bench.scale,
        on_outcome=show,
    )
    metrics = {
        "floor": floor,
        "floor_images": count,
        "extractor": bench.extractor.name,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(chosen).items()}
    settings = {name: value for name, value in settings.items() if name not in ("run", "data", "heads")}
    print(write_result(f"lgs-quality-{bench.name}", metrics, settings, seed=chosen.seeds[0], started=started))


if __name__ == "__main__":
    main()
