"""Features for digits: a small classifier, trained on the spot."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from wellposed.batches import ImageBatch
from wellposed.data.bundled import digits
from wellposed.evaluation.features import FeatureExtractor, SmallConvNet
from wellposed.training import PlannedBatches, Player, StepContext, TrainingConfig, train
from wellposed.training.context import derived_seed

__all__ = ["digit_features"]


def digit_features(
    folder: str | Path, *, size: int = 8, steps: int = 300, seed: int = 0, device: str = "auto"
) -> FeatureExtractor:
    """The last hidden layer of a classifier of scikit-learn's digits, for a Frechet distance.

    Trained on the training split by the one loop; a second call with the same folder loads what the first one left. Its
    name says the share of test digits that it gets right.

    Args:
        folder: where its checkpoint lies.
        size: side of the images.
        steps: training steps.
        seed: of its weights and of the order of the data.
        device: where it is trained and will run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, "classifier"))
        net = SmallConvNet(in_channels=1, num_classes=10)
    train(
        Player(name="classifier", model=net, objective=_cross_entropy, optimizer=partial(AdamW, lr=2e-3)),
        PlannedBatches(dataset=digits(size, split="train"), batch_size=128, seed=seed),
        TrainingConfig(max_steps=steps, checkpoint_every=steps, keep_last=1, seed=seed, device=device, progress=False),
        folder,
    )
    test = digits(size, split="test")
    batch = test.batch(range(len(test)))
    assert batch.labels is not None
    net.eval().requires_grad_(False)
    where = next(net.parameters()).device
    accuracy = (net(batch.images.to(where)).argmax(1).cpu() == batch.labels).float().mean()
    return net.extractor(f"digit classifier ({accuracy:.1%} of test digits)")


def _cross_entropy(
    models: Mapping[str, nn.Module], batch: ImageBatch, context: StepContext
) -> tuple[Tensor, dict[str, Tensor]]:
    assert batch.labels is not None
    logits = models[context.player](batch.images)
    return nn.functional.cross_entropy(logits, batch.labels), {}
