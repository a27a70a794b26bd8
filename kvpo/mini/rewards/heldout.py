"""Held-out evaluators: another kind of eye than the training rewards', and never trained against.

    AttributeAgreement    a small network's opinion whether shape, colour, size, place and pillar are as asked
    IdentityDrift         how far the object and its place wander from the segment's own first frames
    diversity             how much the videos of one prompt differ over seeds: pixels, embedding, attributes
    (``FlowMotion`` in ``kvpo.mini.rewards.flow_motion``: direction and smoothness by optical flow)

What they cannot see: the network judges frames one by one, so it knows nothing of motion, and it
was trained on this world only; on pictures unlike it, its confidence means little. Drift cannot
tell a wanted change from an unwanted one: cut clips at the prompt switches. Diversity is not good
in itself: noise has most of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kvpo.mini.rewards.asked import EVIDENCE, NONE, asked
from kvpo.mini.rewards.attributes import HEADS, WEIGHTS, AttributeNet, load_network, read_frames
from kvpo.rewards.base import RewardSpec, VideoBatch
from kvpo.rewards.measured import Measured

FAMILY = "learned-classifier"
FIRST = 4
"""Frames that stand for the beginning of a segment."""


@dataclass
class _Classifier(Measured):
    """Base of the rewards that look through the network."""

    path: Path = WEIGHTS
    network: AttributeNet | None = field(default=None, init=False, repr=False)

    def load(self, device: str | torch.device = "cpu") -> None:
        self.network = load_network(self.path, device)

    def offload(self) -> None:
        self.network = None

    def read(self, batch: VideoBatch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if self.network is None:
            raise RuntimeError(
                "the attribute network is not loaded; call load(device) before score(batch)"
            )
        return read_frames(self.network, batch.frames)


@dataclass
class AttributeAgreement(_Classifier):
    """Mean over the asked attributes of their probability, in [0, 1].

    part = sum_t p_object(t) p_asked(t) / sum_t w(t), with w = 1 in the open and w = p_object in
    a scene with a pillar (which may hide the object): what is missing in the open counts 0.
    Place and pillar: plain means over frames."""

    spec: RewardSpec = RewardSpec(
        "attributes",
        FAMILY,
        looks_at="the asked attributes, by a small network",
        weights=WEIGHTS.name,
    )

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        p, _ = self.read(batch)
        scenes = asked(batch)
        names = ("shape", "colour", "size", "place", "pillar")
        rows: dict[str, list[float]] = {name: [] for name in names}
        for b, scene in enumerate(scenes):
            seen = p["object"][b, :, 1]
            weight = seen if scene.pillar else torch.ones_like(seen)
            for name, row in rows.items():
                value = (
                    ("yes" if scene.pillar else "no") if name == "pillar" else getattr(scene, name)
                )
                if value is None:
                    row.append(NONE)
                    continue
                right = p[name][b, :, list(HEADS[name]).index(value)]
                about_object = name in ("shape", "colour", "size")
                enough = not about_object or weight.sum() >= min(EVIDENCE, batch.length)
                row.append(
                    ((right * seen).sum() / weight.sum() if about_object else right.mean()).item()
                    if enough
                    else NONE
                )
        parts = {name: torch.tensor(row) for name, row in rows.items()}
        return torch.stack(list(parts.values())).nanmean(0), parts


@dataclass
class IdentityDrift(_Classifier):
    """Share of the object that stays as in the clip's own first frames; 1 = nothing has changed.

    The first frames are the first FIRST that show an object; the score lies in [0, 1].

    embedding    mean cosine to the mean of the first frames' embeddings
    attributes   1 - mean over frames of the largest total variation of shape, colour, size and place probabilities to theirs
    end          attributes, of the last FIRST frames only
    score        mean of embedding and attributes

    Frames whose object probability is below one half are left out; NaN if too few remain. A
    frozen clip is perfect: read it beside a motion measure.
    """

    spec: RewardSpec = RewardSpec(
        "identity",
        FAMILY,
        looks_at="whether the object stays itself, by the same network",
        needs_prompt=False,
        min_frames=2 * FIRST,
        weights=WEIGHTS.name,
    )

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        p, embedding = self.read(batch)
        rows = []
        for b, seen in enumerate(p["object"][..., 1] > 0.5):
            if seen.sum() < 2 * FIRST:
                rows.append((NONE, NONE, NONE))
                continue
            e = embedding[b, seen]
            near = e[FIRST:] @ torch.nn.functional.normalize(e[:FIRST].mean(0), dim=0)
            change = torch.stack(
                [_variation(p[name][b, seen]) for name in ("shape", "colour", "size", "place")]
            ).amax(0)
            rows.append(
                (
                    near.mean().clamp(0, 1).item(),
                    1 - change.mean().item(),
                    1 - change[-FIRST:].mean().item(),
                )
            )
        parts = dict(zip(("embedding", "attributes", "end"), torch.tensor(rows).T))
        return (parts["embedding"] + parts["attributes"]) / 2, parts


def _variation(p_TV: torch.Tensor) -> torch.Tensor:
    """Total variation of every later frame's probabilities to the mean of the first FIRST.

    [T - FIRST].
    """
    return (p_TV[FIRST:] - p_TV[:FIRST].mean(0)).abs().sum(-1) / 2


def diversity(frames: torch.Tensor, network: AttributeNet) -> dict[str, float]:
    """Mean pairwise difference of R >= 2 videos of one prompt, uint8 [R, T, C, H, W].

    pixels      mean absolute difference, in [0, 1]: low level, any displacement counts
    embedding   1 - cosine of time-averaged embeddings: what is in the picture, wherever it is
    attributes  total variation of time-averaged attribute probabilities, mean over attributes, in [0, 1]: meaning
    """
    R = len(frames)
    if R < 2:
        raise ValueError(
            f"diversity needs at least 2 videos of a prompt, not {R}; set seeds to 2 or more"
        )
    p, embedding = read_frames(network, frames)
    i, j = torch.triu_indices(R, R, 1)
    mean = torch.nn.functional.normalize(embedding.mean(1), dim=-1)
    apart: Mapping[str, torch.Tensor] = {
        name: (value.mean(1)[i] - value.mean(1)[j]).abs().sum(-1) / 2 for name, value in p.items()
    }
    x = frames.float() / 255
    return {
        "pixels": torch.stack([(x[a] - x[b]).abs().mean() for a, b in zip(i.tolist(), j.tolist())])
        .mean()
        .item(),
        "embedding": (1 - (mean[i] * mean[j]).sum(-1)).clamp(min=0).mean().item(),
        "attributes": torch.stack(list(apart.values())).mean().item(),
    }
