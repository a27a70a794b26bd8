"""Stage 2: one prefix, then all branches and their anchor in one batch (method.md section 2).

All rows read one shared cache.

Everything but the plans is shared bit for bit: prefix, start noise, re-noise, prompts, tail noise.
The anchor is the row whose plan is empty; it goes through the same code in the same batch.

Stage 2, its beginning: the past that a group's branches share; of several groups side by side.

Prefixes of one step differ in length, because forks do. Rows of the batch stand in the order of
their forks, the latest first: who has reached its fork is always the last row, leaves, and no page
is copied for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvpo.common.rng import stream
from kvpo.common.timing import Phases
from kvpo.generators.history import Routed
from kvpo.generators.pipeline import Geometry, Pipeline
from kvpo.generators.sampler import (
    NamedNoise,
    Noise,
    Ode,
    OwnSteps,
    Sampler,
    StackedNoise,
    Stream,
)
from kvpo.generators.streaming import StreamingDecoder
from kvpo.method.explorers import Explorer, forks_of, mix_noise
from kvpo.method.objectives.interface import EVERYTHING, Record
from kvpo.method.settings import RolloutConfig
from kvpo.types import BranchPlan, Rollout, Script, Trajectory, Window


@dataclass(frozen=True)
class Start:
    """Common beginning of all rows of a group."""

    window: Window
    noise: NamedNoise
    past: Stream
    """Stream of the prefix, stopped at the fork; it has one row."""
    held: Mapping[int, torch.Tensor]
    """Blocks of the past that the velocity penalty holds -> z_SFCHW, their network inputs."""
    decoder: Callable[[int | None], StreamingDecoder]
    """Gives the decoder as the past has left it, see `PrefixDecoders.take`."""

    @property
    def script(self) -> Script:
        return self.past.scripts[0]


def start_groups(
    pipeline: Pipeline,
    sampler: Sampler,
    scripts: Sequence[Script],
    windows: Sequence[Window],
    embeddings: Mapping[str, torch.Tensor],
    noises: Sequence[NamedNoise],
    cache_frames: int,
    held: Sequence[Sequence[int]],
) -> list[Start]:
    """Generate the prefix of every script, with the weights now in the pipeline.

    Groups of one script and noise have one prefix up to the first of their forks: it is generated
    once, and those that fork early take a copy of its cache. ``held``: blocks of each prefix whose
    network inputs are kept.
    """
    stories = _by_story(scripts, windows, noises)
    last, copies = [story[-1] for story in stories], {}

    def visit(batch: Stream, block: int) -> None:
        for row in range(batch.rows):
            for i in stories[row][:-1]:
                if windows[i].fork == block:
                    copies[i] = batch.copied(row)
                    copies[i].switch()

    pasts, inputs = generate_prefixes(
        pipeline,
        sampler,
        [scripts[i] for i in last],
        embeddings,
        [noises[i] for i in last],
        [windows[i].fork for i in last],
        cache_frames,
        [sorted({block for i in story for block in held[i]}) for story in stories],
        visit,
    )
    past = dict(zip(last, pasts)) | copies
    kept = {i: inputs[row] for row, story in enumerate(stories) for i in story}
    order = sorted(past, key=lambda i: -windows[i].fork)
    decoders = PrefixDecoders(pipeline, [latents(past[i]) for i in order])
    return [
        Start(
            windows[i],
            noises[i],
            past[i],
            {block: kept[i][block] for block in held[i]},
            functools.partial(decoders.take, order.index(i)),
        )
        for i in range(len(scripts))
    ]


def _by_story(
    scripts: Sequence[Script], windows: Sequence[Window], noises: Sequence[NamedNoise]
) -> list[list[int]]:
    """Groups that share a prefix, the earliest fork first; the story of the latest fork first."""
    found: dict[tuple[Script, NamedNoise], list[int]] = {}
    for i in sorted(range(len(scripts)), key=lambda i: windows[i].fork):
        found.setdefault((scripts[i], noises[i]), []).append(i)
    return sorted(found.values(), key=lambda story: -windows[story[-1]].fork)


def generate_prefixes(
    pipeline: Pipeline,
    sampler: Sampler,
    scripts: Sequence[Script],
    embeddings: Mapping[str, torch.Tensor],
    noises: Sequence[NamedNoise],
    forks: Sequence[int],
    cache_frames: int,
    held: Sequence[Sequence[int]],
    visit: Callable[[Stream, int], None] = lambda batch, block: None,
) -> tuple[list[Stream], list[dict[int, torch.Tensor]]]:
    """Generate each script's stream of one row up to its fork; ``forks`` must fall.

    Returns the streams, and the inputs z_SFCHW of each one's ``held`` blocks. A prompt switch at
    the fork itself is part of the stream. ``visit`` is shown the streams that are left, and the
    number of the block that comes next.
    """
    n = len(scripts)
    batch = Stream(
        pipeline.generator,
        pipeline.geometry,
        sampler,
        scripts,
        embeddings,
        StackedNoise(tuple(noises)),
        pipeline.new_cache(cache_frames, rows=n),
    )
    pasts: list[Stream] = []
    kept: list[dict[int, list[torch.Tensor]]] = [{block: [] for block in blocks} for blocks in held]
    for block in range(forks[0] + 1):
        visit(batch, block)
        while n and forks[n - 1] == block:
            n -= 1
            pasts.insert(0, batch.part(n, 1))
            pasts[0].switch()
            batch = batch.part(0, n)
        if n:
            batch.advance(
                observe=lambda i, x, v: _keep_inputs(kept[:n], block, x)  # noqa: B023, called at once
            )
    return pasts, [
        {block: torch.stack(inputs) for block, inputs in blocks.items()} for blocks in kept
    ]


def _keep_inputs(
    kept: Sequence[dict[int, list[torch.Tensor]]], block: int, x_BFCHW: torch.Tensor
) -> None:
    """Keep a step's network inputs in those rows that hold the block."""
    for inputs, x in zip(kept, x_BFCHW):
        if block in inputs:
            inputs[block].append(x)


def latents(past: Stream) -> torch.Tensor:
    """x0_NCHW of a stream of one row; N is 0 before its first block."""
    if not past.blocks:
        g = past.geometry
        channels = past.model.transformer.config.in_channels
        shape = (0, channels, g.latent_height, g.latent_width)
        return torch.zeros(shape, device=past.model.device)
    return torch.cat(past.blocks, dim=1)[0]


class PrefixDecoders:
    """Decoders that have seen their prefix, each handed out once.

    The prefixes are decoded when the first is asked for, side by side: a row alone takes a CPU as
    long as two.
    """

    def __init__(self, pipeline: Pipeline, prefixes: Sequence[torch.Tensor]):
        """``prefixes``: x0_NCHW each, none longer than the one before it."""
        self.pipeline, self.prefixes = pipeline, prefixes
        self._ready: dict[int, StreamingDecoder] | None = None

    def take(self, row: int, lead: int | None = None) -> StreamingDecoder:
        """The decoder behind one prefix.

        ``lead``: latent frames of the prefix that it decodes, the last ones (default: its receptive
        field, which leaves out nothing that matters). The first call decides for all prefixes.
        """
        if self._ready is None:
            self._ready = self._decoded(range(len(self.prefixes)), lead)
        return self._ready.pop(row, None) or self._decoded([row], lead)[row]

    def _decoded(self, rows: Sequence[int], lead: int | None) -> dict[int, StreamingDecoder]:
        network = self.pipeline.scoring
        lead = network.field if lead is None else lead
        ends = [self.prefixes[row][-lead:] for row in rows]
        skipped = [len(self.prefixes[row]) - len(end) for row, end in zip(rows, ends)]
        decoder, done, ready = StreamingDecoder(network, skipped), 0, {}
        for n in range(len(rows), 0, -1):
            length = len(ends[n - 1])
            if length > done:
                decoder(torch.stack([end[done:length] for end in ends[:n]]))
            ready[rows[n - 1]], done = decoder.part(n - 1, 1), length
            decoder = decoder.part(0, n - 1)
        return ready


