"""Token reduction inside the transformers of diffusers.

Everything runs in hooks of diffusers' registry. One *root* on the model counts steps, decides whether a step is dense, a
Matching step or a Reduction step, and publishes the decision to the *sites*: attention modules or whole blocks. A site
does what it is told on tensors of fixed shape, so that a compiled block has one graph for each kind of step; all step
logic and all matching happen outside of compiled code.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from jaxtyping import Float, Int
from torch import Tensor, nn

from wellposed.dito.adapters import HostBlock, Rows, find_blocks
from wellposed.dito.attention import AttentionInputs
from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.geometry import token_grid
from wellposed.dito.matching import (
    TokenCorrespondence,
    TokenWindows,
    flat_rows,
    num_reduced_tokens,
    pair_match_ratio,
    recovery_error,
    take_rows,
)
from wellposed.dito.schedule import Measurement

__all__ = [
    "MatchEvent",
    "StepRecord",
    "TokenReduction",
    "apply_token_reduction",
    "remove_token_reduction",
    "token_reduction",
]

logger = logging.getLogger(__name__)

Mode = Literal["dense", "match", "reduce"]

ROOT_HOOK = "token_reduction"
SITE_HOOK = "token_reduction_site"
ATTENTION_HOOK = "token_reduction_attention"
ENTRY_HOOK = "token_reduction_entry"

# Calls at one and the same timestep that are told apart: branches of guidance, stages of a two-stage solver. A fifth one
# is taken for a new generation.
_CALLS_PER_TIMESTEP = 4


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One call of the model.

    Attributes:
        context: name of the pipeline's cache context ("cond", "uncond"), or "default".
        step: index of the call in its context and generation.
        mode: "dense", "match" (dense, and pairs are chosen) or "reduce".
    """

    context: str
    step: int
    mode: Mode


@dataclass(frozen=True, kw_only=True)
class MatchEvent:
    """What an observer is told at every site of every Matching step.

    Attributes:
        site: name of the module.
        context: see :class:`StepRecord`.
        step: see :class:`StepRecord`.
        inputs: the image tokens that go into the block.
        output: the image tokens' outputs that a reduction copies: of the attention, or the block's increment.
        windows: the image tokens' windows.
        correspondence: the new pairs.
    """

    site: str
    context: str
    step: int
    inputs: Float[Tensor, "batch tokens channels"]
    output: Float[Tensor, "batch tokens out_channels"]
    windows: TokenWindows
    correspondence: TokenCorrespondence


Observer = Callable[[MatchEvent], None]


def apply_token_reduction(
    model: Any, config: TokenReductionConfig | None = None, *, observer: Observer | None = None
) -> "TokenReduction":
    """Make a transformer compute only some of its image tokens at most of its steps.

    At a Matching step every site runs dense and chooses, from its own output, which tokens the next Reduction steps drop
    and whose output they are given instead (arXiv 2605.22011). Generations are told apart by their timesteps, branches of
    guidance by the pipeline's cache contexts or by the order of calls, so that nothing leaks from one into another.

    Args:
        model: a transformer of diffusers, or a pipeline that has one.
        config: the settings; ``TokenReductionConfig()`` if None.
        observer: called with a :class:`MatchEvent` for every site of every Matching step.

    Returns:
        a handle with what happened and ``remove()``. At ratio 0 nothing is installed.

    Raises:
        ValueError: blocks that are not supported, a model that has token reduction already, full-covariance sampling or
            a cache that it cannot be combined with, sequence parallelism, an attention processor that ``keep_kv``
            cannot replace.
    """
    config = TokenReductionConfig() if config is None else config
    transformer = _transformer_of(model)
    blocks = find_blocks(transformer)
    unknown = sorted(set(config.block_ratios) - {block.name for block in blocks})
    if unknown:
        raise ValueError(f"block_ratios names {', '.join(unknown)}; the blocks are {_listed(blocks)}")
    _refuse_occupied(transformer)
    hosts = [block for block in blocks if config.ratio_of(block.name) > 0]
    root = _RootHook(transformer, config, hosts, observer)
    if hosts:
        root.install()
    return TokenReduction(root)


def remove_token_reduction(model: Any) -> None:
    """Take token reduction off a transformer or pipeline; the model is then what it was, whatever else has been hooked
    on or off meanwhile. Nothing happens where there is none."""
    root = _installed_root(_transformer_of(model))
    if root is not None:
        root.uninstall()


