"""VideoReward (VideoAlign): visual quality, motion quality and text alignment of a video.

It is a Qwen2-VL-2B trained on human pairs.

    2 frames a second + prompt -> one number at each of <|VQ_reward|> <|MQ_reward|> <|TA_reward|>
    score = (number - mean) / std, with the mean and std that its checkpoint gives

MQ is asked of the video in grey (luma in all three channels), so that it can not be won by colours;
VQ and TA see it as it is. The template says VQ and MQ before it says the prompt, and no token sees
later ones: those two do not depend on the prompt.

What it falls for, by public reports (DanceGRPO, issue 74): trained on VQ, pictures drift to an
animated look; TA is unstable. Source: Liu et al., Improving Video Generation with Human Feedback
(2025), KwaiVGI/VideoAlign, code MIT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kvpo.rewards.base import UNBOUNDED, RewardSpec, VideoBatch
from kvpo.rewards.pretrained.qwen import (
    TEMPLATES,
    QwenReward,
    RewardNetwork,
    check_dtype,
    filled,
    open_base,
    open_folder,
)

PARTS = ("VQ", "MQ", "TA")
TOKENS = tuple(f"<|{part}_reward|>" for part in PARTS)
CONFIG, FILE = "model_config.json", "checkpoint-*/model.pth"
LEAST = 128 * 28 * 28
"""Pixels of a frame; smaller ones grow to at least that.