Name = tuple[int | str, ...]
"""Name of a group's random streams, e.g. ("train", step, index)."""
Held = Callable[[int], Sequence[int]]
"""Fork -> blocks of the prefix whose network inputs are kept."""


@dataclass(frozen=True)
class PlannedNoise:
    """Noise of each row as its plan says, inside the window; all else as in ``shared``."""

    shared: NamedNoise
    plans: tuple[BranchPlan, ...]
    window: Window
    first: int = 0
    """Number of the first plan's branch in its group, which names its noise."""

    def start(self, block: int) -> torch.Tensor:
        noise = self.shared.start(block)
        if block not in self.window or not any(plan.noise_mix for plan in self.plans):
            return noise
        return torch.stack(
            [
                mix_noise(noise, self._fresh(row, block), plan.noise_mix)
                for row, plan in enumerate(self.plans, self.first)
            ]
        )

    def renoise(self, block: int, step: int) -> torch.Tensor:
        noise = self.shared.renoise(block, step)
        own = [plan.draws(step) for plan in self.plans]
        if block not in self.window or not any(own):
            return noise
        return torch.stack(
            [
                self._of_branch(row).renoise(block, step) if fresh else noise
                for row, fresh in enumerate(own, self.first)
            ]
        )

    def _fresh(self, row: int, block: int) -> torch.Tensor:
        return self._of_branch(row).start(block)

    def _of_branch(self, row: int) -> NamedNoise:
        return NamedNoise(self.shared.shape, self.shared.seed, (*self.shared.name, "branch", row))


def roll_out(
    pipeline: Pipeline,
    sampler: Sampler,
    explorer: Explorer,
    config: RolloutConfig,
    script: Script,
    embeddings: Mapping[str, torch.Tensor],
    seed: int,
    name: Name,
    phases: Phases,
    fork: int | None = None,
    horizon: Callable[[Window], int] | None = None,
    held: Held = lambda fork: (),
    own: range | None = None,
    needs: Collection[Record] = EVERYTHING,
) -> Rollout:
    """Roll out a group under ``script`` with the weights now in the pipeline.

    ``name`` names its random streams.

    ``fork``: fork block (default: drawn among the eligible ones). ``horizon``: the block to stop
    before, but never within the window (default: the whole script). ``held``: fork -> blocks of the
    prefix whose network inputs are kept. ``own``: those of the G branches that are generated here
    (default: all), beside the anchor. ``needs``: what is recorded of the window.
    """
    with phases("prefix"):
        (start,) = starts(
            pipeline, sampler, explorer, config, [script], embeddings, seed, [name], [held], [fork]
        )
    return go_on(pipeline, explorer, config, start, seed, name, phases, horizon, own, needs)


def starts(
    pipeline: Pipeline,
    sampler: Sampler,
    explorer: Explorer,
    config: RolloutConfig,
    scripts: Sequence[Script],
    embeddings: Mapping[str, torch.Tensor],
    seed: int,
    names: Sequence[Name],
    held: Sequence[Held],
    forks: Sequence[int | None] | None = None,
    stories: Sequence[Name] | None = None,
) -> list[Start]:
    """The pasts of some groups, one a script and name, generated side by side.

    ``forks``: fork blocks (default, and None in it: drawn). ``stories``: names of the prefixes'
    noise (default: the groups' own); groups of one script and story share their prefix.
    """
    geometry, forks = pipeline.geometry, forks or [None] * len(names)
    for script in scripts:
        check_room(explorer, config, script.blocks, geometry)
    windows = [
        _window(explorer, script, geometry, seed, name, fork)
        for script, name, fork in zip(scripts, names, forks)
    ]
    noises = [
        NamedNoise(pipeline.latent_shape(geometry.block), seed, (*name, "noise"))
        for name in stories or names
    ]
    return start_groups(
        pipeline,
        sampler,
        scripts,
        windows,
        embeddings,
        noises,
        config.cache_frames,
        [h(w.fork) for h, w in zip(held, windows)],
    )


