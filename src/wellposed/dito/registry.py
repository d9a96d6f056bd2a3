"""Hooks in diffusers' registry that survive other hooks being taken off.

``HookRegistry.remove_hook`` (diffusers 0.42) hands the forward of a removed hook to the next one outside of it by
overwriting that one's own: a hook that replaces the forward is then bypassed without a word, and removing it brings the
removed one back.
"""

from typing import Any

from diffusers.hooks import HookRegistry
from torch import nn

__all__ = ["heal_hook", "hooks_of", "register_hook", "unregister_hook"]


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """The module's hooks by name, innermost first."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    return {} if registry is None else {name: registry.hooks[name] for name in registry._hook_order}


def register_hook(module: nn.Module, name: str, hook: Any) -> None:
    """Outside of those that the module has."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, name)
    hook.wrapper = module.forward
    if hasattr(hook, "new_forward"):
        hook.runner = hook.fn_ref.forward  # what the registry calls in place of the module's forward


def heal_hook(hook: Any) -> None:
    """Undo what diffusers' removal of an inner hook does to an outer one: it overwrites the outer's forward."""
    ref = hook.fn_ref
    if hasattr(hook, "runner") and ref.forward is not hook.runner:
        ref.original_forward, ref.forward = ref.forward, hook.runner


def unregister_hook(module: nn.Module, name: str) -> None:
    """As the registry's ``remove_hook``, but right when a hook outside of it replaces the forward too.

    Also when offloading has wrapped the module since. Nothing happens where there is no such hook.
    """
    registry: Any = getattr(module, "_diffusers_hook", None)
    if registry is None or name not in registry.hooks:
        return
    hook = registry.hooks[name]
    heal_hook(hook)
    index = registry._hook_order.index(name)
    ref = registry._fn_refs[index]
    inner = ref.forward if ref.original_forward is None else ref.original_forward
    if index + 1 < len(registry._hook_order):
        outer = registry._fn_refs[index + 1]
        if outer.original_forward is None:
            outer.forward = inner
        else:
            outer.original_forward = inner
    elif vars(module).get("_old_forward") is hook.wrapper:
        module._old_forward = inner
    elif vars(module).get("forward") is hook.wrapper:  # else offloading that we were put around took us off with it
        if getattr(inner, "__func__", None) is type(module).forward:
            del module.forward
        else:
            module.forward = inner
    del registry.hooks[name]
    registry._hook_order.pop(index)
    registry._fn_refs.pop(index)
    if not registry.hooks:
        del module._diffusers_hook  # made anew by whoever needs one
