"""HPS v2.1: the picture of a prompt that people prefer; about 0.2 to 0.35.

It is a CLIP ViT-H on open_clip (Wu et al., arXiv 2306.09341).

Training on it alone is known to end in over-saturated pictures. Frames are judged one by one,
whole, with black bars.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvpo.common.files import first_line
from kvpo.common.weights import identity
from kvpo.rewards.base import RewardSpec
from kvpo.rewards.pretrained.image_text import FAMILY, ImageText, share_read
from kvpo.rewards.pretrained.pixels import Pixels
from kvpo.rewards.pretrained.released import file_in, find

ARCHITECTURE = "ViT-H-14"
FILE = "HPS_v2.1_compressed.pt"


@dataclass
class HPSv2(ImageText):
    """Cosine of every frame and its prompt."""

    weights: str = "xswu/HPSv2"
    """The file HPS_v2.1_compressed.pt, a folder that holds it, or a hub id."""
    spec: RewardSpec = RewardSpec(
        "hpsv2",
        FAMILY,
        looks_at="how much people prefer a frame for its prompt",
        bounds=(-1.0, 1.0),
        licence="Apache-2.0",
        packages=("open_clip",),
        extra="hpsv2",
        memory_gb=5,
    )

    def build(self) -> torch.nn.Module:
        import open_clip

        path = file_in(self.spec.name, find(self.spec.name, self.weights, [FILE]), FILE)
        try:
            # strict, and weights only
            model = open_clip.create_model(ARCHITECTURE, pretrained=str(path))
        except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"reward {self.spec.name!r}: {path} does not hold the weights of a {ARCHITECTURE} ({first_line(error)}); copy {FILE} again"
            ) from None
        self.tokenizer = open_clip.get_tokenizer(ARCHITECTURE)
        height, width = model.visual.image_size
        # the released preprocessing fits the longer side
        self.pixels = Pixels((height, width), "pad")
        self.spec = replace(self.spec, weights=identity(self.weights, [path]))
        return model

    def embed_images(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(x_NCHW)

    def embed_texts(self, prompts: list[str]) -> torch.Tensor:
        return self.model.encode_text(self.tokenizer(prompts).to(self.device))

    def prompt_read(self, prompts: Sequence[str]) -> torch.Tensor:
        # + first and last mark
        return share_read(
            [len(self.tokenizer.encode(prompt)) + 2 for prompt in prompts],
            self.tokenizer.context_length,
        )
