"""Looks of a frame as people like them: the LAION aesthetic predictor V2 on CLIP ViT-L/14.

Its scores lie in about 1 to 10, mostly 4 to 7.

It reads no prompt and judges frames one by one, so style alone raises it, and a frozen clip loses
nothing: train on it only beside a term for the prompt and one for motion.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kvpo.common.files import first_line
from kvpo.common.weights import identity
from kvpo.rewards.base import UNBOUNDED, RewardSpec
from kvpo.rewards.measured import FrameScorer, check_frame_options
from kvpo.rewards.pretrained.image_text import FAMILY
from kvpo.rewards.pretrained.pixels import Pixels
from kvpo.rewards.pretrained.released import STOCK_FILES, file_in, find, load_stock, weight_files

HEAD_FILE = "aesthetic-model.pth"
"""Name of the head's file on the hub.

It is sac+logos+ava1-l14-linearMSE.pth of
github.com/christophschuhmann/improved-aesthetic-predictor.
"""
WIDTH = 768
"""Width of the embeddings of CLIP ViT-L/14, on which the head was trained."""


@dataclass
class Aesthetic(FrameScorer):
    """Mean aesthetic score of the frames; a linear function of CLIP's unit embedding."""

    weights: str = "openai/clip-vit-large-patch14"
    """CLIP ViT-L/14: a local folder, or a hub id."""
    head: str = "trl-lib/ddpo-aesthetic-predictor"
    """The predictor: a .pth file, a folder that holds HEAD_FILE, or a hub id."""
    stride: int = 4
    reduce: str = "mean"
    model: Any = field(default=None, init=False, repr=False)
    pixels: Pixels = field(init=False, repr=False, compare=False)
    """Preparation of pictures that the files ask for; set when the network is built."""
    spec: RewardSpec = RewardSpec(
        "aesthetic",
        FAMILY,
        looks_at="how beautiful single frames are",
        bounds=UNBOUNDED,
        needs_prompt=False,
        licence="Apache-2.0 (head), MIT (CLIP)",
        memory_gb=2.2,
    )

    def __post_init__(self):
        check_frame_options(self.stride, self.reduce)

    def build(self) -> nn.Module:
        from transformers import CLIPModel

        name = self.spec.name
        folder = find(name, self.weights, STOCK_FILES)
        clip = load_stock(name, CLIPModel, folder)
        if clip.config.projection_dim != WIDTH:
            raise ValueError(
                f"reward {name!r}: the embeddings of {self.weights} have {clip.config.projection_dim} numbers, the predictor reads {WIDTH}; give CLIP ViT-L/14"
            )
        head = file_in(name, find(name, self.head, [HEAD_FILE]), HEAD_FILE)
        model = nn.ModuleDict({"clip": clip, "head": load_head(name, head)})
        self.pixels = Pixels.released(name, folder)
        self.spec = replace(
            self.spec,
            weights=identity(f"{self.weights} + {self.head}", [*weight_files(name, folder), head]),
        )
        return model

    def score_frames(self, frames_NCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        clip, head = self.model["clip"], self.model["head"]["layers"]
        embeddings = (
            clip.get_image_features(pixel_values=x).pooler_output
            for x in self.pixels.batches(frames_NCHW, self.device)
        )
        return torch.cat([head(F.normalize(e, dim=-1)).squeeze(-1) for e in embeddings])


def load_head(reward: str, path: Path) -> nn.ModuleDict:
    """Load the five linear layers of the released file, by its names: layers.0, 2, 4, 6 and 7.

    The gaps were dropout. Raises ValueError for any other file.
    """
    d = nn.Dropout()
    layers = nn.Sequential(
        nn.Linear(WIDTH, 1024),
        d,
        nn.Linear(1024, 128),
        d,
        nn.Linear(128, 64),
        d,
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    head = nn.ModuleDict({"layers": layers})
    try:
        head.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, EOFError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"reward {reward!r}: {path} is not the head sac+logos+ava1-l14-linearMSE.pth ({first_line(error)}); copy it again"
        ) from None
    return head