def go_on(
    pipeline: Pipeline,
    explorer: Explorer,
    config: RolloutConfig,
    start: Start,
    seed: int,
    name: Name,
    phases: Phases,
    horizon: Callable[[Window], int] | None = None,
    own: range | None = None,
    needs: Collection[Record] = EVERYTHING,
) -> Rollout:
    """A group from its past on; arguments as in `roll_out`."""
    geometry = pipeline.geometry
    script = start.script
    window = start.window
    prefix = start.past
    noise = start.noise
    plans = explorer.plan(
        window, geometry, config.branches, stream(seed, *name, "plan"), prefix.cache.resident
    )
    own = range(config.branches) if own is None else own
    plans = (*plans[own.start : own.stop], BranchPlan())
    stop = script.blocks if horizon is None else max(horizon(window), window.stop)
    size = config.together or len(plans)
    with phases("branches"):
        parts = [
            _branches(
                pipeline,
                prefix,
                plans[i : i + size],
                PlannedNoise(noise, plans[i : i + size], window, own.start + i),
                window,
                stop,
                needs,
            )
            for i in range(0, len(plans), size)
        ]
    inputs, velocities, latents_of_parts = zip(*parts)
    after = torch.cat(latents_of_parts)
    clean = after[:, : window.blocks * geometry.block].unflatten(1, (window.blocks, geometry.block))
    return Rollout(
        script,
        window,
        plans,
        Trajectory(_joined(inputs), _joined(velocities), clean),
        latents(prefix),
        after,
        prefix.cache,
        start.held,
        start.decoder,
    )


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Join the records of a group's parts; None where nothing was asked for."""
    return None if parts[0] is None else torch.cat(parts)


