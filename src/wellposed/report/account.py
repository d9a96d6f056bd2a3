"""Efficiency accounting: what runs and published trainings used, and a ratio of two of them split into its causes.

The cost is *peak FLOP*: device-seconds times the most FLOP/s that a device can do. With the samples that it took,

.. code-block:: text

    peak FLOP = caption words x samples / caption word x model FLOPs / sample x peak FLOP / model FLOP
                convergence     information per sample   FLOPs per sample       utilisation (1 / MFU)

so the ratio of two costs is the product of the ratios of these four. Where one of the two settings does not say a
quantity in the middle, its neighbours are one factor, which nobody can take apart; the product remains the ratio.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from wellposed.report.files import read_metrics
from wellposed.report.record import RECORD_FILE, read_record
from wellposed.report.series import smoothed
from wellposed.training import METRICS_FILE
from wellposed.training.usage import USAGE_FILE, Usage, read_usage

__all__ = [
    "HISTORY_FILE",
    "LENS",
    "PARTS_FILE",
    "PUBLISHED",
    "STAGES_FILE",
    "Z_IMAGE",
    "AccountTable",
    "Comparison",
    "Factor",
    "Setting",
    "Target",
    "account_tables",
    "compare",
    "facts",
    "read_setting",
    "remarks",
    "setting_of",
]

HISTORY_FILE = "history.json"
"""Scores along a run, ``{"metric": [[samples seen, value], ...]}``, which it may have beside its losses."""

STAGES_FILE = "stages.json"
"""Folders of the stages whose sum is a run, as ``["low", "."]``, where they are more than its own folder."""

PARTS_FILE = "parts.json"
"""Folders of what a run trained on the way, as ``["autoencoder"]``: they cost what they cost, and see other samples."""

LOSS = "loss"

History = Mapping[str, Sequence[tuple[float | int, float | int]]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A score to be reached: accuracy=0.9."""

    metric: str
    value: float | int

    def __str__(self) -> str:
        return f"{self.metric} = {self.value:g}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training and what it used.

    Attributes:
        name: what it is called in tables.
        device: what it ran on.
        device_hours: wall-clock hours x devices.
        peak_flop: device-seconds x peak FLOP/s of a device.
        samples: images or texts seen, with repetition; None if unknown, as below.
        model_flops: FLOPs of forward and backward passes.
        caption_words: words of the captions of all samples.
        counters: further sums over all samples.
        captioning: what the captions cost, by unit, which is in none of the above; empty if unknown.
        history: scores along the way, by metric: (samples seen, value).
        scores: scores at the end.
        notes: where the figures are from.

    Raises:
        ValueError: an amount that is not positive.
    """

    name: str
    device: str
    device_hours: float | int
    peak_flop: float | int
    samples: float | int | None = None
    model_flops: float | int | None = None
    caption_words: float | int | None = None
    counters: Mapping[str, float | int] = field(default_factory=dict[str, float | int])
    captioning: Mapping[str, float | int] = field(default_factory=dict[str, float | int])
    history: History = field(default_factory=dict[str, Sequence[tuple[float | int, float | int]]])
    scores: Mapping[str, float | int] = field(default_factory=dict[str, float | int])
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("device_hours", "peak_flop", "samples", "model_flops", "caption_words"):
            amount = getattr(self, name)
            if amount is not None and not 0 < amount < math.inf:
                raise ValueError(f"{self.name}: {name} is {amount}; write a positive number, or None if it is unknown")

    @property
    def peak_flop_per_second(self) -> float:
        """Of one device, on average over the run."""
        return self.peak_flop / (3600 * self.device_hours)

    @property
    def flops_per_sample(self) -> float | None:
        """Model FLOPs of a sample: forward and backward."""
        return _ratio(self.model_flops, self.samples)

    @property
    def words_per_sample(self) -> float | None:
        """Caption words of a sample: how much it says about its image."""
        return _ratio(self.caption_words, self.samples)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over peak FLOP: the share of what was paid for that the model asked for."""
        return _ratio(self.model_flops, self.peak_flop)

    def samples_to(self, target: Target) -> float:
        """Samples until the target was first reached, between two evaluations by the logarithm of their samples.

        A metric is one that rises if its last evaluation is above its first.

        Raises:
            ValueError: no history of this metric, or the target was never reached.
        """
        evaluations = self.history.get(target.metric, ())
        if len(evaluations) < 2:
            raise ValueError(
                f"{self.name} has no history of {target.metric!r}; there is {', '.join(self.history) or 'none at all'} "
                f"({METRICS_FILE} or {HISTORY_FILE} in the folder of a run, two evaluations or more)"
            )
        sign = 1 if evaluations[-1][1] >= evaluations[0][1] else -1
        if sign * evaluations[0][1] >= sign * target.value:
            return float(evaluations[0][0])
        for (samples, value), (later, reached) in pairwise(evaluations):
            if sign * reached >= sign * target.value:
                weight = (target.value - value) / (reached - value)
                if samples == 0:
                    return weight * later
                return math.exp((1 - weight) * math.log(samples) + weight * math.log(later))
        best = max(sign * value for _, value in evaluations) * sign
        raise ValueError(f"{self.name} has not reached {target}: its best is {best:g}; choose a target that both reach")


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One of the ratios whose product is the ratio of two costs.

    Attributes:
        levers: what it stands for; several where they cannot be told apart.
        quantity: what is compared.
        first: in the one setting.
        second: in the other.
    """

    levers: tuple[str, ...]
    quantity: str
    first: float
    second: float

    @property
    def ratio(self) -> float:
        """First over second: below 1 the first is cheaper by it."""
        return self.first / self.second


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The cost of one setting over that of another.

    Attributes:
        first: the one.
        second: the other.
        target: the score up to which both are counted; None for the whole of both.
        hours: device-hours of the first over those of the second, up to the target.
        factors: their product is the ratio.
    """

    first: Setting
    second: Setting
    target: Target | None
    hours: float
    factors: tuple[Factor, ...]

    @property
    def ratio(self) -> float:
        """Peak FLOP of the first over those of the second."""
        return self.hours * self.first.peak_flop_per_second / self.second.peak_flop_per_second


