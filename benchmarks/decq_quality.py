"""What do detail-condensing queries give back, and does a generator on their latents learn faster? Real images, seeds.

One frozen encoder, one decoder, one budget for all; only queries, taps and summed layers differ:

(i)   reconstruction: PSNR, SSIM and error by frequency of K = 0 (the plain RAE), 2, 8, 16, of shallow, deep, spread and
      all taps, and of the sum of the last layers with and without queries (the idea of RAEv2);
(ii)  generation: Frechet distance by epoch on the latents of both kinds, time to the RAE's best in epochs, steps and
      seconds (with the seeds that never get there counted), and the patches of DecQ's generator decoded by the plain
      autoencoder of the same patch latents ("queries discarded");
(iii) what the encoder knows (linear probe), what taps do, and what neighbours by queries and by patches share.

    python benchmarks/decq_quality.py                                    # digits in random colours
    python benchmarks/decq_quality.py --data DATA                        # CIFAR-10 as JPEGs, classifier's features
    python benchmarks/decq_quality.py --part generation --seeds 0         # trains what is missing of these only
"""

import argparse
import io
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from wellposed.data.images import ImageDataset, StoredPixels
from wellposed.data.pictures import save_image_grid
from wellposed.decq.latents import EncodedImages
from wellposed.evaluation.features import FeatureExtractor, hash_weights
from wellposed.evaluation.linear_probe import fit_linear_probe
from wellposed.evaluation.neighbours import neighbour_colour_difference, neighbour_label_agreement, token_neighbours
from wellposed.recipes.ddpm_recipe import FeatureEvaluation
from wellposed.recipes.decq import TINY_TAPS, decq_tiny, tiny_encoder, with_joint_loss
from wellposed.recipes.decq_comparison import (
    Arm,
    GenerationCurve,
    ReconstructionOutcome,
    arms,
    compare_generation,
    compare_reconstructions,
    convergence,
    stage_one,
)
from wellposed.recipes.latent_recipe import EncoderSource, LatentRecipe
from wellposed.recipes.latent_stages import encoder_stage
from wellposed.recipes.real_images import real_images
from wellposed.recipes.stages import StageOptions
from wellposed.report.record import write_result

BLOCK_SIZES = (32, 8, 1)  # mean colour, means of a 4 x 4 grid, the rest
JOINT = "K = 8, one mean"
GENERATED = ("RAE", "K = 8, spread", JOINT, "K = 8, shallow", "K = 8, deep", "K = 8, all")
GENERATED += ("last 4 layers", "last 4 layers, K = 8")
PUBLISHED_SPEED = {"ratio": 3.3, "by": "epochs", "of": "800/240, DiT^DH-XL on ImageNet 256, gFID 1.51 (one run each)"}
PROBED, NEIGHBOURS = 4000, 5

PUBLISHED = """\
published (arXiv 2605.22777, ImageNet 256, DINOv2-B; not measured here):
  PSNR: RAE 19.61 (19.13 in another table), K = 2 20.89, 8 22.76, 16 24.41; taps shallow 23.47, deep 20.72, all 22.67
  gFID, DiT^DH-S, 80 epochs: RAE 6.05, K = 2 5.94, 8 4.74, 16 6.43; shallow 6.35, deep 5.09, all 4.77
  gFID, DiT^DH-XL, 80 epochs: RAE 2.16, queries discarded 1.99, all 1.80; RAE's 1.51 of 800 epochs at 240: 3.3x"""


def coloured_digits(chosen: argparse.Namespace) -> LatentRecipe:
    """``decq_tiny`` with the L1 distance alone: what is compared is pixels."""
    recipe = decq_tiny()
    return replace(recipe, reconstruction=replace(recipe.reconstruction, perceptual=None, discriminator=None))


