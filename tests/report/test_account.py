"""The published ratio, the law that factors multiply to it, and accounts read from folders."""

import json
import math
from dataclasses import asdict, replace
from datetime import UTC, datetime

import pytest

from wellposed.report.account import (
    LENS,
    PUBLISHED,
    Z_IMAGE,
    Setting,
    Target,
    account_tables,
    compare,
    facts,
    read_setting,
    remarks,
    setting_of,
)
from wellposed.report.record import new_record, write_record
from wellposed.training.usage import Usage

FULL = Setting(
    name="full",
    device="8 x A100",
    device_hours=10.0,
    peak_flop=10 * 3600 * 312e12,
    samples=1e6,
    model_flops=4e18,
    caption_words=5e7,
    captioning={"usd": 1250.0},
    history={"accuracy": ((1e5, 0.2), (2e5, 0.5), (4e5, 0.4), (8e5, 0.9), (1e6, 0.8))},
)
OTHER = Setting(
    name="other",
    device="4 x H100",
    device_hours=7.0,
    peak_flop=7 * 3600 * 989.5e12,
    samples=3e6,
    model_flops=1.7e19,
    caption_words=3.3e7,
    history={"accuracy": ((0, 0.1), (1e6, 0.6), (3e6, 0.95)), "loss": ((1e5, 3.0), (1e6, 1.0), (3e6, 1.5))},
)


def usage(**changes):
    settings = {
        "device": "A100",
        "kind": "cuda",
        "devices": 4,
        "peak_flop_per_second": 312e12,
        "peak_source": "nominal",
        "seconds": 900.0,
        "device_seconds": 3600.0,
        "peak_flop": 3600 * 312e12,
        "steps": 10,
        "samples": 400,
        "model_flops": 1e17,
        "counters": {"caption_words": 8000.0, "image_tokens": 400 * 1024.0},
        "captioning": {"usd": 3.0},
    }
    return Usage(**(settings | changes))


def make_run(folder, used=None, **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "usage.json").write_text(json.dumps(asdict(used or usage())))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_the_published_ratio():
    compared = compare(LENS, Z_IMAGE)
    assert compared.ratio == pytest.approx(192_000 * 312 / (314_000 * 989.5), rel=1e-12)
    assert f"{compared.ratio:.4f}" == "0.1928"
    assert compared.hours == pytest.approx(192 / 314)
    (factor,) = compared.factors
    assert factor.quantity == "peak FLOP"
    assert len(factor.levers) == 4
    said = " ".join(remarks(compared))
    assert "0.1928 of the peak FLOP of z-image" in said
    assert "192,000 h x 312 TFLOP/s against 314,000 h x 989.5 TFLOP/s" in said
    assert "normalised by peak" in said
    assert "Captioning is left out" in said
    assert "for want of figures of z-image" in said


def test_the_arithmetic_of_lens():
    """Section 3.3 of the note: images of the two stages, FLOPs of the transformer, their share of the peak."""
    first, second = 400_000 * 3072, 400_000 * 128 * (24 + 10 + 6) / 3
    assert first == pytest.approx(1.23e9, rel=2e-3)
    assert second == pytest.approx(0.68e9, rel=5e-3)
    assert LENS.samples == pytest.approx(first + second)
    assert LENS.model_flops == pytest.approx(1.36e22 + 1.42e22, rel=2e-3)
    assert LENS.mfu == pytest.approx(0.13, abs=0.002)
    assert LENS.mfu * 4 / 3 == pytest.approx(0.17, abs=0.003)  # with the forward pass that checkpointing repeats
    assert LENS.words_per_sample == pytest.approx(109)
    assert LENS.device_hours / 128 == 1500
    assert PUBLISHED == {"lens": LENS, "z-image": Z_IMAGE}


UNKNOWN = [
    (),
    ("caption_words",),
    ("samples",),
    ("model_flops",),
    ("caption_words", "samples"),
    ("samples", "model_flops"),
    ("caption_words", "samples", "model_flops"),
]


