"""Removal of hooks in every order, beside others of diffusers' and of accelerate's."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from wellposed.dito.registry import heal_hook, hooks_of, register_hook, unregister_hook

X = torch.ones(1)


class Doubler(nn.Module):
    """The host: twice its input."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Replacing(ModelHook):
    """An affine function of the output, each its own: compositions tell their order."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return self.scale * self.fn_ref.original_forward(*args, **kwargs) + 1


class Around(ModelHook):
    """One that leaves the forward alone."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return self.scale * output + 1


HOOKS: dict[str, Callable[[], ModelHook]] = {
    "ours": lambda: Replacing(3),
    "cache": lambda: Replacing(5),
    "other": lambda: Replacing(7),
    "offload": lambda: Around(11),
}
SCALES = {"ours": 3, "cache": 5, "other": 7, "offload": 11}


def expected(names: list[str]) -> float:
    y = 2.0
    for name in names:
        y = SCALES[name] * y + 1
    return y


def put(module: nn.Module, name: str) -> None:
    if name == "ours":
        register_hook(module, name, HOOKS[name]())
    else:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(HOOKS[name](), name)


def take(module: nn.Module, name: str) -> None:
    if name == "ours":
        unregister_hook(module, name)
    else:
        module._diffusers_hook.remove_hook(name)


def call(module: nn.Module) -> float:
    """As before every step: our hook is healed first."""
    if "ours" in hooks_of(module):
        heal_hook(hooks_of(module)["ours"])
    return module(X).item()


def is_diffusers_bug(order: tuple[str, ...], removal: tuple[str, ...]) -> bool:
    """Whether diffusers takes a foreign hook from under another foreign one that replaces the forward."""
    left = list(order)
    for name in removal:
        outside = left[left.index(name) + 1 :][:1]
        if name != "ours" and outside and outside[0] in ("cache", "other"):
            return True
        left.remove(name)
    return False


@pytest.mark.parametrize(
    "names",
    [("ours",), ("ours", "cache"), ("ours", "offload"), ("ours", "cache", "offload"), ("ours", "cache", "other")],
)
@pytest.mark.parametrize("calls_between", [True, False])
def test_any_order_of_removal_leaves_what_remains(names: tuple[str, ...], calls_between: bool) -> None:
    tried = 0
    for order, removal in itertools.product(itertools.permutations(names), repeat=2):
        if is_diffusers_bug(order, removal):
            continue
        tried += 1
        module = Doubler()
        for name in order:
            put(module, name)
        left = list(order)
        assert call(module) == expected(left)
        for name in removal:
            take(module, name)
            left.remove(name)
            if calls_between or not left:
                assert call(module) == expected(left), (order, removal)
        if removal[-1] == "ours":  # diffusers leaves an empty registry and a bound forward behind; we do not
            assert vars(module).keys() == vars(Doubler()).keys()
    assert tried >= {1: 1, 2: 4, 3: 20}[len(names)]


@pytest.mark.xfail(strict=True, reason="HookRegistry.remove_hook bypasses the hook outside of the one it removes")
def test_diffusers_removes_an_inner_hook_correctly() -> None:
    """When this passes, ``heal_hook`` can go."""
    module = Doubler()
    put(module, "cache"), put(module, "other")
    take(module, "cache")
    assert call(module) == expected(["other"])


@pytest.mark.xfail(strict=True, reason="HookRegistry.remove_hook brings a removed hook back")
def test_diffusers_does_not_bring_a_removed_hook_back() -> None:
    module = Doubler()
    put(module, "cache"), put(module, "other")
    take(module, "cache"), take(module, "other")
    assert call(module) == expected([])


class Halving(AccelerateHook):
    """What offloading puts around a forward."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output / 2


@pytest.mark.parametrize("actions", list(itertools.permutations(("wrap", "unwrap", "put", "take"))))
def test_with_accelerates_wrapper_in_any_order(actions: tuple[str, ...]) -> None:
    """It keeps the forward that it found and puts it back: ours may be above it, below it, or gone with it."""
    if actions.index("wrap") > actions.index("unwrap") or actions.index("put") > actions.index("take"):
        return
    module, is_wrapped, has_ours = Doubler(), False, False
    for action in actions:
        match action:
            case "wrap":
                add_hook_to_module(module, Halving())
                is_wrapped = True
            case "unwrap":
                # Our hook goes with it where it lies above.
                has_ours = has_ours and actions.index("put") < actions.index("wrap")
                remove_hook_from_module(module)
                is_wrapped = False
            case "put":
                put(module, "ours")
                has_ours = True
            case "take":
                unregister_hook(module, "ours")
                has_ours = False
        if is_wrapped and has_ours:
            below = actions.index("put") < actions.index("wrap")
            wanted = expected(["ours"]) / 2 if below else 3 * 1.0 + 1
        else:
            wanted = expected(["ours"]) if has_ours else 2 / (2 if is_wrapped else 1)
        assert call(module) == wanted, action
    assert "_diffusers_hook" not in vars(module)


def test_no_such_hook_is_no_error() -> None:
    module = Doubler()
    unregister_hook(module, "ours")
    put(module, "cache")
    unregister_hook(module, "ours")
    assert call(module) == expected(["cache"]) and list(hooks_of(module)) == ["cache"]


def test_hooks_are_listed_from_the_innermost() -> None:
    module = Doubler()
    assert hooks_of(module) == {}
    put(module, "cache"), put(module, "ours"), put(module, "offload")
    assert list(hooks_of(module)) == ["cache", "ours", "offload"]