def cifar(chosen: argparse.Namespace) -> LatentRecipe:
    """The same networks on CIFAR-10, compressed as JPEG: 10 classes, features of a public classifier."""
    path = chosen.data / "cifar10" / "cifar10_jpegq75_full.npz"
    sets = {part: _jpegs(path, part) for part in ("train", "test")}
    recipe = coloured_digits(chosen)
    return replace(
        recipe,
        name="decq_cifar10_jpeg",
        encoder=EncoderSource(get=_cifar_encoder(sets["train"], chosen.encoder_steps), what="trained on its classes"),
        # Latents of fewer images are encoded in seconds; a generator of this budget sees each of them a few times.
        dataset=lambda folder: _first(sets["train"], chosen.images),
        test_dataset=lambda folder: sets["test"],
        evaluation=FeatureEvaluation(num_samples=chosen.samples, extractor=_resnet(chosen.data)),
    )


def _jpegs(path: Path, part: str) -> ImageDataset:
    with np.load(path, allow_pickle=False) as held:
        blob, ends, labels = (held[f"{name}_{part}"] for name in ("blob", "off", "y"))
    pixels = [
        np.asarray(Image.open(io.BytesIO(blob[start:end].tobytes())).convert("RGB"))
        for start, end in pairwise(ends.tolist())
    ]
    return ImageDataset(
        name=f"CIFAR-10-JPEG ({part})",
        source=StoredPixels(pixels=torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()),
        labels=torch.from_numpy(labels.astype(np.int64)),
    )


def _first(images: ImageDataset, count: int) -> ImageDataset:
    assert images.labels is not None
    pixels = images.source.read(torch.arange(count))
    return ImageDataset(
        name=f"{images.name}, the first {count}", source=StoredPixels(pixels=pixels), labels=images.labels[:count]
    )


def _cifar_encoder(images: ImageDataset, steps: int) -> Callable[..., nn.Module]:
    def get(folder: Path, data: Path, seed: int, device: str) -> nn.Module:
        return tiny_encoder(folder, replace(images, flip=True), steps=steps, seed=seed, device=device, task="classes")

    return get


