"""What a sampling step of uniform diffusion costs outside the network, at the vocabulary of a language model.

Claim measured (this library's target): at K = 50257, 128 tokens and a network of width 256 with 4 blocks, everything
but the network takes at most 0.3 of the network's time per evaluation. Beside it, in the same rounds: the same step
with the whole bridge in float64 and Gumbel noise over the vocabulary, as published code takes it (our own words of
it), diffusers' ``DiscreteDDIMScheduler``, both with their correctors, and nucleus truncation.

    python benchmarks/udm_sampling.py
    python benchmarks/udm_sampling.py --device cuda --batch 16 --length 1024
"""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
from diffusers import DiscreteDDIMScheduler
from torch import Tensor

from wellposed.batches import TextBatch
from wellposed.evaluation.speed import Comparison, comparable_clock, time_calls
from wellposed.recipes.device import resolved_device
from wellposed.report.record import write_result
from wellposed.udm import (
    Absorbing,
    Corrector,
    Masked,
    SamplingSettings,
    TokenState,
    Truncation,
    Uniform,
    ancestral_step,
    to_leave_one_out,
)
from wellposed.udm.corrector import correct
from wellposed.udm.models import GivenLogits, NetworkModel
from wellposed.udm.transformer import UniformDiffusionTransformerModel

TARGET = 0.3
STEPS = 64


def float64_step(logits: Tensor, x_t: Tensor, alpha_t: float, alpha_s: float, top_p: float = 1.0) -> Tensor:
    """The plug-in bridge over the whole vocabulary in float64, and a Gumbel draw from it."""
    size = logits.shape[-1]
    probs = logits.double().log_softmax(-1).exp()
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)
        ranked = ranked * (ranked.cumsum(-1) - ranked < top_p)
        probs = torch.zeros_like(probs).scatter_(-1, order, ranked / ranked.sum(-1, keepdim=True))
    own = torch.nn.functional.one_hot(x_t, size).double()
    survival = alpha_t / alpha_s
    stay = size * alpha_t * (probs * own).sum(-1, keepdim=True) + survival - alpha_t
    weights = (alpha_s - alpha_t) * probs + (1 - survival) * (1 - alpha_s) / size + own * stay
    gumbel = -torch.log(-torch.log(torch.rand_like(weights).clamp(1e-12, 1 - 1e-12)))
    return (weights.log() + gumbel).argmax(-1)


def calls(
    device: torch.device, dtype: torch.dtype, batch: int, length: int, vocab: int
) -> dict[str, Callable[[], Any]]:
    """The network, and what comes after it, by name; names with "whole" include the network."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        shape: dict[str, Any] = {
            "vocab_size": vocab,
            "num_layers": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 64,
            "given_embedding": False,
        }
        network = UniformDiffusionTransformerModel(**shape).eval().to(device, dtype)
        masked = UniformDiffusionTransformerModel(**shape, mask_token=True).eval().to(device, dtype)
        absorbing = UniformDiffusionTransformerModel(**shape, absorbing_fusion="shared_mlp").eval().to(device, dtype)
        for each in (network, masked, absorbing):
            torch.nn.init.normal_(each.proj_out.weight, std=0.3)
    x = torch.randint(vocab, (batch, length), generator=generator, device=device)
    canvas, plain = TextBatch(tokens=x), SamplingSettings()
    nucleus = SamplingSettings(truncation=Truncation(top_p=0.9))
    alpha_t, alpha_s = 0.5, 0.5 + 1 / STEPS
    t, s = (torch.full((batch,), alpha, dtype=torch.float64) for alpha in (alpha_t, alpha_s))
    state = TokenState(tokens=x)
    hidden = torch.rand(batch, length, generator=generator, device=device) > alpha_t

    @torch.no_grad()
    def forward() -> Tensor:
        return network(input_ids=x, alpha=t).logits

    logits = forward()
    given = GivenLogits(logits=logits, kind="leave_one_out")
    informed = Corrector(steps=1, k=12)
    theirs = DiscreteDDIMScheduler(num_inference_steps=STEPS, corrector_k=12)

    @torch.no_grad()
    def step(kernel: Any, model: Any, where: TokenState, settings: SamplingSettings = plain) -> Any:
        return ancestral_step(model, kernel, where, t, s, canvas=canvas, settings=settings, generator=generator)

    @torch.no_grad()
    def corrected() -> Any:
        return correct(
            given, Uniform(vocab), state, s, corrector=informed, canvas=canvas, settings=plain, generator=generator
        )

    def network_model(model: Any, channel: Any) -> NetworkModel:
        return NetworkModel(network=model, kind="denoiser", channel=channel, knows_given=False)

    masked_state = TokenState(tokens=torch.where(hidden, vocab, x))
    absorbing_state = TokenState(tokens=x, noise=torch.where(hidden, x, (x + 1) % vocab))
    as_denoiser = network_model(network, "uniform")
    return {
        "network": forward,
        "ours": lambda: step(Uniform(vocab), given, state),
        "ours, top-p": lambda: step(Uniform(vocab), given, state, nucleus),
        "ours, from a denoiser": lambda: step(Uniform(vocab), GivenLogits(logits=logits, kind="denoiser"), state),
        "float64": lambda: float64_step(logits, x, alpha_t, alpha_s),
        "float64, top-p": lambda: float64_step(logits, x, alpha_t, alpha_s, 0.9),
        "diffusers": lambda: theirs.step(logits, STEPS // 2, x, temperature=1.0, generator=generator),
        "diffusers, LOO first": lambda: theirs.step(
            to_leave_one_out(logits, x, t), STEPS // 2, x, temperature=1.0, generator=generator
        ),
        "ours, corrector": corrected,
        "diffusers, corrector": lambda: theirs.step_correct(logits, STEPS // 2, x, generator=generator),
        "whole step, uniform": lambda: step(Uniform(vocab), as_denoiser, state),
        "whole step, masked": lambda: step(Masked(vocab), network_model(masked, "masked"), masked_state),
        "whole step, absorbing": lambda: step(Absorbing(vocab), network_model(absorbing, "absorbing"), absorbing_state),
    }


def main() -> None:
    """Runs, prints, writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--repeats", type=int, default=15)
    chosen = parser.parse_args()
    started = datetime.now(UTC)
    device, dtype = resolved_device(chosen.device), getattr(torch, chosen.dtype)
    clock = comparable_clock(device)
    named = calls(device, dtype, chosen.batch, chosen.length, chosen.vocab)
    comparison: Comparison = time_calls(named, repeats=chosen.repeats, baseline="network", device=device)
    network = comparison.timings["network"].seconds(clock).median
    print(f"network: {1000 * network:.1f} ms ({chosen.batch} x {chosen.length} tokens, K = {chosen.vocab})")
    for name in comparison.timings:
        ratio = comparison.ratio(name, clock=clock)
        print(f"  {name:24} {1000 * comparison.timings[name].seconds(clock).median:8.1f} ms  {ratio!s:>24} networks")
    ours = comparison.ratio("ours", clock=clock).median
    print(f"outside the network, ours: {ours:.3f} (target <= {TARGET}: {'met' if ours <= TARGET else 'missed'})")
    settings = vars(chosen) | {"steps": STEPS, "target": TARGET}
    name = f"udm-sampling-{chosen.dtype}-batch{chosen.batch}"
    metrics = {"clock": clock, "timings": comparison.to_dict(), "outside": ours}
    print(write_result(name, metrics, settings, seed=0, started=started))


if __name__ == "__main__":
    main()
