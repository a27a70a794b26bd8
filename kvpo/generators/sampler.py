"""The sampler: one block through the denoise steps, and a stream of blocks.

Every stage generates through this file.

    x_0 = start noise      x0 = x_i - sigma_i v(x_i)      x_{i+1} = sampler.next(...)      clean latents = the last x0

With the noise of every step given, both samplers are deterministic maps: that is what "ODE-native"
rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvpo.common.rng import normal
from kvpo.generators.cache import FrameCache
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.flow import add_noise, denoised
from kvpo.generators.gaussian_steps import sde_step
from kvpo.generators.geometry import Geometry
from kvpo.generators.history import History
from kvpo.types import Script

Observer = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called at every denoise step with (step, network input, velocity), [B, F, C, H, W] each."""


class Sampler(Protocol):
    """Interface of a sampler, the rule from one denoise step to the next one's input."""

    def next(
        self,
        x: torch.Tensor,
        v: torch.Tensor,
        x0: torch.Tensor,
        sigma: float,
        sigma_next: float,
        noise: Callable[[], torch.Tensor],
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Renoise:
    """Sampler that mixes fresh noise into the predicted clean latents.

    The released few-step models were distilled for it.
    """

    def next(self, x, v, x0, sigma, sigma_next, noise):
        return add_noise(x0, noise(), sigma_next)


@dataclass(frozen=True)
class Ode:
    """An Euler step along the velocity; needs no noise after the start."""

    def next(self, x, v, x0, sigma, sigma_next, noise):
        return x + (sigma_next - sigma) * v


@dataclass(frozen=True)
class OwnSteps:
    """The `ode` sampler whose steps are stochastic in some rows of a batch.

    Rows without noise take Euler's step, bit for bit.
    """

    sigmas: tuple[float, ...]
    """Noise levels of the denoise steps."""
    stds_BS: tuple[tuple[float, ...], ...]
    """Standard deviation of the noise of every row's steps; () = all steps are Euler's."""

    def next(self, x, v, x0, sigma, sigma_next, noise):
        plain = Ode().next(x, v, x0, sigma, sigma_next, noise)
        step = self.sigmas.index(sigma)
        stds = [row[step] if row else 0.0 for row in self.stds_BS]
        if not any(stds):
            return plain
        eps = noise()
        rows = [
            sde_step(sigma, sigma_next, std).of(x[i], v[i], eps[i]) if std else plain[i]
            for i, std in enumerate(stds)
        ]
        return torch.stack(rows)


SAMPLERS: Mapping[str, Sampler] = {"renoise": Renoise(), "ode": Ode()}


class Noise(Protocol):
    """The noise of a stream, block by block; [F, C, H, W] for all rows alike or [B, F, C, H, W]."""

    def start(self, block: int) -> torch.Tensor: ...

    def renoise(self, block: int, step: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class NamedNoise:
    """Noise from the named streams of one video.

    It is the same whatever else is drawn, and on every device.
    """

    shape: tuple[int, int, int, int]
    """F, C, H, W of a block."""
    seed: int
    name: tuple[int | str, ...]

    def start(self, block: int) -> torch.Tensor:
        return normal(self.shape, self.seed, *self.name, "start", block)

    def renoise(self, block: int, step: int) -> torch.Tensor:
        return normal(self.shape, self.seed, *self.name, "renoise", block, step)


@dataclass(frozen=True)
class StackedNoise:
    """One noise per row, for videos of different names in one batch."""

    rows: tuple[Noise, ...]

    def part(self, first: int, count: int) -> StackedNoise:
        return StackedNoise(self.rows[first : first + count])

    def start(self, block: int) -> torch.Tensor:
        return torch.stack([row.start(block) for row in self.rows])

    def renoise(self, block: int, step: int) -> torch.Tensor:
        return torch.stack([row.renoise(block, step) for row in self.rows])


def denoise_block(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    sampler: Sampler,
    sigmas: Sequence[float],
    start: torch.Tensor,
    renoise: Callable[[int], torch.Tensor],
    observe: Observer | None = None,
) -> torch.Tensor:
    """Denoise a block from its start noise; returns its clean latents.

    ``velocity(x, sigma)``; ``renoise(i)`` is the noise mixed in after step i.
    """
    x = start
    for i, sigma in enumerate(sigmas):
        v = velocity(x, sigma)
        x0 = denoised(x, v, sigma)
        if observe is not None:
            observe(i, x, v)
        if i + 1 < len(sigmas):
            x = sampler.next(x, v, x0, sigma, sigmas[i + 1], lambda: renoise(i))  # noqa: B023, called before i moves on
    return x0


class Stream:
    """Videos being generated block by block, one cache row each.

    A prompt switch re-encodes the window's past frames under the new prompt before the next block,
    in the rows that switch; the sink keeps the first prompt's keys (method.md section 1).
    """

    def __init__(
        self,
        model: CausalWan,
        geometry: Geometry,
        sampler: Sampler | None,
        scripts: Sequence[Script],
        embeddings: Mapping[str, torch.Tensor],
        noise: Noise | None,
        cache: FrameCache,
        past: Sequence[torch.Tensor] = (),
    ):
        """Begin a stream after the clean blocks ``past`` [B or 1, F, C, H, W].

        ``scripts``: one for all rows, or one per row. ``embeddings``: prompt -> [L, D].
        ``sampler`` and ``noise``: None where clean blocks are only committed, as in a replay.
        """
        self.model = model
        self.geometry = geometry
        self.sampler = sampler
        self.scripts = scripts
        self.embeddings = embeddings
        self.noise, self.cache, self.blocks = noise, cache, list(past)
        self.reencoded = -1

    @property
    def rows(self) -> int:
        return self.cache.rows

    def part(self, first: int, count: int) -> Stream:
        """Give ``count`` rows of a batch of videos (a script and a noise each) as their own stream.

        It goes on in this one's memory: these rows must not go on here.
        """
        assert isinstance(self.noise, StackedNoise), "a batch of videos has a noise each"
        blocks = [b[first : first + count] for b in self.blocks]
        part = Stream(
            self.model,
            self.geometry,
            self.sampler,
            self.scripts[first : first + count],
            self.embeddings,
            self.noise.part(first, count),
            self.cache.part(first, count),
            blocks,
        )
        part.reencoded = self.reencoded
        return part

    def copied(self, row: int) -> Stream:
        """Give one row of a batch of videos as its own stream, while this one goes on as well."""
        copied = self.part(row, 1)
        copied.cache = copied.cache.copied()
        return copied

    def text(self, block: int, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Embeddings of the prompts that hold at ``block``.

        [1, L, D] if one script serves all rows, else [B, L, D].
        """
        scripts = (
            self.scripts
            if len(self.scripts) == 1 or rows is None
            else [self.scripts[r] for r in rows]
        )
        return torch.stack([self.embeddings[s.text(block)] for s in scripts])

    @torch.no_grad()
    def advance(
        self, history: History | None = None, observe: Observer | None = None
    ) -> torch.Tensor:
        """Generate and commit the next block; returns its clean latents [B, F, C, H, W].

        ``history``: default the deployed window.
        """
        noise = self.noise
        assert self.sampler is not None and noise is not None, "a stream that generates has both"
        self.switch()
        block, F = len(self.blocks), self.geometry.block
        frames = list(range(block * F, (block + 1) * F))
        past, text = (history or self.geometry.history).past(frames[0], F), self.text(block)

        def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
            return self.model.velocity(x, sigma, text, frames, self.cache, past)

        x0 = denoise_block(
            velocity,
            self.sampler,
            self.geometry.sigmas_of(block),
            self.of_all_rows(noise.start(block)),
            lambda i: self.of_all_rows(noise.renoise(block, i)),
            observe,
        )
        self.model.commit(x0, text, frames, self.cache, past)
        self.blocks.append(x0)
        return x0

    def switch(self) -> None:
        """Prepare the next block: the memory bank's recording, and re-encoding at a prompt switch.

        Only rows whose segment changes there are re-encoded. `advance` does it; call it to fork at
        a switch.
        """
        block = len(self.blocks)
        if block == 0 or self.reencoded == block:
            return
        self.reencoded = block
        self._remember(block)
        changes = [s.segment(block) != s.segment(block - 1) for s in self.scripts]
        if any(changes):
            self._reencode(
                block, None if all(changes) else [r for r, changed in enumerate(changes) if changed]
            )

    def forget(self) -> None:
        """Let go of latents that no prompt switch can need any more.

        `blocks` keeps their places.
        """
        first = self.geometry.reencoded(len(self.blocks)).start // self.geometry.block
        self.blocks[:first] = [None] * first

    def _remember(self, block: int) -> None:
        """Record the history's frame in the memory bank, under the prompt of the next block."""
        if (recorded := self.geometry.history.recorded(block)) is not None:
            assert self.cache.bank is not None, "a history that records has a cache with a bank"
            frame, number = recorded
            keys = self.model.mean_text_keys(self.text(block))
            self.cache.bank = self.cache.bank.recorded(
                frame, lambda layer: self.cache.page(frame, layer), keys, number, self.geometry.bank
            )

    def _reencode(self, block: int, rows: Sequence[int] | None) -> None:
        g, again = self.geometry, self.geometry.reencoded(block)
        if not again:
            return  # nothing but the sink so far, and that keeps its prompt
        recent = self.blocks[again.start // g.block :]
        latents = torch.cat([b.expand(self.rows, *b.shape[1:]) for b in recent], dim=1)[
            :, -len(again) :
        ]
        own = len(again) if g.window < 0 else min(g.window - g.sink, len(again))
        latents = latents if rows is None else latents[list(rows)]
        self.model.commit(
            latents,
            self.text(block, rows),
            list(again),
            self.cache,
            g.history.kept_at_switch(again.start, block),
            rows,
            own,
        )

    def of_all_rows(self, noise: torch.Tensor) -> torch.Tensor:
        """A block's noise on the model's device, shared by all rows unless each has its own."""
        noise = noise.to(self.model.device)
        return noise if noise.dim() == 5 else noise.expand(self.rows, *noise.shape)
