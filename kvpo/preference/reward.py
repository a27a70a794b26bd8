"""A fitted preference as a reward: u, the log odds that a clip beats the mean recorded one.

    u      w . z - stake (1 - alive), see `kvpo.preference.validation`
    z      features of the clip, in units of what compared clips differ by, cut at four standard
           deviations of the recorded clips
    score  u itself; 0 is the mean of the recorded clips
    parts  log odds that each set of features adds, and what is lost where nothing moves

Stories differ by far more log odds than branches of one story: a probability would be 0 or 1 for
nearly every clip, and tell no branches apart.

It knows what one studio's raters preferred in its own clips, by features that are frozen; what
those do not see it does not see either, and the prompt is none of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from kvpo.preference.features import FeatureSet, make_sets
from kvpo.preference.saved import AGAIN, Saved, read
from kvpo.preference.validation import dead, joined, stake
from kvpo.rewards.base import UNBOUNDED, RewardSpec, VideoBatch
from kvpo.rewards.measured import Measured


@dataclass
class Preference(Measured):
    """The reward of a folder that `kvpo preference fit` wrote.

    Raises FileNotFoundError or ValueError for a folder that is none, and where the packages of its
    features are missing. NaN for clips that are too short for a feature.
    """

    path: str
    spec: RewardSpec = RewardSpec(
        "preference",
        "preference",
        bounds=UNBOUNDED,
        looks_at="what the raters of a studio preferred",
        needs_prompt=False,
    )
    saved: Saved = field(init=False, repr=False)
    sets: dict[str, FeatureSet] = field(init=False, repr=False)

    def __post_init__(self):
        if not self.path:
            raise ValueError(f"a preference needs its folder, preference:FOLDER; {AGAIN}")
        folder = Path(self.path)
        self.saved = read(folder)
        try:
            self.sets = make_sets(self.saved.sets)
        except ValueError as error:
            raise ValueError(
                f"the preference of {folder} can not be used here ({error}); install what its features need, or give one that was fitted with `--features frames`"
            ) from None
        names = tuple(f"{kind}.{n}" for kind, fs in self.sets.items() for n in fs.names)
        if names != self.saved.names or "frames" not in self.sets:
            raise ValueError(f"{folder} was fitted to other features than this kvpo has; {AGAIN}")
        label = re.sub(r"[^A-Za-z0-9_.-]", "_", folder.resolve().name)
        self.spec = replace(
            self.spec,
            name=f"preference-{label}",
            min_frames=max(features.min_frames for features in self.sets.values()),
            weights=self.saved.identity,
            packages=tuple(p for features in self.sets.values() for p in features.packages),
        )

    def load(self, device: str | torch.device = "cpu") -> None:
        super().load(device)
        for name, features in self.sets.items():
            features.load(device)
            if (fitted := self.saved.networks.get(name, "")) != features.weights:
                raise ValueError(
                    f"the preference of {self.path} was fitted with {fitted or 'no weights'}, and here the features {name!r} have {features.weights}; install the same weights, or fit the answers again"
                )

    def offload(self) -> None:
        for features in self.sets.values():
            features.offload()

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        found = {name: features.measure(batch).numpy() for name, features in self.sets.items()}
        odds_BF = self.saved.scale(joined(found, self.saved.sets)) * self.saved.weights
        ends = np.cumsum([part.shape[1] for part in found.values()])[:-1]
        parts = {
            name: torch.from_numpy(odds.sum(1))
            for name, odds in zip(found, np.split(odds_BF, ends, axis=1))
        }
        lost = stake(self.saved.weights, self.saved.scale)
        parts["dead"] = torch.from_numpy(-lost * dead(found["frames"], self.saved.limits))
        return sum(parts.values(), torch.zeros(len(batch))), parts
