"""Stage 5: how well does the UNPERTURBED policy explain each branch (method.md section 4).

Under the weights now in the module, the stored inputs z of the window pass again, in the deployed
window without routing. What the later blocks of the window read as their past is the context's
business. All inputs are known beforehand, so branches, blocks and steps go through together:
`contexts` re-encodes the past (no gradient), then the rows (branch, block, step) are independent of
each other and are cut into as few passes as memory allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from kvpo.common.rng import normal
from kvpo.common.rng import stream as random_stream
from kvpo.generators.cache import FrameCache
from kvpo.generators.flow import denoised
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.sampler import Stream
from kvpo.method.energies import Surrogate, added_up, squared_residual
from kvpo.types import Rollout


class Context(Protocol):
    """The clean latents that a replayed block leaves behind as the past of the next one."""

    def clean(
        self, rollout: Rollout, position: int, rows: Sequence[int], last_step
    ) -> torch.Tensor:
        """x0_BFCHW of the window's block number ``position``.

        ``last_step()`` gives the replaying weights' own prediction.
        """
        ...


@dataclass(frozen=True)
class BranchContext:
    """The branch's own clean latents, re-encoded without routing."""

    def clean(self, rollout, position, rows, last_step):
        return rollout.trajectory.clean[list(rows), position]


@dataclass(frozen=True)
class AnchorContext:
    """The anchor's clean latents, for all branches alike."""

    def clean(self, rollout, position, rows, last_step):
        return rollout.trajectory.clean[[-1] * len(rows), position]


@dataclass(frozen=True)
class SelfContext:
    """Context from what the replaying weights make of the block's last step.

    It is the reference code's.
    """

    def clean(self, rollout, position, rows, last_step):
        return last_step()


CONTEXTS: Mapping[str, Context] = {
    "branch": BranchContext(),
    "anchor": AnchorContext(),
    "self": SelfContext(),
}


@dataclass(frozen=True)
class Row:
    """One velocity to replay: of a branch, a block and a denoise step."""

    branch: int
    position: int
    """Block, counted from the fork."""
    step: int


@dataclass(frozen=True)
class Members:
    """Rows of a rollout that are replayed, and how many of them at a time."""

    pipeline: Pipeline
    rollout: Rollout
    embeddings: Mapping[str, torch.Tensor]
    """Prompt -> [L, D]."""
    context: Context
    rows: Sequence[int]
    """Rollout rows."""
    rows_per_pass: int = 0
    """Most velocities in a pass, 0 = all."""
    together: int = 0
    """Most rows that have their past in memory at a time, 0 = all."""