LEVELS = ("caption words", "samples", "model FLOPs", "peak FLOP")
LEVERS = ("convergence", "information per sample", "FLOPs per sample", "utilisation")


def compare(first: Setting, second: Setting, target: Target | None = None) -> Comparison:
    """The ratio of two costs as the product of what it is made of.

    With a target, each setting is counted up to the samples at which it reached it, at its mean FLOPs per sample and
    its mean utilisation.

    Raises:
        ValueError: a setting without a history of the target's metric, or which did not reach it.
    """
    shares = [_share_until(setting, target) for setting in (first, second)]
    sides = [_levels(setting, share) for setting, share in zip((first, second), shares, strict=True)]
    factors: list[Factor] = []
    levers: list[str] = []
    below: tuple[str, float, float] | None = None
    for level, lever, mine, yours in zip(LEVELS, LEVERS, *sides, strict=True):
        levers.append(lever)
        if mine is None or yours is None:
            continue
        name, under_mine, under_yours = below or ("", 1.0, 1.0)
        until = f" until {target}" if target else ""
        quantity = f"{level} / {name.removesuffix('s')}" if name else level + until
        factors.append(
            Factor(levers=tuple(levers), quantity=quantity, first=mine / under_mine, second=yours / under_yours)
        )
        below, levers = (level, mine, yours), []
    hours = first.device_hours * shares[0] / (second.device_hours * shares[1])
    return Comparison(first=first, second=second, target=target, hours=hours, factors=tuple(factors))


def _share_until(setting: Setting, target: Target | None) -> float:
    """The part of the whole training up to the target."""
    if target is None:
        return 1.0
    reached = setting.samples_to(target)
    if setting.samples is None:
        raise ValueError(f"{setting.name} does not say how many samples it saw; leave out the target {target}")
    if reached == 0:
        raise ValueError(f"{setting.name} was at {target} before its first sample; choose a target that takes training")
    return reached / setting.samples


def _levels(setting: Setting, share: float) -> tuple[float | None, ...]:
    whole = (setting.caption_words, setting.samples, setting.model_flops, setting.peak_flop)
    return tuple(None if amount is None else amount * share for amount in whole)


