"""What runs of Lens make for themselves: an autoencoder, a text encoder, a corpus; none is taken for another."""

from pathlib import Path
from typing import Any

import pytest

from wellposed.data.bucketed import BucketedBatches
from wellposed.data.buckets import Buckets, Size
from wellposed.data.captioned_digits import captioned_digits
from wellposed.evaluation.features import hash_weights
from wellposed.recipes.lens import lens_tiny, tiny_corpus
from wellposed.recipes.recipe import TrainingSettings
from wellposed.recipes.small_flux_vae import FluxVaeShape, small_flux_vae
from wellposed.recipes.small_gpt_oss import GptOssShape, small_gpt_oss

CAPTIONS = ("a red three", "a blue seven on grey")


def autoencoder(folder: Path, *, steps: int = 1, seed: int = 0, pictures: int = 6, latent_channels: int = 4) -> Any:
    corpus = captioned_digits(pictures, (16, 16))
    data = BucketedBatches(dataset=corpus, buckets=Buckets.fixed(Size(16, 16), batch_size=2), shares=1, seed=seed)
    shape = FluxVaeShape(block_out_channels=(8, 8), latent_channels=latent_channels, norm_num_groups=4)
    training = TrainingSettings(max_steps=steps, batch_size=2, learning_rate=1e-3, ema_decay=None)
    return small_flux_vae(folder, data, shape, training, seed=seed, device="cpu", shares=1, statistics_steps=1)


def test_an_autoencoder_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    hashed = hash_weights(autoencoder(tmp_path))
    others: list[tuple[str, dict[str, Any]]] = [
        (r"max_steps = 1 \(now 2\)", {"steps": 2}),
        (r"seed = 0 \(now 1\)", {"seed": 1}),
        (r"latent_channels = 4 \(now 8\)", {"latent_channels": 8}),
        ("made with data = ", {"pictures": 8}),
    ]
    for told, changes in others:
        with pytest.raises(ValueError, match=told):
            autoencoder(tmp_path, **changes)
    assert hash_weights(autoencoder(tmp_path)) == hashed


def test_a_text_encoder_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    shape = GptOssShape(hidden_size=32, num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1)
    folder = tmp_path / "encoder"
    hashed = hash_weights(small_gpt_oss(folder, CAPTIONS, shape, seed=0).model)
    with pytest.raises(ValueError, match=r"seed = 0 \(now 1\)"):
        small_gpt_oss(folder, CAPTIONS, shape, seed=1)
    with pytest.raises(ValueError, match=r"vocab_size = 512 \(now 1024\)|hidden_size = 32 \(now 64\)"):
        small_gpt_oss(folder, CAPTIONS, GptOssShape(), seed=0)
    with pytest.raises(ValueError, match="made with captions = "):
        small_gpt_oss(folder, CAPTIONS[:1], shape, seed=0)
    assert hash_weights(small_gpt_oss(folder, CAPTIONS, shape, seed=0).model) == hashed


def test_a_corpus_of_other_pictures_is_not_taken(tmp_path: Path) -> None:
    def corpus(count: int, seed: int) -> Any:
        return tiny_corpus(tmp_path, Path(), lens_tiny(), seed, "cpu", count=count)

    fingerprint = corpus(6, 0).fingerprint()
    with pytest.raises(ValueError, match=r"count = 6 \(now 8\)"):
        corpus(8, 0)
    with pytest.raises(ValueError, match=r"seed = 0 \(now 1\)"):
        corpus(6, 1)
    assert corpus(6, 0).fingerprint() == fingerprint
