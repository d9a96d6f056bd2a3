"""How large the demo is."""

from dataclasses import dataclass

__all__ = ["DemoSettings"]


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo's experiments; the defaults take about half an hour on two cores.

    Attributes:
        training_steps: of the digits' U-Net.
        head_steps: of each covariance head (NPR, SN, OCM).
        step_counts: numbers T of reverse steps on the trained network.
        num_samples: images for each Frechet distance.
        judge_steps: training steps of the classifier whose features that compares.
        analytic_images: real images for the variances of Analytic-DPM.
        path_kl_steps: numbers T for the exact path KL.
        max_products: largest m in the study of the Lanczos draw.
        guidance_steps: numbers T of guided sampling.
        guidance_scales: guidance scales.
        guidance_samples: samples of a guided run on the mixture.
        guided_digits: images of a guided run on the digits, a multiple of 10.
        classifier_steps: training steps of the classifier of noised digits.
        token_steps: numbers of reverse steps of the exact token samplers.
        text_files: of Python's standard library, to train on.
        text_training_steps: of each of the four language models.
        text_temperatures: at which they are sampled.
        text_evaluations: network evaluations of a text.
        text_samples: texts for each generative perplexity.
        text_validation: texts for each bound.
        reduction_training_steps: of the transformer whose tokens are reduced.
        reduction_steps: of its sampling.
        reduction_images: drawn with each way to sample.
        reduction_ratios: shares of the tokens that are left out.
        reduction_shorter: numbers of steps to compare with.
        reduction_cache_thresholds: of FirstBlockCache.
        reduction_extrapolated: TaylorSeer computes one step in so many.
        reduction_penalties: coefficients of the frequency penalty.
        detail_copies: of each digit, in other colours.
        detail_images: images to train on and to reconstruct, None for all.
        detail_encoder_steps: training steps of the small frozen encoder.
        detail_steps: of each autoencoder over it.
        detail_generation_steps: of each generator on its latents.
        detail_measurements: how often a generator is measured along the way.
        detail_samples: images of each measurement.
        detail_sampling_steps: points of the sampler's grid.
        penalised_ratios: shares of the tokens that they are tried at.
        captions_pictures: in the folder that is curated.
        captions_autoencoder_steps: training steps of the small autoencoder.
        captions_steps: of the text-to-image network at one resolution.
        captions_mixed_steps: of the same at several.
        captions_samples: pictures of each kind that are scored.
        captions_judge_steps: training steps of the classifier that scores them.
        captions_judge_scenes: scenes that it is trained on.
    """

    training_steps: int = 1000
    head_steps: int = 150
    step_counts: tuple[int, ...] = (4, 8, 16, 32)
    num_samples: int = 360
    judge_steps: int = 300
    analytic_images: int = 512
    path_kl_steps: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    max_products: int = 6
    guidance_steps: tuple[int, ...] = (10, 25)
    guidance_scales: tuple[float, ...] = (1.0, 2.0, 5.0)
    guidance_samples: int = 1500
    guided_digits: int = 150
    classifier_steps: int = 500
    token_steps: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    text_files: int = 160
    text_training_steps: int = 300
    text_temperatures: tuple[float, ...] = (0.8, 0.9, 1.0)
    text_evaluations: int = 16
    text_samples: int = 64
    text_validation: int = 512
    reduction_training_steps: int = 200
    reduction_steps: int = 20
    reduction_images: int = 6
    reduction_ratios: tuple[float, ...] = (0.25, 0.5)
    reduction_shorter: tuple[int, ...] = (16, 13, 10)
    reduction_cache_thresholds: tuple[float, ...] = (0.1, 0.2)
    reduction_extrapolated: tuple[int, ...] = (2, 3)
    reduction_penalties: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.3)
    penalised_ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    detail_copies: int = 2
    detail_images: int | None = None
    detail_encoder_steps: int = 200
    detail_steps: int = 250
    detail_generation_steps: int = 200
    detail_measurements: int = 4
    detail_samples: int = 150
    detail_sampling_steps: int = 12
    captions_pictures: int = 2000
    captions_autoencoder_steps: int = 600
    captions_steps: int = 1000
    captions_mixed_steps: int = 300
    captions_samples: int = 100
    captions_judge_steps: int = 400
    captions_judge_scenes: int = 6000