def remarks(comparison: Comparison) -> tuple[str, ...]:
    """What to know about a comparison, in sentences."""
    first, second = comparison.first, comparison.second
    until = f" until {comparison.target}" if comparison.target else ""
    said = [
        f"{first.name} took {comparison.ratio:.4f} of the peak FLOP of {second.name}{until}: {comparison.hours:.4f} of "
        f"the device-hours, on devices of {first.peak_flop_per_second / second.peak_flop_per_second:.4f} of the peak; "
        f"in all, {_cost(first)} against {_cost(second)}.",
        "It is normalised by peak: what devices could have computed, not what they did. A device that idles costs as "
        "much as one that works, and prices differ from peaks.",
        f"Captioning is left out. It cost {_captioning(first)}, and {_captioning(second)}.",
    ]
    if comparison.target is None:
        said.append("Both are counted as a whole, whatever they reached: see the scores.")
    merged = [factor for factor in comparison.factors if len(factor.levers) > 1]
    if merged:
        missing = dict.fromkeys(s.name for s in (first, second) if None in _levels(s, 1.0))
        apart = "; ".join(" x ".join(factor.levers) for factor in merged)
        said.append(f"Not to be told apart, for want of figures of {' and '.join(missing)}: {apart}.")
    return tuple(said)


def facts(setting: Setting) -> dict[str, str | float | int | None]:
    """What a setting used, by what it is called in tables; None where that is unknown."""
    return {
        "device": setting.device,
        "device-hours": setting.device_hours,
        "peak FLOP/s of a device": setting.peak_flop_per_second,
        "peak FLOP": setting.peak_flop,
        "samples": setting.samples,
        "caption words": setting.caption_words,
        "caption words / sample": setting.words_per_sample,
        "model FLOPs": setting.model_flops,
        "model FLOPs / sample": setting.flops_per_sample,
        "MFU (model FLOPs / peak FLOP)": setting.mfu,
        "samples / device-hour": _ratio(setting.samples, setting.device_hours),
        **{name.replace("_", " "): amount for name, amount in setting.counters.items()},
        "captioning": _amounts(setting.captioning) or None,
    }


@dataclass(frozen=True, kw_only=True)
class AccountTable:
    """A table as it is shown on a terminal.

    Attributes:
        columns: heads.
        rows: cells as text.
        remarks: sentences to stand below it.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...]


def account_tables(settings: Sequence[Setting], target: Target | None = None) -> tuple[AccountTable, ...]:
    """What settings used, side by side, then the ratio of the first one's cost to each other's.

    Raises:
        ValueError: see :func:`compare`.
    """
    columns = [facts(setting) for setting in settings]
    if target is not None:
        for setting, column in zip(settings, columns, strict=True):
            column[f"samples until {target}"] = setting.samples_to(target)
    for score in settings[0].scores:
        if all(score in setting.scores for setting in settings):
            for setting, column in zip(settings, columns, strict=True):
                column[score] = setting.scores[score]
    keys = dict.fromkeys(key for column in columns for key in column)
    used = AccountTable(
        columns=("", *(setting.name for setting in settings)),
        rows=tuple((key, *(_cell(column.get(key)) for column in columns)) for key in keys),
        remarks=tuple(f"{setting.name}: {note}." for setting in settings for note in setting.notes),
    )
    return (used, *(_ratio_table(compare(settings[0], other, target)) for other in settings[1:]))


def _ratio_table(comparison: Comparison) -> AccountTable:
    rows = [
        (" x ".join(factor.levers), factor.quantity, _cell(factor.first), _cell(factor.second), f"{factor.ratio:.4f}")
        for factor in comparison.factors
    ]
    return AccountTable(
        columns=("lever", "quantity", comparison.first.name, comparison.second.name, "ratio"),
        rows=(*rows, ("all of them", "", "", "", f"{comparison.ratio:.4f}")),
        remarks=remarks(comparison),
    )


def read_setting(folder: Path, name: str) -> Setting:
    """What the run in a folder used, its scores, and the history of scores and losses.

    A run in stages lists their folders in :data:`STAGES_FILE`, and their sum is the run's. What is in
    :data:`PARTS_FILE` counts in its time and its FLOPs; samples, words and losses are those of the stages. Losses go by
    their names in the metrics, and without the player's where there is one alone; a running mean over a fiftieth of the
    lines.

    Raises:
        ValueError: no such folder, no account in it, or a damaged file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is neither the folder of a run nor a published setting ({', '.join(PUBLISHED)})")
    stages = _accounts(folder, _read_folders(folder / STAGES_FILE, otherwise=["."]))
    parts = _accounts(folder, _read_folders(folder / PARTS_FILE, otherwise=[]))
    usages = [read_usage(stage) for stage in stages]
    others = sorted(set(folder.glob(f"*/{USAGE_FILE}")) - {*stages, *parts})
    notes = [
        f"{what}: {', '.join(path.parent.name for path in paths)}"
        for what, paths in (("in its time and FLOPs, not in its samples", parts), ("not in it", others))
        if paths
    ]
    record = folder / RECORD_FILE
    return setting_of(
        usages,
        name,
        parts=[read_usage(part) for part in parts],
        history={
            **_losses([stage.parent / METRICS_FILE for stage in stages], usages),
            **_read_history(folder / HISTORY_FILE),
        },
        scores=_numbers(read_record(record).metrics) if record.is_file() else {},
        notes=notes,
    )


