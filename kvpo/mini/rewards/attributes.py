"""A small network that names the attributes of single frames of the miniature's world.

It is the held-out second opinion.

It learned from rendered frames with blur, noise and coding errors
(``kvpo.mini.pretraining.attributes``), shares no code with the pixel rewards, and is never trained
on or against. Convolutions wrap around, as the world does.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from kvpo.mini.world import COLOURS, PLACES, SHAPES, SIZES

HEADS = {
    "object": ("none", "one"),
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
    "pillar": ("no", "yes"),
}
"""Attribute -> its values, in the order of the logits.

Shape, colour and size mean nothing where there is no object.
"""
WEIGHTS = Path(__file__).parent / "weights" / "attributes.safetensors"
CHUNK = 256
"""Frames in one forward pass."""


class AttributeNet(nn.Module):
    """Network from a 64x64 RGB frame to 128 numbers to logits of every attribute.

    It has about 85,000 parameters.
    """

    def __init__(self):
        super().__init__()
        # in, out, kernel, stride
        widths = (
            (3, 16, 5, 2),
            (16, 32, 3, 2),
            (32, 48, 3, 2),
            (48, 64, 3, 1),
            (64, 64, 3, 1),
        )
        self.body = nn.Sequential(
            *(
                layer
                for i, o, k, s in widths
                for layer in (
                    nn.Conv2d(i, o, k, s, k // 2, padding_mode="circular", bias=False),
                    nn.GroupNorm(4, o),
                    nn.SiLU(),
                )
            )
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(128, len(values)) for name, values in HEADS.items()}
        )

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed RGB [N, 3, 64, 64] in [0, 1] as [N, 128].

        It holds what is anywhere (maximum) and what is everywhere (mean).
        """
        x = self.body(pixels * 2 - 1)
        return torch.cat((x.amax((2, 3)), x.mean((2, 3))), 1)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits [N, number of values] by attribute."""
        e = self.embed(pixels)
        return {name: head(e) for name, head in self.heads.items()}


def load_network(path: str | Path = WEIGHTS, device: str | torch.device = "cpu") -> AttributeNet:
    """Load the trained network, frozen.

    Raises ValueError if the file is missing, damaged or another network's.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping: it has keys() and cannot be iterated)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot read attribute weights {path}: {error}; make them with python -m kvpo.mini.pretraining.attributes"
        ) from error
    network = AttributeNet()
    wanted = {key: value.shape for key, value in network.state_dict().items()}
    if {key: value.shape for key, value in state.items()} != wanted:
        raise ValueError(
            f"{path} does not hold an attribute network (its tensors differ in name or shape); make it with python -m kvpo.mini.pretraining.attributes"
        )
    network.load_state_dict(state)
    return network.requires_grad_(False).eval().to(device)


@torch.inference_mode()
def read_frames(
    network: AttributeNet, frames: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Read the attributes of frames, uint8 [B, T, C, H, W].

    Returns probabilities by attribute [B, T, values] and unit embeddings [B, T, 128].
    """
    device = next(network.parameters()).device
    embeddings = torch.cat(
        [network.embed(part.to(device).float() / 255) for part in frames.flatten(0, 1).split(CHUNK)]
    )
    shape = frames.shape[:2]
    probabilities = {
        name: head(embeddings).softmax(-1).unflatten(0, shape).cpu()
        for name, head in network.heads.items()
    }
    return probabilities, F.normalize(embeddings, dim=-1).unflatten(0, shape).cpu()
