from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from wellposed.denoisers import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Denoiser,
    from_diffusers,
    posterior_mean,
)
from wellposed.lgs.covariance import posterior_covariance_product
from wellposed.lgs.jacobian import linearize
from wellposed.lgs.path_kl import anisotropic_mixture
from wellposed.oracles import GaussianMixtureOracle, gaussian_oracle
from wellposed.paths import PredictionType, RectifiedFlow, convert_prediction, from_scheduler

PATH = from_scheduler(DDPMScheduler())
CLASS = [0, 2]  # components of the mixture that make up the class


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(model: nn.Module) -> nn.Module:
    """The model with weights that make every output channel live, whatever its initialisation zeroes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def unet(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    }
    return drawn(UNet2DModel(**{**config, **changes}))


def text_unet() -> nn.Module:
    return drawn(
        UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=12,
        )
    )


def dit(out_channels: int) -> nn.Module:
    return drawn(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=3,
            out_channels=out_channels,
            num_layers=1,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
    )


def sd3() -> nn.Module:
    return drawn(
        SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            pos_embed_max_size=8,
        )
    )


def flux(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "axes_dims_rope": (2, 2, 4),
    }
    return drawn(FluxTransformer2DModel(**{**config, **changes}))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_unet_equals_the_schedulers_own_clean_sample(prediction_type: str) -> None:
    model, x_t = unet(), randn(2, 3, 8, 8)
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    denoiser = from_diffusers(model, scheduler)
    assert denoiser.prediction_type == prediction_type
    with torch.no_grad():
        for index in (0, 417, 999):
            output = model(x_t, index).sample
            expected = scheduler.step(
                output, index, x_t, generator=torch.Generator().manual_seed(0)
            ).pred_original_sample
            t = (index + 1) / 1000
            torch.testing.assert_close(denoiser.predict(x_t, t), output)
            torch.testing.assert_close(denoiser(x_t, t), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("model", [dit(6), dit(3), unet(out_channels=6)], ids=["dit", "dit without", "unet"])
def test_learned_variance_is_left_out(model: nn.Module) -> None:
    x_t, labels = randn(2, 3, 8, 8), torch.tensor([1, 5])
    cond = {"class_labels": labels} if isinstance(model, DiTTransformer2DModel) else {}
    denoiser = from_diffusers(model, DDPMScheduler(variance_type="learned_range"))
    with torch.no_grad():
        expected = model(x_t, timestep=torch.tensor([300, 300]), **cond).sample[:, :3]
        torch.testing.assert_close(denoiser.predict(x_t, 0.301, **cond), expected)


def test_text_conditioned_unet() -> None:
    model, x_t, text = text_unet(), randn(2, 4, 8, 8), randn(2, 5, 12, seed=1)
    scheduler = DDPMScheduler(clip_sample=False)
    with torch.no_grad():
        output = model(x_t, 600, encoder_hidden_states=text).sample
        expected = scheduler.step(output, 600, x_t, generator=torch.Generator().manual_seed(0)).pred_original_sample
        ours = from_diffusers(model, scheduler)(x_t, 0.601, encoder_hidden_states=text)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_sd3_is_called_with_a_thousand_t() -> None:
    model, x_t = sd3(), randn(2, 4, 8, 8)
    cond = {"encoder_hidden_states": randn(2, 5, 12, seed=1), "pooled_projections": randn(2, 10, seed=2)}
    denoiser = from_diffusers(model, FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert denoiser.path == RectifiedFlow()
    with torch.no_grad():
        v = model(x_t, timestep=torch.tensor([640.0, 640.0]), **cond).sample
        torch.testing.assert_close(denoiser.predict(x_t, 0.64, **cond), v)
        torch.testing.assert_close(denoiser(x_t, 0.64, **cond), x_t - 0.64 * v)


def test_flux_is_called_with_t_itself() -> None:
    model, packed = flux(), randn(2, 16, 4)
    cond = {
        "encoder_hidden_states": randn(2, 5, 12, seed=1),
        "pooled_projections": randn(2, 10, seed=2),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(5, 3),
    }
    with torch.no_grad():
        v = model(packed, timestep=torch.tensor([0.64, 0.64]), **cond).sample
        ours = from_diffusers(model, FlowMatchEulerDiscreteScheduler())(packed, 0.64, **cond)
    torch.testing.assert_close(ours, packed - 0.64 * v)


class Recorder(nn.Module):
    """Returns its input, and remembers how it was called."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, sample: Tensor, timestep: Tensor, **cond: Any) -> Tensor:
        self.calls.append((timestep, cond))
        return sample * cond.get("gain", 1)