@contextmanager
def token_reduction(
    model: Any, *, config: TokenReductionConfig | None = None, observer: Observer | None = None, **fields: Any
) -> Iterator["TokenReduction"]:
    """Within the block, ``model`` samples with token reduction: ``with token_reduction(pipe, ratio=0.5): pipe(...)``.

    Args:
        model: a transformer of diffusers, or a pipeline that has one.
        config: the settings, instead of ``fields``.
        observer: see :func:`apply_token_reduction`.
        **fields: of :class:`TokenReductionConfig`.

    Raises:
        ValueError: see :func:`apply_token_reduction`; or both ``config`` and ``fields``.
    """
    if config is not None and fields:
        raise ValueError(f"give either config or {', '.join(sorted(fields))}, not both")
    reduction = apply_token_reduction(model, config or TokenReductionConfig(**fields), observer=observer)
    try:
        yield reduction
    finally:
        reduction.remove()


class TokenReduction:
    """What is installed on a model, and what it did in the generation that runs or ran last."""

    def __init__(self, root: "_RootHook") -> None:
        self._root = root
        self.config = root.config

    @property
    def site_names(self) -> tuple[str, ...]:
        """The modules whose tokens are reduced."""
        return tuple(site.name for site in self._root.sites)

    @property
    def steps(self) -> list[StepRecord]:
        """The model's calls, in order."""
        calls = [entry for summary in self._root.summaries.values() for entry in summary.steps]
        return [record for _, record in sorted(calls, key=lambda entry: entry[0])]

    @property
    def measurements(self) -> list[Measurement]:
        """What Matching steps said about the pairs they replaced, where the schedule asks for it."""
        self._root.settle()
        return [entry for summary in self._root.summaries.values() for entry in summary.measured]

    def drop_counts(self) -> dict[str, Int[Tensor, "batch tokens"]]:
        """Reduction steps in which each image token was dropped, by site; contexts one after the other on the batch."""
        self._root.settle()
        counts: dict[str, list[Tensor]] = {}
        for summary in self._root.summaries.values():
            for name, dropped in summary.counts.items():
                counts.setdefault(name, []).append(dropped.cpu())
        return {name: torch.cat(parts) for name, parts in counts.items()}

    def plan_bytes(self) -> int:
        """Memory that pairs take at this moment."""
        plans = [state.rows.tokens for state in self._root.site_states() if state.rows is not None]
        return sum(
            part.numel() * part.element_size()
            for plan in plans
            for part in (plan.keep, plan.recover_from, plan.dropped)
        )

    def offset_bytes(self) -> int:
        """Memory that delta recovery takes at this moment."""
        offsets = [state.offset for state in self._root.site_states() if state.offset is not None]
        return sum(offset.numel() * offset.element_size() for offset in offsets)

    def remove(self) -> None:
        """Take it off the model; twice does nothing."""
        self._root.uninstall()


@dataclass(eq=False)
class _SiteState:
    """What one site keeps between the steps of one trajectory."""

    image: TokenCorrespondence | None = None  # the pairs among image tokens
    rows: Rows | None = None  # the same in the site's sequence
    dropped_rows: Tensor | None = None  # of the flattened batch
    target_rows: Tensor | None = None
    offset: Tensor | None = None  # o_i - o_m(i) of the Matching step, for delta recovery
    matching: int = -1  # which Matching step the pairs are of
    generator_state: Tensor | None = None  # before the destinations were drawn
    counts: Tensor | None = None
    reductions: int = 0  # Reduction steps so far
    uncounted: int = 0  # of them, since the pairs were chosen


@dataclass(eq=False)
class _Summary:
    """What outlives a trajectory: the record of it."""

    steps: list[tuple[int, StepRecord]] = field(default_factory=list[tuple[int, StepRecord]])
    measured: list[Measurement] = field(default_factory=list[Measurement])
    counts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(eq=False)
class _Trajectory:
    """The calls that belong to one generation, context and branch."""

    name: str
    windows: TokenWindows
    generator: torch.Generator
    summary: _Summary
    sites: dict[str, _SiteState]
    progress: float = float("-inf")
    step: int = -1
    last_matching: int = -1
    matchings: int = 0
    factor: float = 1.0  # of the ratio, until the next Matching step
    unread: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])

    def read_measurements(self) -> None:
        if self.unread:
            pmr, error = (
                fmean(values) for values in torch.stack([torch.stack(pair) for pair in self.unread]).T.tolist()
            )
            self.summary.measured.append(Measurement(pmr=pmr, recovery_error=error))
            self.unread.clear()


Key = tuple[Any, ...]