@pytest.mark.parametrize("missing", UNKNOWN)
@pytest.mark.parametrize("whose", ["first", "second", "both"])
def test_factors_multiply_to_the_ratio(missing, whose):
    nothing = dict.fromkeys(missing)
    first = replace(FULL, **nothing) if whose != "second" else FULL
    second = replace(OTHER, **nothing) if whose != "first" else OTHER
    compared = compare(first, second)
    assert len(compared.factors) == 4 - len(missing)
    assert [lever for factor in compared.factors for lever in factor.levers] == [
        "convergence",
        "information per sample",
        "FLOPs per sample",
        "utilisation",
    ]
    assert math.prod(factor.ratio for factor in compared.factors) == pytest.approx(compared.ratio, rel=1e-12)
    assert compared.ratio == pytest.approx(FULL.peak_flop / OTHER.peak_flop, rel=1e-12)
    assert compare(second, first).ratio == pytest.approx(1 / compared.ratio, rel=1e-12)


def test_each_factor_is_what_it_says():
    words, information, flops, utilisation = compare(FULL, OTHER).factors
    assert (words.quantity, words.ratio) == ("caption words", pytest.approx(5e7 / 3.3e7))
    assert (information.quantity, information.first) == ("samples / caption word", pytest.approx(1 / 50))
    assert (flops.quantity, flops.first) == ("model FLOPs / sample", pytest.approx(4e12))
    assert (utilisation.quantity, utilisation.first) == ("peak FLOP / model FLOP", pytest.approx(1 / FULL.mfu))


@pytest.mark.parametrize("change", ["more words", "smaller network", "faster code"])
def test_a_change_of_one_thing_shows_in_one_factor(change):
    changed = {
        "more words": {"caption_words": 3 * FULL.caption_words},
        "smaller network": {"model_flops": FULL.model_flops / 2, "peak_flop": FULL.peak_flop / 2, "device_hours": 5.0},
        "faster code": {"peak_flop": FULL.peak_flop / 2, "device_hours": 5.0},
    }[change]
    compared = compare(replace(FULL, **changed), FULL)
    ratios = {factor.levers[0]: factor.ratio for factor in compared.factors}
    expected = (
        dict.fromkeys(ratios, 1.0)
        | {
            "more words": {"convergence": 3.0, "information per sample": 1 / 3},
            "smaller network": {"FLOPs per sample": 0.5},
            "faster code": {"utilisation": 0.5},
        }[change]
    )
    assert ratios == pytest.approx(expected)


def test_until_a_score_only_what_was_used_up_to_it_counts():
    target = Target(metric="accuracy", value=0.6)
    compared = compare(FULL, OTHER, target)
    mine, yours = FULL.samples_to(target), OTHER.samples_to(target)
    assert compared.ratio == pytest.approx(FULL.peak_flop * mine / 1e6 / (OTHER.peak_flop * yours / 3e6), rel=1e-12)
    assert math.prod(factor.ratio for factor in compared.factors) == pytest.approx(compared.ratio, rel=1e-12)
    assert compared.factors[0].quantity == "caption words until accuracy = 0.6"
    assert compared.factors[0].first == pytest.approx(50 * mine)
    without_words = compare(replace(FULL, caption_words=None), OTHER, target)
    assert without_words.factors[0].quantity == "samples until accuracy = 0.6"
    assert without_words.factors[0].ratio == pytest.approx(mine / yours)


@pytest.mark.parametrize(
    ("setting", "metric", "value", "samples"),
    [
        (FULL, "accuracy", 0.5, 2e5),  # at an evaluation
        (FULL, "accuracy", 0.45, 1e5 * 2 ** (0.25 / 0.3)),  # the first time, not after the dip
        (FULL, "accuracy", 0.65, 4e5 * math.sqrt(2)),  # halfway from 0.4 to 0.9: the geometric mean
        (FULL, "accuracy", 0.1, 1e5),  # the first evaluation was past it
        (OTHER, "accuracy", 0.35, 5e5),  # no logarithm of 0 samples
        (OTHER, "loss", 2.0, 1e5 * math.sqrt(10)),  # a metric that falls
    ],
)
def test_samples_to_a_score(setting, metric, value, samples):
    assert setting.samples_to(Target(metric=metric, value=value)) == pytest.approx(samples, rel=1e-12)


