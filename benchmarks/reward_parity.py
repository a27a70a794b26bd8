"""Numbers of the original Qwen2-VL reward models, for tests/rewards/test_qwen_rewards.py.

They come from tiny random networks under transformers 4.45.2.

The original classes call the text model of Qwen2VLForConditionalGeneration on embeddings that have
the vision tokens filled in, without positions, and put a head on its hidden states (HPSv3:
hpsv3/model/qwen2vl_trainer.py; VideoReward: trainer.py of VideoAlign, adapted by peft). The same
calls are made here; the networks differ from the real ones in size only.

    python -m venv parity
    parity/bin/pip install torch==2.13.0 transformers==4.45.2 peft==0.10.0 pillow
    parity/bin/python benchmarks/reward_parity.py tests/golden_rewards
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

PADDING, VISION_START, VISION_END, IMAGE, VIDEO, FIRST_REWARD = 256, 259, 260, 261, 262, 263
"""Numbers of the tokens after 256 bytes.

They are <|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|>
<|video_pad|>; then the reward tokens.
"""
RANK, ALPHA = 2, 4
VISION = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2)
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    rms_norm_eps=1e-6,
)
TOKENS = dict(
    vocab_size=280,
    bos_token_id=PADDING,
    eos_token_id=258,
    vision_start_token_id=VISION_START,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
)
"""Sizes and numbers of tokens; the embeddings have more rows than the tokenizer has tokens.

The real ones begin so too.
"""
ROPE = dict(rope_theta=1e4, rope_scaling={"type": "mrope", "mrope_section": (2, 3, 3)})
SIZES = ((56, 56), (56, 84))
"""Pixels of the two frames of a batch: different grids, so that their rows differ in length."""


def config(tied: bool) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        **TEXT, **TOKENS, **copy.deepcopy(ROPE), vision_config=VISION, tie_word_embeddings=tied
    )


def published(made: Qwen2VLConfig) -> dict:
    """Settings as the config.json of Qwen2-VL has them.

    They are what differs from the defaults, and the rope's type before the class rewrites it.
    """
    written = json.loads(made.to_json_string())
    return written | ROPE | {"vision_config": {**VISION, "model_type": "qwen2_vl"}}


def base(
    generator: torch.Generator, tied: bool, head: nn.Module, tokens: int
) -> Qwen2VLForConditionalGeneration:
    """A random network with a head, all weights exact in bfloat16.

    Its embeddings are cut to the tokenizer's tokens as in the original.
    """
    network = Qwen2VLForConditionalGeneration(config(tied))
    network.rm_head = head
    network.resize_token_embeddings(FIRST_REWARD + tokens)
    randomise(network, generator)
    return network.eval()


@torch.no_grad()
def randomise(network: nn.Module, generator: torch.Generator) -> None:
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        value = (
            0.2 * noise + (1 if parameter.mean() == 1 else 0)
            if parameter.dim() == 1
            else noise / parameter[0].numel() ** 0.5
        )
        parameter.copy_(value.bfloat16())


def rows(
    generator: torch.Generator, pad: int, counts: list[int], rewards: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make ids and mask: vision tokens, text, then every reward token after some more.

    The longer row has the shorter text.
    """
    made = []
    for count, text in zip(counts, (9, 5)):
        row = [VISION_START, *[pad] * count, VISION_END]
        for token in (None, *rewards):
            row += ([] if token is None else [token]) + torch.randint(
                0, 256, (text,), generator=generator
            ).tolist()
        made.append(torch.tensor(row))
    ids = nn.utils.rnn.pad_sequence(made, batch_first=True, padding_value=PADDING)
    return ids, nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in made], batch_first=True)


@torch.no_grad()
def original(
    network: Qwen2VLForConditionalGeneration,
    ids: torch.Tensor,
    mask: torch.Tensor,
    patches: torch.Tensor,
    grid: torch.Tensor,
    pad: int,
) -> torch.Tensor:
    """The head at every reward token [B, tokens, outputs]."""
    embedded = network.model.embed_tokens(ids)
    seen = network.visual(patches, grid_thw=grid)
    embedded = embedded.masked_scatter((ids == pad)[..., None].expand_as(embedded), seen)
    hidden = network.model(
        input_ids=None,
        position_ids=None,
        attention_mask=mask,
        inputs_embeds=embedded,
        use_cache=False,
    )[0]
    return network.rm_head(hidden)[ids >= FIRST_REWARD].view(
        len(ids), int((ids[0] >= FIRST_REWARD).sum()), -1
    )


