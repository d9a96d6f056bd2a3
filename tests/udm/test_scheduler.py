"""The schedulers: the room's loop in diffusers' words, their configs, what they refuse."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiscreteDDIMScheduler
from torch import Tensor

from wellposed.batches import TextBatch
from wellposed.oracles import TokenOracle
from wellposed.schedulers import LeaveOneOutDDIMScheduler, UniformDiffusionScheduler
from wellposed.udm import sample, to_denoiser, to_leave_one_out
from wellposed.udm.grids import alpha_grid
from wellposed.udm.kernels import TokenState, kernel_named, uniform_bridge
from wellposed.udm.models import TableModel

KERNELS = ("uniform", "masked", "absorbing", "refreshed_absorbing", "maximal_coupling")
K, LENGTH = 3, 2


@pytest.fixture
def oracle(world: Any, oracle_of: Callable[[Any], TokenOracle]) -> TokenOracle:
    return oracle_of(world)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loop(scheduler: UniformDiffusionScheduler, model: TableModel, batch: int, steps: int, **given: Any) -> TokenState:
    """A loop of one's own: full logits, one call of the scheduler after the other."""
    generator = seeded()
    canvas = given.pop("tokens", torch.zeros(batch, LENGTH, dtype=torch.long))
    state = scheduler.kernel(K).prior(canvas, generator=generator, given=given.get("given"))
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        logits = model(state, scheduler.alpha(t).expand(batch), given=given.get("given")).logits
        after = scheduler.step(logits, t, state.tokens, generator=generator, noise_tokens=state.noise, **given)
        state = TokenState(tokens=after.prev_sample, noise=after.prev_noise)
        corrector = scheduler.corrector
        for _ in range(corrector.steps if corrector and scheduler.alpha_after(t) < 1 else 0):
            logits = model(state, scheduler.alpha_after(t).expand(batch), given=given.get("given")).logits
            corrected = scheduler.step_correct(logits, t, state.tokens, generator=generator, **given)
            state = TokenState(tokens=corrected.prev_sample)
    return state


@pytest.mark.parametrize("spacing", ["linear", "geometric"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["leave_one_out", "denoiser"])
def test_a_loop_over_step_is_the_rooms_sampler(oracle: TokenOracle, kernel: str, kind: Any, spacing: Any) -> None:
    scheduler = UniformDiffusionScheduler(
        kernel=kernel, prediction_kind=kind, timestep_spacing=spacing, temperature=0.7, top_p=0.9, vocab_size=K
    )
    model = TableModel(oracle=oracle, kernel=kernel_named(kernel, K), kind=kind)
    found = loop(scheduler, model, 500, 5)
    canvas = TextBatch(tokens=torch.zeros(500, LENGTH, dtype=torch.long))
    expected, _ = sample(model, model.kernel, canvas, scheduler.alphas, settings=scheduler.settings, generator=seeded())
    assert torch.equal(found.tokens, expected)
    assert (found.noise is None) == (not model.kernel.has_noise_tokens)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("selection", ["random", "lowest_log_margin"])
def test_a_loop_with_corrections_on_given_tokens_is_the_rooms_sampler(
    oracle: TokenOracle, selection: Any, prompt: bool
) -> None:
    scheduler = UniformDiffusionScheduler(
        corrector_steps=2, corrector_k=1, corrector_selection=selection, corrector_selection_temperature=9.0
    )
    model = TableModel(oracle=oracle, kernel=kernel_named("uniform", K))
    tokens = torch.tensor([[1, 0], [2, 0]]).repeat(200, 1)
    given = torch.tensor([[prompt, False]]).expand(400, -1)
    found = loop(scheduler, model, 400, 4, tokens=tokens, given=given).tokens
    expected, record = sample(
        model,
        model.kernel,
        TextBatch(tokens=tokens, given=given),
        scheduler.alphas,
        corrector=scheduler.corrector,
        generator=seeded(),
    )
    assert torch.equal(found, expected)
    assert record.corrections == 3 * 2
    assert torch.equal(found[:, 0], tokens[:, 0]) == prompt
    assert len(found[:, 1].unique()) == K


def test_times_fall_from_one_and_alphas_rise_to_one() -> None:
    scheduler = UniformDiffusionScheduler()
    assert len(scheduler) == 64
    for spacing in ("linear", "geometric"):
        scheduler = UniformDiffusionScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(10)
        assert len(scheduler) == scheduler.num_inference_steps == 10
        assert scheduler.timesteps[0] == 1
        assert bool((scheduler.timesteps.diff() < 0).all()) and scheduler.timesteps[-1] > 0
        torch.testing.assert_close(scheduler.alphas, alpha_grid(10, spacing), rtol=0, atol=1e-15)
        assert [float(scheduler.alpha(t)) for t in scheduler.timesteps] == scheduler.alphas[:-1].tolist()
        assert [float(scheduler.alpha_after(t)) for t in scheduler.timesteps] == scheduler.alphas[1:].tolist()


@pytest.mark.parametrize("steps", [3, 1000])
@pytest.mark.parametrize("spacing", ["linear", "geometric"])
def test_times_may_have_lost_their_precision(spacing: Any, steps: int) -> None:
    scheduler = UniformDiffusionScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    after = [float(scheduler.alpha_after(t.float())) for t in scheduler.timesteps]
    assert after == scheduler.alphas[1:].tolist()


def test_what_is_given_or_padding_stays() -> None:
    scheduler = UniformDiffusionScheduler()
    scheduler.set_timesteps(2)
    tokens = torch.arange(12).view(2, 6)
    given, valid = torch.zeros(2, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    given[0, :3], valid[1, 4:] = True, False
    logits = torch.full((2, 6, 20), -20.0)
    logits[..., 19] = 20.0
    found = scheduler.step(logits, 0.5, tokens, generator=seeded(), given=given, valid=valid).prev_sample
    stays = given | ~valid
    assert torch.equal(found[stays], tokens[stays])
    assert (found[~stays] == 19).all()


def test_a_sequence_is_the_same_in_any_batch() -> None:
    scheduler = UniformDiffusionScheduler(corrector_steps=1, corrector_k=3)
    scheduler.set_timesteps(4)
    logits = torch.randn(3, 7, 11, generator=seeded(1))
    tokens = torch.randint(11, (3, 7), generator=seeded(2))
    for call in (scheduler.step, scheduler.step_correct):
        every = call(logits, 0.5, tokens, generator=[seeded(seed) for seed in (5, 6, 7)]).prev_sample
        alone = call(logits[1:2], 0.5, tokens[1:2], generator=[seeded(6)]).prev_sample
        assert torch.equal(every[1:2], alone)
        assert torch.equal(call(logits[1:2], 0.5, tokens[1:2], seeded(6), False)[0], alone)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}, {"temperature": 1e-6}])
