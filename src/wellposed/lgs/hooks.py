"""Full-covariance sampling in pipelines that know nothing of it."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from wellposed.denoisers import refuse_guidance_embedding
from wellposed.lgs.branches import NetworkCalls
from wellposed.lgs.jacobian import ProductMethod, linearize
from wellposed.lgs.scheduler import LanczosDDPMScheduler, LanczosFlowMatchScheduler

__all__ = ["full_covariance"]

HOOK_NAME = "wellposed_full_covariance"


@contextmanager
def full_covariance(
    pipe: Any,
    *,
    num_lanczos_steps: int = 3,
    tol: float | None = None,
    amortize: int = 0,
    method: ProductMethod = "vjp",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    **scheduler_config: Any,
) -> Iterator[LanczosDDPMScheduler | LanczosFlowMatchScheduler]:
    """Within the block, ``pipe`` samples with the full posterior covariance of every reverse step.

    Replaces the pipeline's scheduler by ``LanczosDDPMScheduler`` (any scheduler with betas) or
    ``LanczosFlowMatchScheduler``, with the old one's config, and hooks the denoising network so that its Jacobian is at
    hand when the scheduler steps. Both are undone on leaving, also after an exception. A deterministic or multi-step
    solver is thereby replaced by ancestral sampling, which wants more steps.

    Args:
        pipe: a pipeline with ``unet`` or ``transformer`` and ``scheduler``: DDPM, DiT, Stable Diffusion, SD3, ...
        num_lanczos_steps: m, the most Jacobian products a step may take; a step costs about 1 + m forward passes.
        tol: relative error at which m stops growing, 1e-2 say; None for a fixed m.
        amortize: see ``LanczosSettings.amortize``.
        method: how products are computed; "difference" for models that cannot be differentiated.
        generator: for the noise of every step, in pipelines that hand none to their scheduler (DiT, SD3, Flux).
        **scheduler_config: further config of the new scheduler, e.g. ``timestep_spacing="linspace"``.

    Yields:
        The scheduler in force; its ``record`` says what the last chain has cost.

    Raises:
        ValueError: for a pipeline without a network or a known scheduler, a guidance-distilled network, one with a cache,
            offloading or casting hook that a graph does not survive, or one that is hooked already.
    """
    name, model = _network(pipe)
    _check_network(name, model)
    calls = NetworkCalls()
    scheduler = _lanczos_scheduler(
        pipe.scheduler,
        num_lanczos_steps=num_lanczos_steps,
        lanczos_tol=tol,
        lanczos_amortize=amortize,
        **scheduler_config,
    )
    scheduler.network_calls, scheduler.default_generator = calls, generator
    had_registry, had_forward = hasattr(model, "_diffusers_hook"), "forward" in vars(model)
    previous = pipe.scheduler
    registry = HookRegistry.check_if_exists_or_initialize(model)
    if num_lanczos_steps > 0:
        registry.register_hook(_LinearizeHook(calls, method), HOOK_NAME)
    pipe.scheduler = scheduler
    try:
        yield scheduler
    finally:
        pipe.scheduler = previous
        calls.clear()
        registry.remove_hook(HOOK_NAME, recurse=False)
        if not had_registry:
            del model._diffusers_hook
        if not had_forward:
            vars(model).pop("forward", None)


class _LinearizeHook(ModelHook):
    """Runs the network with a graph to its sample and keeps the graph for the scheduler; returns the output without it."""

    def __init__(self, calls: NetworkCalls, method: ProductMethod) -> None:
        super().__init__()
        self.calls = calls
        self.method: ProductMethod = method

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The network's forward, linearised in its first argument."""
        assert self.fn_ref is not None
        forward = self.fn_ref.original_forward
        first = list(inspect.signature(type(_unwrapped(module)).forward).parameters)[1]
        with torch.inference_mode(False):
            args, kwargs = tree_map(lambda leaf: leaf.clone() if _is_inference(leaf) else leaf, (args, kwargs))
        x, rest = (args[0], args[1:]) if args else (kwargs.pop(first), ())
        whole: list[Any] = []

        def predict(x: Tensor) -> Tensor:
            output = forward(x, *rest, **kwargs)
            whole.append(output)
            return output[0] if not isinstance(output, Tensor) else output

        linear = linearize(predict, x, method=self.method, module=module)
        self.calls.add(linear)
        return _with_output(whole[0], linear.output)


def _with_output(output: Any, tensor: Tensor) -> Any:
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    first = next(iter(output.keys()))
    return type(output)(**{**output, first: tensor})


def _is_inference(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_inference()


def _unwrapped(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)


def _network(pipe: Any) -> tuple[str, nn.Module]:
    for name in ("unet", "transformer"):
        model = getattr(pipe, name, None)
        if isinstance(model, nn.Module):
            if getattr(pipe, "scheduler", None) is None:
                break
            return name, model
    raise ValueError(
        f"{type(pipe).__name__} has no denoising network (unet or transformer) with a scheduler; full_covariance takes a "
        "diffusers pipeline such as DDPMPipeline"
    )


def _check_network(name: str, model: nn.Module) -> None:
    refuse_guidance_embedding(getattr(model, "config", {}))
    registry = getattr(model, "_diffusers_hook", None)
    if registry is not None and registry.get_hook(HOOK_NAME) is not None:
        raise ValueError("this pipeline is inside a full_covariance block already; blocks do not nest")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"{name}.compile() compiles the hooks along with the model; use {name}.compile_repeated_blocks() or "
            f"pipe.{name} = torch.compile(pipe.{name}) instead"
        )
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(
            f"a cache is enabled on the {name}: its Jacobian is not the model's; call {name}.disable_cache()"
        )
    for child_name, child in model.named_modules():
        offloads = getattr(getattr(child, "_hf_hook", None), "offload", False)
        hooks = getattr(getattr(child, "_diffusers_hook", None), "hooks", {})
        if offloads or "group_offloading" in hooks or "layerwise_casting" in hooks:
            raise ValueError(
                f"{name}.{child_name} moves or recasts its weights after every call, so that a saved graph would read "
                "other numbers; use enable_model_cpu_offload, or full precision storage"
            )


def _lanczos_scheduler(scheduler: Any, **config: Any) -> LanczosDDPMScheduler | LanczosFlowMatchScheduler:
    if type(scheduler).__name__.startswith("FlowMatch") or isinstance(scheduler, LanczosFlowMatchScheduler):
        return LanczosFlowMatchScheduler.from_config(scheduler.config, **config)  # pyright: ignore[reportReturnType]
    if getattr(scheduler, "alphas_cumprod", None) is None or getattr(scheduler.config, "use_flow_sigmas", False):
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod, so the Gaussian path of its model is unknown; set "
            "pipe.scheduler to the DDPMScheduler or FlowMatchEulerDiscreteScheduler that the model was trained with"
        )
    if scheduler.config.get("prediction_type", "epsilon") not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"prediction_type {scheduler.config.prediction_type!r} is none of epsilon, sample, v_prediction"
        )
    return LanczosDDPMScheduler.from_config(scheduler.config, **config)  # pyright: ignore[reportReturnType]