def _branches(
    pipeline: Pipeline,
    prefix: Stream,
    plans: tuple[BranchPlan, ...],
    noise: Noise,
    window: Window,
    stop: int,
    needs: Collection[Record],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Generate some rows of a group from the fork to block ``stop``.

    Returns the window's inputs and velocities [B, P, S, F, C, H, W], None where they are not
    needed, and all latents [B, N, C, H, W].
    """
    geometry = pipeline.geometry
    seen: dict[Record, list[torch.Tensor]] = {"inputs": [], "velocities": []}
    branches = branch_out(pipeline, prefix, plans, noise, window)
    history = Routed(geometry.history, plans, window, geometry.block)

    def record(step: int, x: torch.Tensor, v: torch.Tensor) -> None:
        if "inputs" in needs:
            seen["inputs"].append(x)
        if "velocities" in needs:
            seen["velocities"].append(v)

    assert branches.sampler is not None, "branches are generated, not only committed to"
    deployed, own = branches.sampler, own_steps(branches.sampler, plans, geometry)
    plain = branches.scripts, branches.embeddings
    told = told_otherwise(branches, plans, window)
    for block in range(window.fork, stop):
        branches.sampler = own if block in window else deployed
        branches.scripts, branches.embeddings = told if block in window else plain
        branches.advance(*((history, record) if block in window else ()))
    shape = (window.blocks, len(geometry.sigmas))
    inputs, velocities = (
        torch.stack(x, dim=1).unflatten(1, shape) if x else None for x in seen.values()
    )
    return inputs, velocities, torch.cat(branches.blocks[window.fork :], dim=1)


def told_otherwise(
    branches: Stream, plans: tuple[BranchPlan, ...], window: Window
) -> tuple[Sequence[Script], Mapping[str, torch.Tensor]]:
    """Scripts and embeddings of a window's rows, of which some plans move the fork's prompt.

    One script for all rows where none does.
    """
    if not any(plan.prompt_shift for plan in plans):
        return branches.scripts, branches.embeddings
    script, embeddings = branches.scripts[0], dict(branches.embeddings)
    here = script.segment(window.fork)
    new, old = (embeddings[script.texts[i]] for i in (here, here - 1))
    scripts = []
    for plan in plans:
        text = script.texts[here]
        if w := plan.prompt_shift:
            text = f"{text} + {w} of its distance from the prompt before"
            embeddings[text] = new + w * (new - old)
        texts = (*script.texts[:here], text, *script.texts[here + 1 :])
        scripts.append(replace(script, texts=texts))
    return scripts, embeddings


def own_steps(deployed: Sampler, plans: tuple[BranchPlan, ...], geometry: Geometry) -> Sampler:
    """The sampler of a window's blocks: the deployed one, stochastic in rows whose plans say so.

    ValueError where the deployed one draws noise itself.
    """
    if not any(plan.step_noise for plan in plans):
        return deployed
    if not isinstance(deployed, Ode):
        raise ValueError(
            f"these branches take the ode sampler's steps with noise, but the sampler is {type(deployed).__name__.lower()}; use sampler ode, or another explorer"
        )
    return OwnSteps(tuple(geometry.sigmas), tuple(plan.step_noise for plan in plans))


def check_room(explorer: Explorer, config: RolloutConfig, blocks: int, geometry: Geometry) -> None:
    """Check, before anything is generated, that settings and generator fit.

    Raises ValueError if no block can be a fork, or the cache is too small.
    """
    eligible = explorer.eligible_forks(blocks, geometry)
    if config.forks > len(eligible):
        raise ValueError(
            f"rollout.forks = {config.forks}, but a video of {blocks} blocks can be forked at {len(eligible)}: {eligible}; lower it, or lengthen the videos"
        )
    if config.cache_frames < (least := geometry.resident(blocks)):
        raise ValueError(
            f"rollout.cache_frames = {config.cache_frames}, but this generator (sink {geometry.sink}, window {geometry.window}) streams {blocks} blocks "
            f"from a cache of at least {least} latent frames; set {least} or more, routing draws from what is beyond the window"
        )


def spread_forks(eligible: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    """Fork blocks of ``count`` groups on one prefix, evenly spread: early, middle, late.

    One random number places all of them, ascending; each eligible block is as likely as any other.
    """
    step = len(eligible) / count
    first = step * float(torch.rand((), generator=generator, dtype=torch.float64))
    return [eligible[min(int(first + i * step), len(eligible) - 1)] for i in range(count)]


def _window(
    explorer: Explorer, script: Script, geometry, seed: int, name: tuple, fork: int | None
) -> Window:
    check_fork(explorer, script, geometry, fork)
    if fork is None:
        fork = draw_fork(forks_of(explorer, script, geometry), seed, name)
    return Window(fork, explorer.window_blocks)


def draw_fork(eligible: Sequence[int], seed: int, name: Name) -> int:
    """The fork block of the group ``name``: each eligible one is as likely as any other."""
    generator = stream(seed, *name, "fork")
    return eligible[int(torch.randint(len(eligible), (), generator=generator))]


def check_fork(explorer: Explorer, script: Script, geometry: Geometry, fork: int | None) -> None:
    """Check that a story can be forked at all, and at ``fork`` where one is asked for.

    Raises ValueError where not; the generator need not be loaded for it.
    """
    eligible = forks_of(explorer, script, geometry)
    if fork is not None and fork not in eligible:
        raise ValueError(
            f"block {fork} can not be a fork of script {script.id!r}; eligible are {eligible}"
        )


def branch_out(
    pipeline: Pipeline, prefix: Stream, plans: tuple[BranchPlan, ...], noise: Noise, window: Window
) -> Stream:
    """All rows, continuing from the prefix."""
    cache = prefix.cache.fork(len(plans), own_frames(prefix.geometry, prefix.scripts[0], window))
    branches = Stream(
        pipeline.generator,
        prefix.geometry,
        prefix.sampler,
        prefix.scripts,
        prefix.embeddings,
        noise,
        cache,
        prefix.blocks,
    )
    branches.reencoded = len(prefix.blocks)
    return branches


def own_frames(geometry: Geometry, script: Script, window: Window) -> int:
    """Frames that each row keeps of its own: what a block can read, and the block itself.

    A switch inside the window re-encodes frames that branches may have been routed to; those stay
    to the window's end.
    """
    if geometry.window < 0:
        return script.blocks * geometry.block
    switch = next(
        (
            b
            for b in range(window.fork + 1, window.stop)
            if script.segment(b) != script.segment(b - 1)
        ),
        window.stop - 1,
    )
    return geometry.window + geometry.block * (window.stop - switch)