def test_settings_reach_the_draw(options: dict[str, Any]) -> None:
    scheduler = UniformDiffusionScheduler(kernel="maximal_coupling", prediction_kind="denoiser", **options)
    scheduler.set_timesteps(1)
    logits = torch.randn(2, 50, 11, generator=seeded(1))
    tokens = torch.randint(11, (2, 50), generator=seeded(2))
    found = scheduler.step(logits, 1.0, tokens, generator=seeded()).prev_sample
    if "temperature" in options:  # it divides the leave-one-out posterior
        logits = to_leave_one_out(logits, tokens, scheduler.alpha(1.0).expand(2))
    assert torch.equal(found, logits.argmax(-1))


@pytest.mark.parametrize("kernel", KERNELS)
def test_noise_is_added_with_the_right_probability(kernel: str) -> None:
    scheduler = UniformDiffusionScheduler(kernel=kernel, vocab_size=5)
    clean = torch.randint(5, (2, 20_000), generator=seeded(1))
    given = torch.zeros_like(clean, dtype=torch.bool)
    given[:, :10] = True
    times = torch.tensor([0.25, 0.75], dtype=torch.float64)
    state = scheduler.add_noise(clean, times, generator=seeded(), given=given)
    alpha = 1 - (1 - 1e-3) * times
    kept = alpha if kernel == "masked" else alpha + (1 - alpha) / 5
    frequency = (state.tokens == clean)[:, 10:].double().mean(-1)
    torch.testing.assert_close(frequency, kept, rtol=0, atol=0.015)  # four standard errors
    assert torch.equal(state.tokens[:, :10], clean[:, :10])
    assert (state.noise is not None) == ("absorbing" in kernel)


def test_a_vocabulary_is_named_or_refused() -> None:
    clean = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="pass vocab_size"):
        UniformDiffusionScheduler().add_noise(clean, torch.ones(1))
    assert UniformDiffusionScheduler().add_noise(clean, torch.ones(1), seeded(), vocab_size=9).tokens.max() > 2
    with pytest.raises(ValueError, match="vocab_size is 9, here is a vocabulary of 8"):
        UniformDiffusionScheduler(vocab_size=9).step(torch.zeros(1, 4, 8), 1.0, clean)
    with pytest.raises(ValueError, match=r"must lie in \[0, 9\)"):
        UniformDiffusionScheduler(vocab_size=9).add_noise(clean + 9, torch.ones(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "gaussian"}, "there is no kernel 'gaussian'"),
        ({"kernel": "masked", "corrector_steps": 1}, "freezes what it has revealed"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"corrector_steps": -1}, "corrector_steps is -1"),
        ({"corrector_steps": 1, "corrector_metropolis": True}, "write k=1"),
    ],
)
def test_a_config_that_makes_no_scheduler_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniformDiffusionScheduler(**options)