class WindowReplay:
    """Inputs of a rollout's window, to pass once more under the weights in the module.

    They pass in the deployed window without routing. Which inputs is up to the objective: those
    that the rollout has recorded, or others.
    """

    def __init__(
        self,
        members: Members,
        inputs: torch.Tensor,
        sigmas: Sequence[float],
        wanted_PS: torch.Tensor,
    ):
        """Plan the passes of a replay.

        ``inputs``: z_BPSFCHW of all rollout rows, and ``sigmas`` their S noise levels.
        ``wanted_PS``: the (block, step) pairs that are replayed, bool.
        """
        self.members = members
        self.pipeline = members.pipeline
        self.rollout = members.rollout
        self.embeddings = members.embeddings
        self.inputs, self.sigmas, self.wanted_PS = inputs, sigmas, wanted_PS
        self.rows = list(members.rows)
        self.last = int(wanted_PS.any(dim=1).nonzero().max())
        """Last block that is replayed, counted from the fork: none behind it is anyone's past."""
        start = inputs[self.rows, 0, 0]
        self.shared_start = bool((start == start[:1]).all())
        size = members.together or len(self.rows)
        self.chunks = [
            range(first, min(first + size, len(self.rows)))
            for first in range(0, len(self.rows), size)
        ]
        self.plan = [
            self._parts(positions, chunk) for chunk in self.chunks for positions in self._runs()
        ]
        """Rows of every pass, chunk by chunk and in it run by run."""

    def velocities(self) -> Iterator[tuple[list[Row], torch.Tensor]]:
        """Yield (rows [R], v_RFCHW) of every pass, each independent of the others.

        Velocities carry gradient where gradients are enabled.
        """
        for (cache, chunk), parts in zip(self.contexts(), self.plan):
            for rows in parts:
                yield rows, self._velocity(cache, rows, chunk)

    @torch.no_grad()
    def all_velocities(self) -> torch.Tensor:
        """v_MPSFCHW of all members, without gradient; 0 at pairs that are not replayed."""
        found = torch.zeros_like(self.inputs[self.rows])
        for rows, v in self.velocities():
            found[self.places(rows)] = v.to(found.dtype)
        return found

    @staticmethod
    def places(rows: list[Row]) -> tuple[list[int], list[int], list[int]]:
        """Indices (member, position, step) of rows in a tensor [M, P, S, ...]."""
        return [r.branch for r in rows], [r.position for r in rows], [r.step for r in rows]

    @property
    def single_pass(self) -> bool:
        """Everything fits one pass: its graph can be kept, and no branch need be replayed twice."""
        return sum(len(parts) for parts in self.plan) == 1

    def contexts(self) -> Iterator[tuple[FrameCache, range]]:
        """Yield (cache, its branches) for every run of every chunk.

        The cache is forked anew at every prompt switch and recording of the memory bank, which
        would otherwise change what an earlier block has read and may have to read again in its
        backward pass.
        """
        r, g = self.rollout, self.pipeline.geometry
        prefix = [r.prefix[None, i : i + g.block] for i in range(0, len(r.prefix), g.block)]
        for chunk in self.chunks:
            cache, past = r.cache, prefix
            for positions in self._runs():
                left = [p for p in positions if p < self.last]  # blocks that others read
                again = len(g.reencoded(r.window.fork + positions[0])) if positions[0] > 0 else 0
                cache = cache.fork(len(chunk), len(left) * g.block + again)
                stream = Stream(
                    self.pipeline.generator, g, None, [r.script], self.embeddings, None, cache, past
                )
                if positions[0] > 0:
                    stream.switch()
                for position in left:
                    stream.blocks.append(self._commit(stream, position, chunk))
                past = stream.blocks
                yield cache, chunk

    @torch.no_grad()
    def _commit(self, stream: Stream, position: int, chunk: range) -> torch.Tensor:
        """Leave the window's block ``position`` behind as past.

        Returns its clean latents [B, F, C, H, W].
        """
        text = stream.text(self.rollout.window.fork + position)

        def last_step() -> torch.Tensor:
            rows = [Row(g, position, len(self.sigmas) - 1) for g in chunk]
            v = self._velocity(stream.cache, rows, chunk)
            return denoised(self.stored(self.inputs, rows), v, self.sigmas[-1])

        clean = self.members.context.clean(
            self.rollout, position, [self.rows[g] for g in chunk], last_step
        )
        self.pipeline.generator.commit(
            clean, text, self._frames(position), stream.cache, self._past(position)
        )
        return clean

    def _runs(self) -> list[list[int]]:
        """Positions of the window's blocks, cut where the prompt or the memory bank changes."""
        r, runs, history = self.rollout, [[0]], self.pipeline.geometry.history
        for position in range(1, self.last + 1):
            block = r.window.fork + position
            if (
                r.script.segment(block) != r.script.segment(block - 1)
                or history.recorded(block) is not None
            ):
                runs.append([])
            runs[-1].append(position)
        return runs

    def _parts(self, positions: list[int], chunk: range) -> list[list[Row]]:
        """Cut the rows of a run into passes.

        Passes are as large as allowed, and all rows of one pass have equally many past frames.
        """
        alike: dict[int, list[Row]] = {}
        for p in positions:
            steps = self.wanted_PS[p].nonzero().flatten().tolist()
            alike.setdefault(len(self._past(p)), []).extend(
                Row(g, p, s) for s in steps for g in chunk
            )
        size = self.members.rows_per_pass or max(1, *map(len, alike.values()))
        return [rows[i : i + size] for rows in alike.values() for i in range(0, len(rows), size)]

    def _frames(self, position: int) -> list[int]:
        F = self.pipeline.geometry.block
        block = self.rollout.window.fork + position
        return list(range(block * F, (block + 1) * F))

    def _past(self, position: int) -> tuple[int, ...]:
        frames = self._frames(position)
        return self.pipeline.geometry.history.past(frames[0], len(frames))

    def stored(self, x_BPSFCHW: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        """x_RFCHW of rows, from a tensor of all rollout rows."""
        return x_BPSFCHW[
            [self.rows[r.branch] for r in rows], [r.position for r in rows], [r.step for r in rows]
        ]

    def _velocity(self, cache: FrameCache, rows: list[Row], chunk: range) -> torch.Tensor:
        """v_RFCHW of rows of the chunk, which share one prompt: a run holds one segment."""
        places: dict[Row, int] = {}
        index = [places.setdefault(self._representative(row, chunk), len(places)) for row in rows]
        distinct = list(places)
        frames = [self._frames(r.position) for r in distinct]
        past = [self._past(r.position) for r in distinct]
        text = self.embeddings[
            self.rollout.script.text(self.rollout.window.fork + rows[0].position)
        ][None]
        sigma = torch.tensor([self.sigmas[r.step] for r in distinct])
        z = self.stored(self.inputs, distinct)
        v = self.pipeline.generator.velocity(
            z, sigma, text, frames, cache, past, [r.branch - chunk.start for r in distinct]
        )
        return v if len(distinct) == len(rows) else v[index]

    def _representative(self, row: Row, chunk: range) -> Row:
        """Return the row whose velocity stands for this one.

        At the fork all branches start from one noise and one past: that velocity is computed once.
        """
        return (
            replace(row, branch=chunk.start)
            if self.shared_start and row.position == row.step == 0
            else row
        )


class Replay(WindowReplay):
    """The recorded inputs of a group's members, with the energies that a surrogate makes of them.

    It is also what an objective learns a group from (`kvpo.method.objectives.interface.Objective`),
    which may want other inputs: `at` gives their replay, `draw` noise for them.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        rollout: Rollout,
        embeddings: Mapping[str, torch.Tensor],
        context: Context,
        surrogate: Surrogate,
        rows: Sequence[int] | None = None,
        rows_per_pass: int = 0,
        together: int = 0,
        factors_PS: torch.Tensor | None = None,
        seed: int = 0,
        stream_name: tuple[int | str, ...] = ("replay",),
    ):
        """Plan the passes; arguments as in `Members`, ``rows``: default the G branches.

        ``factors_PS``: what the energy of every (block, step) pair is multiplied by (default: 1);
        a pair of factor 0 is not replayed. ``seed`` and ``stream_name``: of the random streams of
        an objective that draws.
        """
        sigmas = pipeline.geometry.sigmas
        self.surrogate, self.seed, self.stream_name = surrogate, seed, stream_name
        self.weights_PS = surrogate.step_weights(sigmas).repeat(rollout.window.blocks, 1)
        if factors_PS is not None:
            self.weights_PS = self.weights_PS * factors_PS
        inputs = rollout.trajectory.inputs
        if inputs is None:  # an objective that replays its own inputs: only `at` is of use
            clean = rollout.trajectory.clean
            inputs = clean[:, :, None].expand(-1, -1, len(sigmas), *clean.shape[2:])
        rows = range(rollout.num_branches) if rows is None else rows
        members = Members(pipeline, rollout, embeddings, context, rows, rows_per_pass, together)
        # a pair of weight 0 is worth no pass
        super().__init__(members, inputs, sigmas, self.weights_PS > 0.0)

    @torch.no_grad()
    def energies(self) -> torch.Tensor:
        """E_G float64 under the weights in the module."""
        return added_up(self.passes(), len(self.rows))

    def passes(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (branch [R], share of its energy [R] float64) of every pass.

        E_g is the sum of branch g's shares. Shares carry gradient where gradients are enabled;
        every pass is independent of the others.
        """
        terms = self.rollout.window.blocks * len(self.sigmas)
        for rows, v in self.velocities():
            u = self.stored(self.rollout.trajectory.velocities, rows)
            weight = self.weights_PS[[r.position for r in rows], [r.step for r in rows]]
            weight = weight.to(v.device) / terms
            yield torch.tensor([r.branch for r in rows]), weight * squared_residual(v, u)

    def at(
        self,
        inputs: torch.Tensor,
        sigmas: Sequence[float],
        steps: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> WindowReplay:
        """The same group replayed at other inputs z_BPSFCHW of noise levels ``sigmas``.

        ``steps`` and ``rows``: those that are replayed; default all steps, and this one's members.
        """
        wanted_PS = torch.zeros(self.rollout.window.blocks, len(sigmas), dtype=torch.bool)
        wanted_PS[:, list(range(len(sigmas)) if steps is None else steps)] = True
        members = self.members if rows is None else replace(self.members, rows=rows)
        return WindowReplay(members, inputs, sigmas, wanted_PS)

    def draw(self, shape: Sequence[int], *name: int | str) -> torch.Tensor:
        """Standard normal noise of the group's stream ``name``, float32 on the generator's device.

        It is the same for all members, on all ranks and in all updates on the group.
        """
        noise = normal(tuple(shape), self.seed, *self.stream_name, *name)
        return noise.to(self.rollout.trajectory.clean.device)

    def uniform(self, count: int, *name: int | str) -> torch.Tensor:
        """``count`` numbers in [0, 1) of the group's stream ``name``, float64."""
        generator = random_stream(self.seed, *self.stream_name, *name)
        return torch.rand(count, generator=generator, dtype=torch.float64)
