"""Classifier guidance with every covariance: distance to the exact conditional law, and class agreement on digits.

Claims measured (arXiv 2605.22723 motivates matching the whole trajectory by classifier guidance; the numbers are
ours): with the exact covariance of the *guided* posterior, ten steps reach the conditional law at scale 1; a mean shift
by Sigma, the usual form, profits from the full covariance too but keeps an error of its own. At scales above 1 guided
sampling does not aim at the conditional law: beside the distance to it stands that to the same guided field run in many
steps.

    python benchmarks/lgs_guidance.py                              # the mixture
    python benchmarks/lgs_guidance.py --run runs/lgs_tiny          # and digits
"""

import argparse
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from wellposed.recipes.ddpm_draw import load_denoiser
from wellposed.recipes.device import resolved_device
from wellposed.recipes.digit_features import digit_features
from wellposed.recipes.lgs_guidance import (
    GuidedDigits,
    GuidedMixture,
    guided_digits_study,
    guided_mixture_study,
    train_noisy_classifier,
)
from wellposed.report.record import write_result


def show_mixture(study: GuidedMixture) -> None:
    """One line a row."""
    print(f"mixture: energy distance to the exact conditional law; its own agreement {study.exact_agreement:.3f}")
    for row in study.rows:
        print(
            f"T = {row.steps:<4} scale {row.scale:<4g} {row.variant.name:38}  {row.distance!s:>22}  "
            f"limit {row.limit_distance!s:>22}  agreement {row.agreement:.3f}"
        )


def show_digits(study: GuidedDigits) -> None:
    """One line a row."""
    print(f"digits: agreement of real test images {study.real_agreement}, floor of the distance {study.floor:.2f}")
    for row in study.rows:
        print(
            f"T = {row.steps:<4} scale {row.scale:<4g} {row.form:>9}, m = {row.num_lanczos_steps}  "
            f"agreement {row.agreement!s:>18}  distance {row.frechet:6.2f}  {1000 * row.seconds:7.2f} ms an image"
        )


def main() -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run of lgs_tiny, for the digits")
    parser.add_argument("--device", default="cpu", help="of the digits; the mixture runs on the CPU")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 5.0])
    parser.add_argument("--samples", type=int, default=4000, help="on the mixture; a tenth of it on the digits")
    parser.add_argument("--limit-steps", type=int, default=400)
    parser.add_argument("--classifier-steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    started = datetime.now(UTC)
    mixture = guided_mixture_study(
        chosen.steps, chosen.scales, num_samples=chosen.samples, seed=chosen.seed, limit_steps=chosen.limit_steps
    )
    show_mixture(mixture)
    metrics = {"mixture": asdict(mixture)}
    if chosen.run is not None:
        device = str(resolved_device(chosen.device))
        denoiser = load_denoiser(chosen.run / "pipeline", resolved_device(device))
        classifier = train_noisy_classifier(
            chosen.run / "noisy_classifier", denoiser.path, steps=chosen.classifier_steps, device=device
        )
        digits = guided_digits_study(
            denoiser,
            classifier,
            digit_features(chosen.run / "features", device=device),
            step_counts=chosen.steps,
            scales=chosen.scales,
            num_samples=chosen.samples // 100 * 10,
            seed=chosen.seed,
        )
        show_digits(digits)
        metrics["digits"] = asdict(digits)
    settings = {name: value for name, value in vars(chosen).items() if name not in ("run", "seed")}
    print(write_result("lgs-guidance", metrics, settings, seed=chosen.seed, started=started))


if __name__ == "__main__":
    main()