The most is in the checkpoint's configuration (448 x 448).
"""
TRAINED = {"prompt_template_type": "detailed_special", "use_rslora": False}
LUMA = (0.299, 0.587, 0.114)


@dataclass(eq=False)
class VideoReward(QwenReward):
    """One of the three judges, or ``overall``, their mean.

    Parts: what was asked for the score. ``overall`` asks twice, in colour and in grey, and has
    VQ, MQ and TA; VQ and TA come together. Rewards that differ in ``judge`` only share their
    network.
    """

    judge: str = "overall"
    """VQ, MQ, TA or overall."""
    weights: str = "KlingTeam/VideoReward"
    """Folder or hub id with ``model_config.json`` and ``checkpoint-<step>/model.pth``.

    The file is 5 GB, all weights of the network and its LoRA.
    """
    base: str = "Qwen/Qwen2-VL-2B-Instruct"
    """Folder or hub id with that model's ``config.json`` and ``tokenizer.json``.

    Its weights are not needed.
    """
    dtype: str = "auto"
    """Precision of the network: bfloat16, float32, or auto.

    auto: bfloat16 where it is first loaded to a CUDA device, else float32.
    """
    spec: RewardSpec = RewardSpec(
        "videoreward",
        "qwen-vl",
        UNBOUNDED,
        looks_at="people's verdicts on videos: picture, motion or text",
        min_frames=8,
        fps=2.0,
        licence="Apache-2.0; code and template MIT",
        memory_gb=7.0,
    )
    """Spec of the reward: it looks at 2 frames a second, but 8 at least.

    Of a branch of 36 frames at 16 a second it would see 4, too few for motion.
    """
    model: Any = field(init=False, default=None, repr=False)

    def __post_init__(self):
        if self.judge not in (*PARTS, "overall"):
            raise ValueError(
                f"judge = {self.judge!r} is unknown; choose one of {', '.join(PARTS)} or overall"
            )
        check_dtype(self.dtype)
        whole = self.judge == "overall"
        self.spec = replace(
            self.spec,
            name=f"videoreward_{self.judge.lower()}",
            needs_prompt=whole or self.judge == "TA",
            report=PARTS if whole else (),
        )

    def read(self, dtype: torch.dtype) -> RewardNetwork:
        from kvpo.common.weights import read_checkpoint

        folder = open_folder(self.spec.name, self.weights, (CONFIG, FILE))
        settings = read_settings(folder / CONFIG)
        file = max(folder.glob(FILE), key=lambda path: int(path.parent.name.rpartition("-")[2]))
        config, tokenizer = open_base(self.spec.name, self.base, "video", TOKENS)
        state = merged(read_checkpoint(file), settings["peft_lora_config"], file)
        head = torch.nn.Linear(config.text_config.hidden_size, 1, bias=False)
        network = filled(
            self.weights,
            lambda: RewardNetwork(config, tokenizer, "video", TOKENS, head),
            state,
            file,
            dtype,
        )
        network.settings = settings
        return network

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        frames = batch.frames.to(self.device)
        parts: dict[str, torch.Tensor] = {}
        if self.judge != "MQ":
            coloured = self.normalised(frames, batch.prompts)
            parts |= {"VQ": coloured[:, 0], "TA": coloured[:, 2]}
        if self.judge in ("MQ", "overall"):
            parts["MQ"] = self.normalised(grey(frames), batch.prompts)[:, 1]
        score = (
            torch.stack(list(parts.values())).mean(0)
            if self.judge == "overall"
            else parts[self.judge]
        )
        return score, parts

    def normalised(self, frames_BTCHW: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """VQ, MQ, TA [B, 3] of these frames."""
        template = (TEMPLATES / "videoreward.txt").read_text(encoding="utf-8")
        settings = self.model.settings
        texts = [template.format(text_prompt=prompt) for prompt in prompts]
        numbers = self.model.judge(
            frames_BTCHW, texts, LEAST, settings["data_config"]["max_frame_pixels"]
        ).squeeze(-1)
        scale = settings["inference_config"]
        mean, std = (
            numbers.new_tensor([scale[f"{part}_{what}"] for part in PARTS])
            for what in ("mean", "std")
        )
        return (numbers - mean) / std


def grey(frames_BTCHW: torch.Tensor) -> torch.Tensor:
    """uint8 RGB -> uint8, its luma (BT.601) in all three channels."""
    luma = (frames_BTCHW * torch.tensor(LUMA, device=frames_BTCHW.device).view(3, 1, 1)).sum(
        2, keepdim=True
    )
    return luma.round().clamp(0, 255).to(torch.uint8).expand_as(frames_BTCHW)


def read_settings(file: Path) -> dict[str, Any]:
    """Read the checkpoint's own configuration.

    Raises ValueError where it lacks something, or was trained in another way than this file asks.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        data = settings["data_config"]
        lora = settings["peft_lora_config"]
        scale = settings["inference_config"]
        numbers = [
            data["max_frame_pixels"],
            lora["lora_r"],
            lora["lora_alpha"],
            *(scale[f"{part}_{what}"] for part in PARTS for what in ("mean", "std")),
        ]
        how = {
            "prompt_template_type": data["prompt_template_type"],
            "use_rslora": lora["use_rslora"],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no configuration of VideoReward ({type(error).__name__}: {error}); give the checkpoint's own folder"
        ) from None
    if how != TRAINED or not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError(
            f"{file} is of another model: {how}, numbers {numbers}; VideoReward has {TRAINED}, and numbers throughout; give the checkpoint's own folder"
        )
    return settings


def merged(
    state: Mapping[str, torch.Tensor], lora: Mapping[str, Any], file: Path
) -> dict[str, torch.Tensor]:
    """Merge a checkpoint of peft into the plain network's weights.

    Every adapted weight is W + alpha / r * B A in float32. Raises ValueError for another rank than
    the configuration's.
    """
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    for name in [name for name in state if name.endswith(".lora_A.default.weight")]:
        module = name.removesuffix(".lora_A.default.weight")
        A = state.pop(name).float()
        B = state.pop(f"{module}.lora_B.default.weight", torch.empty(0)).float()
        W = state.get(f"{module}.base_layer.weight", torch.empty(0))
        if (len(A), W.shape) != (lora["lora_r"], (*B.shape[:1], *A.shape[1:])) or B.shape[
            1:
        ] != A.shape[:1]:
            raise ValueError(
                f"{file}: LoRA of {module} is A {list(A.shape)}, B {list(B.shape)} on W {list(W.shape)}; its configuration says rank {lora['lora_r']}; give the checkpoint's own folder"
            )
        state[f"{module}.base_layer.weight"] = (
            W.float() + lora["lora_alpha"] / lora["lora_r"] * B @ A
        )
    return {name.replace(".base_layer.", "."): value for name, value in state.items()}
