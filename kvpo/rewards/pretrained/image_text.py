"""Fit of single frames to their prompt, as contrastive image-text models see it.

    pickscore   logit scale * cosine   CLIP ViT-H tuned on human choices between pictures of one prompt; about 18 to 24
    clip        cosine                 CLIP ViT-L/14; about 0.15 to 0.35
    siglip      cosine                 SigLIP 2; lower than CLIP's, its loss has an offset

(``hpsv2`` is in ``kvpo.rewards.pretrained.hpsv2``.)  They judge every frame by itself: no motion, no order, and a frozen clip scores
as its one frame does. They read the clip's own prompt only: what "it" is, an earlier prompt says,
they do not know. Read between clips of one prompt; between prompts the levels differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from kvpo.common.files import first_line
from kvpo.common.weights import identity
from kvpo.rewards.base import RewardSpec, VideoBatch
from kvpo.rewards.measured import FrameScorer, check_frame_options
from kvpo.rewards.pretrained.pixels import Pixels
from kvpo.rewards.pretrained.released import STOCK_FILES, find, load_stock, weight_files

FAMILY = "clip"
"""Family of all models that learned from captions of pictures: they like the same pictures.

SigLIP is included.
"""
VOCABULARIES = ("tokenizer.json", "vocab.json")


@dataclass
class ImageText(FrameScorer):
    """``scale()`` times the cosine of every frame with its prompt.

    A prompt is embedded once a call however many clips it has. A prompt longer than the model reads
    is cut at the end. Part ``prompt_read`` says how much was read: 1 = all of it.
    """

    weights: str = ""
    """A local folder, or a hub id."""
    stride: int = 4
    reduce: str = "mean"
    model: Any = field(default=None, init=False, repr=False)
    tokenizer: Any = field(default=None, init=False, repr=False)
    pixels: Pixels = field(init=False, repr=False, compare=False)
    """Preparation of pictures that the files ask for; set when the network is built."""

    def __post_init__(self):
        check_frame_options(self.stride, self.reduce)

    def embed_images(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, D] of preprocessed frames."""
        raise NotImplementedError(f"{type(self).__name__} has no embed_images(x)")

    def embed_texts(self, prompts: list[str]) -> torch.Tensor:
        """[P, D]."""
        raise NotImplementedError(f"{type(self).__name__} has no embed_texts(prompts)")

    def prompt_read(self, prompts: Sequence[str]) -> torch.Tensor:
        """[P], in (0, 1]: which share of a prompt's tokens the model reads."""
        raise NotImplementedError(f"{type(self).__name__} has no prompt_read(prompts)")

    def scale(self) -> torch.Tensor | float:
        return 1.0

    def score_frames(self, frames_NCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        device, distinct = self.device, list(dict.fromkeys(prompts))
        text_PD = F.normalize(self.embed_texts(distinct), dim=-1)
        image_ND = F.normalize(
            torch.cat([self.embed_images(x) for x in self.pixels.batches(frames_NCHW, device)]),
            dim=-1,
        )
        return self.scale() * (
            image_ND * text_PD[[distinct.index(prompt) for prompt in prompts]]
        ).sum(-1)

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        scores, parts = super().measure(batch)
        return scores, {**parts, "prompt_read": self.prompt_read(batch.prompts)}


@dataclass
class _Stock(ImageText):
    """An image-text model on a stock class of transformers."""

    def classes(self) -> tuple[type, type]:
        """Classes of the model and of its tokenizer."""
        raise NotImplementedError(f"{type(self).__name__} has no classes()")

    def build(self) -> torch.nn.Module:
        model, tokenizer = self.classes()
        folder = find(self.spec.name, self.weights, STOCK_FILES)
        built = load_stock(self.spec.name, model, folder)
        self.pixels = Pixels.released(self.spec.name, folder)
        self.tokenizer = open_tokenizer(self.spec.name, tokenizer, folder)
        self.spec = replace(
            self.spec, weights=identity(self.weights, weight_files(self.spec.name, folder))
        )
        return built

    @property
    def limit(self) -> int:
        """Tokens that the text tower reads, first and last mark included.

        77 for CLIP, 64 for SigLIP.
        """
        return self.model.config.text_config.max_position_embeddings

    def embed_images(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=x_NCHW).pooler_output

    def embed_texts(self, prompts: list[str]) -> torch.Tensor:
        # Padded to the full length without a mask, as SigLIP learned; CLIP reads causally and ends
        # at its end mark, so it does not see the padding.
        ids = self.tokenizer(
            _lower(prompts),
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.limit,
            return_tensors="pt",
        ).input_ids
        return self.model.get_text_features(input_ids=ids.to(self.device)).pooler_output

    def prompt_read(self, prompts: Sequence[str]) -> torch.Tensor:
        return share_read(
            [len(ids) for ids in self.tokenizer(_lower(prompts), verbose=False).input_ids],
            self.limit,
        )


@dataclass
class PickScore(_Stock):
    """PickScore: the one of two pictures of a prompt that people choose; 100 * cosine as released.

    Source: Kirstain et al., arXiv 2305.01569.
    """

    weights: str = "yuvalkirstain/PickScore_v1"
    spec: RewardSpec = RewardSpec(
        "pickscore",
        FAMILY,
        looks_at="which picture of a prompt people choose",
        bounds=(-100.0, 100.0),
        licence="MIT",
        memory_gb=5,
    )

    def classes(self) -> tuple[type, type]:
        return _clip_classes()

    def scale(self) -> torch.Tensor:
        return self.model.logit_scale.exp()


@dataclass
class ClipAlignment(_Stock):
    """Cosine of CLIP (Radford et al., arXiv 2103.00020); any CLIPModel."""

    weights: str = "openai/clip-vit-large-patch14"
    spec: RewardSpec = RewardSpec(
        "clip",
        FAMILY,
        looks_at="how frames fit their prompt",
        bounds=(-1.0, 1.0),
        licence="MIT",
        memory_gb=2.2,
    )

    def classes(self) -> tuple[type, type]:
        return _clip_classes()


@dataclass
class SiglipAlignment(_Stock):
    """Cosine of SigLIP 2 (Tschannen et al., arXiv 2502.14786) of a fixed picture size.

    Any SiglipModel with a tokenizer.json fits.
    """

    weights: str = "google/siglip2-so400m-patch14-384"
    spec: RewardSpec = RewardSpec(
        "siglip",
        FAMILY,
        looks_at="how frames fit their prompt",
        bounds=(-1.0, 1.0),
        licence="Apache-2.0",
        memory_gb=5.6,
    )

    def classes(self) -> tuple[type, type]:
        from transformers import PreTrainedTokenizerFast, SiglipModel

        # the class that tokenizer.json alone defines: SiglipTokenizer needs sentencepiece
        return (
            SiglipModel,
            PreTrainedTokenizerFast,
        )


def _clip_classes() -> tuple[type, type]:
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel, CLIPTokenizer


def open_tokenizer(reward: str, kind: Any, folder: Path) -> Any:
    """Open the tokenizer of a folder; ValueError if it has none, or a broken one."""
    if not any(
        (folder / name).is_file() for name in VOCABULARIES
    ):  # CLIPTokenizer would start with an empty one, and say nothing
        raise ValueError(
            f"reward {reward!r}: {folder} holds no {' or '.join(VOCABULARIES)}; copy the tokenizer's files into it"
        )
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"reward {reward!r}: the tokenizer in {folder} can not be read ({first_line(error)}); copy its files again"
        ) from None


def _lower(prompts: Sequence[str]) -> list[str]:
    """SigLIP 2 learned from lower case; CLIP's tokenizer lowers by itself."""
    return [prompt.lower() for prompt in prompts]


def share_read(tokens: Sequence[int], limit: int) -> torch.Tensor:
    """[P] of the prompts' token counts and how many are read."""
    return torch.tensor([min(1.0, limit / max(1, count)) for count in tokens])
