"""Enumeration beside the library, and uniform numbers of our choice in place of random ones."""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from wellposed.oracles import TokenOracle
from wellposed.udm import corrector, kernels, remasking
from wellposed.udm.kernels import Absorbing, Kernel, TokenState

SPEC = importlib.util.spec_from_file_location("enumeration", Path(__file__).with_name("enumeration.py"))
assert SPEC is not None and SPEC.loader is not None
_enumeration = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(_enumeration)


@pytest.fixture(scope="session")
def enumeration() -> ModuleType:
    """Brute force, see enumeration.py."""
    return _enumeration


@pytest.fixture(scope="session")
def world() -> Any:
    """Three tokens, two positions."""
    return _enumeration.World.random(3, 2)


@pytest.fixture(scope="session")
def oracle_of() -> Callable[[Any], TokenOracle]:
    """The library's oracle of a world."""
    return lambda world: TokenOracle.from_table(world.table)


@pytest.fixture(scope="session")
def channel_of() -> Callable[[Kernel, float], Tensor]:
    """By brute force, what a kernel's forward law should be."""
    by_channel = {
        "uniform": _enumeration.uniform_channel,
        "masked": _enumeration.masked_channel,
        "absorbing": _enumeration.absorbing_channel,
    }
    return lambda kernel, alpha: by_channel[kernel.channel](alpha, kernel.vocab_size)


@pytest.fixture(scope="session")
def states_of() -> Callable[[Kernel, int], TokenState]:
    """Every state of a kernel, in the order of the enumeration."""

    def states(kernel: Kernel, length: int) -> TokenState:
        size = kernel.vocab_size
        if isinstance(kernel, Absorbing):
            pairs = _enumeration.all_sequences(size * size, length)
            return TokenState(tokens=pairs // size, noise=pairs % size)
        return TokenState(tokens=_enumeration.all_sequences(size + (kernel.channel == "masked"), length))

    return states


@pytest.fixture(scope="session")
def symbols_of() -> Callable[[Kernel, TokenState], Tensor]:
    """The enumeration's number of each position's state."""

    def symbols(kernel: Kernel, state: TokenState) -> Tensor:
        return state.tokens if state.noise is None else kernel.vocab_size * state.tokens + state.noise

    return symbols


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterable[Tensor]], AbstractContextManager[None]]:
    """``with scripted(answers):`` the k-th request for uniform numbers gets the k-th tensor, (batch,) or whole."""

    @contextmanager
    def script(answers: Iterable[Tensor]) -> Iterator[None]:
        queue = iter(answers)

        def answer(tokens: Tensor, generator: Any) -> Tensor:
            numbers = next(queue)
            return (numbers if numbers.ndim == 2 else numbers[:, None]).expand(tokens.shape).contiguous()

        with monkeypatch.context() as patch:
            for module in (kernels, corrector, remasking):
                patch.setattr(module, "uniform_numbers", answer)
            yield
        assert next(queue, None) is None, "fewer numbers were drawn than expected"

    return script
