import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import TypeCheckError

from wellposed.dito.calibration import TriedSetting, calibrate, calibrate_sampler, calibrate_schedule, setting_grid
from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.hooks import apply_token_reduction
from wellposed.dito.observe import observe_outputs
from wellposed.dito.schedule import FixedInterval
from wellposed.evaluation import speed
from wellposed.evaluation.image_quality import psnr

STEPS = 5


@pytest.fixture(scope="module")
def pipe():
    """A class-conditional DiT of 8 x 8 tokens with its pipeline."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=1,
            num_embeds_ada_norm=10,
        )
        vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4)
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampler(pipe):
    """Five steps of the transformer alone; the picture depends on the generator only."""

    def sample(generator):
        x = torch.randn(2, 4, 8, 8, generator=generator)
        for step in range(STEPS):
            t = torch.full((2,), 900 - 200 * step)
            x = (
                x
                - 0.3 * pipe.transformer(x, timestep=t, class_labels=torch.tensor([1, 2]), return_dict=False)[0][:, :4]
            )
        return x

    return sample


def setting(ratio, interval=2, **fields):
    return TokenReductionConfig(ratio=ratio, schedule=FixedInterval(interval=interval), round_to=1, **fields)


def dense_picture(pipe, seed=0):
    with torch.no_grad():
        return sampler(pipe)(torch.Generator().manual_seed(seed))


def by_ratio(config):
    """A prediction that knows nothing of the model."""
    return 1 + config.ratio


def test_the_best_is_the_closest_of_those_that_are_fast_enough(pipe):
    candidates = [setting(0.75), setting(0.5), setting(0.25), setting(0.5, interval=4)]
    found = calibrate_sampler(pipe.transformer, sampler(pipe), 1.4, candidates=candidates, predict=by_ratio)
    assert [each.config for each in found.tried] == candidates
    assert [each.speedup for each in found.tried] == [1.75, 1.5, 1.25, 1.5]
    assert found.tried[2].psnr is None
    fast = [each for each in found.tried if each.speedup >= 1.4]
    assert found.best.psnr == max(each.psnr for each in fast)
    assert found.config is found.best.config
    assert not found.is_measured
    line = next(line for line in found.table().splitlines() if line.endswith("<- best"))
    assert f"{found.best.psnr:.2f} dB" in line
    assert len(found.table().splitlines()) == 5


def test_psnr_is_the_mean_over_pictures_from_the_same_noise(pipe):
    config = setting(0.5)
    found = calibrate_sampler(
        pipe.transformer, sampler(pipe), 1.1, candidates=[config], seeds=(3, 7), predict=by_ratio, data_range=2.0
    )
    expected = []
    for seed in (3, 7):
        dense = dense_picture(pipe, seed)
        reduction = apply_token_reduction(pipe.transformer, config)
        expected.append(psnr(dense_picture(pipe, seed), dense, data_range=2.0).mean())
        reduction.remove()
    assert found.best.psnr == pytest.approx(float(sum(expected) / 2), abs=1e-4)


def test_the_range_of_the_dense_pictures_is_what_psnr_refers_to_by_default(pipe):
    def tried(**options):
        found = calibrate_sampler(
            pipe.transformer, sampler(pipe), 1.1, candidates=[setting(0.5)], predict=by_ratio, **options
        )
        return found.best.psnr

    dense = dense_picture(pipe)
    assert tried() == pytest.approx(tried(data_range=float(dense.max() - dense.min())))
    assert tried(data_range=2 * float(dense.max() - dense.min())) == pytest.approx(tried() + 6.0206, abs=1e-3)


def test_speed_is_measured_by_turns(pipe, monkeypatch):
    # A clock that only the rows move which the first block computes: what is measured is the ratio, on any machine.
    elapsed = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: elapsed[0])
    monkeypatch.setattr(speed.time, "process_time", lambda: elapsed[0])

    def sample(generator):
        def advance(module, args):
            elapsed[0] += args[0].shape[1]

        hook = pipe.transformer.transformer_blocks[0].ff.register_forward_pre_hook(advance)
        picture = sampler(pipe)(generator)
        hook.remove()
        return picture

    said = []
    candidates = [setting(0.75, interval=5), setting(0.5, interval=5)]
    found = calibrate_sampler(
        pipe.transformer, sample, 1.05, candidates=candidates, progress=lambda *count: said.append(count)
    )
    assert found.is_measured
    assert found.tried[0].speedup > found.tried[1].speedup
    # A round to warm up and three that count, of the dense model and two settings each.
    assert said == [(index, 12) for index in range(12)]
    assert all(each.psnr is not None for each in found.tried)


def test_every_picture_takes_part_though_rounds_are_few(pipe):
    seeds = []

    def sample(generator):
        seeds.append(generator.initial_seed())
        return sampler(pipe)(generator)

    candidates = [setting(0.75, interval=5)]
    with pytest.raises(ValueError, match="no setting is 1e\\+06 times faster"):
        calibrate_sampler(pipe.transformer, sample, 1e6, candidates=candidates, seeds=(5, 6))
    assert seeds == [5, 5, 6, 6, 5, 5, 6, 6]


def test_the_model_is_left_as_it_was(pipe):
    before = dense_picture(pipe)
    calibrate_sampler(pipe.transformer, sampler(pipe), 1.1, candidates=[setting(0.5)], predict=by_ratio)
    assert torch.equal(dense_picture(pipe), before)
    calls = []

    def broken(generator):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return sampler(pipe)(generator)

    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate_sampler(pipe.transformer, broken, 1.1, candidates=[setting(0.5)], predict=by_ratio)
    assert torch.equal(dense_picture(pipe), before)


def test_settings_that_the_model_refuses_are_left_out_of_the_usual_ones_only(pipe):
    refused = setting(0.5, block_ratios={"transformer_blocks.9": 0.25})
    with pytest.raises(ValueError, match=r"transformer_blocks\.9"):
        calibrate_sampler(pipe.transformer, sampler(pipe), 1.1, candidates=[refused], predict=by_ratio)
    with pytest.raises(ValueError, match="Linear"):
        calibrate_sampler(torch.nn.Linear(2, 2), sampler(pipe), 1.1, predict=by_ratio)


def test_of_the_usual_settings_those_that_the_model_refuses_are_left_out(pipe):
    class OwnProcessor(AttnProcessor):
        pass

    transformer = DiTTransformer2DModel.from_config(pipe.transformer.config).eval()
    transformer.transformer_blocks[1].attn1.set_processor(OwnProcessor())
    own = DiTPipeline(transformer, pipe.vae, pipe.scheduler)
    found = calibrate_sampler(own, sampler(own), 1.7, predict=by_ratio)
    assert [each.config for each in found.tried] == setting_grid(keep_kv=(False,))


def test_where_nothing_is_fast_enough_the_message_has_the_table(pipe):
    candidates = [setting(0.25), setting(0.5)]
    with pytest.raises(ValueError, match=r"no setting is 3 times faster.*reaches 1\.5") as refusal:
        calibrate_sampler(pipe.transformer, sampler(pipe), 3.0, candidates=candidates, predict=by_ratio)
    assert str(refusal.value).count("dense K/V") == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": 1.0}, "budget is 1.0"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"candidates": []}, "candidates is empty"),
        ({"seeds": ()}, "seeds is empty"),
    ],
)
def test_bad_input_is_refused(pipe, wrong, message):
    arguments = {"budget": 1.2, "candidates": [setting(0.5)], "seeds": (0,), **wrong}
    with pytest.raises(ValueError, match=message):
        calibrate_sampler(pipe.transformer, sampler(pipe), **arguments)


def test_the_grid_has_every_combination_once():
    grid = setting_grid(ratios=(0.25, 0.5), intervals=(2, 4), block_ratios=({}, {"a": 0.0}), seed=5)
    assert len(grid) == 2 * 2 * 2 * 2 * 2
    assert len({str(config) for config in grid}) == len(grid)
    assert all(config.seed == 5 and config.recovery == ("linear" if config.keep_kv else "copy") for config in grid)
    both = setting_grid(ratios=(0.5,), scopes=("block",), keep_kv=(True,), recoveries=("copy", "delta"), intervals=(4,))
    assert [config.recovery for config in both] == ["copy", "delta"]


def test_labels_tell_settings_apart():
    grid = setting_grid(block_ratios=({}, {"a": 0.0}))
    labels = {TriedSetting(config=config, speedup=1.0, psnr=None).label for config in grid}
    assert len(labels) == len(grid)
    assert "ratio 0.25 | block | dense K/V | linear | every 2 | a 0" in labels


def test_a_pipeline_is_calibrated(pipe):
    found = calibrate(
        pipe,
        [[3], [7]],
        1.01,
        candidates=[setting(0.5, interval=4), setting(0.75, interval=4)],
        by="flops",
        num_inference_steps=4,
        guidance_scale=1.0,
        output_type="np",
    )
    assert found.tried[0].speedup < found.tried[1].speedup < 4
    assert all(each.psnr > 10 for each in found.tried)
    assert found.best.psnr == max(each.psnr for each in found.tried)


def test_prompts_and_outputs_are_checked(pipe):
    for prompts in ([], "a cat"):
        with pytest.raises(ValueError, match="prompts is"):
            calibrate(pipe, prompts, 1.2)
    with pytest.raises(ValueError, match="at least one seed"):
        calibrate(pipe, [[1]], 1.2, seeds=())
    with pytest.raises(ValueError, match="seeds="):
        calibrate(pipe, [[1]], 1.2, generator=torch.Generator())
    with pytest.raises(ValueError, match="output_type is 'pil'"):
        calibrate(pipe, [[1]], 1.2, output_type="pil")
    with pytest.raises((ValueError, TypeCheckError), match="latency"):
        calibrate(pipe, [[1]], 1.2, by="time")


def test_a_schedule_is_what_dense_generations_say(pipe):
    options = {"num_inference_steps": 6, "guidance_scale": 1.0}
    with observe_outputs(pipe, gaps=(1, 2, 3)) as observed:
        for label in (3, 7):
            pipe([label], generator=torch.Generator().manual_seed(0), output_type="np", **options)
    found = observed.summary()
    for threshold in (0.0, 0.5, 1.0):
        steps = calibrate_schedule(pipe, [[3], [7]], threshold=threshold, longest=3, output_type="np", **options)
        assert steps == found.matching_steps(threshold)
    assert calibrate_schedule(pipe, [[3]], threshold=0.0, longest=3, output_type="np", **options).steps == (0, 3)
    with pytest.raises(ValueError, match="longest is 0"):
        calibrate_schedule(pipe, [[3]], longest=0)
    with pytest.raises(ValueError, match="prompts is"):
        calibrate_schedule(pipe, [])
