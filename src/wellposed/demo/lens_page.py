"""The room lens on the demo page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wellposed.demo.lens import SHOWN_SCALES
from wellposed.demo.settings import DemoSettings
from wellposed.report.page import Callout, Column, Grid, Number, Section, Table
from wellposed.report.pictures import read_png

__all__ = ["lens_numbers", "lens_sections"]

ALL = "all"


def lens_numbers(captions: Mapping[str, Any]) -> tuple[Number, ...]:
    """A figure to begin with."""
    best = max((one for one in captions["scores"] if one["attribute"] == "position"), key=lambda one: one["value"])
    return (
        Number(
            value=f"{best['value']:.0%}",
            label="of pictures have their digit where the prompt says, after minutes of training from scratch",
            note=f"chance {best['chance']:.0%}, n = {best['kind']['count']}",
        ),
    )


def lens_sections(captions: Mapping[str, Any], folder: Path, settings: DemoSettings) -> tuple[Section, ...]:
    """Every section of the room, in reading order."""
    return _drawing(captions, folder, settings), _data(captions)


def _drawing(captions: Mapping[str, Any], folder: Path, settings: DemoSettings) -> Section:
    words = (
        "Lens learns to draw from few, long captions, at several resolutions at once "
        "([arXiv 2605.21573](https://arxiv.org/abs/2605.21573)). Its network here has 1.4 million parameters in place "
        "of 4.1 billion, an autoencoder trained just now, and a text encoder of GPT-OSS's architecture with random "
        "weights; the code is the same. Each picture is a handwritten digit in some ink, somewhere, on some ground, "
        "and its caption says so in 25 to 40 words. The prompts below describe combinations that no training picture "
        "has."
    )
    rows = {"meant": "meant", **{f"w{scale:g}": f"w = {scale:g}" for scale in SHOWN_SCALES}}
    numbers = range(len(captions["prompts"]))
    grid = Grid(
        cells=tuple(
            tuple(read_png(folder / "captions" / f"{name}_{number}.png") for number in numbers) for name in rows
        ),
        row_labels=tuple(rows.values()),
        column_labels=tuple(str(number + 1) for number in numbers),
        caption="The prompts below, in order, none picked; w is the guidance scale.",
    )
    prompts = "\n".join(f"- {number + 1}: {captions['prompts'][number]}" for number in numbers)
    return Section(
        id="prompts",
        title="Drawing what is said",
        short="Prompts",
        items=(words, grid, prompts, _following(captions), Callout(text=_verdict(captions, settings), kind="caveat")),
    )


def _following(captions: Mapping[str, Any]) -> Table:
    scores = captions["scores"]
    names = list(dict.fromkeys(one["attribute"] for one in scores))
    kinds = list(dict.fromkeys(_kind(one) for one in scores))
    found = {(_kind(one), one["attribute"]): one for one in scores}
    rows: list[tuple[Any, ...]] = [
        (kind, *((100 * one["value"], 100 * one["standard_error"]) for one in (found[kind, name] for name in names)))
        for kind in kinds
    ]
    first = {name: next(one for one in scores if one["attribute"] == name) for name in names}
    rows.append(("by chance", *(100 * first[name]["chance"] for name in names)))
    rows.append(("drawn scenes, the ceiling", *(100 * first[name]["ceiling"] for name in names)))
    return Table(
        columns=("pictures", *(Column(title=name, digits=3) for name in names)),
        rows=tuple(rows),
        caption=(
            "Percent of the pictures that show what the prompt says, told by a classifier that was trained on other "
            f"scenes; n = {scores[0]['kind']['count']} for each row, standard errors."
        ),
    )


def _kind(score: Mapping[str, Any]) -> str:
    kind = score["kind"]
    return f"{kind['height']} x {kind['width']}, w = {kind['guidance_scale']:g}"


def _verdict(captions: Mapping[str, Any], settings: DemoSettings) -> str:
    best = {
        name: max(one["value"] for one in captions["scores"] if one["attribute"] == name)
        for name in ("digit", "colour", "position", "background")
    }
    order = sorted(best, key=lambda name: -best[name])
    return (
        f"After {settings.captions_steps} and {settings.captions_mixed_steps} steps the model follows "
        + ", ".join(f"{name} {best[name]:.0%}" for name in order)
        + ". What is large in a picture is learned first; shapes of digits come last, and docs/methods/lens.md has a "
        "longer run. Pictures, words and encoder are toys: nothing here measures the published claims about quality."
    )


def _data(captions: Mapping[str, Any]) -> Section:
    curation, usage = captions["curation"], captions["usage"]
    stages = Table(
        columns=("stage", "seen", "kept", "images/s"),
        rows=tuple(
            (stage["name"], stage["seen"], stage["kept"], stage["images_per_second"]) for stage in curation["stages"]
        ),
        caption=(
            "From pictures in a folder to shards. Left out for want of a network to judge or on purpose: "
            + ", ".join(curation["skipped"])
            + "."
        ),
    )
    amounts = Table(
        columns=("stage", "steps", "pictures", "words a caption", "GFLOP a picture", "seconds", "MFU, %"),
        rows=tuple(_amounts(name, used) for name, used in usage.items()),
        caption=(
            "What training amounted to. Operations are the network's own, three times its forward pass; MFU is their "
            "share of what this machine's cores do in a large matrix product."
        ),
    )
    losses = ", ".join(
        f"{captions['losses'][name]:.2f} from t = {name[1:]}" for name in captions["losses"] if name.startswith("t")
    )
    words = (
        f"Loss by noise level at the end: {losses}. Batches are pictures of one size for each share of a step, other "
        "sizes for other shares; a run may be interrupted anywhere and goes on with the same numbers."
    )
    return Section(id="captions", title="From pictures to batches", short="Data", items=(stages, amounts, words))


def _amounts(name: str, used: Mapping[str, Any]) -> tuple[Any, ...]:
    samples = used["samples"]
    return (
        {"low": "32 x 32", "mixed": "six sizes"}[name],
        used["steps"],
        samples,
        used["counters"]["caption_words"] / samples,
        used["model_flops"] / samples / 1e9,
        used["seconds"],
        None if used["mfu"] is None else 100 * used["mfu"],
    )
