"""What a dense run says about token reduction, as plots and a table.

On the page of a run and on the demo's, from what ``wellposed.dito.observe`` found.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from wellposed.report.page import Column, Figure, Table
from wellposed.report.plots import Series, draw, lines

__all__ = ["OUTPUTS_FILE", "persistence_items"]

OUTPUTS_FILE = "outputs.json"
"""Of a run: the statistics of its outputs by scope, ``{"attn": ..., "block": ...}``."""

GAP_STYLES = ("dito", "dito_dense_kv", "dito_paper", "dito_paper_bias")
PLACES = {"attn": "attention", "block": "whole block"}


def persistence_items(outputs: Mapping[str, Any]) -> tuple[Figure, Table]:
    """Pair match ratio, persistence of similarities and recovery error of whole blocks over the steps; means of both
    scopes.

    Args:
        outputs: ``OutputStatistics`` as plain types, by scope; of two steps at least.
    """
    watched = outputs["block"]
    steps = range(watched["num_steps"])
    ticks = list(steps[::5])
    panels = [
        lines(
            [
                Series(x=list(steps[: len(row)]), y=row, method=style, label=_apart(gap))
                for gap, row, style in zip(watched["gaps"], watched[name], GAP_STYLES, strict=False)
                if row
            ]
            + extra,
            "step",
            label,
            title=title,
            markers=False,
            xticks=ticks,
        )
        for name, label, title, extra in (
            ("pair_match_ratio", "pair match ratio", "The same pairs again", []),
            (
                "persistence",
                "correlation of similarities",
                "The same similarities again",
                [
                    Series(
                        x=list(steps), y=watched["input_output_correlation"], method="tomesd", label="input with output"
                    )
                ],
            ),
        )
    ]
    errors = [
        Series(x=list(steps[gap:]), y=row, method=style, label=_ago(gap))
        for gap, row, style in zip(watched["gaps"], watched["earlier_output_error"], GAP_STYLES, strict=False)
        if row
    ]
    errors += [
        Series(x=list(steps), y=watched["output_error"], method="fewer_steps", label="this output (not known yet)"),
        Series(x=list(steps), y=watched["input_error"], method="tomesd", label="this input"),
        Series(x=list(steps), y=watched["random_error"], method="random_pairs", label="chance, within a window"),
    ]
    panels.append(
        lines(
            errors,
            "step",
            "recovery error",
            title="What a choice of pairs costs",
            yscale="log",
            markers=False,
            xticks=ticks,
        )
    )
    by_block = list(watched["site_pair_match_ratio"].values())
    panels.append(
        lines(
            [
                Series(
                    x=list(range(1, 1 + len(by_block))),
                    y=[values[index] for values in by_block],
                    method=style,
                    label=_apart(gap),
                )
                for index, (gap, style) in enumerate(zip(watched["gaps"], GAP_STYLES, strict=False))
                if watched["pair_match_ratio"][index]
            ],
            "block",
            "pair match ratio",
            title="Block by block",
        )
    )
    figure = Figure(
        pictures=tuple(draw(panel) for panel in panels),
        caption=(
            f"A dense generation of {watched['num_steps']} steps, watched at {len(watched['sites'])} blocks with "
            f"destinations drawn once; pairs drop {watched['ratio']:.0%} of the tokens. {_old_pairs(watched)}"
        ),
        alt=(
            "Pair match ratio against the step, for several gaps.",
            "Correlation of similarities against the step, for several gaps and between input and output.",
            "Recovery error against the step, by what the pairs were chosen from.",
            "Pair match ratio of each block, for several gaps.",
        ),
        wide=True,
    )
    return figure, _persistence_table(outputs)


def _apart(gap: int) -> str:
    return f"{gap} step{'s' * (gap > 1)} apart"


def _ago(gap: int) -> str:
    return f"output, {gap} step{'s' * (gap > 1)} ago"


def _old_pairs(watched: Mapping[str, Any]) -> str:
    """What is left of the oldest pairs that were watched, and what keeping them would cost."""
    index = max(i for i, row in enumerate(watched["pair_match_ratio"]) if row)
    gap = watched["gaps"][index]
    kept = fmean(watched["pair_match_ratio"][index])
    error, least = fmean(watched["earlier_output_error"][index]), fmean(watched["output_error"][gap:])
    return (
        f"After {gap} step{'s' * (gap > 1)} {kept:.0%} of the pairs would be chosen again, and keeping all of them "
        f"costs {error / least:.2g} times the error of new ones."
    )


def _persistence_table(outputs: Mapping[str, Any]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for scope, place in PLACES.items():
        watched = outputs[scope]
        rows += [
            (
                place,
                _ago(gap),
                _mean(watched["pair_match_ratio"][index]),
                _mean(watched["persistence"][index]),
                _mean(watched["earlier_output_error"][index]),
            )
            for index, gap in enumerate(watched["gaps"])
            if watched["pair_match_ratio"][index]
        ]
        rows += [
            (place, "this output (not known yet)", 1.0, 1.0, _mean(watched["output_error"])),
            (
                place,
                "this input",
                None,
                _mean(watched["input_output_correlation"]),
                _mean(watched["input_error"]),
            ),
            (place, "chance, within a window", None, None, _mean(watched["random_error"])),
        ]
    return Table(
        columns=(
            "outputs of",
            "pairs chosen by",
            "pairs that this output would choose",
            "correlation of similarities",
            Column(title="recovery error"),
        ),
        rows=tuple(rows),
        caption="Means over blocks, images and steps.",
    )


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None
