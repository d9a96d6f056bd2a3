"""Compiled hosts. Run without the annotation checks, which dynamo cannot trace."""

import shutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.hooks import apply_token_reduction, token_reduction
from wellposed.dito.schedule import FixedInterval

pytestmark = [
    pytest.mark.compile,
    # Importing the compiler warns of torch's own use of torch.jit.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

Host = Any

MATCH, REDUCE = "match", "reduce"


def settings(**fields: Any) -> TokenReductionConfig:
    fields = {"ratio": 0.5, "round_to": 1, "end_dense_steps": 0, "schedule": FixedInterval(interval=3), **fields}
    return TokenReductionConfig(**fields)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graphs of other tests, and no silent return to eager code where there are too many of them."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


class Counting:
    """A back end that runs graphs as they are, and counts how many were made and run."""

    def __init__(self) -> None:
        self.graphs = 0
        self.runs = 0

    def __call__(self, graph: Any, example_inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


def compiled(model: nn.Module, form: str, backend: Any) -> nn.Module:
    if form == "whole":
        return torch.compile(model, backend=backend)
    model.compile_repeated_blocks(fullgraph=False, backend=backend)
    return model


def denoise(host: Host, model: nn.Module, steps: int) -> Tensor:
    outputs = []
    with torch.no_grad():
        for step in range(steps):
            output = model(**host.arguments(step / steps, 2), return_dict=False)[0]
            outputs.append(torch.stack(output) if isinstance(output, list) else output)
    return torch.stack(outputs)


CASES = [  # SD3, PixArt and DiT name no repeated blocks
    ("flux", "blocks", "block", 4),
    ("flux", "blocks", "attn", 3 * 4),
    ("sd3", "whole", "block", None),
    ("qwen", "blocks", "block", 2),
    pytest.param("flux", "whole", "block", None, marks=pytest.mark.slow),
    pytest.param("flux2", "blocks", "block", 3, marks=pytest.mark.slow),
    pytest.param("pixart", "whole", "attn", None, marks=pytest.mark.slow),
    pytest.param("z_image", "blocks", "block", 2 + 2, marks=pytest.mark.slow),  # two refiners
]


@pytest.mark.parametrize(("name", "form", "scope", "graphs_in_a_step"), CASES)
def test_one_graph_for_each_kind_of_step_and_none_later(
    tiny: SimpleNamespace, name: str, form: str, scope: Any, graphs_in_a_step: int | None
) -> None:
    """Compiled blocks give what eager ones give; a Reduction step breaks no block, and nothing is compiled twice.

    In attention scope a block is what comes before the attention, the attention, and what comes after it.
    """
    host, backend = tiny.hosts[name](), Counting()
    with token_reduction(host.model, config=settings(scope=scope)):
        expected = denoise(host, host.model, 9)
    reduction = apply_token_reduction(host.model, settings(scope=scope))
    model = compiled(host.model, form, backend)
    assert torch.equal(denoise(host, model, 9), expected)
    assert {record.mode for record in reduction.steps} == {MATCH, REDUCE}
    made = backend.graphs
    runs: dict[str, set[int]] = {MATCH: set(), REDUCE: set()}
    with torch.no_grad():
        for step in range(18):  # a second generation, at other times
            backend.runs = 0
            model(**host.arguments(step / 18, 2))
            runs[reduction.steps[-1].mode].add(backend.runs)
    assert backend.graphs == made, "a step of the second generation was compiled anew"
    if graphs_in_a_step is not None:
        # Matching happens outside of the graphs, so that Matching steps have as many.
        assert runs == {MATCH: {graphs_in_a_step}, REDUCE: {graphs_in_a_step}}
    assert all(len(numbers) == 1 for numbers in runs.values())


@pytest.mark.parametrize("form", [pytest.param("whole", marks=pytest.mark.slow), "blocks"])
def test_the_compiled_model_may_come_first(tiny: SimpleNamespace, form: str) -> None:
    """Hooks are put on, and taken off, a model that is compiled already."""
    host, backend = tiny.hosts["flux"](), Counting()
    dense = denoise(host, host.model, 4)
    with token_reduction(host.model, config=settings()):
        expected = denoise(host, host.model, 4)
    model = compiled(host.model, form, backend)
    assert torch.equal(denoise(host, model, 4), dense)
    with token_reduction(model, config=settings()) as reduction:
        assert torch.equal(denoise(host, model, 4), expected)
        assert [record.mode for record in reduction.steps] == [MATCH, REDUCE, REDUCE, MATCH]
    assert torch.equal(denoise(host, model, 4), dense)


@pytest.mark.slow
def test_other_recoveries_and_reduced_keys(tiny: SimpleNamespace) -> None:
    for fields in ({"recovery": "copy", "reduction": "merge"}, {"keep_kv": False, "proportional_attention": True}):
        torch._dynamo.reset()
        host, backend = tiny.hosts["flux"](), Counting()
        with token_reduction(host.model, config=settings(**fields)):
            expected = denoise(host, host.model, 5)
        with token_reduction(host.model, config=settings(**fields)):
            model = compiled(host.model, "blocks", backend)
            assert torch.equal(denoise(host, model, 5), expected)
            assert backend.graphs <= 9


@pytest.mark.slow
def test_other_sizes_of_picture(tiny: SimpleNamespace) -> None:
    """A third size is compiled no more: its sizes are variables by then."""
    pipe = tiny.pipes["flux"]()
    sizes = [(64, 96), (96, 64), (96, 96), (128, 96)]
    expected = []
    with token_reduction(pipe.pipe, config=settings()):
        expected = [pipe(height=height, width=width) for height, width in sizes]
    backend = Counting()
    made = []
    with token_reduction(pipe.pipe, config=settings()):
        pipe.transformer.compile_repeated_blocks(fullgraph=False, backend=backend)
        for (height, width), latents in zip(sizes, expected, strict=True):
            torch.testing.assert_close(pipe(height=height, width=width), latents, rtol=1e-5, atol=1e-5)
            made.append(backend.graphs)
    assert made[3] == made[2] <= 4 * made[0]


@pytest.mark.slow
def test_blocks_compiled_one_by_one(tiny: SimpleNamespace) -> None:
    host, backend = tiny.hosts["sd3"](), Counting()
    with token_reduction(host.model, config=settings()):
        expected = denoise(host, host.model, 4)
    for index, block in enumerate(host.model.transformer_blocks):
        host.model.transformer_blocks[index] = torch.compile(block, backend=backend)
    with token_reduction(host.model, config=settings()) as reduction:
        assert torch.equal(denoise(host, host.model, 4), expected)
        assert len(reduction.site_names) == 3 and backend.graphs > 0


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("scope", ["attn", "block"])
def test_inductor(tiny: SimpleNamespace, scope: Any) -> None:
    host = tiny.hosts["flux"]()
    with token_reduction(host.model, config=settings(scope=scope)):
        expected = denoise(host, host.model, 4)
    with token_reduction(host.model, config=settings(scope=scope)):
        model = compiled(host.model, "blocks", "inductor")
        torch.testing.assert_close(denoise(host, model, 4), expected, rtol=1e-3, atol=1e-3)