def _accounts(folder: Path, names: Sequence[str]) -> list[Path]:
    paths = [folder / name / USAGE_FILE for name in names]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path.parent} has no {USAGE_FILE}; name the folder of a run that has been trained")
    return paths


def _read_folders(path: Path, *, otherwise: list[str]) -> list[str]:
    if not path.is_file():
        return otherwise
    try:
        folders = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove or mend it") from error
    if not isinstance(folders, list) or not folders or not all(isinstance(s, str) for s in cast("list[Any]", folders)):
        raise ValueError(f'{path} holds {folders!r}; write a list of folders: ["low", "."]')
    return cast("list[str]", folders)


def setting_of(
    usages: Sequence[Usage],
    name: str,
    *,
    parts: Sequence[Usage] = (),
    history: History | None = None,
    scores: Mapping[str, float | int] | None = None,
    notes: Sequence[str] = (),
) -> Setting:
    """The setting of a run from what its stages used, and the parts that it trained on the way.

    Raises:
        ValueError: no stages, or nothing was done in them.
    """
    if not usages:
        raise ValueError(f"{name} has no stages; give what at least one used")
    said = list(notes)
    trained = (*parts, *usages)
    if any(usage.peak_source == "measured" for usage in trained):
        said.append("the peak is that of a short matrix product on its device: measured, not nominal")
    repeated = sum(usage.repeated_steps for usage in trained)
    if repeated:
        said.append(f"{repeated} steps were done again after a crash; their time is in it twice")
    # What one stage does not count is unknown of their sum.
    counted = {
        name: _sum([usage.counters.get(name) for usage in usages]) for usage in usages for name in usage.counters
    }
    counters = {name: amount for name, amount in counted.items() if amount is not None}
    return Setting(
        name=name,
        device=", ".join(dict.fromkeys(f"{usage.devices} x {usage.device}" for usage in trained)),
        device_hours=sum(usage.device_hours for usage in trained),
        peak_flop=sum(usage.peak_flop for usage in trained),
        samples=sum(usage.samples for usage in usages),
        model_flops=_sum([usage.model_flops for usage in trained]) or None,
        caption_words=counters.pop("caption_words", 0) or None,
        counters=counters,
        # Stages share their captions.
        captioning={unit: amount for usage in usages for unit, amount in usage.captioning.items()},
        history=history or {},
        scores=scores or {},
        notes=tuple(said),
    )


