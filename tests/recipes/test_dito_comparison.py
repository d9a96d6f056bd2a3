"""The comparison of token reduction: everyone drops as many tokens, costs are counted, verdicts follow from numbers."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel

from wellposed.dito.config import Scope, TokenReductionConfig
from wellposed.evaluation.blocking import blocking
from wellposed.evaluation.features import FeatureExtractor
from wellposed.evaluation.frechet import feature_statistics
from wellposed.recipes import dito_comparison
from wellposed.recipes.dito import small_flux
from wellposed.recipes.dito_comparison import (
    INPUT_CONTROLS,
    Contender,
    Judge,
    Outcome,
    Subject,
    cached_contenders,
    compare,
    compare_penalties,
    compare_speed,
    extrapolated_contenders,
    flow_subject,
    model_flops,
    pipeline_subject,
    reduction_contenders,
    sampled,
    shorter_contenders,
    targets,
)
from wellposed.recipes.flow_draw import FlowSampler
from wellposed.recipes.optimize import seeded_network
from wellposed.training.context import derived_seed

ROOT = Path(__file__).parents[2]
SIZE, STEPS = 16, 6
TOKENS = (SIZE // 2) ** 2


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def subject() -> Subject:
    network = seeded_network(lambda: small_flux(channels=1, num_classes=2, num_single_layers=1, num_heads=1), 0)
    generator = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        if weight.ndim > 1:  # as initialised, a velocity hardly depends on the tokens around
            torch.nn.init.normal_(weight, std=1.5 * weight[0].numel() ** -0.5, generator=generator)
    sampler = FlowSampler(network.eval().requires_grad_(False), FlowMatchEulerDiscreteScheduler())
    return flow_subject("noise", sampler, size=SIZE, num_inference_steps=STEPS, batch_size=4)


def everyone(subject: Subject, ratio: float = 0.5, scope: Scope = "block") -> list[Contender]:
    return reduction_contenders(subject.transformer, ratio=ratio, scope=scope, cache_threshold=0.05)


@pytest.mark.parametrize(("ratio", "scope"), [(0.25, "attn"), (0.5, "block")])
def test_everyone_drops_as_many_tokens_and_equal_compute_is_equal(subject: Subject, ratio: float, scope: Scope) -> None:
    contenders = everyone(subject, ratio, scope)
    assert len({one.name for one in contenders}) == len(contenders)
    dense_steps: dict[str, list[int]] = {}
    for contender in contenders:
        assert (contender.ratio, contender.scope) == (ratio, scope)
        with sampled(subject, contender, 3) as reduction:
            subject.draw(0, STEPS, 1)
            assert reduction is not None
            modes = [record.mode for record in reduction.steps]
            dense_steps[contender.name] = [step for step, mode in enumerate(modes) if mode != "reduce"]
            if contender.cache_threshold is None:
                for site, counts in reduction.drop_counts().items():
                    assert counts.sum(1).tolist() == [modes.count("reduce") * int(ratio * TOKENS)], site
    for contender in contenders:
        if contender.family == "published":
            assert dense_steps[contender.name] == []
        elif contender.family in ("dense steps", "criterion") or contender.name == "paper":
            assert dense_steps[contender.name] == [0, 4]


def test_a_model_is_as_it_was_after_every_contender(subject: Subject) -> None:
    before = subject.draw(0, 3, 1)
    cached = [*cached_contenders(subject.transformer, (9.0,)), *extrapolated_contenders(subject.transformer, (2,))]
    for contender in [*everyone(subject), *cached]:
        with sampled(subject, contender, 0):
            first = subject.draw(0, 3, 1)
            # Nothing of a generation leaks into the next one.
            assert torch.equal(subject.draw(0, 3, 1), first), contender.name
        assert torch.equal(subject.draw(0, 3, 1), before), contender.name


def test_images_do_not_depend_on_how_many_are_drawn(subject: Subject) -> None:
    torch.testing.assert_close(subject.draw(5, 3, 2), subject.draw(5, 3, 6)[:2], atol=1e-5, rtol=0)
    assert subject.draw(5, 3, 2).shape == (2, 1, SIZE, SIZE)


def test_operations_are_counted_on_a_cpu_too(subject: Subject) -> None:
    """Against the same counter on attention that is spelled out in matrix products."""
    flops, images = model_flops(subject, count=2)
    with sdpa_kernel(SDPBackend.MATH):
        spelled_out, _ = model_flops(subject, count=2)
    assert flops == spelled_out
    assert torch.equal(images, subject.draw(0, STEPS, 2))
    half, _ = model_flops(subject, Contender(name="3 steps", family="steps", num_inference_steps=3), count=2)
    assert half / flops == pytest.approx(3 / STEPS)


def test_outcomes(subject: Subject) -> None:
    pixels = FeatureExtractor(function=lambda x: x.flatten(1)[:, ::32], name="pixels", weights_hash="none")
    real = torch.rand(32, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    shown: list[str] = []
    contenders = [
        *shorter_contenders((4,)),
        *cached_contenders(subject.transformer, (9.0,)),
        *extrapolated_contenders(subject.transformer, (2,)),
        *(one for one in everyone(subject) if one.name in ("paper", "default", "tomesd")),
    ]
    outcomes = compare(
        subject,
        contenders,
        seeds=(0, 1),
        num_images=3,
        judge=Judge(extractor=pixels, reference=feature_statistics(real, pixels)),
        num_judged=5,
        judged=lambda one: one.name == "default",
        on_outcome=lambda outcome, images: shown.append(f"{outcome.name} {len(images)}"),
    )
    assert shown == ["dense 5", "4 steps 3", "cache 9 3", "TaylorSeer 2 3", "paper 3", "default 5", "tomesd 3"]
    at = {one.name: one for one in outcomes}
    assert (at["dense"].psnr, at["dense"].flops, at["dense"].blocking) == ((100.0, 100.0), 1.0, 1.0)
    assert at["4 steps"].flops == pytest.approx(4 / STEPS)
    assert at["cache 9"].flops < 1
    # Two steps to begin with, then every second one: of 6 steps, those with index 0, 1, 3 and 5.
    assert at["TaylorSeer 2"].flops == pytest.approx(4 / 6, abs=0.03)
    assert at["tomesd"].flops < at["paper"].flops < at["default"].flops < 1
    assert at["paper"].mean_psnr < at["default"].mean_psnr < 100
    assert [len(one.frechet) for one in outcomes] == [2, 0, 0, 0, 0, 2, 0]
    assert at["default"].mean_frechet == pytest.approx(sum(at["default"].frechet) / 2)
    assert at["paper"].mean_frechet is None and at["default"].psnr_std > 0
    # By hand: PSNR of images in [0, 1] from the same noise, destinations drawn from the seed.
    paper = next(one for one in contenders if one.name == "paper")
    with sampled(subject, paper, 1):
        error = (subject.draw(1, STEPS, 3) - subject.draw(1, STEPS, 3)).abs().max()
        images = subject.draw(1, STEPS, 3)
    assert error == 0
    squares = (images - subject.draw(1, STEPS, 3)).double().square().mean((1, 2, 3))
    assert at["paper"].psnr[1] == pytest.approx(float((-10 * squares.log10()).mean()), abs=1e-4)


def test_destinations_follow_the_seed(subject: Subject) -> None:
    default = next(one for one in everyone(subject) if one.name == "default")

    def drawn(seed: int) -> torch.Tensor:
        with sampled(subject, default, seed):
            return subject.draw(0, STEPS, 1)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_speed_is_of_everyone_against_the_dense_model(subject: Subject) -> None:
    contenders = shorter_contenders((2,))
    speed = compare_speed(subject, contenders, count=1, repeats=3)
    assert (speed.baseline, set(speed.timings)) == ("dense", {"dense", "2 steps"})
    assert speed.ratio("2 steps", clock="process").median < 1


def test_a_penalty_spreads_the_load(subject: Subject) -> None:
    config = TokenReductionConfig.paper(round_to=1)
    subject = replace(subject, num_inference_steps=13)
    free, evened = compare_penalties(subject, config, ratios=(0.5,), penalties=(0.0, 5.0), seeds=(0, 1), num_images=3)
    assert (free.ratio, free.penalty, evened.penalty) == (0.5, 0.0, 5.0)
    assert evened.gini < free.gini and evened.most < free.most == 1
    assert len(free.psnr) == len(free.blocking) == 2
    assert free.latent_blocking == free.blocking, "pixels are its latents"
    # In three intervals of half of the tokens each, some token is dropped in two at least.
    assert evened.most >= 2 / 3


def outcome(name: str, psnr: tuple[float, ...], ratio: float = 0.5, frechet: tuple[float, ...] = ()) -> Outcome:
    return Outcome(
        name=name,
        family="ours",
        scope="block",
        ratio=ratio,
        psnr=psnr,
        psnr_std=0.0,
        frechet=frechet,
        blocking=1.0,
        flops=0.5,
    )


def test_verdicts() -> None:
    controls = [outcome(name, (16.0, 16.0)) for name in INPUT_CONTROLS]
    outcomes = [
        outcome("paper", (20.0, 22.0), frechet=(10.0, 20.0)),
        outcome("default", (29.5, 31.0), frechet=(4.0, 4.0)),
        outcome("default, delta", (26.0, 27.0)),
        outcome("tomesd", (17.0, 18.5), frechet=(20.0, 60.0)),
        outcome("input, reused", (19.0, 20.0)),
        *controls,
    ]
    found = {one.claim: one for one in targets(outcomes)}
    assert len(found) == 8

    def one(part: str) -> tuple[float, float, bool]:
        (match,) = (target for claim, target in found.items() if part in claim)
        return match.measured, match.spread, match.holds

    assert one("paper over ToMeSD") == (3.25, pytest.approx(0.25 * 2**0.5), False)
    # The best control is ours by input here, at 19.5 on average.
    assert one("paper over the best control by input (input, reused)") == (1.5, pytest.approx(0.5 * 2**0.5), True)
    assert one("default over ToMeSD")[0] == 12.5
    assert one("default, delta over paper") == (5.5, pytest.approx(0.5 * 2**0.5), False)
    assert one("default over paper") == (9.25, pytest.approx(0.25 * 2**0.5), True)
    assert one("over that of paper") == (2.5, pytest.approx(0.5 * 2**0.5), False)
    assert one("over that of default") == (10.0, pytest.approx(5 * 2**0.5), True)
    assert targets([replace(one, ratio=0.75) for one in outcomes]) == []
    assert targets(outcomes[:-1]) == []
    assert targets([replace(one, psnr=one.psnr[:1], frechet=()) for one in outcomes])[0].spread == 0


def test_a_model_without_caches_has_no_cached_contender() -> None:
    assert cached_contenders(torch.nn.Linear(1, 1), (0.1,)) == []
    assert extrapolated_contenders(torch.nn.Linear(1, 1), (2,)) == []


def test_no_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no prompts"):
        pipeline_subject("p", None, [], num_inference_steps=2, call={})


@pytest.mark.slow
def test_the_table_of_any_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole FLUX with random weights from its folder, and prompts from a file."""
    pipe = loaded(ROOT / "examples" / "dito_flux.py").tiny_flux()
    pipe.save_pretrained(tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a red lighthouse\n\nwaves\n")
    arguments = ["--pipeline", str(tmp_path / "flux"), "--prompts", str(tmp_path / "prompts.txt"), "--quick"]
    benchmark = loaded(ROOT / "benchmarks" / "dito_quality.py")
    benchmark.main([*arguments, "--results", str(tmp_path / "results"), "--pages", str(tmp_path / "pages")])
    (file,) = (tmp_path / "results").iterdir()
    metrics = json.loads(file.read_text())["metrics"]
    assert metrics["judge"] == {
        "pipeline": "FluxPipeline",
        "prompts": 2,
        "call": {"height": 64, "width": 64, "max_sequence_length": 16},
    }
    names = {(one["name"], one["scope"]) for one in metrics["outcomes"]}
    assert {("dense", None), ("default", "block"), ("tomesd", "block"), ("cache + default", "block")} <= names
    assert all(one["latent_blocking"] != one["blocking"] for one in metrics["penalties"]["paper"])
    page = (tmp_path / "pages" / "penalty-pipeline.html").read_text()
    assert page.count("data:image/png") == 1 + 2 * 1 * 2, "a dense crop, and one for each setting, ratio and penalty"
    told = capsys.readouterr().out
    assert "PSNR 25.21 dB, ToMeSD 21.59" in told and "frequency penalty" in told and "targets" in told


def test_prompts_and_sizes_of_a_pipeline() -> None:
    pipe = loaded(ROOT / "examples" / "dito_flux.py").tiny_flux()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "max_sequence_length": 8}
    subject = pipeline_subject("flux", pipe, ["a", "b"], num_inference_steps=2, call=call)
    assert subject.cell == (32, 32)
    images = subject.draw(0, 2, 3)
    assert images.shape == (3, 3, 64, 64)
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert torch.equal(subject.draw(0, 2, 1), images[:1])
    assert not torch.equal(subject.draw(1, 2, 1), images[:1])
    shorter = shorter_contenders((1,))
    dense, other = compare(subject, shorter, seeds=(0,), num_images=1)
    assert (dense.name, other.flops) == ("dense", 0.5) and other.mean_psnr < 100


