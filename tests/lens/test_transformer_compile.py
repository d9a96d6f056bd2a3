"""The compiled network. Run without the annotation checks, which dynamo cannot trace."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from wellposed.lens.transformer import LensTransformer2DModel, rotary_tables, rotate

pytestmark = [
    pytest.mark.compile,
    # Importing the compiler warns of torch's own use of torch.jit.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    # dynamo looks at .grad of a compiled block's input, which is no leaf; it takes the warning for a failure only here.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

Build = Callable[..., LensTransformer2DModel]
Inputs = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    """Blocks of all models share their code, and a cache that earlier tests filled would be compiled against."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def sample_and_gradients(model: LensTransformer2DModel, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    sample = model(**arguments).sample
    sample.square().mean().backward()
    # What nothing depends on, the last block's text side, gets None in eager mode and may get zeros from a compiler.
    gradients = {
        name.replace("_orig_mod.", ""): parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
    }
    return sample, gradients


def assert_the_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("aot_eager", marks=pytest.mark.slow), pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_compiled_blocks(build_lens: Build, lens_inputs: Inputs, backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    arguments = lens_inputs(text=16, padded=5)
    expected = sample_and_gradients(build_lens(), **arguments)
    model = build_lens()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    assert_the_same(sample_and_gradients(model, **arguments), expected)


def test_one_graph_for_every_block_and_few_for_every_text(build_lens: Build, lens_inputs: Inputs) -> None:
    """The second length of a text makes lengths a variable, from then on nothing is compiled; no text is apart."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    model, plain = build_lens(), build_lens()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    counts: dict[int, int] = {}
    with torch.no_grad():
        for text in (16, 32, 48, 0):
            arguments = lens_inputs(text=text, padded=min(text, 3))
            torch.testing.assert_close(model(**arguments).sample, plain(**arguments).sample, atol=1e-4, rtol=1e-4)
            counts[text] = len(compiled)
    assert counts[16] == 1
    # On a CPU the first block's text is a view of what a matrix product returned, which is a graph of its own.
    assert counts[32] == counts[48] <= 3
    assert counts[0] == counts[48] + 1


@pytest.mark.slow
def test_a_network_compiled_whole_in_one_graph(build_lens: Build, lens_inputs: Inputs) -> None:
    arguments = lens_inputs(text=16, padded=5)
    expected = sample_and_gradients(build_lens(), **arguments)
    model = build_lens()
    model.compile(fullgraph=True, backend="aot_eager")
    assert_the_same(sample_and_gradients(model, **arguments), expected)


@pytest.mark.slow
def test_compiled_blocks_under_gradient_checkpointing(build_lens: Build, lens_inputs: Inputs) -> None:
    arguments = lens_inputs(text=16, padded=5)
    expected = sample_and_gradients(build_lens().train(), **arguments)
    model = build_lens().train()
    model.enable_gradient_checkpointing()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert_the_same(sample_and_gradients(model, **arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_has_one_result_compiled_or_not(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 3, 16, generator=generator, dtype=torch.float64).to(dtype)
    tables = rotary_tables(10 * torch.randn(9, 3, generator=generator), (4, 6, 6))
    compiled = torch.compile(rotate, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, *tables), rotate(x, *tables), rtol=1e-6, atol=1e-6)
