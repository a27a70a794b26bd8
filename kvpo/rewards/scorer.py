"""A recipe's rewards at work: asked in calls that fit their memory, every answer checked.

They are loaded here, and score each clip once.

A `Scorer` stands for one reward wherever the loop or an evaluation asks it. What a scorer has said
of a clip is kept by the clip's content, so equal clips of a group, or of two evaluations, are
scored once.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Mapping, Sequence

import torch

from kvpo.common.metrics import NAME
from kvpo.rewards.base import Reward, RewardOutput, RewardSpec, VideoBatch, check_output
from kvpo.rewards.isolated.reward import Isolated
from kvpo.rewards.measured import sampled
from kvpo.rewards.registry import RewardEntry, check_held_out, make_reward

REMEMBERED = 65_536
"""Clips whose scores a scorer keeps."""

Answer = tuple[float, Mapping[str, float]]
"""Score and parts of one clip."""


class Scorer:
    """One reward of a recipe; a `Reward` itself, whose ``score`` is checked and complete."""

    def __init__(self, reward: Reward, entry: RewardEntry):
        self.reward, self.entry = reward, entry
        self._known: dict[tuple, Answer] = {}
        self._device: torch.device | str = "cpu"

    @property
    def spec(self) -> RewardSpec:
        return self.reward.spec

    @property
    def resident(self) -> bool:
        """Whether it stays on the device between two uses."""
        return self.entry.role == "train" and not self.entry.offload

    def load(self, device: torch.device | str) -> None:
        """Load the reward now, so that missing weights are said before any work.

        It goes away from the device again unless it is resident.
        """
        self._device = device
        self.reward.load(device)
        if not self.resident:
            self.reward.offload()

    def offload(self) -> None:
        self.reward.offload()

    def score(self, batch: VideoBatch) -> RewardOutput:
        """Score a batch and check the answer.

        Raises ValueError, in one line, for whatever the reward does wrong.
        """
        begin = time.perf_counter()
        keys = [
            (digest, batch.fps, prompt, history)
            for digest, prompt, history in zip(batch.digests, batch.prompts, batch.history)
        ]
        new = {key: clip for clip, key in enumerate(keys) if key not in self._known}
        if new:
            self._ask(batch, new)
        scores = torch.tensor([self._known[key][0] for key in keys], dtype=torch.float32)
        names = dict.fromkeys(name for key in keys for name in self._known[key][1])
        parts = {
            name: torch.tensor([self._known[key][1].get(name, float("nan")) for key in keys])
            for name in names
        }
        return RewardOutput(
            scores,
            scores.isfinite(),
            parts,
            {"seconds": time.perf_counter() - begin, "scored": len(new)},
        )

    def _ask(self, batch: VideoBatch, new: Mapping[tuple, int]) -> None:
        """Scores clips that are new, as many in a call as its spec allows."""
        if len(self._known) + len(new) > REMEMBERED:
            self._known.clear()
        if not self.resident:
            self.reward.load(self._device)
        items, most = list(new.items()), _clips_per_call(self.spec, batch)
        for first in range(0, len(items), most):
            part = items[first : first + most]
            # The batch itself where it is all of it: rewards that share a measurement know it
            # again.
            asked = batch if len(part) == len(batch) else batch.rows([clip for _, clip in part])
            output = check_output(self.spec, asked, self._answer(asked))
            self._known |= {key: _of_clip(output, i) for i, (key, _) in enumerate(part)}
        if not self.resident:
            self.reward.offload()

    def _answer(self, batch: VideoBatch) -> RewardOutput:
        """Ask the reward, and make one line that a user needs of whatever it raises.

        Anyone's code runs in here; torch's own out-of-memory keeps its name.
        """
        try:
            return self.reward.score(batch)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"reward {self.spec.name!r} failed on {len(batch)} clips of {batch.length} frames ({where.filename}:{where.lineno}): {type(error).__name__}: {error}; correct the reward, or take it out of the recipe"
            ) from error


def _of_clip(output: RewardOutput, clip: int) -> Answer:
    score = output.scores[clip].item() if output.valid[clip] else float("nan")
    return score, {name: value[clip].item() for name, value in output.parts.items()}


def _clips_per_call(spec: RewardSpec, batch: VideoBatch) -> int:
    frames = len(sampled(batch.length, batch.fps, spec))
    return (
        max(1, spec.max_pixels // (frames * batch.frames.shape[-2] * batch.frames.shape[-1]))
        if spec.max_pixels
        else len(batch)
    )


def make_scorers(entries: Sequence[RewardEntry]) -> list[Scorer]:
    """Make the rewards of a recipe, not loaded.

    Raises ValueError for one that can not be, or where two share a name.
    """
    scorers = [Scorer(_made(entry), entry) for entry in entries]
    names = [s.spec.name for s in scorers]
    if odd := [name for s in scorers for name in s.spec.columns if not re.fullmatch(NAME, name)]:
        raise ValueError(
            f"reward {odd[0]!r} can not be logged under that name: it must begin with a letter and go on with letters, digits, '_', '.' or '-'; correct the spec's name or report"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"rewards share a name: {names}; every one must have its own")
    return scorers


def _made(entry: RewardEntry) -> Reward:
    if entry.isolation == "inline":
        return make_reward(entry.name, entry.params)
    return Isolated(
        entry.name, entry.params, entry.environment, entry.url, entry.timeout, entry.devices
    )


def load_rewards(entries: Sequence[RewardEntry], device: torch.device | str) -> list[Scorer]:
    """Make and load the rewards of a recipe.

    Raises ValueError as `make_scorers` does, and where an evaluator is not held out.
    """
    scorers = make_scorers(entries)
    check_held_out(entries, [s.spec for s in scorers])
    for scorer in scorers:
        scorer.load(device)
    return scorers