@pytest.mark.parametrize(
    ("first", "target", "said"),
    [
        (FULL, ("accuracy", 0.99), "full has not reached accuracy = 0.99: its best is 0.9; choose"),
        (replace(FULL, history=OTHER.history), ("loss", 0.5), "not reached loss = 0.5: its best is 1;"),
        (FULL, ("beauty", 1.0), "full has no history of 'beauty'; there is accuracy"),
        (LENS, ("accuracy", 0.5), "lens has no history of 'accuracy'; there is none at all"),
        (replace(FULL, samples=None), ("accuracy", 0.5), "full does not say how many samples"),
        (replace(FULL, history=OTHER.history), ("accuracy", 0.1), "full was at accuracy = 0.1 before its first sample"),
    ],
)
def test_targets_that_tell_nothing(first, target, said):
    with pytest.raises(ValueError, match=said):
        compare(first, OTHER, Target(metric=target[0], value=target[1]))


@pytest.mark.parametrize("amount", [0, -1.0, math.inf])
def test_amounts_are_positive(amount):
    with pytest.raises(ValueError, match=f"full: samples is {amount}; write a positive number"):
        replace(FULL, samples=amount)


def test_a_run_is_read_from_its_folder(tmp_path):
    history = {"accuracy": [[0, 0.1], [200, 0.5], [400, 0.9]]}
    folder = make_run(tmp_path / "run", history=history)
    record = new_record(
        "lens_tiny",
        "train",
        settings={},
        metrics={"fid": {"25": 3.5}, "kind": "x", "done": True},
        seed=0,
        started=datetime.now(UTC),
    )
    write_record(record, folder / "record.json")
    setting = read_setting(folder, "tiny")
    assert (setting.name, setting.device, setting.device_hours) == ("tiny", "4 x A100", 1.0)
    assert setting.peak_flop_per_second == pytest.approx(312e12)
    assert (setting.samples, setting.words_per_sample) == (400, 20)
    assert setting.counters == {"image_tokens": 400 * 1024}
    assert setting.captioning == {"usd": 3.0}
    assert setting.scores == {"fid.25": 3.5}
    assert setting.samples_to(Target(metric="accuracy", value=0.7)) == pytest.approx(200 * math.sqrt(2))
    assert setting.notes == ()
    assert facts(setting)["image tokens"] == 400 * 1024


def test_a_run_in_stages_is_their_sum(tmp_path):
    folder = make_run(tmp_path / "run", usage(samples=100, device="H100"), stages=["low", "."])
    make_run(folder / "low", usage(counters={"caption_words": 2000.0}))
    make_run(folder / "autoencoder")
    setting = read_setting(folder, "run")
    assert (setting.device, setting.device_hours, setting.samples) == ("4 x A100, 4 x H100", 2.0, 500)
    assert (setting.model_flops, setting.caption_words) == (2e17, 10_000)
    assert setting.counters == {}  # the first stage did not count tokens
    assert setting.captioning == {"usd": 3.0}
    assert setting.notes == ("not in it: autoencoder",)
    make_run(folder / "low", usage(model_flops=None, counters={}))
    setting = read_setting(folder, "run")
    assert (setting.model_flops, setting.caption_words) == (None, None)


def test_what_a_run_trained_on_the_way_costs_and_is_told_nothing(tmp_path):
    folder = make_run(tmp_path / "run", usage(samples=100), stages=["low", "."], parts=["autoencoder"])
    make_run(folder / "low", usage())
    make_run(folder / "autoencoder", usage(samples=10**6, counters={}, device="H100", repeated_steps=3))
    (folder / "autoencoder" / "metrics.jsonl").write_text('{"step": 1, "autoencoder/loss": 1.0, "samples": 50}\n')
    (folder / "metrics.jsonl").write_text('{"step": 1, "net/loss": 1.0, "samples": 50}\n')
    make_run(folder / "judge")
    setting = read_setting(folder, "run")
    assert (setting.device, setting.device_hours) == ("4 x H100, 4 x A100", 3.0)
    assert (setting.peak_flop, setting.model_flops) == (3 * 3600 * 312e12, 3e17)
    assert (setting.samples, setting.caption_words) == (500, 16_000)
    assert setting.history == {"net/loss": [(450, 1.0)], "loss": [(450, 1.0)]}
    assert setting.notes == (
        "in its time and FLOPs, not in its samples: autoencoder",
        "not in it: judge",
        "3 steps were done again after a crash; their time is in it twice",
    )


