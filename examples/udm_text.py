"""A small uniform diffusion model of Python source, byte by byte: trained here, then asked to write and to fill a hole.

    python examples/udm_text.py                    # 400 steps, two minutes on one core, nothing to download
    python examples/udm_text.py runs/python        # keeps the pipeline, for UniformDiffusionPipeline.from_pretrained

What to expect, from one run: a bound of about 2.7 nats a byte on held-out files. All bytes equally likely would be
5.55, each by its own frequency 3.11, and each after the one before it 2.41: so far it knows that letters depend on each
other, not more.
"""

import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from wellposed.data.corpora import python_source
from wellposed.data.text import GivenMasks, PromptedText, pack
from wellposed.data.tokenizers import byte_tokenizer
from wellposed.models import UniformDiffusionTransformerModel
from wellposed.pipelines import UniformDiffusionPipeline
from wellposed.schedulers import UniformDiffusionScheduler
from wellposed.training import PlannedBatches, Player, TrainingConfig, train
from wellposed.udm import Uniform
from wellposed.udm.likelihood import likelihood_bound
from wellposed.udm.models import NetworkModel
from wellposed.udm.objectives import token_objective


def trained(run: str | Path, max_steps: int = 400, documents: int = 200) -> tuple[UniformDiffusionPipeline, float]:
    """A pipeline, and the network's bound on held-out files."""
    tokenizer = byte_tokenizer(special_tokens=("eos",))
    blocks = pack(python_source("train").first(documents), tokenizer, 64, wrap="eos")
    held_out = pack(python_source("validation").first(20), tokenizer, 64, wrap="eos").batch(range(128))
    # Something is given in half of the blocks: so it learns to continue a text and to fill in.
    batches = PlannedBatches(dataset=PromptedText(dataset=blocks, masks=GivenMasks(none=0.5)), batch_size=32)
    kernel, sizes = Uniform(len(tokenizer)), {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32}
    network = UniformDiffusionTransformerModel(vocab_size=len(tokenizer), given_embedding=True, **sizes)
    adam, objective = partial(torch.optim.AdamW, lr=2e-3), token_objective(kernel)
    model = Player(name="model", model=network, objective=objective, optimizer=adam, ema_decay=0.99, clip_norm=1.0)
    average = train(model, batches, TrainingConfig(max_steps=max_steps, device="cpu"), run).averages["model"]
    pipe = UniformDiffusionPipeline(network, UniformDiffusionScheduler(), tokenizer)
    with average.applied():
        pipe.save_pretrained(Path(run) / "pipeline")
    pipe = UniformDiffusionPipeline.from_pretrained(Path(run) / "pipeline")
    model = NetworkModel(network=pipe.transformer, kind="leave_one_out")
    generator = torch.Generator().manual_seed(0)
    return pipe, likelihood_bound(model, kernel, [held_out], generator=generator, times_per_sequence=4).diffusion


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        pipe, bound = trained(sys.argv[1] if len(sys.argv) > 1 else folder)
    print(f"{bound:.2f} nats a byte on held-out files")
    generator = torch.Generator().manual_seed(0)
    print(pipe(length=64, generator=generator).texts[0])
    hole = "def area(r):\n    return ____ * r ** 2"
    print(pipe(hole, num_inference_steps=64, corrector_steps=2, generator=generator).texts[0])