def _read_history(path: Path) -> History:
    if not path.is_file():
        return {}
    try:
        content = cast("dict[str, list[list[float]]]", json.loads(path.read_text(encoding="utf-8")))
        history = {metric: tuple((float(n), float(v)) for n, v in rows) for metric, rows in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not {{"metric": [[samples, value], ...]}} ({error}); remove or mend it') from error
    for metric, rows in history.items():
        if any(before >= after for (before, _), (after, _) in pairwise(rows)):
            raise ValueError(f"{path}: the samples of {metric!r} do not rise; write the evaluations in their order")
    return history


def _losses(metrics: Sequence[Path], usages: Sequence[Usage]) -> dict[str, list[tuple[float, float]]]:
    """Losses by samples seen in this stage and those before, as far as the lines of metrics say."""
    found: dict[str, list[tuple[float, float]]] = {}
    before = 0
    for path, usage in zip(metrics, usages, strict=True):
        lines = [line for line in read_metrics(path) if "samples" in line] if path.is_file() else []
        for name in dict.fromkeys(key for line in lines for key in line if LOSS in key):
            known = [line for line in lines if isinstance(line.get(name), int | float) and math.isfinite(line[name])]
            values = smoothed([float(line[name]) for line in known], max(1, len(known) // 50))
            samples = [float(before + line["samples"]) for line in known]
            found.setdefault(name, []).extend(zip(samples, values, strict=True))
        before += usage.samples
    players = {name.partition("/")[0] for name in found}
    return found | {name.partition("/")[2]: rows for name, rows in found.items() if len(players) == 1}


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found


def _ratio(amount: float | int | None, unit: float | int | None) -> float | None:
    return None if amount is None or unit is None else amount / unit


def _sum(amounts: Sequence[float | int | None]) -> float | int | None:
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if len(known) == len(amounts) else None


def _cost(setting: Setting) -> str:
    return f"{_number(setting.device_hours)} h x {setting.peak_flop_per_second / 1e12:.4g} TFLOP/s"


def _amounts(amounts: Mapping[str, float | int]) -> str:
    return ", ".join(f"{_number(amount)} {unit}" for unit, amount in amounts.items())


def _number(amount: float | int) -> str:
    return f"{amount:,.0f}" if 1000 <= amount < 1e7 else f"{amount:.4g}"


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else _number(value)


def _captioning(setting: Setting) -> str:
    return f"{_amounts(setting.captioning) or 'an unknown sum'} for {setting.name}"


def _published(device: str, hours: int, tera_flop_per_second: float | int) -> dict[str, Any]:
    return {"device": device, "device_hours": hours, "peak_flop": hours * 3600 * tera_flop_per_second * 1e12}


def _lens_forward_flops(image_tokens: int) -> float:
    """Of one image of the 48 blocks of width 1536, with 180 tokens of text: products with weights, and attention."""
    tokens = image_tokens + 180
    return 2 * 1.359e9 * tokens + 4 * tokens**2 * 1536 * 48


# Two stages of 400,000 steps on 128 devices. In the second a device draws squares of about 512, 768 or 1024 pixels, and
# so many at once; that the three are equally likely is assumed.
LENS_STEPS, LENS_DEVICES = 400_000, 128
LENS_FIRST_IMAGES = LENS_STEPS * 3072
LENS_SECOND_IMAGES = {
    tokens: LENS_STEPS * LENS_DEVICES * at_once / 3 for tokens, at_once in {1024: 24, 2304: 10, 4096: 6}.items()
}
LENS_IMAGES = LENS_FIRST_IMAGES + sum(LENS_SECOND_IMAGES.values())
LENS_MODEL_FLOPS = 3 * (
    LENS_FIRST_IMAGES * _lens_forward_flops(1024)
    + sum(images * _lens_forward_flops(tokens) for tokens, images in LENS_SECOND_IMAGES.items())
)

LENS = Setting(
    name="lens",
    **_published("128 x A100-80GB", 192_000, 312),
    samples=LENS_IMAGES,
    model_flops=LENS_MODEL_FLOPS,
    caption_words=109 * LENS_IMAGES,
    scores={"OneIG-EN": 0.532, "LongText-EN": 0.893, "CVTG word accuracy": 0.849},
    notes=(
        "pre-training as published in arXiv 2605.21573; images and model FLOPs follow from its steps, batch sizes and "
        "network (three forward passes' worth, of the transformer alone), words from 109 a caption",
        "scores without its prompt rewriter; with it 0.557, 0.937 and 0.869",
    ),
)
"""Lens (arXiv 2605.21573), pre-training."""

Z_IMAGE = Setting(
    name="z-image",
    **_published("H800", 314_000, 989.5),
    scores={"OneIG-EN": 0.546, "LongText-EN": 0.935, "CVTG word accuracy": 0.867},
    notes=("hours as published; its images and FLOPs are not known here",),
)
"""Z-Image, with which the paper of Lens compares itself."""

PUBLISHED: Mapping[str, Setting] = {setting.name: setting for setting in (LENS, Z_IMAGE)}
"""Published trainings by the names that ``wellposed account`` knows them by."""
