"""The room udm on the demo page."""

from collections.abc import Mapping
from typing import Any

from wellposed.demo.settings import DemoSettings
from wellposed.demo.udm import text_frontiers
from wellposed.report.page import Callout, Column, Figure, Number, Section, Table
from wellposed.report.plots import Reference, Series, draw, lines, scatter
from wellposed.report.styles import method_style

__all__ = ["udm_numbers", "udm_sections"]

ON_THE_FRONTIER = ("udm_denoiser", "udm_loo", "udm_loo_corrector", "udm_loo_denoiser_temperature", "audm", "mdm")

LADDER = (
    ("denoiser head", "udm_denoiser", 1.0),
    ("leave-one-out head", "udm_loo", 1.0),
    ("absorbing bridge", "audm", 1.0),
    ("leave-one-out head, corrector", "udm_loo_corrector", 1.0),
    ("the same, temperature on the leave-one-out posterior", "udm_loo_corrector", None),
    ("the same, nucleus 0.9", "udm_loo_corrector_nucleus", None),
    ("masked diffusion", "mdm", 1.0),
    ("masked diffusion, temperature", "mdm", None),
    ("masked diffusion, temperature, nucleus 0.9", "mdm_nucleus", None),
)
"""What is changed, the way of sampling, and its temperature; None is the lowest one measured."""


def udm_numbers(tokens: Mapping[str, Any]) -> tuple[Number, ...]:
    """Two figures to begin with."""
    return (
        Number(
            value=f"{tokens['bound']['leave_one_out']:.3f}",
            label="bound of uniform diffusion at the exact leave-one-out posterior, nats",
            note=f"entropy of the data: {tokens['entropy']:.3f}",
        ),
        Number(
            value=f"{tokens['bound']['denoiser']:.3f}",
            label="the same bound with the exact denoiser in its place",
            note="right numbers, wrong meaning",
        ),
    )


def udm_sections(tokens: Mapping[str, Any], text: Mapping[str, Any], settings: DemoSettings) -> tuple[Section, ...]:
    """Every section of the room, in reading order."""
    return (_misread(tokens), _gap(text, settings), _frontier(text, settings), _texts(text))


def _misread(tokens: Mapping[str, Any]) -> Section:
    density = lines(
        [
            Series(x=tokens["alphas"], y=tokens["density"]["leave_one_out"], method="udm_loo", label="leave-one-out"),
            Series(x=tokens["alphas"], y=tokens["density"]["denoiser"], method="udm_denoiser", label="denoiser"),
        ],
        "survival probability α",
        "density of the bound (nats per unit of time)",
        title="What the plug-in bound is given",
        markers=False,
        xticks=[0, 0.25, 0.5, 0.75, 1],
    )
    distance = lines(
        [Series(x=tokens["steps"], y=found, method=name) for name, found in tokens["distance"].items()],
        "reverse steps",
        "total variation to the data",
        title="What the sampler gives",
        xscale="log",
        yscale="log",
        xticks=tokens["steps"],
    )
    figure = Figure(
        pictures=(draw(density), draw(distance)),
        caption=(
            "Everything exact, for a law over 4³ sequences. **Left:** the area under the leave-one-out curve is "
            f"{tokens['bound']['leave_one_out']:.4f} nats, the entropy of the data is {tokens['entropy']:.4f}; under "
            f"the denoiser's it is {tokens['bound']['denoiser']:.4f}. **Right:** a chain that plugs the denoiser into "
            "the bridge of uniform diffusion does not reach the data with any number of steps."
        ),
        alt=(
            "Density of the bound against alpha: the denoiser's curve lies above the leave-one-out curve.",
            "Total variation against steps: all fall but that of the misread denoiser.",
        ),
        wide=True,
    )
    words = (
        "A denoiser has seen the noisy token of the position it speaks about; the leave-one-out posterior has not. "
        "Masked diffusion cannot tell the two apart, because a mask says nothing. Uniform diffusion can: its bound and "
        "its reverse step ask for the leave-one-out posterior, and one addition to one logit turns either into the "
        "other ([arXiv 2605.22765](https://arxiv.org/abs/2605.22765))."
    )
    return Section(id="tokens", title="Uniform diffusion, misread", short="Tokens", items=(words, figure))


def _gap(text: Mapping[str, Any], settings: DemoSettings) -> Section:
    found = text_frontiers(text)
    lowest = min(settings.text_temperatures)
    rows: list[tuple[Any, ...]] = []
    for change, way, wanted in LADDER:
        temperature = lowest if wanted is None else max(settings.text_temperatures)
        point = next(p for p in found[way].points if p.setting == temperature)
        rows.append((change, temperature, point.perplexity, point.entropy))
    real = text["real"]
    rows.append(("real text", None, real["perplexity"], real["entropy"]))
    held_out = text["held_out"]
    bounds = Table(
        columns=("trained", Column(title="bound on held-out text, nats a token", best="min", digits=4)),
        rows=tuple((method_style(name).label, value) for name, value in held_out.items()),
        caption=f"One network, one budget ({settings.text_training_steps} steps), one seed.",
    )
    ladder = Table(
        columns=("what is changed", "temperature", "generative perplexity", "token entropy"),
        rows=tuple(rows),
        caption=(
            f"{settings.text_samples} texts of each, {settings.text_evaluations} network evaluations for every text. "
            f"The judge is {text['judge']}. A low perplexity is worth little where the "
            "entropy falls below that of real text: read both."
        ),
    )
    note = Callout(
        text=(
            "Small networks, minutes of training, one seed: this page shows the mechanism. The comparison with three "
            "seeds, and where it contradicts the paper's claims, is in `docs/methods/udm.md`."
        ),
        kind="caveat",
    )
    return Section(
        id="gap",
        title="Parameterisation and sampling, not marginals",
        short="Gap",
        items=(
            "Four language models on the source of Python's standard library: uniform diffusion with two heads, its "
            "absorbing reformulation, and masked diffusion.",
            bounds,
            ladder,
            note,
        ),
    )


def _frontier(text: Mapping[str, Any], settings: DemoSettings) -> Section:
    found = text_frontiers(text)
    series = [
        Series(
            x=[point.entropy for point in found[way].points],
            y=[point.perplexity for point in found[way].points],
            method=way,
            point_labels=[f"{point.setting:g}" for point in found[way].points],
        )
        for way in ON_THE_FRONTIER
    ]
    panel = scatter(
        series,
        "token entropy (nats)",
        "generative perplexity",
        title=f"{settings.text_evaluations} network evaluations",
        yscale="log",
        references=[Reference(label="real text", y=text["real"]["perplexity"])],
    )
    figure = Figure(
        pictures=(draw(panel),),
        caption=(
            "A temperature trades perplexity for variety, so ways of sampling are compared as curves: lower and "
            "further right is better. Numbers at the points are temperatures. Tempering the denoiser also tempers the "
            "evidence of the token's own noise; tempering the leave-one-out posterior leaves it alone."
        ),
        alt=("Generative perplexity against token entropy, one curve for each way of sampling.",),
    )
    return Section(id="frontier", title="Frontiers", short="Frontiers", items=(figure,))


def _texts(text: Mapping[str, Any]) -> Section:
    rows = tuple(
        (method_style(way).label, f"`{written[:90]!r}`".replace("\\n", " ⏎ ")) for way, written in text["texts"].items()
    )
    table = Table(
        columns=("sampled by", "first text, not picked"),
        rows=rows,
        caption="A network that was trained for a minute writes like one.",
    )
    return Section(id="texts", title="What they write", short="Texts", items=(table,))