def test_losses_of_a_run_are_its_history(tmp_path):
    """In stages, one after the other by the samples seen; what is measured besides is in the same history."""
    folder = make_run(
        tmp_path / "run", usage(samples=100), stages=["low", "."], history={"fid": [[10, 9.0], [20, 3.0]]}
    )
    make_run(folder / "low", usage(samples=400))
    for where, losses in ((folder / "low", (4.0, 2.0)), (folder, (math.nan, 1.0, 0.5))):
        lines = [
            {"step": n, "net/loss": loss, "net/lr": 1.0, "samples": 50 * n} for n, loss in enumerate(losses, start=1)
        ]
        (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    setting = read_setting(folder, "run")
    assert setting.history["loss"] == [(50, 4.0), (100, 2.0), (500, 1.0), (550, 0.5)]
    assert setting.history.keys() == {"loss", "net/loss", "fid"}
    assert setting.samples_to(Target(metric="loss", value=0.75)) == pytest.approx(math.sqrt(500 * 550))
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "net/loss": 1.0, "samples": 50}\n{"step": 2, "judge/loss": 1.0}\n'
    )
    assert "loss" in read_setting(folder, "run").history
    (folder / "metrics.jsonl").write_text('{"step": 1, "judge/loss": 1.0, "samples": 50}\n')
    assert read_setting(folder, "run").history.keys() == {"net/loss", "judge/loss", "fid"}


def test_what_is_special_about_a_run_is_noted():
    setting = setting_of([usage(peak_source="measured", repeated_steps=7)], "run")
    assert "measured, not nominal" in setting.notes[0]
    assert "7 steps were done again" in setting.notes[1]
    with pytest.raises(ValueError, match="run has no stages"):
        setting_of([], "run")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"usage": "{"}, r"usage\.json is not the account of a run"),
        ({"history": '{"accuracy": [1, 2]}'}, r'history\.json is not {"metric"'),
        ({"history": "[]"}, r'history\.json is not {"metric"'),
        ({"history": '{"accuracy": [[2, 0.1], [1, 0.2]]}'}, "samples of 'accuracy' do not rise"),
        ({"stages": "{"}, r"stages\.json is not JSON"),
        ({"stages": "[]"}, r"stages\.json holds \[\]; write a list of folders"),
        ({"parts": "[1]"}, r"parts\.json holds \[1\]; write a list of folders"),
        ({"parts": '["vae"]'}, r"vae has no usage\.json; name the folder of a run that has been trained"),
        ({"stages": '["high"]'}, r"high has no usage\.json; name the folder of a run that has been trained"),
    ],
)
def test_damaged_folders(tmp_path, files, said):
    folder = make_run(tmp_path / "run", **files)
    with pytest.raises(ValueError, match=said):
        read_setting(folder, "run")


def test_folders_without_an_account(tmp_path):
    with pytest.raises(ValueError, match=r"no_such is neither the folder of a run nor a published setting \(lens, z"):
        read_setting(tmp_path / "no_such", "run")
    with pytest.raises(ValueError, match=r"has no usage\.json"):
        read_setting(tmp_path, "run")


def test_tables_of_a_comparison():
    scored = [replace(s, scores={"fid": v, s.name: 1.0}) for s, v in ((FULL, 3.0), (OTHER, 2.5))]
    used, ratios = account_tables(scored)
    assert used.columns == ("", "full", "other")
    rows = {row[0]: row[1:] for row in used.rows}
    assert rows["device"] == ("8 x A100", "4 x H100")
    assert rows["samples"] == ("1,000,000", "3,000,000")
    assert rows["captioning"] == ("1,250 usd", "–")
    assert rows["fid"] == ("3", "2.5")
    assert "full" not in rows
    assert ratios.columns == ("lever", "quantity", "full", "other", "ratio")
    assert [row[0] for row in ratios.rows][-2:] == ["utilisation", "all of them"]
    assert ratios.rows[-1][-1] == f"{FULL.peak_flop / OTHER.peak_flop:.4f}"
    assert "It cost 1,250 usd for full, and an unknown sum for other." in " ".join(ratios.remarks)
    assert not any("told apart" in remark for remark in ratios.remarks)


def test_tables_until_a_score():
    (used,) = account_tables([FULL], Target(metric="accuracy", value=0.5))
    assert ("samples until accuracy = 0.5", "200,000") in used.rows
    _, ratios = account_tables([FULL, OTHER], Target(metric="accuracy", value=0.5))
    assert ratios.rows[0][1] == "caption words until accuracy = 0.5"
    assert "until accuracy = 0.5" in ratios.remarks[0]
