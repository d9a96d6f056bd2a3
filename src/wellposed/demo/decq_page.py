"""The room decq on the demo page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wellposed.demo.decq import DECQ, RAE, STYLES, picture_name
from wellposed.demo.settings import DemoSettings
from wellposed.report.page import Callout, Column, Figure, Grid, Number, Section, Table
from wellposed.report.pictures import read_png
from wellposed.report.plots import Reference, Series, draw, lines
from wellposed.report.styles import method_style

__all__ = ["decq_numbers", "decq_sections"]

Row = Mapping[str, Any]


def decq_numbers(detail: Mapping[str, Any]) -> tuple[Number, ...]:
    """Two figures to begin with."""
    plain, ours = (_arm(detail, name) for name in (RAE, DECQ))
    return (
        Number(
            value=f"{ours['gain'][0]:+.1f} dB".replace("-", "−"),
            label="gained in the squared error of reconstructions by eight queries beside the same frozen latent",
            note=f"PSNR {ours['psnr']:.1f} dB, without {plain['psnr']:.1f}",
        ),
        Number(
            value=f"{1 - ours['bands'][0] / plain['bands'][0]:.0%}",
            label="of the error of mean colours that the queries take away",
            note=f"of what is finer than 8 pixels: {1 - ours['bands'][-1] / plain['bands'][-1]:.0%}".replace("-", "−"),
        ),
    )


def decq_sections(
    detail: Mapping[str, Any], generation: Mapping[str, Any], folder: Path, settings: DemoSettings
) -> tuple[Section, ...]:
    """Every section of the room, in reading order."""
    return (
        _reconstruction(detail, folder, settings),
        _looking(detail, folder),
        _generation(generation, folder, settings),
    )


def _reconstruction(detail: Mapping[str, Any], folder: Path, settings: DemoSettings) -> Section:
    words = (
        "A representation autoencoder decodes the last layer of a frozen encoder. What the encoder was trained to "
        "ignore is then lost. This one is a caricature: it learned where the edges of digits are, and to say the same "
        "of an image in any colours, until colour was gone. Eight learned *queries* read its patch tokens at four "
        "depths from the side; the encoder and its patches stay what they are, to the last bit "
        "([arXiv 2605.22777](https://arxiv.org/abs/2605.22777))."
    )
    rows = ("originals", *STYLES)
    grid = Grid(
        cells=tuple((read_png(folder / "detail" / picture_name(name)),) for name in rows),
        row_labels=tuple(name if name == "originals" else _label(name) for name in rows),
        column_labels=("digits by hands that no network here has seen",),
        caption=f"The first test images. Same decoder, same {settings.detail_steps} steps, same noise; one seed.",
    )
    table = Table(
        columns=(
            "latent",
            Column(title="PSNR, dB", best="max", digits=4),
            Column(title="SSIM", best="max"),
            Column(title="gain, dB", best="max"),
            Column(title="mean colour"),
            Column(title="4 x 4 means"),
            Column(title="finer"),
            "weights trained",
        ),
        rows=tuple(
            (
                _label(row["arm"]),
                row["psnr"],
                row["ssim"],
                None if row["arm"] == RAE else tuple(row["gain"]),
                *(None if row["arm"] == RAE else tuple(gain) for gain in row["band_gains"]),
                f"{row['parameters']:,}",
            )
            for row in detail["outcomes"]
        ),
        caption=(
            "Gains are of the mean squared error over the plain latent's, in all and by frequency band, with the "
            "standard error over test images. Eight tokens for the whole image give back what is the same everywhere "
            "or changes slowly."
        ),
    )
    return Section(
        id="detail", title="What a frozen latent lacks", short="Detail", items=(words, grid, table, _band_words(detail))
    )


def _band_words(detail: Mapping[str, Any]) -> str:
    plain, ours = (_arm(detail, name) for name in (RAE, DECQ))
    shares = [1 - b / a for a, b in zip(plain["bands"], ours["bands"], strict=True)]
    changes = [f"{-share:+.0%}".replace("-", "−") for share in shares]
    return (
        f"The queries change the error of mean colours by {changes[0]}, that of 4 x 4 means by {changes[1]}, and that "
        f"of what is finer by {changes[2]}. On ImageNet the paper has +3.15 dB over its own plain autoencoder and "
        "+3.63 dB over the published one."
    )


def _looking(detail: Mapping[str, Any], folder: Path) -> Section:
    ours = _arm(detail, DECQ)
    taps = ours["taps"]
    numbers = range(detail["looked_at"])
    grid = Grid(
        cells=tuple((read_png(folder / "detail" / picture_name(f"attention {number}")),) for number in numbers),
        row_labels=tuple(f"image {number + 1}" for number in numbers),
        column_labels=("where the eight queries look, a row for each tap",),
        caption="Attention of the condensers, mean over heads; white is the patch that a query looks at most.",
    )
    table = Table(
        columns=(
            "tap",
            "share of the movement",
            "part of the image attended to",
            "error without it",
            "share of detail",
        ),
        rows=tuple(
            (f"input of block {layer}", movement, coverage, error, share)
            for layer, movement, coverage, error, share in zip(
                taps["layers"],
                taps["movement"],
                taps["coverage"],
                taps["error"],
                taps["reconstruction"],
                strict=True,
            )
        ),
        caption=(
            "How far each tap moves the queries; over how much of the image its attention is spread; the squared error "
            "of reconstructions if its condenser is left out, 1 = with all; and its share of what leaving out adds."
        ),
    )
    return Section(id="taps", title="Where the queries look", short="Taps", items=(grid, table))


def _generation(generation: Mapping[str, Any], folder: Path, settings: DemoSettings) -> Section:
    curves = {curve["arm"]: curve for curve in generation["curves"]}
    floor = generation["floor"]
    by_steps = lines(
        [Series(x=curve["steps"], y=curve["frechet"], method=STYLES[name]) for name, curve in curves.items()],
        "training steps of the generator",
        "Frechet distance of samples",
        title="At equal steps",
        yscale="log",
        references=() if floor is None else (Reference(y=floor, label="real images"),),
    )
    by_time = lines(
        [Series(x=curve["seconds"], y=curve["frechet"], method=STYLES[name]) for name, curve in curves.items()],
        "CPU seconds of training",
        "Frechet distance of samples",
        title="At equal time, here",
        yscale="log",
        xticks=[round(max(curve["seconds"][-1] for curve in curves.values()) * part / 4) for part in range(5)],
        references=() if floor is None else (Reference(y=floor, label="real images"),),
    )
    figure = Figure(
        pictures=(draw(by_steps), draw(by_time)),
        caption=(
            "The same generator on the 64 patch latents alone, and on 64 + 8 tokens; distance on "
            f"{generation['extractor']}, {settings.detail_samples} samples."
        ),
        alt=("Frechet distance over training steps, two curves.", "Frechet distance over CPU seconds, two curves."),
    )
    grid = Grid(
        cells=tuple((read_png(folder / "detail_generation" / picture_name(name)),) for name in curves),
        row_labels=tuple(_label(name) for name in curves),
        column_labels=("samples, none picked",),
        caption="The ten digits in turn, from the same noise of the patches.",
    )
    words = (
        "A generator on these latents makes patches and queries together, at one shared noise level. The published "
        "claim is that it converges 3.3 times as fast; a minute of training on digits can show the mechanism, not that "
        "number."
    )
    return Section(
        id="generating",
        title="Generating on both latents",
        short="Generating",
        items=(words, figure, grid, Callout(text=_verdict(curves), kind="caveat", title="What is seen here")),
    )


def _verdict(curves: Mapping[str, Row]) -> str:
    plain, ours = curves[RAE], curves[DECQ]
    last, other = ours["frechet"][-1], plain["frechet"][-1]
    discarded = ours["discarded"]
    near = abs(discarded / other - 1) < 0.05
    patches = "level with" if near else "below" if discarded < other else "above"
    return (
        f"After {ours['steps'][-1]} steps the distance is {last:.3g} with queries and {other:.3g} without. This "
        "encoder was made to lose colour: no generator of patches alone can paint as the images are. Does it make "
        "better patches for the queries beside them? Decoded by the plain autoencoder, queries discarded, they score "
        f"{discarded:.3g}, {patches} those of the generator without queries. On CIFAR-10 with an encoder that was "
        "trained to classify, docs/methods/decq.md has smaller differences, and not all in favour."
    )


def _arm(detail: Mapping[str, Any], name: str) -> Row:
    return next(row for row in detail["outcomes"] if row["arm"] == name)


def _label(name: str) -> str:
    return method_style(STYLES[name]).label
