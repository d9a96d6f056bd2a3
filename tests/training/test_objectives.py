"""The regression of a diffusion model, against its definition."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from wellposed.batches import ImageBatch
from wellposed.paths import RectifiedFlow, from_scheduler
from wellposed.training import StepContext, denoising_objective

PATHS = {"vp": from_scheduler(DDPMScheduler(num_train_timesteps=100)), "flow": RectifiedFlow()}
TYPES = ["epsilon", "sample", "v_prediction", "flow_prediction"]


class Recorder(nn.Module):
    """Answers with a given function of its input, and keeps what it was called with."""

    def __init__(self, answer, channels=1):
        super().__init__()
        self.answer, self.channels = answer, channels

    def forward(self, sample, timestep, class_labels=None):
        self.sample, self.timestep, self.class_labels = sample, timestep, class_labels
        return (self.answer(sample, timestep).repeat(1, self.channels, 1, 1),)


def context(batch_size=64, step=0):
    rows = range(batch_size)
    device = torch.device("cpu")
    return StepContext(player="net", step=step, seed=0, rows=rows, batch_size=batch_size, device=device)


def times(path, timestep):
    return (timestep + 1) / path.num_train_timesteps if path.num_train_timesteps else timestep / 1000


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_who_knows_the_sample_has_no_loss(path, prediction_type):
    """With x_0 = c known, eps = (x_t - alpha c) / sigma, and every target follows by its definition."""
    c = 0.5

    def exact(x_t, timestep):
        t = times(path, timestep.double())
        alpha, sigma = (s.reshape(-1, 1, 1, 1) for s in (path.alpha(t), path.sigma(t)))
        eps = (x_t.double() - alpha * c) / sigma
        x_0 = torch.full_like(eps, c)
        targets = {
            "epsilon": eps,
            "sample": x_0,
            "v_prediction": alpha * eps - sigma * x_0,
            "flow_prediction": eps - x_0,
        }
        return targets[prediction_type].float()

    objective = denoising_objective(path, prediction_type=prediction_type)
    batch = ImageBatch(images=torch.full((64, 1, 4, 4), c))
    loss, _ = objective({"net": Recorder(exact)}, batch, context())
    assert loss.item() < 1e-6
    wrong, _ = objective({"net": Recorder(lambda x, t: exact(x, t) + 1)}, batch, context())
    assert wrong.item() == pytest.approx(1, rel=1e-3)


def test_the_model_is_called_with_every_training_index_alike():
    path, model = PATHS["vp"], Recorder(lambda x, t: x)
    objective = denoising_objective(path, stratified=False)
    seen = []
    for step in range(50):
        objective({"net": model}, ImageBatch(images=torch.zeros(64, 1, 2, 2)), context(step=step))
        seen.append(model.timestep)
    indices = torch.cat(seen)
    assert indices.dtype == torch.int64
    counts = torch.bincount(indices, minlength=100)
    assert len(counts) == 100
    assert counts.min() > 10
    # Noise of the index' own level: x_t / sigma is standard normal where x_0 = 0.
    sigma = path.sigma((model.timestep + 1) / 100).float().reshape(-1, 1, 1, 1)
    assert (model.sample / sigma).std().item() == pytest.approx(1, abs=0.15)


def test_a_continuous_path_calls_with_scaled_time():
    for scale in (1000.0, 1.0):
        model = Recorder(lambda x, t: x)
        objective = denoising_objective(PATHS["flow"], prediction_type="flow_prediction", timestep_scale=scale)
        objective({"net": model}, ImageBatch(images=torch.zeros(64, 1, 2, 2)), context())
        assert 0 < model.timestep.min() < 0.05 * scale
        assert 0.95 * scale < model.timestep.max() <= scale


def test_time_zero_is_never_drawn():
    """There the signal is clean, and an epsilon model would be asked for noise that is not there."""

    class Lowest(StepContext):
        def uniform(self, *, stratified=False):
            return torch.zeros(len(self.rows), dtype=torch.float64)

    lowest = Lowest(**{field: getattr(context(8), field) for field in StepContext.__dataclass_fields__})
    for path, timestep in ((PATHS["flow"], 1000), (PATHS["vp"], 0)):
        model = Recorder(lambda x, t: x)
        denoising_objective(path)({"net": model}, ImageBatch(images=torch.zeros(8, 1, 2, 2)), lowest)
        assert model.timestep.tolist() == [timestep] * 8


def test_labels_reach_the_model_and_a_learned_variance_is_ignored():
    model = Recorder(lambda x, t: x, channels=2)
    labels = torch.arange(8)
    objective = denoising_objective(PATHS["vp"])
    with_variance, _ = objective({"net": model}, ImageBatch(images=torch.zeros(8, 1, 2, 2), labels=labels), context(8))
    assert torch.equal(model.class_labels, labels)
    model.channels = 1
    without, _ = objective({"net": model}, ImageBatch(images=torch.zeros(8, 1, 2, 2), labels=labels), context(8))
    assert torch.equal(with_variance, without)


def test_a_real_network_learns(tmp_path, toy):
    from functools import partial

    from wellposed.data.images import ImageDataset, StoredPixels
    from wellposed.training import PlannedBatches, Player, train

    ramp = torch.linspace(-1, 1, 8).expand(1, 8, 8)
    dataset = ImageDataset(name="ramps", source=StoredPixels(pixels=torch.stack([ramp, -ramp] * 8)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
            add_attention=False,
        )
    player = Player(
        name="denoiser",
        model=model,
        objective=denoising_objective(PATHS["vp"]),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )
    data = PlannedBatches(dataset=dataset, batch_size=16)
    result = train(player, data, toy.config(max_steps=40), tmp_path)
    assert result.metrics["denoiser/loss"] < 0.4


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        denoising_objective(PATHS["vp"], prediction_type="noise")
