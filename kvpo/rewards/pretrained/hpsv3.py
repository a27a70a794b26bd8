"""HPSv3: people's preference for a picture of a prompt.

It is a Qwen2-VL-7B trained on pairs of pictures.

    frame + prompt -> (mu, log sigma) at the token <|Reward|>;  mu is the score, unbounded; some 7 ... 11 on clips of Wan 1.3B

It judges frames one by one and knows nothing of motion: a frozen clip scores as its frame does, and
Astrolabe's generator (2603.17051), trained on it alone, came to a standstill. Use it beside a
motion reward. Source: Ma et al., HPSv3 (2025), MizzenAI/HPSv3, code MIT.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kvpo.rewards.base import UNBOUNDED, RewardSpec, VideoBatch
from kvpo.rewards.measured import REDUCTIONS, check_frame_options
from kvpo.rewards.pretrained.qwen import (
    TEMPLATES,
    QwenReward,
    RewardNetwork,
    check_dtype,
    filled,
    open_base,
    open_folder,
)

FILE = "HPSv3.safetensors"
TOKENS = ("<|Reward|>",)
PIXELS = 256 * 28 * 28
"""Pixels of a frame as it was trained.

Larger frames shrink to at most that, smaller ones grow to at least that.
"""


@dataclass(eq=False)
class HPSv3(QwenReward):
    """mu of every ``stride``-th frame, of which ``reduce`` makes one number.

    ``top`` = mean of the best 30 %, ``mean`` or ``worst``.

    Parts: ``first`` and ``last`` judged frame; ``sigma``, the model's own doubt in units of mu,
    mean over frames.
    """

    weights: str = "MizzenAI/HPSv3"
    """Folder or hub id with ``HPSv3.safetensors`` (16.6 GB, all weights of the network)."""
    base: str = "Qwen/Qwen2-VL-7B-Instruct"
    """Folder or hub id with that model's ``config.json`` and ``tokenizer.json``.

    Its weights are not needed.
    """
    stride: int = 4
    """Every how many frames one is judged, from the first on."""
    reduce: str = "top"
    dtype: str = "auto"
    """Precision of the network: bfloat16, float32, or auto.

    auto: bfloat16 where it is first loaded to a CUDA device, else float32.
    """
    spec: RewardSpec = RewardSpec(
        "hpsv3",
        "qwen-vl",
        UNBOUNDED,
        looks_at="how much people prefer a frame for its prompt",
        licence="MIT; base Apache-2.0",
        memory_gb=20.0,
        report=("sigma",),
    )
    model: Any = field(init=False, default=None, repr=False)

    def __post_init__(self):
        check_frame_options(self.stride, self.reduce)
        check_dtype(self.dtype)

    def read(self, dtype: torch.dtype) -> RewardNetwork:
        from kvpo.common.weights import read_checkpoint

        file = open_folder(self.spec.name, self.weights, (FILE,)) / FILE
        config, tokenizer = open_base(self.spec.name, self.base, "image", TOKENS)
        return filled(
            self.weights,
            lambda: RewardNetwork(
                config, tokenizer, "image", TOKENS, head(config.text_config.hidden_size)
            ),
            read_checkpoint(file),
            file,
            dtype,
        )

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        frames = batch.frames[:, :: self.stride].to(self.device)
        B, T = frames.shape[:2]
        template = (TEMPLATES / "hpsv3.txt").read_text(encoding="utf-8")
        texts = [template.format(text_prompt=prompt) for prompt in batch.prompts for _ in range(T)]
        mu_BT, log_sigma_BT = (
            self.model.judge(frames.flatten(0, 1)[:, None], texts, PIXELS, PIXELS)
            .view(B, T, 2)
            .unbind(-1)
        )
        return REDUCTIONS[self.reduce](mu_BT), {
            "first": mu_BT[:, 0],
            "last": mu_BT[:, -1],
            "sigma": log_sigma_BT.exp().mean(1),
        }


def head(width: int) -> torch.nn.Module:
    """Layers from hidden states to (mu, log sigma).

    They drop nothing: dropout was for the training only, but has its place in the weights' names.
    """
    nn = torch.nn
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )
