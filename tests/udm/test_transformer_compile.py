"""The compiled network. Run without the annotation checks, which dynamo cannot trace."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from wellposed.udm.transformer import UniformDiffusionTransformerModel

pytestmark = [
    pytest.mark.compile,
    # Importing the compiler warns of torch's own use of torch.jit.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    # dynamo looks at .grad of a compiled block's input, which is no leaf; it takes the warning for a failure only here.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

VOCAB = 11


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    """Blocks of all models share their code, and a cache that earlier tests filled would be compiled against."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def network(**config: Any) -> UniformDiffusionTransformerModel:
    model = UniformDiffusionTransformerModel(
        vocab_size=VOCAB,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cond_dim=12,
        given_embedding=True,
        **config,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(length: int = 7, *, padded: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(VOCAB, (2, length), generator=generator)
    return {
        "input_ids": x,
        "alpha": torch.tensor([0.9, 0.2], dtype=torch.float64),
        "given": x % 3 == 0,
        "attention_mask": torch.arange(length) < torch.tensor([[length], [4]]) if padded else None,
    }


def logits_and_gradients(model: UniformDiffusionTransformerModel, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(**arguments).logits
    logits.square().mean().backward()
    gradients = {
        name.replace("_orig_mod.", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert len(gradients) == len(list(model.parameters()))
    return logits, gradients


def assert_the_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks(backend: str, padded: bool) -> None:
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    arguments = inputs(padded=padded)
    expected = logits_and_gradients(network(), **arguments)
    model = network()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    assert_the_same(logits_and_gradients(model, **arguments), expected)


def test_one_compilation_serves_every_block() -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    model = network()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            model(**inputs())
    assert len(compiled) == 1


@pytest.mark.parametrize("fusion", [None, "separate_linear", "shared_mlp"])
def test_a_network_compiled_whole_in_one_graph(fusion: str | None) -> None:
    arguments = inputs(padded=True)
    if fusion is not None:
        arguments["noise_ids"] = (arguments["input_ids"] + arguments["given"].long()) % VOCAB
    config = {"absorbing_fusion": fusion, "tie_word_embeddings": fusion is not None}
    expected = logits_and_gradients(network(**config), **arguments)
    model = network(**config)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_the_same(logits_and_gradients(model, **arguments), expected)


def test_compiled_blocks_under_gradient_checkpointing() -> None:
    expected = logits_and_gradients(network(dropout=0.0).train(), **inputs())
    model = network(dropout=0.0).train()
    model.enable_gradient_checkpointing()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert_the_same(logits_and_gradients(model, **inputs()), expected)


def test_errors_at_the_door_are_the_same_for_compiled_blocks() -> None:
    model = network()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    arguments = inputs()
    with pytest.raises(ValueError, match=r"0\.\.10"):
        model(arguments["input_ids"] + VOCAB, arguments["alpha"])