class _ContextState(BaseState):
    """The trajectories of one cache context, by shape of the call and by its number at its timestep."""

    def __init__(self, root: "_RootHook") -> None:
        self.root = root
        self.trajectories: dict[Key, list[_Trajectory]] = {}
        self.last: dict[Key, tuple[float, int]] = {}

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Forget pairs and outputs; the record of what happened stays with the root."""
        self.root.settle()
        self.trajectories.clear()
        self.last.clear()

    def trajectory(self, key: Key, progress: float, start: Callable[[int], _Trajectory]) -> _Trajectory:
        """The one that a call belongs to, a new one if time went back."""
        before, number = self.last.get(key, (float("-inf"), -1))
        number = number + 1 if progress == before else 0
        number %= _CALLS_PER_TIMESTEP
        found = self.trajectories.get(key, [])
        if number < len(found) and found[number].progress < progress:
            current = found[number]
        else:
            if number == 0:  # a new generation: whatever is left of earlier ones goes, other shapes included
                self.reset()
                found = []
            current = start(number)
            self.trajectories[key] = [*found[:number], current]
        self.last[key] = (progress, number)
        current.progress = progress
        return current


class _RootHook(ModelHook):
    """Counts, decides and publishes. Runs before the model's forward, outside of compiled code."""

    _is_stateful = True

    def __init__(
        self,
        transformer: nn.Module,
        config: TokenReductionConfig,
        hosts: list[HostBlock],
        observer: Observer | None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.config = config
        self.observer = observer
        self.state_manager = StateManager(_ContextState, (self,))  # type: ignore[arg-type]
        self.parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self.sites: list[_SiteHook] = []
        self.helpers: list[tuple[nn.Module, str, ModelHook]] = []
        self.summaries: dict[tuple[str, Key, int], _Summary] = {}
        self.active: _Trajectory | None = None
        self.calls = 0
        self.checked_step = False
        self.handle: Any = None
        self.is_installed = False
        for host in hosts:
            self._plan_host(host)

    def _plan_host(self, host: HostBlock) -> None:
        config = self.config
        attentions = host.attentions()
        helpers = [_AttentionHook(host) for _ in attentions]
        if config.scope == "block":
            self.sites.append(_BlockSite(self, host, host.name, host.module, helpers))
            self.helpers += [(m, ATTENTION_HOOK, h) for (_, m), h in zip(attentions, helpers, strict=True)]
            return
        entry = _EntryHook(host)
        for name, module in attentions:
            self.sites.append(_AttentionSite(self, host, name, module, entry))
        if config.metric == "input" or self.observer is not None:
            self.helpers.append((host.module, ENTRY_HOOK, entry))

    # --- on and off the model

    def install(self) -> None:
        """All hooks; or none, if one of them cannot be."""
        self.check_hosts()
        for site in self.sites:
            _refuse_inner_hooks(site)
        for site in self.sites:
            _register(site.module, SITE_HOOK, site)
        for module, name, hook in self.helpers:
            _register(module, name, hook)
        # The decision is made in a hook of torch's, because offloading puts another forward in place of the model's
        # after every generation; the registry's part is to carry contexts and resets here.
        self.handle = self.transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        _register(self.transformer, ROOT_HOOK, self)
        HookRegistry.check_if_exists_or_initialize(self.transformer).invalidate_child_registries_cache()
        self.is_installed = True

    def uninstall(self) -> None:
        """All hooks, in whatever order others came and went."""
        if not self.is_installed:
            return
        self.settle()
        self.handle.remove()
        for site in self.sites:
            _unregister(site.module, SITE_HOOK)
        for module, name, _ in self.helpers:
            _unregister(module, name)
        _unregister(self.transformer, ROOT_HOOK)
        HookRegistry.check_if_exists_or_initialize(self.transformer).invalidate_child_registries_cache()
        self.state_manager.reset()
        self.is_installed = False

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by pipelines at the end of a generation."""
        self.state_manager.reset()
        self.active = None
        return module

    # --- every call

    @torch.compiler.disable
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            raise ValueError(
                "token reduction is for sampling: a reduced step's gradient would be that of another function. Call the "
                "model under torch.no_grad(), or take token reduction off with remove_token_reduction"
            )
        self.settle()
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        trajectory = self._trajectory(arguments)
        trajectory.read_measurements()
        trajectory.step += 1
        mode = self._decide(trajectory)
        record = StepRecord(context=trajectory.name, step=trajectory.step, mode=mode)
        trajectory.summary.steps.append((self.calls, record))
        self.calls += 1
        self.active = trajectory
        for _, _, hook in self.helpers:
            _heal(hook)
        for site in self.sites:
            _heal(site)
            site.publish(trajectory, mode)

    def _trajectory(self, arguments: dict[str, Any]) -> _Trajectory:
        manager = self.state_manager
        borrowed = manager._context is None  # many pipelines never name their calls
        if borrowed:
            from diffusers.hooks.hooks import CacheContext

            manager.set_context(CacheContext("default"))
        try:
            name = manager.context.name
            state: _ContextState = manager.get_state()  # type: ignore[assignment]
        finally:
            if borrowed:
                manager.set_context(None)
        image = arguments["x"][0] if isinstance(arguments.get("x"), list) else arguments["hidden_states"]
        batch = len(arguments["x"]) if isinstance(arguments.get("x"), list) else image.shape[0]
        key: Key = (batch, tuple(image.shape), image.dtype, str(image.device))

        def start(number: int) -> _Trajectory:
            if number == 0:
                for old in [entry for entry in self.summaries if entry[0] == name]:
                    del self.summaries[old]
            summary = self.summaries[name, key, number] = _Summary()
            return self._start(name, arguments, summary)

        return state.trajectory(key, _progress(arguments), start)

    def _start(self, name: str, arguments: dict[str, Any], summary: _Summary) -> _Trajectory:
        _refuse_covariance(self.transformer)
        self.check_hosts()
        for site in self.sites:
            _heal(site)
            _refuse_inner_hooks(site)
        if arguments.get("kv_cache_mode") is not None:
            raise ValueError("cached keys of reference images are not supported by token reduction")
        config = getattr(self.transformer, "config", {})
        grid = token_grid(arguments, config.get("patch_size") if isinstance(config.get("patch_size"), int) else None)
        return _Trajectory(
            name=name,
            windows=TokenWindows.of_coordinates(grid.coordinates, self.config.window, movable=grid.movable),
            generator=torch.Generator().manual_seed(self.config.seed),
            summary=summary,
            sites={site.name: _SiteState() for site in self.sites},
        )

    def _decide(self, trajectory: _Trajectory) -> Mode:
        config, step = self.config, trajectory.step
        if step < config.warmup_steps - 1 or step >= self._first_end_dense():
            return "dense"
        schedule, measured = config.schedule, trajectory.summary.measured
        if step == config.warmup_steps - 1 or (
            schedule is not None and schedule.is_matching(step, trajectory.last_matching, measured)
        ):
            trajectory.last_matching = step
            trajectory.matchings += 1
            if config.ratio_by_pmr is not None:
                pmr = measured[-1].pmr if measured else None
                trajectory.factor = config.ratio_by_pmr.ratio(pmr, 1.0)
            return "match"
        return "reduce" if trajectory.factor > 0 else "dense"

    def _first_end_dense(self) -> float:
        if not self.config.end_dense_steps:
            return float("inf")
        context = self.state_manager._context
        total = getattr(context, "num_inference_steps", None) or self.config.num_inference_steps
        if total is None:
            raise ValueError(
                "end_dense_steps needs the number of steps, which this pipeline does not say; give "
                "TokenReductionConfig(num_inference_steps=...)"
            )
        return total - self.config.end_dense_steps

    def check_hosts(self) -> None:
        """Raise where the settings need an attention that the sites do not have."""
        if self.config.keep_kv or self.config.proportional_attention:
            for site in self.sites:
                for _, attn in site.host.attentions():
                    site.host.adapter.check_processor(attn)

    @torch.compiler.disable
    def settle(self) -> None:
        """Bring the counts up to date with the sites that ran."""
        for site in self.sites:
            if site.has_reduced:
                site.state.uncounted += 1
                site.has_reduced = False
        if self.active is not None:
            self.active.read_measurements()
            for name, state in self.active.sites.items():
                _settle_counts(state)
                if state.counts is not None:
                    self.active.summary.counts[name] = state.counts

    def site_states(self) -> Iterator[_SiteState]:
        """All that is kept at this moment."""
        for context in self.state_manager._state_cache.values():
            for trajectories in context.trajectories.values():
                for trajectory in trajectories:
                    yield from trajectory.sites.values()


class _SiteHook(ModelHook):
    """A module whose image tokens are reduced."""

    def __init__(self, root: _RootHook, host: HostBlock, name: str, module: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.host = host
        self.name = name
        self.module = module
        self.config = root.config
        self.ratio = root.config.ratio_of(host.name)
        self.parameters = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
        self.mode: Mode = "dense"
        self.state = _SiteState()
        self.has_reduced = False
        self.has_warned = False

    def publish(self, trajectory: _Trajectory, mode: Mode) -> None:
        """What the next call has to do."""
        self.state = trajectory.sites[self.name]
        self.trajectory = trajectory
        stale = self.state.matching != trajectory.matchings and not self.config.rematch
        # A cache may have skipped this site at the Matching step: its pairs are then of an older one.
        self.mode = "match" if mode == "reduce" and stale else mode

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Dense, dense and matched, or reduced."""
        forward = self.fn_ref.original_forward
        if self.mode == "dense":
            return forward(*args, **kwargs)
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        self.host.adapter.refuse(arguments)
        if self.mode == "match":
            output = forward(*args, **kwargs)
            self.match_output(arguments, output)
            return output
        if self.config.rematch:
            self.match_input(arguments)
        if self.state.rows is None:
            return forward(*args, **kwargs)
        self.has_reduced = True
        return self.reduced(forward, arguments)

    def sequence(self, arguments: dict[str, Any]) -> tuple[Tensor, int]:
        """The tensor whose rows are reduced, and its first image row."""
        raise NotImplementedError

    def entry(self, arguments: dict[str, Any]) -> Tensor | None:
        """The image tokens that go into the block, if they are known."""
        raise NotImplementedError

    def copied(self, arguments: dict[str, Any], output: Any) -> Tensor:
        """What a Reduction step copies from token to token, in the whole sequence."""
        raise NotImplementedError

    def reduced(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The module on the rows that are left, and its outputs for all."""
        raise NotImplementedError

    @torch.compiler.disable
    def match_output(self, arguments: dict[str, Any], output: Any) -> None:
        """New pairs from a dense call."""
        copied = self.copied(arguments, output)
        x, start = self.sequence(arguments)
        num_tokens = self._checked_num_tokens(x, start)
        image = copied[:, start : start + num_tokens]
        entry = self.entry(arguments)
        state, config = self.state, self.config
        _settle_counts(state)
        if state.image is not None and self._measures:
            self.trajectory.unread.append((self._pmr(image), recovery_error(state.image, image)))
        if config.rematch:
            state.image = state.rows = None
        else:
            features = entry if config.metric == "input" else image
            assert features is not None
            self._choose(features, x, start, arguments)
            if config.recovery == "delta" and state.rows is not None:
                tokens = state.rows.tokens
                state.offset = take_rows(copied, tokens.dropped) - take_rows(copied, tokens.target)
        state.matching = self.trajectory.matchings
        if self.root.observer is not None and state.image is not None:
            assert entry is not None
            self.root.observer(
                MatchEvent(
                    site=self.name,
                    context=self.trajectory.name,
                    step=self.trajectory.step,
                    inputs=entry,
                    output=image,
                    windows=self.trajectory.windows,
                    correspondence=state.image,
                )
            )

    @torch.compiler.disable
    def match_input(self, arguments: dict[str, Any]) -> None:
        """New pairs before the module runs, from the block's input."""
        x, start = self.sequence(arguments)
        self._checked_num_tokens(x, start)
        _settle_counts(self.state)
        entry = self.entry(arguments)
        assert entry is not None
        self._choose(entry, x, start, arguments)

    @property
    def _measures(self) -> bool:
        schedule = self.config.schedule
        return self.config.ratio_by_pmr is not None or (schedule is not None and schedule.measures)

    def _choose(self, features: Tensor, x: Tensor, start: int, arguments: dict[str, Any]) -> None:
        state, config, trajectory = self.state, self.config, self.trajectory
        windows = trajectory.windows
        text = arguments.get(self.host.adapter.text) if self.host.adapter.text else None
        num_text = x.shape[1] - windows.num_tokens + (text.shape[1] if isinstance(text, Tensor) else 0)
        ratio = self.ratio * trajectory.factor
        k = num_reduced_tokens(windows.num_tokens, windows.num_sources, num_text, ratio, config.round_to)
        if k == 0:
            state.image = state.rows = None
            self._warn_of_nothing(ratio)
            return
        state.generator_state = trajectory.generator.get_state()
        state.image = config.matcher(
            features, windows, k, generator=trajectory.generator, penalty=self._penalty(windows.num_tokens)
        )
        state.rows = Rows.around(state.image, start, x.shape[1])
        tokens = state.rows.tokens
        state.dropped_rows = flat_rows(tokens.dropped, x.shape[1])
        state.target_rows = flat_rows(tokens.target, x.shape[1])

    def _penalty(self, num_tokens: int) -> Tensor | None:
        state = self.state
        if not self.config.frequency_penalty or state.counts is None or not state.reductions:
            return None
        return self.config.frequency_penalty * state.counts / state.reductions

    def _pmr(self, image: Tensor) -> Tensor:
        """Of the old pairs with new ones on the same destinations."""
        state = self.state
        assert state.image is not None and state.generator_state is not None
        again = torch.Generator()
        again.set_state(state.generator_state)
        probe = self.config.matcher(image, self.trajectory.windows, state.image.dropped.shape[1], generator=again)
        return pair_match_ratio(state.image, probe)

    def _checked_num_tokens(self, x: Tensor, start: int) -> int:
        num_tokens = self.trajectory.windows.num_tokens
        if start < 0 or start + num_tokens > x.shape[1]:
            raise ValueError(
                f"{self.name} was given {x.shape[1]} rows, the call's geometry has {num_tokens} image tokens; something "
                "has cut the sequence on its way (sequence parallelism, another reduction), which is not supported"
            )
        return num_tokens

    def _warn_of_nothing(self, ratio: float) -> None:
        if ratio > 0 and not self.has_warned:
            logger.warning(
                "%s: %.3g of %d tokens is no whole group of %d rows, so nothing is reduced; raise the ratio or lower "
                "round_to",
                self.name,
                ratio,
                self.trajectory.windows.num_tokens,
                self.config.round_to,
            )
            self.has_warned = True

    def _given(self, keys: Tensor | None, queries: Tensor, rotation: Any, mask: Any) -> AttentionInputs:
        """The attention's inputs on reduced rows; ``keys`` None for the same rows as the queries."""
        state = self.state
        assert state.rows is not None and state.image is not None
        turned = self.host.adapter.rotation_rows(state.image, rotation)
        bias = None
        if self.config.proportional_attention:
            bias = state.rows.tokens.sizes().to(queries.dtype).log()
        if keys is None and mask is not None:
            mask = mask.gather(1, state.rows.tokens.keep)
        return AttentionInputs(
            queries=queries,
            keys=queries if keys is None else keys,
            query_rotation=turned,
            key_rotation=turned if keys is None else rotation,
            mask=mask,
            key_bias=bias,
        )

    def _needs_own_attention(self, batch: int) -> bool:
        """Whether the host's attention cannot do it: it has one sequence, no bias, and one table for the batch."""
        config, adapter = self.config, self.host.adapter
        shared_table = adapter.rotation is not None and adapter.key_masks is None
        return config.keep_kv or config.proportional_attention or (shared_table and batch > 1)


class _AttentionSite(_SiteHook):
    """Scope "attn": what is copied is the attention's output, before the gate."""

    def __init__(self, root: _RootHook, host: HostBlock, name: str, module: nn.Module, entry: "_EntryHook") -> None:
        super().__init__(root, host, name, module)
        self.entry_hook = entry

    def sequence(self, arguments: dict[str, Any]) -> tuple[Tensor, int]:
        """The normalised states."""
        x = arguments["hidden_states"]
        return x, self.host.adapter.attention_start(x.shape[1], self.trajectory.windows.num_tokens)

    def entry(self, arguments: dict[str, Any]) -> Tensor | None:
        """Of the block, before its norm."""
        x = self.entry_hook.x
        if x is None:
            return None
        num_tokens = self.trajectory.windows.num_tokens
        start = self.host.adapter.block_start(x.shape[1], num_tokens)
        return x[:, start : start + num_tokens]

    def copied(self, arguments: dict[str, Any], output: Any) -> Tensor:
        """Image rows of the output, with what else is in their sequence."""
        return output[0] if isinstance(output, tuple) else output

    def reduced(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Attention on fewer rows."""
        state, config, adapter = self.state, self.config, self.host.adapter
        assert state.rows is not None and state.image is not None
        x = arguments["hidden_states"]
        queries = state.rows.tokens.reduce(x, how=config.reduction)
        rotation = arguments.get(adapter.rotation) if adapter.rotation else None
        mask_name = adapter.key_masks[1] if adapter.key_masks else None
        mask = arguments.get(mask_name) if mask_name else None
        if self._needs_own_attention(x.shape[0]):
            adapter.check_processor(self.module)
            output = adapter.attend(
                self.module, arguments, self._given(x if config.keep_kv else None, queries, rotation, mask)
            )
        else:
            changed = {**arguments, "hidden_states": queries}
            if adapter.rotation:
                changed[adapter.rotation] = adapter.rotation_rows(state.image, rotation)
            if mask_name and mask is not None:
                changed[mask_name] = mask.gather(1, state.rows.tokens.keep)
            output = forward(**changed)
        if not isinstance(output, tuple):
            return self._recovered(output, state.offset)
        return tuple(
            part if index not in adapter.image_outputs else self._recovered(part, None if index else state.offset)
            for index, part in enumerate(output)
        )

    def _recovered(self, y: Tensor, offset: Tensor | None) -> Tensor:
        state = self.state
        assert state.rows is not None and state.dropped_rows is not None
        z = state.rows.tokens.recover(y)
        if offset is not None:
            z.flatten(0, 1).index_add_(0, state.dropped_rows, offset.flatten(0, 1))
        return z


class _BlockSite(_SiteHook):
    """Scope "block": what is copied is the block's increment, out = h + recover(block(reduce(h)) - reduce(h))."""

    def __init__(
        self, root: _RootHook, host: HostBlock, name: str, module: nn.Module, attentions: list["_AttentionHook"]
    ) -> None:
        super().__init__(root, host, name, module)
        self.attentions = attentions
        self.image_argument = host.image_argument
        self.image_output = host.image_output

    def sequence(self, arguments: dict[str, Any]) -> tuple[Tensor, int]:
        """The residual stream."""
        x = arguments[self.image_argument]
        return x, self.host.adapter.block_start(x.shape[1], self.trajectory.windows.num_tokens)

    def entry(self, arguments: dict[str, Any]) -> Tensor | None:
        """Its image rows."""
        x, start = self.sequence(arguments)
        return x[:, start : start + self.trajectory.windows.num_tokens]

    def copied(self, arguments: dict[str, Any], output: Any) -> Tensor:
        """The increment."""
        return self._image(output) - arguments[self.image_argument]

    def _image(self, output: Any) -> Tensor:
        return output if self.image_output is None else output[self.image_output]

    def reduced(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The block on fewer rows."""
        state, config, adapter = self.state, self.config, self.host.adapter
        assert state.rows is not None and state.image is not None
        tokens = state.rows.tokens
        x = arguments[self.image_argument]
        x_reduced = tokens.reduce(x, how=config.reduction)
        changed = {**arguments, self.image_argument: x_reduced}
        for name in adapter.per_token:
            if arguments.get(name) is not None:
                changed[name] = arguments[name].gather(1, tokens.keep)
        rotation = arguments.get(adapter.rotation) if adapter.rotation else None
        if self._needs_own_attention(x.shape[0]):
            keys = adapter.attention_inputs(self.module, arguments) if config.keep_kv else [None] * len(self.attentions)
            mask = arguments.get(adapter.key_masks[0]) if adapter.key_masks else None
            for hook, states in zip(self.attentions, keys, strict=True):
                hook.given = functools.partial(self._attention_given, states, rotation, mask)
        elif adapter.rotation:
            changed[adapter.rotation] = adapter.rotation_rows(state.image, rotation)
        try:
            output = forward(**changed)
        finally:
            for hook in self.attentions:
                hook.given = None
        z = self._recovered(x, x_reduced, self._image(output))
        if self.image_output is None:
            return z
        return tuple(z if index == self.image_output else part for index, part in enumerate(output))

    def _attention_given(self, keys: Tensor | None, rotation: Any, mask: Any, queries: Tensor) -> AttentionInputs:
        """The attention's rows are the block's, with the text before them in single-stream blocks."""
        state = self.state
        assert state.rows is not None
        given = self._given(keys, queries, rotation, mask)
        missing = queries.shape[1] - state.rows.tokens.num_kept
        if given.key_bias is not None and missing:
            given = replace(given, key_bias=nn.functional.pad(given.key_bias, (missing, 0)))
        return given

    def _recovered(self, x: Tensor, x_reduced: Tensor, output: Tensor) -> Tensor:
        state = self.state
        assert state.rows is not None and state.dropped_rows is not None and state.target_rows is not None
        tokens = state.rows.tokens
        if self.config.reduction != "prune":  # a merged row is no row of x, so every row takes its own increment
            z = x + tokens.recover(output - x_reduced)
            if state.offset is not None:
                z.flatten(0, 1).index_add_(0, state.dropped_rows, state.offset.flatten(0, 1))
            return z
        # Kept rows are the block's own, to the last bit; dropped ones are h_i + (out_m(i) - h_m(i)) + offset.
        z = tokens.recover(output)
        flat = x.flatten(0, 1)
        own = flat.index_select(0, state.dropped_rows) - flat.index_select(0, state.target_rows)
        if state.offset is not None:
            own += state.offset.flatten(0, 1)
        z.flatten(0, 1).index_add_(0, state.dropped_rows, own)
        return z


class _AttentionHook(ModelHook):
    """Scope "block": lets the block's attention see other keys and positions than its queries'."""

    def __init__(self, host: HostBlock) -> None:
        super().__init__()
        self.host = host
        self.given: Callable[[Tensor], AttentionInputs] | None = None

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """As the module, unless the block has said otherwise."""
        if self.given is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        arguments = {**({"hidden_states": args[0]} if args else {}), **kwargs}
        self.host.adapter.check_processor(module)
        return self.host.adapter.attend(module, arguments, self.given(arguments["hidden_states"]))


class _EntryHook(ModelHook):
    """Scope "attn": remembers what went into the block, for matching by input."""

    def __init__(self, host: HostBlock) -> None:
        super().__init__()
        self.host = host
        self.parameters = list(inspect.signature(type(host.module).forward).parameters)[1:]
        self.x: Tensor | None = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Keep the image stream until the block is done."""
        self.x = {**dict(zip(self.parameters, args, strict=False)), **kwargs}[self.host.image_argument]
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Let it go."""
        self.x = None
        return output


def _settle_counts(state: _SiteState) -> None:
    """Count the Reduction steps since the pairs were chosen, before other pairs take their place."""
    if state.uncounted and state.image is not None:
        if state.counts is None:
            state.counts = torch.zeros_like(state.image.recover_from)
        ones = torch.full_like(state.image.dropped, state.uncounted)
        state.counts.scatter_add_(1, state.image.dropped, ones)
    state.reductions += state.uncounted
    state.uncounted = 0


def _progress(arguments: dict[str, Any]) -> float:
    """Where the call stands in its generation: grows from noise to data.

    Reading it waits for the device once a step; Z-Image's time runs the other way.
    """
    for name, sign in (("timestep", -1.0), ("t", 1.0)):
        time = arguments.get(name)
        if time is not None:
            return sign * float(time.flatten()[0] if isinstance(time, Tensor) else time)
    raise ValueError("the call has neither timestep nor t, so that steps of a generation cannot be told apart")


# --- the registry, and its removal of hooks


def _register(module: nn.Module, name: str, hook: Any) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, name)
    hook.wrapper = module.forward
    if hasattr(hook, "new_forward"):
        hook.runner = hook.fn_ref.forward  # what the registry calls in place of the module's forward


def _heal(hook: Any) -> None:
    """Undo what diffusers' removal of an inner hook does to an outer one: it overwrites the outer's forward."""
    ref = hook.fn_ref
    if hasattr(hook, "runner") and ref.forward is not hook.runner:
        ref.original_forward, ref.forward = ref.forward, hook.runner


def _unregister(module: nn.Module, name: str) -> None:
    """As the registry's ``remove_hook``, but right when a hook outside of ours replaces the forward too, and when
    offloading has wrapped the module since."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    if registry is None or name not in registry.hooks:
        return
    hook = registry.hooks[name]
    _heal(hook)
    index = registry._hook_order.index(name)
    ref = registry._fn_refs[index]
    inner = ref.forward if ref.original_forward is None else ref.original_forward
    if index + 1 < len(registry._hook_order):
        outer = registry._fn_refs[index + 1]
        if outer.original_forward is None:
            outer.forward = inner
        else:
            outer.original_forward = inner
    elif "_old_forward" in vars(module) and vars(module)["_old_forward"] is getattr(hook, "wrapper", None):
        module._old_forward = inner
    elif getattr(inner, "__func__", None) is type(module).forward and vars(module).get("_old_forward") is None:
        vars(module).pop("forward", None)
    else:
        module.forward = inner
    del registry.hooks[name]
    registry._hook_order.pop(index)
    registry._fn_refs.pop(index)


def _refuse_inner_hooks(site: _SiteHook) -> None:
    """Ours must be the innermost of those that replace a forward: others then see sequences of full length."""
    registry: Any = getattr(site.module, "_diffusers_hook", None)
    order = [] if registry is None else list(registry._hook_order)
    before = order[: order.index(SITE_HOOK)] if SITE_HOOK in order else order
    inner = [name for name in before if hasattr(registry.hooks[name], "new_forward")]
    if isinstance(site, _BlockSite):
        for module in site.module.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if module is not site.module and registry is not None:
                hooks = [name for name in registry._hook_order if name != ATTENTION_HOOK]
                inner += [name for name in hooks if hasattr(registry.hooks[name], "new_forward")]
    if inner:
        raise ValueError(
            f"{site.name} has the hook {', '.join(inner)} inside of token reduction, which would meet shortened "
            "sequences: disable the cache, apply token reduction first, and enable the cache then"
            + (
                '; a cache of attention outputs inside a block needs scope="attn"'
                if isinstance(site, _BlockSite)
                else ""
            )
        )


def _refuse_occupied(transformer: nn.Module) -> None:
    if _installed_root(transformer) is not None:
        raise ValueError("this model has token reduction already; call remove_token_reduction(model) first")
    _refuse_covariance(transformer)
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(
            "sequence parallelism hands each device a part of the tokens; token reduction does not support it"
        )


def _refuse_covariance(transformer: nn.Module) -> None:
    forwards = (vars(transformer).get("forward"), vars(transformer).get("_old_forward"))
    if any(getattr(forward, "keeps_graph", False) for forward in forwards):
        raise ValueError(
            "full_covariance differentiates this model, and token reduction has no derivative that it could use; leave "
            "the full_covariance block first"
        )


def _installed_root(transformer: nn.Module) -> _RootHook | None:
    registry = getattr(transformer, "_diffusers_hook", None)
    return None if registry is None else registry.hooks.get(ROOT_HOOK)


def _transformer_of(model: Any) -> nn.Module:
    model = getattr(model, "transformer", model) if not isinstance(model, nn.Module) else model
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(model).__name__} is neither a transformer nor a pipeline with one; token reduction takes a pipeline "
            "such as FluxPipeline, or its transformer"
        )
    return model


def _listed(blocks: list[HostBlock]) -> str:
    return f"{blocks[0].name} to {blocks[-1].name}"
