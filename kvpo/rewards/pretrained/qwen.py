"""A Qwen2-VL with a reward head: what the reward models HPSv3 and VideoReward share.

    frames -> whole cells of 28 x 28 pixels, patches of 14 x 14 x 2 frames
    prompt -> the model's own template as a chat, with one pad token for every cell
    both   -> Qwen2-VL -> hidden states at the reward tokens -> head, in float32 -> numbers

Both were trained with transformers 4.45. Two things of it must be kept, and are silent where they
are not:

    positions   reward models called its text model without any, which then meant 0, 1, 2 ... for all tokens.  Later versions
                compute positions in time, height and width instead: always given here.
    names       its weights are called visual.* and model.*, now model.visual.* and model.language_model.*

``benchmarks/reward_parity.py`` made the numbers that the tests compare this with, from the original
under 4.45.2.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from kvpo.common.weights import account, identity
from kvpo.rewards.measured import Pretrained
from kvpo.rewards.pretrained.released import find

PATCH, MERGE, FRAMES = 14, 2, 2
"""Sizes of Qwen2-VL's patches and cells.

They are pixels of a patch's side, patches of a cell's side (one token), and frames of a patch.
"""
CELL = PATCH * MERGE
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, of RGB in [0, 1], which Qwen2-VL's preprocessor has."""
CALL_PIXELS = 16 * 448 * 448
"""Resized pixels that go through the network at once: 16 pictures, or 16 frames of videos."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CHAT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
"""Qwen2-VL's chat template for one picture or video, then text."""
TEMPLATES = Path(__file__).parent / "templates"
"""Folder of the texts that the models were trained with; {text_prompt} stands for the prompt.

They are from the models' public code (MIT, see LICENSE there).
"""


class QwenReward(Pretrained):
    """Base of rewards on Qwen2-VL; equal ones share their network.

    A subclass is a dataclass with the fields ``weights``, ``base``, ``dtype``, ``spec`` and
    ``model``; it writes ``read`` and ``measure``.
    """

    weights: str
    base: str
    dtype: str

    @property
    def network(self) -> Hashable:
        return type(self), self.weights, self.base

    def read(self, dtype: torch.dtype) -> RewardNetwork:
        """The network from its files."""
        raise NotImplementedError(f"{type(self).__name__} has no read(dtype)")

    def load(self, device: str | torch.device = "cpu") -> None:
        """Load the network to a device, or share one that is loaded.

        Raises ValueError for files that are missing or of another model.
        """
        if self.model is None:
            auto = "bfloat16" if torch.device(device).type == "cuda" else "float32"
            dtype = DTYPES[auto if self.dtype == "auto" else self.dtype]
            key = (self.network, dtype)
            network = _NETWORKS.get(key) or self.read(dtype).eval().requires_grad_(False)
            self.model = _NETWORKS[key] = network
            self.spec = replace(self.spec, weights=network.identity)
        self.model.users.add(self)
        self.model.to(device)

    def offload(self) -> None:
        """Move the network to main memory, unless another reward still has it loaded."""
        if self.model is not None:
            self.model.users.discard(self)
            if not self.model.users:
                self.model.to("cpu")