@pytest.mark.parametrize(
    ("t", "index"),
    [
        (0.001, [0, 0]),
        (1.0, [999, 999]),
        (0.5, [499, 499]),
        (torch.tensor([0.301, 0.302], dtype=torch.float64), [300, 301]),
        (torch.tensor([0.301, 0.302]), [300, 301]),
    ],
)
def test_tabulated_times_become_integer_indices(t: float | Tensor, index: list[int]) -> None:
    model = Recorder()
    from_diffusers(model, DDPMScheduler()).predict(randn(2, 1), t)
    assert model.calls[0][0].dtype == torch.long
    assert model.calls[0][0].tolist() == index


def test_times_between_indices_are_rounded_only_for_a_table() -> None:
    smooth, table = Recorder(), Recorder(time_embedding_type="learned")
    for model in (smooth, table):
        from_diffusers(model, DDPMScheduler()).predict(randn(2, 1), 0.3005)
    assert smooth.calls[0][0].tolist() == pytest.approx([299.5, 299.5])
    assert table.calls[0][0].tolist() in ([299, 299], [300, 300])


def test_learned_embedding_table_of_a_real_unet() -> None:
    model, x_t = unet(time_embedding_type="learned", num_train_timesteps=50), randn(2, 3, 8, 8)
    denoiser = from_diffusers(model, DDPMScheduler(num_train_timesteps=50))
    with torch.no_grad():
        torch.testing.assert_close(denoiser.predict(x_t, 0.5051), model(x_t, torch.tensor([24, 24])).sample)


def test_one_time_for_each_sample() -> None:
    model, x_t = unet(), randn(2, 3, 8, 8)
    denoiser, t = from_diffusers(model, DDPMScheduler()), torch.tensor([0.2, 0.7], dtype=torch.float64)
    with torch.no_grad():
        together = denoiser(x_t, t)
        for i in range(2):
            alone = denoiser(x_t[i : i + 1], float(t[i]))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_prediction_type_can_be_overridden() -> None:
    assert from_diffusers(Recorder(), DDPMScheduler(), prediction_type="sample").prediction_type == "sample"
    with pytest.raises(ValueError, match="got 'x0'"):
        from_diffusers(Recorder(), DDPMScheduler(), prediction_type="x0")


def test_euler_schedulers_describe_the_same_denoiser() -> None:
    """Euler's scaled input belongs to its scheduler: on the path, x_t is that of the DDPM that was trained."""
    model, x_t = unet(), randn(1, 3, 8, 8)
    with torch.no_grad():
        ours = from_diffusers(model, EulerDiscreteScheduler())(x_t, 0.4)
        torch.testing.assert_close(ours, from_diffusers(model, DDPMScheduler())(x_t, 0.4))


@pytest.mark.parametrize("scale", [1.0, 3.5, 0.0])
def test_classifier_free_guidance_is_its_formula(scale: float) -> None:
    model, x_t = text_unet(), randn(2, 4, 8, 8)
    text, empty = randn(2, 5, 12, seed=1), torch.zeros(2, 5, 12)
    denoiser = from_diffusers(model, DDPMScheduler())
    guided = ClassifierFreeGuidance(denoiser=denoiser, scale=scale, unconditional={"encoder_hidden_states": empty})
    assert isinstance(guided, Denoiser)
    with torch.no_grad():
        with_text = denoiser.predict(x_t, 0.4, encoder_hidden_states=text)
        without = denoiser.predict(x_t, 0.4, encoder_hidden_states=empty)
        expected = (1 - scale) * without + scale * with_text
        torch.testing.assert_close(guided.predict(x_t, 0.4, encoder_hidden_states=text), expected, rtol=1e-4, atol=1e-5)
        clean = posterior_mean(expected, x_t, 0.4, denoiser.path, "epsilon")
        torch.testing.assert_close(guided(x_t, 0.4, encoder_hidden_states=text), clean, rtol=1e-4, atol=1e-4)


