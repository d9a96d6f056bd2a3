"""The room lgs on the demo page."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wellposed.demo.lgs import SHOWN
from wellposed.demo.settings import DemoSettings
from wellposed.report.page import Callout, Column, Figure, Grid, Number, Section, Table
from wellposed.report.pictures import read_png
from wellposed.report.plots import Reference, Series, draw, fitted_slope, lines, scatter
from wellposed.report.styles import method_style

__all__ = ["lgs_numbers", "lgs_sections"]

FIT = (32, 256)
ON_THE_NETWORK = ("beta_tilde", "beta", "analytic", "npr", "sn", "ocm", "lgs_1", "lgs_2", "lgs_3", "lgs")
AGAINST_TIME = ("beta_tilde", "analytic", "ocm", "lgs_3", "lgs", "lgs_amortized", "ddim", "dpm_solver")


def lgs_numbers(theory: Mapping[str, Any], network: Mapping[str, Any], settings: DemoSettings) -> tuple[Number, ...]:
    """Four figures to begin with."""
    steps = settings.path_kl_steps
    slopes = {kind: fitted_slope(steps, theory[kind], FIT) for kind in ("full", "diagonal", "isotropic")}
    few = min(settings.step_counts, key=lambda count: abs(count - 10))
    at = {row["name"]: row["frechet"][0] for row in network["outcomes"] if row["steps"] == few}
    return (
        Number(
            value=f"{slopes['full']:.2f}".replace("-", "−"),
            label="exponent of T in the path KL, full covariance",
            note="theory: −2",
        ),
        Number(
            value=f"{slopes['isotropic']:.2f}".replace("-", "−"),
            label="the same, isotropic covariance",
            note="theory: −1",
        ),
        Number(
            value=f"{at['lgs_3']:.3g}",
            label=f"Frechet distance, full covariance (m = 3), T = {few}",
            note=f"real digits against themselves: {network['floor']:.2g}",
        ),
        Number(
            value=f"{at['beta_tilde']:.3g}",
            label=f"the same network with DDPM's fixed_small variance, T = {few}",
            note=f"fixed_large: {at['beta']:.3g}",
        ),
    )


def lgs_sections(
    theory: Mapping[str, Any],
    lanczos: Mapping[str, Any],
    network: Mapping[str, Any],
    guidance: Mapping[str, Any],
    folder: Path,
    settings: DemoSettings,
) -> tuple[Section, ...]:
    """Every section of the room, in reading order."""
    return (
        _rates(theory, network, settings),
        _samples(folder, settings),
        _cost(network),
        _depth(lanczos),
        _guided(guidance),
        _published(network, settings),
    )


def _rates(theory: Mapping[str, Any], network: Mapping[str, Any], settings: DemoSettings) -> Section:
    steps = list(settings.path_kl_steps)
    kinds = {"full": "full", "diagonal": "diagonal", "isotropic": "isotropic", "analytic": "isotropic_t"}
    series = [Series(x=steps, y=theory[kind], method=method) for method, kind in kinds.items()]
    series += [Series(x=steps, y=theory[kind], method=kind) for kind in ("beta", "beta_tilde")]
    left = lines(
        series,
        "reverse steps T",
        "path KL (nats)",
        title="Exact, on a mixture of Gaussians",
        xscale="log",
        yscale="log",
        slopes=True,
        slope_range=FIT,
        xticks=steps,
    )
    right = lines(
        [_quality(network, name, "steps") for name in ON_THE_NETWORK],
        "reverse steps T",
        "Frechet distance",
        title="On a U-Net trained on digits",
        xscale="log",
        yscale="log",
        references=[Reference(label="real digits against themselves", y=network["floor"])],
        xticks=list(settings.step_counts),
    )
    figure = Figure(
        pictures=(draw(left), draw(right)),
        caption=(
            "**Left:** path KL of a DDPM with the exact mean and each covariance, by quadrature, on a "
            "two-dimensional mixture "
            "of our own choosing; slopes are fitted from T = 32 on. Only the full covariance falls with T². **Right:** "
            f"Frechet distance of {settings.num_samples} samples on the features of a {network['extractor']}; "
            "it is not FID, and its floor is the dashed line."
        ),
        alt=(
            "Path KL against the number of steps on logarithmic axes: the full covariance falls twice as steeply.",
            "Frechet distance against the number of steps for every covariance on the trained network.",
        ),
        wide=True,
    )
    text = (
        "A reverse step of a DDPM is a Gaussian. Its mean is learned; its covariance is usually a fixed multiple "
        "of the identity. The exact one, `beta~ I + g^2 Cov[x_0 | x_t]`, is neither isotropic nor diagonal, and "
        "with it the error of the whole chain falls with the square of the number of steps."
    )
    return Section(id="rates", title="The default covariance is the wrong one", short="Rates", items=(text, figure))


def _samples(folder: Path, settings: DemoSettings) -> Section:
    counts = settings.step_counts[:3]
    cells = tuple(tuple(read_png(folder / "covariances" / f"{name}-{steps}.png") for steps in counts) for name in SHOWN)
    grid = Grid(
        cells=cells,
        row_labels=tuple(method_style(name).label for name in SHOWN),
        column_labels=tuple(f"T = {steps}" for steps in counts),
        corner="steps",
        caption="The first samples of each method from the same starting noise; none is picked.",
    )
    return Section(id="samples", title="The same network, side by side", short="Samples", items=(grid,))


def _cost(network: Mapping[str, Any]) -> Section:
    panels = [
        scatter(
            [_quality(network, name, cost) for name in AGAINST_TIME],
            label,
            "Frechet distance",
            title=title,
            references=[Reference(label="real digits", y=network["floor"])],
        )
        for cost, label, title in (
            ("seconds", "milliseconds an image", "At equal time"),
            ("evaluations", "forward passes + Jacobian products", "At equal network evaluations"),
        )
    ]
    figure = Figure(
        pictures=tuple(draw(panel) for panel in panels),
        caption=(
            "What the quality costs: a step with m products takes 1 + m evaluations. Numbers at the points are T. The "
            "deterministic samplers (green) are shown for their honest place: they solve another problem and need no "
            "covariance."
        ),
        alt=("Frechet distance against time per image.", "Frechet distance against network evaluations."),
        wide=True,
    )
    return Section(id="cost", title="What it costs", short="Cost", items=(figure, _all_runs(network)))


def _all_runs(network: Mapping[str, Any]) -> Table:
    at = {(row["name"], row["steps"]): row for row in network["outcomes"]}
    names, counts = (list(dict.fromkeys(key)) for key in zip(*at, strict=True))
    return Table(
        columns=(
            "method",
            *(Column(title=f"T = {steps}", best="min") for steps in counts),
            *(f"ms, T = {steps}" for steps in counts),
            f"evaluations, T = {counts[-1]}",
        ),
        rows=tuple(
            (
                method_style(name).label,
                *(at[name, steps]["frechet"][0] for steps in counts),
                *(1000 * at[name, steps]["seconds"] for steps in counts),
                at[name, counts[-1]]["evaluations"],
            )
            for name in names
        ),
        caption=(
            "All runs: Frechet distance, and milliseconds an image. One seed: small differences mean nothing. "
            "Analytic's time contains the estimate of its variances."
        ),
    )


def _depth(lanczos: Mapping[str, Any]) -> Section:
    m = list(lanczos["m"])
    start = lanczos["error"][0]
    error = lines(
        [Series(x=m, y=lanczos["error"], method="lgs", label="error of the draw")],
        "Lanczos steps m",
        "relative error",
        title=f"One draw, condition number {lanczos['condition']:.2g}",
        yscale="log",
        references=[Reference(label="3^-m", y=[start * 3.0**-k for k in m], x=m)],
    )
    kl = lines(
        [Series(x=m, y=lanczos["path_kl"], method="lgs", label="path KL of 10 steps")],
        "Lanczos steps m",
        "path KL (nats)",
        title="A whole chain",
        yscale="log",
    )
    figure = Figure(
        pictures=(draw(error), draw(kl)),
        caption=(
            "A Gaussian with the power spectrum of photographs, where the exact answer is known. "
            "**Left:** the draw at the "
            "worst step whose condition number is at most 4, where the bound falls like 3^-m. **Right:** "
            "path KL of the "
            f"chain; its worst step has condition number {lanczos['largest_condition']:.2g}. m = 0 is "
            "DDPM's fixed_small, m = 1 an isotropic covariance."
        ),
        alt=("Error of the Lanczos draw against m with the line 3^-m.", "Path KL against m."),
        wide=True,
    )
    return Section(id="depth", title="Three products are enough", short="Lanczos", items=(figure,))


def _guided(guidance: Mapping[str, Any]) -> Section:
    mixture = Table(
        columns=(
            "covariance, in noise and guidance",
            "T",
            "scale",
            Column(title="energy distance to the exact conditional law", best="min"),
            "p(y | x)",
        ),
        rows=tuple(
            (row["variant"], row["steps"], row["scale"], tuple(row["distance"]), row["agreement"])
            for row in guidance["mixture"]
            if row["scale"] == 1
        ),
        caption=(
            "The mixture with its exact classifier p(y | x_t): whatever distance remains is the sampler's. 0 within "
            f"its error is exact; the law itself has p(y | x) = {guidance['exact_agreement']:.3f}. *posterior*: the "
            "classifier is part of the denoiser, so that its Hessian is part of the covariance; *shift*: the mean "
            "moves by Sigma times the classifier's gradient. Only at scale 1 does a sampler aim at "
            "this law."
        ),
    )
    images = Table(
        columns=(
            "guidance, digits",
            "T",
            "scale",
            Column(title="class agreement", best="max"),
            Column(title="Frechet distance", best="min"),
        ),
        rows=tuple(
            (row["variant"], row["steps"], row["scale"], tuple(row["agreement"]), row["frechet"])
            for row in guidance["digits"]
        ),
        caption=(
            "The trained network with a small classifier of noised digits. Agreement is judged by other features; real "
            f"digits score {guidance['real_agreement']:.1%}. m counts Lanczos products, 0 is DDPM's fixed_small."
        ),
    )
    return Section(
        id="guidance", title="Classifier guidance is where it matters", short="Guidance", items=(mixture, images)
    )


def _published(network: Mapping[str, Any], settings: DemoSettings) -> Section:
    at = {(row["name"], row["steps"]): row["frechet"][0] for row in network["outcomes"]}
    few, many = settings.step_counts[1], settings.step_counts[-1]
    table = Table(
        columns=(
            "method",
            "CelebA 64, FID, T = 25 (published)",
            "CelebA 64, FID, T = 100 (published)",
            Column(title=f"digits, Frechet, T = {few} (here)", best="min"),
            Column(title=f"digits, Frechet, T = {many} (here)", best="min"),
        ),
        rows=(
            ("LGS, m = 3", 9.58, 5.21, at["lgs_3", few], at["lgs_3", many]),
            ("OCM-DDPM", 12.66, 7.09, at["ocm", few], at["ocm", many]),
        ),
        caption=(
            "Published figures (arXiv 2605.22723) beside ours. They are on other data, another network "
            "and another feature "
            "extractor; only the order of the rows can be compared. `wellposed train lgs_celeba64` runs the published "
            "setting where its weights and statistics are at hand."
        ),
    )
    note = Callout(
        title="Read this before quoting",
        kind="caveat",
        text=(
            "A rate of the path KL is no rate of sample quality: the marginal's error of an isotropic chain is already "
            "O(1/T²), and a trained network's own error, which no covariance repairs, dominates at large "
            "T. The heads of "
            "NPR, SN and OCM were trained here for minutes, not for the published 500,000 iterations."
        ),
    )
    return Section(id="published", title="The paper's numbers beside ours", short="Paper", items=(table, note))


def _quality(network: Mapping[str, Any], name: str, cost: str) -> Series:
    rows = [row for row in network["outcomes"] if row["name"] == name]
    scale = 1000 if cost == "seconds" else 1
    return Series(
        x=[scale * row[cost] for row in rows],
        y=[row["frechet"][0] if math.isfinite(row["frechet"][0]) else None for row in rows],
        method=name,
        point_labels=None if cost == "steps" else [str(row["steps"]) for row in rows],
    )