def test_borders_in_the_latents_of_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window has 32 x 32 pixels and 4 x 4 latents: what the decoder is given is what the pipeline ends with."""
    pipe = loaded(ROOT / "examples" / "dito_flux.py").tiny_flux()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "max_sequence_length": 8}
    subject = pipeline_subject("flux", pipe, ["a"], num_inference_steps=4, call=call)
    seen: list[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]] = []

    def watched(images: torch.Tensor, reference: torch.Tensor, cell: tuple[int, int]) -> torch.Tensor:
        seen.append((images, reference, cell))
        return blocking(images, reference, cell)

    monkeypatch.setattr(dito_comparison, "blocking", watched)
    config = TokenReductionConfig.paper(round_to=1)
    (found,) = compare_penalties(subject, config, ratios=(0.5,), penalties=(0.0,), seeds=(0,), num_images=1)
    (pixels, _, cell), (latents, dense, latent_cell) = seen
    assert (pixels.shape[-2:], cell, latents.shape[-2:], latent_cell) == ((64, 64), (32, 32), (8, 8), (4, 4))
    assert found.latent_blocking == (float(blocking(latents, dense, (4, 4))),) != found.blocking
    generator = torch.Generator().manual_seed(derived_seed(0, "image", 0))
    packed = pipe("a", generator=generator, num_inference_steps=4, output_type="latent", **call).images
    own = pipe._unpack_latents(packed, 64, 64, 8) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    torch.testing.assert_close(dense, own, rtol=1e-5, atol=1e-5)
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size = 4
    with pytest.raises(ValueError, match="decodes in tiles"):
        compare_penalties(subject, config, ratios=(0.5,), penalties=(0.0,), seeds=(0,), num_images=1)
