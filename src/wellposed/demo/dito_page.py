"""The room dito on the demo page."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from wellposed.demo.dito import CONTROLS, PICTURED, STYLES, picture_file
from wellposed.demo.settings import DemoSettings
from wellposed.report.outputs import persistence_items
from wellposed.report.page import Callout, Column, Figure, Grid, Number, Section, Table
from wellposed.report.pictures import read_png
from wellposed.report.plots import Series, draw, scatter
from wellposed.report.styles import method_style

__all__ = ["dito_numbers", "dito_sections"]

Row = Mapping[str, Any]


def dito_numbers(reduction: Mapping[str, Any], outputs: Mapping[str, Any]) -> tuple[Number, ...]:
    """Two figures to begin with."""
    at = _at_largest_ratio(reduction)
    watched = outputs["block"]
    return (
        Number(
            value=f"{_psnr(at['default']):.1f} dB",
            label=f"to the dense image, with {at['default']['ratio']:.0%} of the tokens skipped between dense steps",
            note=f"ToMeSD, as published: {_psnr(at['tomesd']):.1f} dB",
        ),
        Number(
            value=f"{_mean(watched['persistence'][0]):.3f}",
            label="correlation of output similarities between neighbouring steps",
            note=f"between input and output of one step: {_mean(watched['input_output_correlation']):.2f}",
        ),
    )


def dito_sections(
    reduction: Mapping[str, Any],
    outputs: Mapping[str, Any],
    penalty: Mapping[str, Any],
    folder: Path,
    settings: DemoSettings,
) -> tuple[Section, ...]:
    """Every section of the room, in reading order."""
    return (
        _fidelity(reduction, folder, settings),
        _honest_place(reduction, settings),
        Section(
            id="persistence",
            title="What persists from step to step",
            short="Persistence",
            items=persistence_items(outputs),
        ),
        _blocking(penalty, folder, settings),
    )


def _fidelity(reduction: Mapping[str, Any], folder: Path, settings: DemoSettings) -> Section:
    at = _at_largest_ratio(reduction)
    ratio = max(settings.reduction_ratios)
    grid = Grid(
        cells=tuple((read_png(folder / "reduction" / picture_file(name)),) for name in PICTURED),
        row_labels=tuple(_label(name) for name in PICTURED),
        column_labels=(f"{ratio:.0%} of the tokens dropped",),
        caption=(
            "The same noise, the same network; none is picked. Ours and our reading of the paper have one dense step "
            "in four, the methods as published have none: the table below also has those with the same dense steps."
        ),
    )
    words = (
        "A transformer that computes half of its image tokens has to make up the outputs of the others. Older methods "
        "give a dropped token the output of one that looked like it going *in*. What matters is who is alike coming "
        "*out*: unknown before the module has run, but hardly changed since the step before "
        "([arXiv 2605.22011](https://arxiv.org/abs/2605.22011)). So some steps run dense and choose the pairs, and "
        "those in between reuse them."
    )
    ours, paper, theirs = at["default"], at["paper"], at["tomesd"]
    same_steps = max((at[name] for name in CONTROLS), key=_psnr)
    gains = (
        f"At ratio {ratio:g} in whole blocks, our reading of the paper is {_gain(paper, theirs)} ToMeSD as published. "
        f"Dense steps alone change ToMeSD by {_change(at['tomesd + dense steps'], theirs)}; against the best of the "
        f"input-similarity methods with the same dense steps ({_label(same_steps['name'])}) our reading of the paper "
        f"is {_gain(paper, same_steps)} it. Computing the keys and values of all tokens changes it by "
        f"{_change(at['dense K/V'], paper)}, and what else our default has by another "
        f"{_change(ours, at['dense K/V'])}: how an output *changed* since the last dense steps is passed on, "
        "rather than the output, and the last step is dense."
    )
    return Section(
        id="skipping", title="Which tokens may be skipped", short="Tokens skipped", items=(words, grid, gains)
    )


def _honest_place(reduction: Mapping[str, Any], settings: DemoSettings) -> Section:
    by_flops = scatter(
        _against(reduction, lambda row: 1 / row["flops"]),
        "dense FLOPs / FLOPs",
        "PSNR to the dense image (dB)",
        title="At equal FLOPs",
        xscale="linear",
        yscale="linear",
    )
    by_time = scatter(
        _against(reduction, lambda row: None if row["latency"] is None else 1 / row["latency"]),
        "dense time / time",
        "PSNR to the dense image (dB)",
        title="At equal time, here",
        xscale="linear",
        yscale="linear",
    )
    figure = Figure(
        pictures=(draw(by_flops), draw(by_time)),
        caption=(
            f"Up and to the right is better. Numbers are the share of tokens dropped, of {settings.reduction_steps} "
            "steps those that are left, FirstBlockCache's threshold, and TaylorSeer's interval. Time is measured at "
            "the largest ratio only; pictures of 256 tokens are so small that what a reduction does besides computing "
            "takes a visible part."
        ),
        alt=(
            "PSNR to the dense image against the ratio of FLOPs, a curve for each method.",
            "PSNR to the dense image against the ratio of measured times.",
        ),
        wide=True,
    )
    return Section(
        id="place",
        title="Its honest place",
        short="Fewer steps",
        items=(
            figure,
            _all_ways(reduction),
            Callout(text=_verdict(reduction), kind="caveat", title="Against skipping steps"),
        ),
    )


def _all_ways(reduction: Mapping[str, Any]) -> Table:
    rows = [row for row in _at_largest_ratio(reduction).values() if row["name"] != "dense"]
    return Table(
        columns=(
            "method",
            Column(title="PSNR to the dense image, dB", best="max"),
            "dense FLOPs / FLOPs",
            "dense time / time",
            "energy at window borders, dense = 1",
        ),
        rows=tuple(
            (
                _label(row["name"]),
                _psnr(row),
                1 / row["flops"],
                None if row["latency"] is None else 1 / row["latency"],
                row["blocking"],
            )
            for row in rows
        ),
        caption=(
            "At the largest ratio. *Dense steps*: the published method with every fourth step dense. One small "
            "network, one seed: small differences mean nothing."
        ),
    )


def _verdict(reduction: Mapping[str, Any]) -> str:
    """Token reduction against skipping steps, as measured."""
    at = _at_largest_ratio(reduction)
    ours = at["default"]
    rivals = [row for row in at.values() if row["family"] in ("steps", "cache") and row["name"] != "dense"]
    sentences: list[str] = []
    for cost, what in (("flops", "FLOPs"), ("latency", "time on this machine")):
        as_cheap = [row for row in rivals if row[cost] <= ours[cost]]
        sentences.append(f"By {what} ours takes {ours[cost]:.0%} of the dense model, at {_psnr(ours):.1f} dB.")
        if as_cheap:
            best = max(as_cheap, key=_psnr)
            sentences.append(
                f"Of fewer steps and caches that take no more, the best is {_label(best['name'])} ({best[cost]:.0%}): "
                f"{_psnr(best):.1f} dB, {_gain(best, ours)} ours."
            )
        else:
            sentences.append("No smaller number of steps and no cache tried here takes as little.")
    stacked, alone = at.get("cache + default"), _cache_of_the_stack(at)
    if stacked is not None and alone is not None:
        sentences.append(
            f"Behind the cache that alone takes {alone['flops']:.0%} of the FLOPs at {_psnr(alone):.1f} dB, ours takes "
            f"{stacked['flops']:.0%} at {_psnr(stacked):.1f} dB."
        )
    sentences.append(
        "Before reducing tokens, try fewer steps or a cache: they are simpler. Where steps are few already, tokens are "
        "what is left to skip."
    )
    return " ".join(sentences)


def _cache_of_the_stack(at: Mapping[str, Row]) -> Row | None:
    """The FirstBlockCache with the lowest threshold, which is the one that the stacked contender has."""
    caches = [row for row in at.values() if _is_block_cache(row["name"])]
    return min(caches, key=lambda row: float(row["name"].removeprefix("cache ")), default=None)


def _blocking(penalty: Mapping[str, Any], folder: Path, settings: DemoSettings) -> Section:
    names = {"default": "ours", "paper": "our reading of the paper, in whole blocks"}
    table = Table(
        columns=(
            "settings",
            "ratio",
            "penalty",
            Column(title="PSNR, dB", best=None),
            Column(title="energy at window borders, dense = 1"),
            Column(title="Gini of drops"),
            Column(title="most dropped token, share of steps"),
        ),
        rows=tuple(
            (
                *(names[name], f"{row['ratio']:g}", f"{row['penalty']:g}"),
                *(_psnr(row), row["blocking"][0], row["gini"], row["most"]),
            )
            for name, rows in penalty.items()
            for row in rows
        ),
        caption=(
            "Energy: squared differences of neighbouring pixels across the borders of 2 x 2 windows of tokens over "
            "those within, relative to the dense images. Gini: 0 if all tokens are dropped equally often."
        ),
    )
    values = settings.reduction_penalties
    shown = [(name, ratio) for name in penalty for ratio in settings.penalised_ratios]
    grid = Grid(
        cells=(
            (read_png(folder / "penalty" / picture_file("dense")), *(None for _ in values[1:])),
            *(
                tuple(read_png(folder / "penalty" / picture_file(name, ratio, value)) for value in values)
                for name, ratio in shown
            ),
        ),
        row_labels=("dense", *(f"{names[name]}, {ratio:.0%} dropped" for name, ratio in shown)),
        column_labels=tuple(f"penalty {value:g}" for value in values),
        caption="The middle of the first images. At 75% every token is dropped that may be, whatever the penalty.",
    )
    return Section(
        id="penalty",
        title="Spreading what is skipped",
        short="Penalty",
        items=(
            "Pairs that are reused drop the same tokens again and again. A penalty on how often a token was dropped "
            "spreads that; its form is ours, the paper's is not known to us.",
            table,
            grid,
            _penalty_words(penalty, names, sorted(settings.penalised_ratios)[len(settings.penalised_ratios) // 2]),
        ),
    )


def _penalty_words(penalty: Mapping[str, Any], names: Mapping[str, str], ratio: float) -> str:
    sentences: list[str] = []
    for name, found in penalty.items():
        rows = [row for row in found if row["ratio"] == ratio]
        none, most = rows[0], rows[-1]
        best = max(rows, key=_psnr)
        sentences.append(
            f"For {names[name]} at ratio {ratio:g}, a penalty of {most['penalty']:g} takes the Gini coefficient from "
            f"{none['gini']:.2f} to {most['gini']:.2f}, the energy at borders from {none['blocking'][0]:.2f} to "
            f"{most['blocking'][0]:.2f} and the PSNR from {_psnr(none):.1f} to {_psnr(most):.1f} dB; the best PSNR is "
            f"at {best['penalty']:g}."
        )
    return " ".join(sentences)


def _against(reduction: Mapping[str, Any], speed: Callable[[Row], float | None]) -> list[Series]:
    """A line for each method over ratios, for fewer steps, and for the cache."""
    groups: dict[str, list[tuple[Any, float, str]]] = {}
    for row in reduction["outcomes"]:
        style, point = _style(row["name"]), speed(row)
        if style is not None and point is not None:
            label = f"{row['ratio']:g}" if row["ratio"] is not None else re.findall(r"[\d.]+", row["name"])[0]
            groups.setdefault(style, []).append((point, _psnr(row), label))
    return [
        Series(
            x=[x for x, _, _ in points],
            y=[y for _, y, _ in points],
            method=style,
            point_labels=[label for _, _, label in points],
        )
        for style, points in groups.items()
    ]


def _style(name: str) -> str | None:
    """None for controls, which are not drawn, and for the dense model."""
    if name.endswith(" steps"):
        return None if name in CONTROLS else "fewer_steps"
    if name.startswith("TaylorSeer "):
        return "taylor_seer"
    return "first_block_cache" if _is_block_cache(name) else STYLES.get(name)


def _is_block_cache(name: str) -> bool:
    return re.fullmatch(r"cache [\d.]+", name) is not None


def _label(name: str) -> str:
    if name == "dense":
        return "dense"
    if name in CONTROLS:
        return f"{method_style(STYLES[name.removesuffix(' + dense steps')]).label}, dense steps"
    if name in STYLES:
        return method_style(STYLES[name]).label
    if name.startswith("TaylorSeer "):
        return f"TaylorSeer, one step in {name.removeprefix('TaylorSeer ')}"
    return f"FirstBlockCache, {name.removeprefix('cache ')}" if _is_block_cache(name) else name


def _at_largest_ratio(reduction: Mapping[str, Any]) -> dict[str, Row]:
    largest = max(row["ratio"] for row in reduction["outcomes"] if row["ratio"] is not None)
    return {row["name"]: row for row in reduction["outcomes"] if row["ratio"] in (None, largest)}


def _psnr(row: Row) -> float:
    return fmean(row["psnr"])


def _gain(ours: Row, theirs: Row) -> str:
    gain = _psnr(ours) - _psnr(theirs)
    if abs(gain) < 0.05:
        return "level with"
    return f"{abs(gain):.1f} dB {'above' if gain >= 0 else 'below'}"


def _change(now: Row, before: Row) -> str:
    return f"{_psnr(now) - _psnr(before):+.1f} dB".replace("-", "−")


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None