def processed(
    films: list[np.ndarray], kind: str, **sizes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and grid of films, uint8 [T, H, W, C] each, by the original's processor."""
    processor = Qwen2VLImageProcessor(**sizes)
    if kind == "image":
        out = processor(images=[film[0] for film in films], return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]
    out = processor(images=None, videos=[list(film) for film in films], return_tensors="pt")
    return out["pixel_values_videos"], out["video_grid_thw"]


def case(
    name: str, generator: torch.Generator, network: nn.Module, kind: str, frames: int, rewards: int
) -> dict[str, torch.Tensor]:
    """Weights, frames, ids, mask and outputs of one model."""
    films = [
        torch.randint(0, 256, (frames, *size, 3), generator=generator, dtype=torch.uint8)
        for size in SIZES
    ]
    patches, grid = processed([film.numpy() for film in films], kind)
    pad = IMAGE if kind == "image" else VIDEO
    ids, mask = rows(
        generator,
        pad,
        (grid.prod(1) // 4).tolist(),
        list(range(FIRST_REWARD, FIRST_REWARD + rewards)),
    )
    plain = (
        network
        if isinstance(network, Qwen2VLForConditionalGeneration)
        else network.base_model.model
    )
    tensors = {f"weights.{key}": value.bfloat16() for key, value in network.state_dict().items()}
    tensors |= {f"frames.{i}": film.permute(0, 3, 1, 2) for i, film in enumerate(films)}
    tensors |= {"ids": ids, "mask": mask, "outputs": original(plain, ids, mask, patches, grid, pad)}
    return {f"{name}.{key}": value.clone().contiguous() for key, value in tensors.items()}


def resizing(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Smooth films of an awkward size and their patches, as picture and as video.

    They are shrunk to at most 6 cells.
    """
    coarse = torch.rand(1, 3, 4, 5, 7, generator=generator)
    film = (
        (
            torch.nn.functional.interpolate(coarse, (4, 60, 100), mode="trilinear")[0].permute(
                1, 2, 3, 0
            )
            * 255
        )
        .round()
        .to(torch.uint8)
    )
    tensors = {"resizing.frames": film.permute(0, 3, 1, 2).contiguous()}
    for kind in ("image", "video"):
        patches, grid = processed(
            [film.numpy()], kind, min_pixels=4 * 28 * 28, max_pixels=6 * 28 * 28
        )
        tensors |= {f"resizing.{kind}.patches": patches, f"resizing.{kind}.grid": grid}
    return tensors


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(20240)
    width = TEXT["hidden_size"]
    hpsv3 = base(
        generator,
        False,
        nn.Sequential(
            nn.Linear(width, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        ),
        1,
    )
    video = base(generator, True, nn.Linear(width, 1, bias=False), 3)
    adapted = [
        name
        for name, module in video.named_modules()
        if isinstance(module, nn.Linear)
        and not any(part in name for part in ("visual", "lm_head", "rm_head"))
    ]
    video = get_peft_model(
        video, LoraConfig(target_modules=adapted, r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM")
    ).eval()
    randomise(video, generator)
    tensors = (
        case("hpsv3", generator, hpsv3, "image", 1, 1)
        | case("videoreward", generator, video, "video", 4, 3)
        | resizing(generator)
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qwen.safetensors").write_bytes(save(tensors))
    about = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "lora": {"lora_r": RANK, "lora_alpha": ALPHA},
    }
    about |= {"hpsv3": published(config(False)), "videoreward": published(config(True))}
    (folder / "qwen.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(
            "usage: reward_parity.py FOLDER   (where qwen.safetensors and qwen.json go: tests/golden_rewards)"
        )
    main(Path(sys.argv[1]))