def test_no_guidance_costs_one_call_and_guidance_replaces_only_what_it_names() -> None:
    model, x_t = Recorder(), randn(1, 2)
    denoiser = from_diffusers(model, DDPMScheduler())
    ClassifierFreeGuidance(denoiser=denoiser, scale=1.0, unconditional={"gain": 0}).predict(x_t, 0.5, gain=2, kept="k")
    assert [call[1] for call in model.calls] == [{"gain": 2, "kept": "k"}]
    ClassifierFreeGuidance(denoiser=denoiser, scale=2.0, unconditional={"gain": 0}).predict(x_t, 0.5, gain=2, kept="k")
    assert [call[1] for call in model.calls[1:]] == [{"gain": 2, "kept": "k"}, {"gain": 0, "kept": "k"}]


def test_guidance_distilled_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance_embeds.*use an undistilled checkpoint"):
        from_diffusers(flux(guidance_embeds=True), FlowMatchEulerDiscreteScheduler())


def test_prediction_is_differentiable_in_the_sample() -> None:
    x_t = randn(1, 3, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(from_diffusers(unet(), DDPMScheduler()).predict(x_t, 0.5).sum(), x_t)
    assert float(gradient.abs().max()) > 0


def test_posterior_mean_of_an_oracle_is_its_prediction() -> None:
    oracle = gaussian_oracle(mean=torch.zeros(2), covariance=torch.eye(2), path=RectifiedFlow())
    x_t = randn(3, 2)
    torch.testing.assert_close(
        posterior_mean(oracle.predict(x_t, 0.3), x_t, 0.3, oracle.path, "sample"), oracle(x_t, 0.3)
    )


@dataclass(frozen=True)
class Converted:
    """The oracle as a network that predicts something else than the clean sample."""

    oracle: GaussianMixtureOracle
    prediction_type: PredictionType
    path: Any = PATH

    def predict(self, x_t: Tensor, t: float, **cond: Any) -> Tensor:
        alpha, sigma = float(self.path.alpha(t)), float(self.path.sigma(t))
        mean = self.oracle(x_t, t)
        return convert_prediction(mean, x_t, source="sample", target=self.prediction_type, alpha=alpha, sigma=sigma)

    __call__ = predict


def class_log_prob(x_t: Tensor, t: float) -> Tensor:
    return torch.logsumexp(anisotropic_mixture(PATH).component_log_prob(x_t, t)[:, CLASS], dim=-1)


def states(count: int = 5) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("t", [0.02, 0.2, 0.5, 0.9])
def test_classifier_guidance_is_the_conditional_posterior_mean(prediction_type: PredictionType, t: float) -> None:
    oracle = anisotropic_mixture(PATH)
    guided = ClassifierGuidance(denoiser=Converted(oracle, prediction_type), log_prob=class_log_prob)
    expected = oracle.restricted_to(CLASS)(states(), t)
    assert torch.allclose(guided(states(), t), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("t", [0.02, 0.2, 0.5, 0.9])
def test_its_jacobian_is_the_conditional_covariance(t: float) -> None:
    oracle = anisotropic_mixture(PATH)
    guided = ClassifierGuidance(denoiser=Converted(oracle, "epsilon"), log_prob=class_log_prob)
    with torch.no_grad():
        linear = linearize(lambda x: guided.predict(x, t), states())
    product = posterior_covariance_product(
        linear.product, alpha=float(PATH.alpha(t)), sigma=float(PATH.sigma(t)), prediction_type="epsilon"
    )
    unit = torch.eye(2, dtype=torch.float64)
    dense = torch.stack([product(unit[i].expand(5, 2)) for i in range(2)], dim=-1)
    assert torch.allclose(dense, oracle.restricted_to(CLASS).posterior_covariance(states(), t), atol=1e-8, rtol=0)
    # The classifier's curvature: without it this would be the covariance given x_t alone.
    if t > 0.1:
        assert not torch.allclose(dense, oracle.posterior_covariance(states(), t), atol=1e-3, rtol=0)


def test_classifier_guidance_of_scale_zero_is_none() -> None:
    oracle = anisotropic_mixture(PATH)
    guided = ClassifierGuidance(denoiser=Converted(oracle, "epsilon"), log_prob=class_log_prob, scale=0.0)
    assert torch.allclose(guided(states(), 0.3), oracle(states(), 0.3), atol=1e-12)