class RewardNetwork(torch.nn.Module):
    """Qwen2-VL without its word head, with a reward head at ``tokens``.

    ``kind``: what it is shown. ``tokens``: texts of the reward tokens, in the order in which
    they were added to the tokenizer for the training, which is also that of the template.
    ``identity`` and ``settings``: of the weights, set by who reads them."""

    def __init__(
        self,
        config,
        tokenizer,
        kind: Literal["image", "video"],
        tokens: Sequence[str],
        head: torch.nn.Module,
    ):
        from transformers import Qwen2VLModel

        super().__init__()
        self.kind, self.tokenizer, self.tokens = kind, tokenizer, tuple(tokens)
        self.token_ids = [tokenizer.token_to_id(token) for token in tokens]
        self.pad_id = getattr(config, f"{kind}_token_id")
        self.model, self.rm_head = Qwen2VLModel(config), head
        self.identity = ""
        self.settings: Mapping[str, Any] = {}
        self.users: weakref.WeakSet[QwenReward] = weakref.WeakSet()

    def forward(
        self,
        ids_BL: torch.Tensor,
        mask_BL: torch.Tensor,
        patches_ND: torch.Tensor,
        grid_B3: torch.Tensor,
    ) -> torch.Tensor:
        """Answers of the head at the reward tokens, float32 [B, tokens, outputs].

        It takes token ids and their mask (padding right), the patches of all pictures or videos and
        their (t, h, w) in patches.
        """
        seen = (
            {"pixel_values": patches_ND, "image_grid_thw": grid_B3}
            if self.kind == "image"
            else {"pixel_values_videos": patches_ND, "video_grid_thw": grid_B3}
        )
        hidden = self.model(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            position_ids=self.positions(ids_BL),
            use_cache=False,
            **seen,
        ).last_hidden_state
        at = torch.isin(ids_BL, torch.tensor(self.token_ids, device=ids_BL.device))
        return self.rm_head(hidden[at].float()).view(len(ids_BL), len(self.token_ids), -1)

    def positions(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """0, 1, 2 ... on all three axes [3, B, L], as it was trained."""
        B, L = ids_BL.shape
        return torch.arange(L, device=ids_BL.device).expand(3, B, L)

    def judge(
        self, frames_BTCHW: torch.Tensor, texts: Sequence[str], least: int, most: int
    ) -> torch.Tensor:
        """Judge pictures (T = 1) or videos; returns float32 [B, tokens, outputs].

        They are uint8 on the network's device, each with its filled-in template. Frames are resized
        to at least ``least`` and at most ``most`` pixels, and go through the network in calls of
        about CALL_PIXELS.
        """
        B, T, _, H, W = frames_BTCHW.shape
        device, size = frames_BTCHW.device, fitting(H, W, least, most)
        at_once = max(1, CALL_PIXELS // (T * math.prod(size)))
        answers = []
        for first in range(0, B, at_once):
            patches, grid = patchify(resized(frames_BTCHW[first : first + at_once], size))
            ids, mask = self.encode(
                texts[first : first + at_once], cells=math.prod(grid) // MERGE**2
            )
            answers.append(
                self(
                    ids.to(device),
                    mask.to(device),
                    patches.flatten(0, 1),
                    torch.tensor([grid] * len(ids), device=device),
                )
            )
        return torch.cat(answers)

    def encode(self, texts: Sequence[str], cells: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode chats about a picture or video of that many cells: ids and mask [B, L].

        They are padded right. Raises ValueError where a prompt holds one of the model's own tokens.
        """
        pad = self.tokenizer.id_to_token(self.pad_id)
        rows = [
            torch.tensor(e.ids)
            for e in self.tokenizer.encode_batch(
                [CHAT.format(pads=pad * cells, text=text) for text in texts],
                add_special_tokens=False,
            )
        ]
        for row, text in zip(rows, texts):
            if (
                any((row == i).sum() != 1 for i in self.token_ids)
                or (row == self.pad_id).sum() != cells
            ):
                raise ValueError(
                    f"a prompt has {pad} or one of {', '.join(self.tokens)} in it, which only the model's template may use; take it out of: {text[-300:]!r}"
                )
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in rows], batch_first=True
        )
        return ids, mask


def check_dtype(dtype: str) -> None:
    """Check the number format; ValueError for one that these rewards do not run in."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype = {dtype!r} is unknown; choose auto, {' or '.join(DTYPES)}")


_NETWORKS: weakref.WeakValueDictionary[tuple, RewardNetwork] = weakref.WeakValueDictionary()
"""Networks in use, by what they were read from."""


def fitting(height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """Qwen2-VL's size for a frame: whole cells of about its own shape.

    It has at most ``most`` pixels, else at least ``least``. Raises ValueError for a frame more than
    200 times as long as wide.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"frames of {width} x {height} are too long, but Qwen2-VL takes at most 200:1; give less oblong clips"
        )
    h, w = (max(CELL, round(side / CELL) * CELL) for side in (height, width))
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        h, w = (max(CELL, math.floor(side / shrink / CELL) * CELL) for side in (height, width))
    elif h * w < least:
        grow = math.sqrt(least / (height * width))
        h, w = (math.ceil(side * grow / CELL) * CELL for side in (height, width))
    return h, w


def resized(frames_BTCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize uint8 frames to float32 in whole steps of 0 ... 255, bicubic with antialiasing.

    They are rounded as PIL and torchvision do (a step apart here and there).
    """
    if frames_BTCHW.shape[-2:] == size:
        return frames_BTCHW.float()
    frames = F.interpolate(
        frames_BTCHW.flatten(0, 1).float(),
        size,
        mode="bicubic",
        antialias=True,
        align_corners=False,
    )
    return frames.round().clamp(0, 255).view(*frames_BTCHW.shape[:3], *size)


def patchify(frames_BTCHW: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Cut frames in 0 ... 255 into normalised patches [B, t h w, 3 * 2 * 14 * 14], and (t, h, w).

    Frames have whole cells, and patches stand cell by cell. The last frame is repeated where T is
    odd.
    """
    if frames_BTCHW.shape[1] % FRAMES:
        frames_BTCHW = torch.cat((frames_BTCHW, frames_BTCHW[:, -1:]), dim=1)
    mean, std = (torch.tensor(v, device=frames_BTCHW.device).view(3, 1, 1) for v in (MEAN, STD))
    x = (frames_BTCHW / 255 - mean) / std
    B, T, C, H, W = x.shape
    t, h, w = T // FRAMES, H // PATCH, W // PATCH
    x = x.view(B, t, FRAMES, C, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    return x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(
        B, t * h * w, C * FRAMES * PATCH * PATCH
    ), (t, h, w)


def open_folder(reward: str, name: str, files: Sequence[str]) -> Path:
    """Find a local folder, or download a hub id, that has these files (patterns).

    Raises ValueError that says what is missing.
    """
    folder = find(reward, name, files)
    if missing := [pattern for pattern in files if not any(folder.glob(pattern))]:
        raise ValueError(
            f"reward {reward!r}: {name} has no {', '.join(missing)}; copy into it {', '.join(files)}"
        )
    return folder


def open_base(reward: str, name: str, kind: Literal["image", "video"], tokens: Sequence[str]):
    """Open configuration and tokenizer of the Qwen2-VL that was trained on.

    The reward tokens are added after all others, in order. Only ``config.json`` and
    ``tokenizer.json`` are read: the reward model's own file has all weights.
    """
    from tokenizers import Tokenizer
    from transformers import Qwen2VLConfig

    folder = open_folder(reward, name, ("config.json", "tokenizer.json"))
    config = Qwen2VLConfig.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pad = f"<|{kind}_pad|>"
    pad_id, wanted = tokenizer.token_to_id(pad), getattr(config, f"{kind}_token_id")
    if pad_id != wanted:
        raise ValueError(
            f"base {name!r}: {pad} is token {pad_id} of its tokenizer, but {wanted} in config.json; give a whole Qwen2-VL folder"
        )
    tokenizer.add_special_tokens(list(tokens))
    config.text_config.vocab_size = rows = tokenizer.get_vocab_size()
    if [tokenizer.token_to_id(token) for token in tokens] != list(range(rows - len(tokens), rows)):
        raise ValueError(
            f"base {name!r}: {', '.join(tokens)} are not the last tokens of its tokenizer, in this order, as in the training; give the plain Qwen2-VL"
        )
    return config, tokenizer


def renamed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename weights from their names in transformers 4.45 to ours.

    The word head, which no reward needs, is left out.
    """
    prefixes = {
        "visual.": "model.visual.",
        "model.": "model.language_model.",
        "rm_head.": "rm_head.",
    }
    names = {
        name: next(
            (new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)),
            name,
        )
        for name in state
    }
    return {names[name]: value for name, value in state.items() if not name.startswith("lm_head.")}


def filled(
    name: str,
    make: Callable[[], RewardNetwork],
    state: Mapping[str, torch.Tensor],
    file: Path,
    dtype: torch.dtype,
) -> RewardNetwork:
    """Make the network and fill in all its weights, named as in 4.45; the head in float32.

    ``name``: where they come from. Raises ValueError that lists what does not fit.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():  # 7 billion random numbers are not worth waiting for
        network = make()
    state = renamed(state)
    account(
        state,
        {name: value.shape for name, value in network.state_dict().items()},
        str(file),
        "the reward model on this base",
        "give the reward model's own file and the Qwen2-VL size it was trained on",
    )
    network.load_state_dict(
        {
            name: value.to(torch.float32 if name.startswith("rm_head.") else dtype)
            for name, value in state.items()
        },
        assign=True,
    )
    network.identity = identity(name, [file])
    return network