class _ResNet(nn.Module):
    """A residual network for CIFAR-10 of 6 n + 2 layers with parameter-free shortcuts; its mean features."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name.replace(".", "_"): w for name, w in weights.items()})
        self.requires_grad_(False)
        self.depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layer1"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        parts = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(self.weights[f"{name}_{part}"] for part in parts))

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = functional.conv2d((images - mean) / std, self.weights["conv1_weight"], padding=1)
        x = self._norm("bn1", x).relu()
        for stage in (1, 2, 3):
            for block in range(self.depth):
                name, stride = f"layer{stage}_{block}", 2 if stage > 1 and block == 0 else 1
                y = functional.conv2d(x, self.weights[f"{name}_conv1_weight"], stride=stride, padding=1)
                y = functional.conv2d(
                    self._norm(f"{name}_bn1", y).relu(), self.weights[f"{name}_conv2_weight"], padding=1
                )
                y = self._norm(f"{name}_bn2", y)
                if stride == 2:
                    added = y.shape[1] // 4
                    x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, added, added))
                x = (x + y).relu()
        return x.mean((2, 3))


def _resnet(data: Path) -> Callable[[Path, str], FeatureExtractor]:
    def extractor(run: Path, device: str) -> FeatureExtractor:
        file = data / "cifar_resnet" / "resnet20.safetensors"
        weights = load_file(file)
        network = _ResNet({name: w for name, w in weights.items() if w.is_floating_point()})
        return FeatureExtractor(
            function=network, name=f"CIFAR-10 {file.stem}, 64 features", weights_hash=hash_weights(network)
        )

    return extractor


def reconstruction(chosen: argparse.Namespace, found: list[Arm], encoder: nn.Module) -> dict[str, Any]:
    """Part (i)."""

    def show(outcome: ReconstructionOutcome, made: Any) -> None:
        print(
            f"  {outcome.arm:22} seed {outcome.seed}: {outcome.psnr:.2f} dB, SSIM {outcome.ssim:.3f}, "
            f"gain {outcome.gain[0]:+.2f} dB; by band "
            + ", ".join(f"{gain:+.2f}" for gain, _ in outcome.band_gains)
            + ("" if outcome.taps is None else f"; taps {[round(x, 2) for x in outcome.taps.reconstruction]}"),
            flush=True,
        )
        if outcome.seed == chosen.seeds[0]:
            grid = chosen.out / "pictures" / f"{outcome.arm}.png"
            save_image_grid(made.images[:16].float() / 255, grid, columns=16, enlarge=2)

    outcomes = compare_reconstructions(
        [arm for arm in found if arm.autoencoder is None],
        encoder,
        chosen.out,
        seeds=chosen.seeds,
        steps=chosen.reconstruction_steps,
        block_sizes=BLOCK_SIZES,
        count=chosen.test_images,
        on_outcome=show,
    )
    summary: dict[str, Any] = {}
    for arm in dict.fromkeys(outcome.arm for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.arm == arm]
        summary[arm] = {
            "psnr": _over_seeds([one.psnr for one in mine]),
            "ssim": _over_seeds([one.ssim for one in mine]),
            "gain_db": _over_seeds([one.gain[0] for one in mine]),
            "band_gains_db": [
                _over_seeds([one.band_gains[band][0] for one in mine]) for band in range(len(BLOCK_SIZES))
            ],
            "trained_parameters": mine[0].parameters,
        }
        gain = summary[arm]["gain_db"]
        print(f"{arm:22} PSNR {summary[arm]['psnr'][0]:.2f} dB, gain {gain[0]:+.2f} +- {gain[1]:.2f}", flush=True)
    return {"summary": summary, "outcomes": [asdict(outcome) for outcome in outcomes]}


def generation(chosen: argparse.Namespace, found: list[Arm], encoder: nn.Module) -> dict[str, Any]:
    """Part (ii)."""
    recipe = found[0].recipe
    real = real_images(
        recipe.evaluation, recipe.training_images, folder=recipe.folder, run=chosen.out, device=torch.device("cpu")
    )

    def show(curve: GenerationCurve, samples: Tensor) -> None:
        values = " ".join(f"{value:.2f}" for value in curve.frechet)
        last = "" if curve.discarded is None else f"; queries discarded {curve.discarded:.2f}"
        print(f"  {curve.arm:22} seed {curve.seed}: {values}{last}", flush=True)
        if curve.seed == chosen.seeds[0]:
            save_image_grid(samples[:40], chosen.out / "pictures" / f"generated {curve.arm}.png", columns=10, enlarge=2)

    curves = compare_generation(
        [arm for arm in found if arm.name in GENERATED],
        encoder,
        chosen.out,
        real,
        seeds=chosen.seeds,
        reconstruction_steps=chosen.reconstruction_steps,
        steps=chosen.generation_steps,
        every=chosen.every,
        count=chosen.samples,
        sampling_steps=chosen.sampling_steps,
        on_curve=show,
    )
    by_arm = {arm.name: [curve for curve in curves if curve.arm == arm.name] for arm in found if arm.name in GENERATED}
    plain, *others = by_arm.values()
    speed: dict[str, Any] = {}
    for mine in others:
        measured = [convergence(mine, plain, by=by) for by in ("epochs", "steps", "seconds")]
        speed[mine[0].arm] = {one.by: asdict(one) for one in measured}
        for one in measured:
            mean = "no mean" if one.mean is None else f"mean {one.mean[0]:.2f} +- {one.mean[1]:.2f}"
            print(
                f"{one.arm:22} the RAE's {one.by} to its best over ours to the same: {mean}; {one.censored} of "
                f"{len(one.ratios)} seeds never got there (published: {PUBLISHED_SPEED['ratio']} in epochs)",
                flush=True,
            )
    floor = real.floor(chosen.samples)
    print(f"real images against real ones: {floor}")
    return {
        "floor": floor,
        "extractor": real.extractor.name,
        "curves": [asdict(curve) for curve in curves],
        "convergence": speed,
        "published_convergence": PUBLISHED_SPEED,
    }


def findings(chosen: argparse.Namespace, found: list[Arm], encoder: nn.Module) -> dict[str, Any]:
    """Part (iii)."""
    arm = next(arm for arm in found if arm.name == "K = 8, spread")
    seed = chosen.seeds[0]
    autoencoder = stage_one(arm, encoder, chosen.out, seed=seed, steps=chosen.reconstruction_steps).model
    images = arm.recipe.training_images()
    test = arm.recipe.test_images()
    encoded = EncodedImages(autoencoder, images)

    def tokens(of: EncodedImages, count: int) -> tuple[Tensor, Tensor]:
        parts = [of.encode(range(start, min(start + 250, count)), mirrored=False) for start in range(0, count, 250)]
        patches = torch.cat([part.latents.flatten(2).transpose(1, 2) for part in parts])
        queries = torch.cat([part.query_latents for part in parts if part.query_latents is not None])
        return patches, queries

    patches, queries = tokens(encoded, min(PROBED, len(images)))
    measured: dict[str, Any] = {}
    if images.labels is not None and test.labels is not None:
        labels, held_out = images.labels[: len(patches)], test.labels[: len(patches) // 2]
        others = tokens(EncodedImages(autoencoder, test), len(held_out))
        for name, here, there in (("patches", patches, others[0]), ("queries", queries, others[1])):
            probe = fit_linear_probe(
                here.mean(1) if name == "patches" else here.flatten(1), labels, num_classes=int(labels.max()) + 1
            )
            accuracy = probe.accuracy(there.mean(1) if name == "patches" else there.flatten(1), held_out)
            measured[f"linear probe, {name}"] = asdict(accuracy)
            print(f"linear probe of {name}: {accuracy}", flush=True)
    count = min(2000, len(patches))
    pixels = ImageDataset(name=images.name, source=images.source).batch(range(count)).images
    for name, some in (("queries", queries[:count]), ("patches", patches[:count])):
        nearest = token_neighbours(some, NEIGHBOURS)
        colour = neighbour_colour_difference((pixels + 1) / 2, nearest)
        measured[f"neighbours by {name}, mean colour"] = {**asdict(colour), "ratio": colour.ratio}
        print(f"neighbours by {name}: difference of mean colour {colour}", flush=True)
        if images.labels is not None:
            same = neighbour_label_agreement(images.labels[:count], nearest)
            measured[f"neighbours by {name}, class"] = {**asdict(same), "ratio": same.ratio}
            print(f"neighbours by {name}: same class {same}", flush=True)
    return measured


def _over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


PARTS = {"reconstruction": reconstruction, "generation": generation, "findings": findings}


def main() -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10/ and cifar_resnet/")
    parser.add_argument("--out", type=Path, help="folder of autoencoders and generators (default: by data)")
    parser.add_argument("--part", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--arms", nargs="+", help="names of the arms, None for all; the first is the plain RAE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=10_000, help="of CIFAR-10, for both stages")
    parser.add_argument("--encoder-steps", type=int, default=2000)
    parser.add_argument("--reconstruction-steps", type=int, default=400)
    parser.add_argument("--generation-steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=150)
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--sampling-steps", type=int, default=12)
    parser.add_argument("--label", default="", help="appended to the name of the result")
    parser.add_argument("--no-result", action="store_true", help="only train what is missing")
    chosen = parser.parse_args()
    set_name = "coloured-digits" if chosen.data is None else "cifar10-jpeg"
    chosen.out = chosen.out or Path("runs") / f"decq_quality_{set_name}"
    recipe = coloured_digits(chosen) if chosen.data is None else cifar(chosen)
    print(PUBLISHED)
    every = arms(recipe, TINY_TAPS)
    spread = next(arm for arm in every if arm.name == "K = 8, spread")
    every.append(Arm(name=JOINT, recipe=with_joint_loss(spread.recipe), autoencoder=spread.name))
    found = [arm for arm in every if chosen.arms is None or arm.name in chosen.arms]
    encoder = encoder_stage(recipe, chosen.out / "encoder", StageOptions(seed=0))
    for part in chosen.part:
        started = datetime.now(UTC)
        metrics = PARTS[part](chosen, found, encoder)
        if not chosen.no_result:
            settings = {name: value for name, value in vars(chosen).items() if not isinstance(value, Path)}
            settings |= {"recipe": recipe.settings(), "threads": torch.get_num_threads()}
            name = f"decq-{part}-{set_name}{chosen.label}"
            print(write_result(name, metrics, settings, seed=chosen.seeds[0], started=started))


if __name__ == "__main__":
    main()
