"""DiffusionGemma's own classes, tiny and random: in diffusers' pipeline with our scheduler, and as a ``TokenModel``."""

from typing import Any

import pytest
import torch
from diffusers import DiffusionGemmaPipeline, DiscreteDDIMScheduler
from torch import Tensor
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4VisionConfig,
)

from wellposed.batches import TextBatch
from wellposed.data.tokenizers import byte_tokenizer
from wellposed.schedulers import LeaveOneOutDDIMScheduler
from wellposed.udm import Corrector, Uniform, alpha_grid, sample
from wellposed.udm.diffusion_gemma import DiffusionGemmaDenoiser
from wellposed.udm.kernels import TokenState

# diffusers' pipeline asks torch.compiler for a mark, and torch imports deprecated parts of its own for that.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

K, CANVAS = 256, 6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(
            **heads,
            vocab_size=K,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            global_head_dim=8,
            num_global_key_value_heads=1,
            num_experts=3,
            top_k_experts=2,
            moe_intermediate_size=12,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"sliding_attention": rope, "full_attention": rope},
        ),
        vision_config=Gemma4VisionConfig(
            **heads, hidden_size=16, intermediate_size=24, num_hidden_layers=1, position_embedding_size=16
        ),
        canvas_length=CANVAS,
    )
    network = DiffusionGemmaForBlockDiffusion(config).eval()
    generator = seeded()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return network


def pipeline(model: Any, scheduler: Any) -> Any:
    processor = byte_tokenizer()
    processor.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    pipe = DiffusionGemmaPipeline(model=model, scheduler=scheduler, processor=processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write(pipe: Any, **options: Any) -> Tensor:
    options = {"gen_length": 2 * CANVAS, "num_inference_steps": 5, "confidence_threshold": None} | options
    return pipe(prompt="hello", output_type="seq", generator=seeded(), eos_early_stop=False, **options).sequences


def test_our_scheduler_drives_diffusers_pipeline(model: Any) -> None:
    pipe = pipeline(model, DiscreteDDIMScheduler(corrector_steps=1, corrector_k=2))
    pipe.scheduler = LeaveOneOutDDIMScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.corrector_steps == 1
    cold = write(pipe, temperature=0.0)
    assert cold.shape == (1, 2 * CANVAS)
    assert torch.equal(cold, write(pipe, temperature=0.0))
    assert not torch.equal(cold, write(pipe, temperature=0.7))


def test_one_step_at_temperature_zero_is_diffusers_own(model: Any) -> None:
    """The last step commits the argmax, whatever the noise."""
    texts = [
        write(pipeline(model, kind()), num_inference_steps=1, gen_length=CANVAS)
        for kind in (DiscreteDDIMScheduler, LeaveOneOutDDIMScheduler)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("padded", [False, True])
def test_the_denoiser_gives_the_logits_that_the_pipeline_sees(model: Any, padded: bool) -> None:
    seen: dict[str, Tensor] = {}

    def watch(pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        seen.update(tensors)
        return {}

    pipe = pipeline(model, LeaveOneOutDDIMScheduler())
    write(
        pipe,
        gen_length=CANVAS,
        num_inference_steps=1,
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["logits"],
    )
    canvas = torch.randint(K, (1, CANVAS), generator=seeded())  # the first thing that the pipeline draws
    prompt = torch.tensor([pipe.processor.encode("hello")])
    denoiser = DiffusionGemmaDenoiser.after(
        model, prompt, torch.ones_like(prompt, dtype=torch.bool) if padded else None
    )
    alpha = torch.full((1,), 0.4, dtype=torch.float64)
    with torch.no_grad():
        prediction = denoiser(TokenState(tokens=canvas), alpha)
        rows = torch.tensor([[True, False, True, False, False, True]])
        some = denoiser(TokenState(tokens=canvas), alpha, rows=rows)
    assert prediction.kind == "denoiser"
    torch.testing.assert_close(prediction.logits, seen["logits"])
    torch.testing.assert_close(some.logits, seen["logits"][rows])
    assert torch.equal(some.tokens, canvas[rows])


def test_the_rooms_sampler_and_corrector_run_on_it(model: Any) -> None:
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    denoiser = DiffusionGemmaDenoiser.after(model, prompt)
    canvas = TextBatch(tokens=torch.zeros(2, CANVAS, dtype=torch.long))
    options = {"corrector": Corrector(steps=1, k=1, selection="random")}
    tokens, record = sample(denoiser, Uniform(K), canvas, alpha_grid(4), generator=seeded(), **options)
    assert tokens.shape == (2, CANVAS)
    assert record.evaluations == 4 + 3
    # The prompt matters, and the cache of it is only read.
    again, _ = sample(denoiser, Uniform(K), canvas, alpha_grid(4), generator=seeded(), **options)
    assert torch.equal(tokens, again)
    swapped = DiffusionGemmaDenoiser.after(model, prompt.flip(0))
    state, alpha = TokenState(tokens=tokens), torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.allclose(denoiser(state, alpha).logits, swapped(state, alpha).logits)


def test_padding_is_refused(model: Any) -> None:
    denoiser = DiffusionGemmaDenoiser.after(model, torch.tensor([[1, 2, 3]]))
    state = TokenState(tokens=torch.zeros(1, CANVAS, dtype=torch.long))
    with pytest.raises(ValueError, match="no padding"):
        denoiser(state, torch.ones(1), valid=torch.ones(1, CANVAS, dtype=torch.bool))
