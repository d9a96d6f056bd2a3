"""``wellposed demo``: every room, measured, on one page."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from wellposed.demo.decq import detail_generation_study, detail_study, frozen_encoder
from wellposed.demo.decq_page import decq_numbers, decq_sections
from wellposed.demo.dito import output_study, penalty_study, reducible_transformer, reduction_study
from wellposed.demo.dito_page import dito_numbers, dito_sections
from wellposed.demo.lens import captions_study
from wellposed.demo.lens_page import lens_numbers, lens_sections
from wellposed.demo.lgs import guidance_study, lanczos_study, network_study, path_kl_study
from wellposed.demo.lgs_page import lgs_numbers, lgs_sections
from wellposed.demo.settings import DemoSettings
from wellposed.demo.stages import Stages
from wellposed.demo.udm import text_study, token_study
from wellposed.demo.udm_page import udm_numbers, udm_sections
from wellposed.report.page import Numbers, Page, write_page
from wellposed.report.record import provenance

__all__ = ["run_demo"]


def run_demo(
    out: str | Path = "runs/demo",
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    resume: bool = True,
    settings: DemoSettings | None = None,
) -> Path:
    """Trains, samples, measures, and writes ``out/index.html``.

    A second run reuses the stages that are finished, and an interrupted one goes on from the last of them (training
    from its last checkpoint). Stages that depend on a setting, a seed or a version that is another now start afresh;
    what they had left is removed.

    Args:
        out: folder of the run.
        steps: training steps of the demo's networks, in place of the settings' own.
        seed: of everything random.
        device: where networks run.
        resume: False refuses a folder that holds a demo already.
        settings: sizes of the experiments.

    Returns:
        The page.

    Raises:
        ValueError: ``resume`` is False and there is a demo in ``out``; or ``out`` has folders of others by the names of
            stages.
    """
    out = Path(out)
    if not resume and (out / "path_kl").exists():
        raise ValueError(f"{out} holds a demo; go on with it by --resume, or choose another folder with --out")
    settings = settings or DemoSettings()
    if steps is not None:
        settings = replace(
            settings,
            training_steps=steps,
            text_training_steps=steps,
            reduction_training_steps=steps,
            detail_encoder_steps=steps,
            detail_steps=steps,
            detail_generation_steps=steps,
            captions_autoencoder_steps=steps,
            captions_steps=steps,
            captions_mixed_steps=steps,
        )
    console = Console()
    stages = Stages(out, seed=seed, announce=console.print)
    theory = path_kl_study(stages, settings)
    lanczos = lanczos_study(stages, settings)
    network = network_study(stages, settings, device=device)
    guidance = guidance_study(stages, settings, device=device)
    tokens = token_study(stages, settings)
    text = text_study(stages, settings, device=device)
    subject = reducible_transformer(stages, settings, device=device)
    reduction = reduction_study(stages, settings, subject)
    outputs = output_study(stages, settings, subject)
    penalty = penalty_study(stages, settings, subject)
    encoder = frozen_encoder(stages, settings, device=device)
    detail = detail_study(stages, settings, encoder, device=device)
    generation = detail_generation_study(stages, settings, encoder, device=device)
    captions = captions_study(stages, settings, device=device)
    page = Page(
        title="wellposed, measured on this machine",
        lead=(
            "Diffusion toolkits are full of underspecified defaults. This page takes five and measures them against "
            "their exact counterparts. The covariance of a reverse step: the Lanczos Gaussian sampler of "
            "[arXiv 2605.22723](https://arxiv.org/abs/2605.22723), which needs no training. What a model of noisy "
            "tokens predicts: the leave-one-out posterior of [arXiv 2605.22765](https://arxiv.org/abs/2605.22765). "
            "Which tokens of an image a transformer may skip: those whose outputs are alike "
            "([arXiv 2605.22011](https://arxiv.org/abs/2605.22011)). What a frozen encoder's latent keeps of an image, "
            "and what queries give back ([arXiv 2605.22777](https://arxiv.org/abs/2605.22777)). What a text-to-image "
            "model is told of its pictures ([arXiv 2605.21573](https://arxiv.org/abs/2605.21573)). "
            "Everything below was computed by `wellposed demo` just now."
        ),
        opening=(
            Numbers(
                numbers=(
                    *lgs_numbers(theory, network, settings),
                    *udm_numbers(tokens),
                    *dito_numbers(reduction, outputs),
                    *decq_numbers(detail),
                    *lens_numbers(captions),
                )
            ),
        ),
        sections=(
            *lgs_sections(theory, lanczos, network, guidance, out, settings),
            *udm_sections(tokens, text, settings),
            *dito_sections(reduction, outputs, penalty, out, settings),
            *decq_sections(detail, generation, out, settings),
            *lens_sections(captions, out, settings),
        ),
        footer=provenance(stages.records),
    )
    path = write_page(page, out / "index.html")
    console.print(f"The page: {path}")
    return path