def test_steps_that_cannot_be_taken_are_refused() -> None:
    logits, tokens = torch.zeros(1, 4, 8), torch.zeros(1, 4, dtype=torch.long)
    scheduler = UniformDiffusionScheduler(corrector_steps=1)
    scheduler.set_timesteps(4)
    for time in (0.6, 0.5001, 0.0, 2.0):
        with pytest.raises(ValueError, match=f"timestep {time:g} is not one"):
            scheduler.step(logits, time, tokens)
    with pytest.raises(ValueError, match="after the last step"):
        scheduler.step_correct(logits, 0.25, tokens)
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="no corrector"):
        UniformDiffusionScheduler().step_correct(logits, 1.0, tokens)
    tested = UniformDiffusionScheduler(corrector_steps=1, corrector_k=1, corrector_metropolis=True)
    with pytest.raises(ValueError, match="compares the network at two states"):
        tested.step_correct(logits, 1.0, tokens)
    # A random choice is exact without a test.
    free = UniformDiffusionScheduler.from_config(tested.config, corrector_selection="random")
    assert free.step_correct(logits, 1.0, tokens, seeded()).prev_sample.shape == (1, 4)
    assert scheduler.scale_model_input(tokens, 0.5) is tokens


def public(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


FULL: dict[type, dict[str, Any]] = {
    UniformDiffusionScheduler: {
        "kernel": "maximal_coupling",
        "prediction_kind": "denoiser",
        "vocab_size": 9,
        "eps": 1e-4,
        "timestep_spacing": "geometric",
        "temperature": 0.8,
        "temper": "denoiser",
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.01,
        "corrector_steps": 2,
        "corrector_k": 1,
        "corrector_selection": "lowest_maxprob",
        "corrector_selection_temperature": 0.5,
        "corrector_metropolis": True,
    },
    LeaveOneOutDDIMScheduler: {
        "num_inference_steps": 7,
        "corrector_steps": 2,
        "corrector_k": 3,
        "corrector_selection": "random",
        "corrector_selection_tau": 0.5,
        "prediction_kind": "leave_one_out",
        "temper": "denoiser",
    },
}


@pytest.mark.parametrize("kind", FULL)
def test_configs_survive_the_disk_and_the_classes_they_are_compatible_with(kind: Any, tmp_path: Path) -> None:
    assert set(FULL[kind]) == set(inspect.signature(kind).parameters)
    scheduler = kind(**FULL[kind])
    scheduler.save_pretrained(tmp_path)
    assert public(kind.from_pretrained(tmp_path).config) == public(scheduler.config) == FULL[kind]
    assert DiscreteDDIMScheduler in scheduler.compatibles
    for compatible in (*scheduler.compatibles, *FULL):
        through = kind.from_config(compatible.from_config(scheduler.config).config)
        assert {name: through.config[name] for name in FULL[kind]} == FULL[kind]


def test_diffusers_scheduler_is_understood() -> None:
    stock = DiscreteDDIMScheduler(corrector_steps=2, corrector_k=4, corrector_selection_tau=0.5)
    ours = UniformDiffusionScheduler.from_config(stock.config)
    assert ours.config.prediction_kind == "denoiser"
    assert ours.corrector is not None
    assert (ours.corrector.steps, ours.corrector.k, ours.corrector.selection_temperature) == (2, 4, 0.5)
    said = UniformDiffusionScheduler.from_config(stock.config, prediction_kind="leave_one_out")
    assert said.config.prediction_kind == "leave_one_out"
    place_taker = LeaveOneOutDDIMScheduler.from_config(stock.config)
    assert place_taker.config.prediction_kind == "denoiser"
    assert place_taker.config.corrector_selection_tau == 0.5
    # Not even where the two classes differ in a default that was left alone.
    between = LeaveOneOutDDIMScheduler.from_config(UniformDiffusionScheduler().config)
    assert between.config.prediction_kind == "leave_one_out"
    assert UniformDiffusionScheduler.from_config(between.config).config.prediction_kind == "leave_one_out"


def ddim_law(scheduler: LeaveOneOutDDIMScheduler, logits: Tensor, step: int, token: int, temperature: float) -> Tensor:
    """Frequencies of x_s over many copies of one position."""
    copies = 200_000
    sampled = scheduler.step(
        logits.expand(1, copies, -1),
        step,
        torch.full((1, copies), token),
        temperature=temperature,
        generator=seeded(step),
    )
    return sampled.prev_sample.flatten().bincount(minlength=len(logits)).double() / copies


@pytest.mark.parametrize("temper", ["leave_one_out", "denoiser"])
@pytest.mark.parametrize("kind", ["leave_one_out", "denoiser"])
@pytest.mark.parametrize("step", [0, 3, 7])
def test_temperature_divides_what_it_should(step: int, kind: Any, temper: Any) -> None:
    logits = torch.tensor([0.5, -1.0, 1.0, 0.0])
    scheduler = LeaveOneOutDDIMScheduler(prediction_kind=kind, temper=temper)
    scheduler.set_timesteps(8)
    token, temperature = 1, 0.6
    alpha_t, alpha_s = (torch.tensor([value / 8], dtype=torch.float64) for value in (max(step, 1e-12), step + 1))
    rows, observed = logits.double()[None], torch.tensor([token])
    loo = rows if kind == "leave_one_out" else to_leave_one_out(rows, observed, alpha_t)
    if temper == "leave_one_out":
        plugged = loo / temperature
    else:
        plugged = to_leave_one_out(to_denoiser(loo, observed, alpha_t) / temperature, observed, alpha_t)
    expected = uniform_bridge(observed, plugged.softmax(-1), alpha_t, alpha_s)[0]
    found = ddim_law(scheduler, logits, step, token, temperature)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def test_temperature_zero_is_the_argmax_of_the_denoiser() -> None:
    tokens = torch.randint(9, (2, 30), generator=seeded(2))
    logits = torch.randn(2, 30, 9, generator=seeded(1))
    alpha = torch.full((2,), 4 / 8, dtype=torch.float64)
    for kind in ("denoiser", "leave_one_out"):
        scheduler = LeaveOneOutDDIMScheduler(prediction_kind=kind)
        scheduler.set_timesteps(8)
        out = scheduler.step(logits, 4, tokens, generator=seeded())
        denoiser = logits if kind == "denoiser" else to_denoiser(logits, tokens, alpha)
        assert torch.equal(out.sampled_tokens, denoiser.argmax(-1))
        torch.testing.assert_close(out.sampled_probs, denoiser.softmax(-1).amax(-1))
        assert out.pred_logits is logits


def test_the_ddim_drop_in_takes_a_generator_for_each_sequence_and_tuples() -> None:
    scheduler = LeaveOneOutDDIMScheduler(corrector_k=2)
    scheduler.set_timesteps(8)
    logits = torch.randn(3, 7, 11, generator=seeded(1))
    tokens = torch.randint(11, (3, 7), generator=seeded(2))
    for call, options in ((scheduler.step, {"temperature": 0.9}), (scheduler.step_correct, {})):
        every = call(logits, 3, tokens, generator=[seeded(seed) for seed in (5, 6, 7)], **options)
        alone = call(logits[1:2], torch.tensor(3), tokens[1:2], generator=seeded(6), return_dict=False, **options)
        for name, value in zip(("prev_sample", "sampled_tokens", "sampled_probs"), alone, strict=False):
            assert torch.equal(every[name][1:2], value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, *x: s.step(x[0], 8, x[1]), "step 8 is outside 0 to 7"),
        (lambda s, *x: s.step(x[0], 1, x[1], temperature=-1), "temperature is -1"),
        (lambda s, *x: s.step_correct(x[0], 7, x[1]), "after the last step"),
    ],
)
def test_the_ddim_drop_in_refuses(call: Callable[..., Any], message: str) -> None:
    scheduler = LeaveOneOutDDIMScheduler()
    scheduler.set_timesteps(8)
    with pytest.raises(ValueError, match=message):
        call(scheduler, torch.zeros(1, 4, 8), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="steps and k count from 1"):
        LeaveOneOutDDIMScheduler(corrector_k=0)


@pytest.mark.gpu
def test_steps_on_a_device_are_those_on_the_cpu() -> None:
    logits = torch.randn(3, 7, 11, generator=seeded(1), dtype=torch.float64)
    tokens = torch.randint(11, (3, 7), generator=seeded(2))
    for scheduler, time in (
        (UniformDiffusionScheduler(corrector_steps=1, corrector_k=2, temperature=0.9), 0.5),
        (LeaveOneOutDDIMScheduler(corrector_k=2), 3),
    ):
        for device in ("cpu", "cuda"):
            scheduler.set_timesteps(8, device=device)
            for call in (scheduler.step, scheduler.step_correct):
                found = call(logits.to(device), time, tokens.to(device), generator=seeded()).prev_sample
                expected = call(logits, time, tokens, generator=seeded()).prev_sample
                assert torch.equal(found.cpu(), expected)
