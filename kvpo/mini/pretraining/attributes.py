"""Training of the attribute network.

    python -m kvpo.mini.pretraining.attributes --seed 0 --steps 1200

Every step renders a fresh batch of frames, each with an object anywhere, cut by the pillar or
missing, and spoils them the way a small generator does: blur, noise, coding errors in blocks, faded
or shifted colours. Accuracy and calibration are measured on frames of stories from other streams,
clean and spoilt, and stored with the weights. Two to four minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kvpo.common.files import open_to_readers
from kvpo.common.rng import stream
from kvpo.mini.rewards.attributes import HEADS, WEIGHTS, AttributeNet
from kvpo.mini.stories import write_story
from kvpo.mini.world import COLOURS, PILLAR, PLACES, SHAPES, SIZE, SIZES, backdrop, coverage

BATCH = 64
RATE = 4e-3
VISIBLE = 0.5
"""Share of the object that must show for its shape, colour and size to be asked.

Below HIDDEN it counts as none.
"""
HIDDEN = 0.08


def frames(generator: torch.Generator, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Random frames RGB [N, 3, 64, 64] in [0, 1] and their labels int64 [N]; -100 = not asked."""

    def draw(n):
        return torch.randint(n, (count,), generator=generator)

    labels = {name: draw(len(values)) for name, values in HEADS.items()}
    labels["object"] = (torch.rand(count, generator=generator) > 0.1).long()
    centre = torch.rand(count, 2, generator=generator) * SIZE
    radius = torch.tensor(list(SIZES.values()))[labels["size"]] * (
        1 + 0.05 * torch.randn(count, generator=generator)
    )
    alpha = torch.empty(count, SIZE, SIZE)
    for k, shape in enumerate(SHAPES):
        at = (labels["shape"] == k).nonzero().flatten()
        alpha[at] = coverage(shape, centre[at], radius[at][:, None, None])
    whole = alpha.sum((1, 2))
    alpha[labels["pillar"] == 1, :, PILLAR[0] : PILLAR[1]] = 0
    alpha[labels["object"] == 0] = 0
    shown = alpha.sum((1, 2)) / whole
    places = torch.stack(
        [torch.stack([backdrop(place, bool(p)) for p in (0, 1)]) for place in PLACES]
    )[labels["place"], labels["pillar"]]
    palette = (torch.tensor(list(COLOURS.values())) / 255.0)[labels["colour"]]
    solid = 1 - 0.25 * torch.rand(count, 1, 1, 1, generator=generator) ** 2
    pixels = places + (solid * alpha[:, None]) * (palette[:, :, None, None] - places)
    labels["object"] = torch.where(shown < HIDDEN, 0, torch.where(shown >= VISIBLE, 1, -100))
    for name in ("shape", "colour", "size"):
        labels[name] = torch.where(shown >= VISIBLE, labels[name], -100)
    return pixels, labels


def spoil(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, coding errors, colour shifts and noise.

    Each has a strength drawn per frame (often none).
    """
    N = len(pixels)

    def strength(most):
        return most * (torch.rand(N, 1, 1, 1, generator=generator) * 1.5 - 0.5).clamp(min=0)

    x = _blur(pixels, 0.05 + strength(1.8)[:, 0, 0, 0])
    x = _coded(x, strength(0.35))
    x = x * (1 + strength(0.12) * torch.randn(N, 3, 1, 1, generator=generator)) + strength(
        0.06
    ) * torch.randn(N, 3, 1, 1, generator=generator)
    return (x + strength(0.08) * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def _blur(pixels: torch.Tensor, sigma_N: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of a width per frame, edges joined."""
    at = torch.arange(-4, 5.0)
    kernel = (-(at**2) / (2 * sigma_N[:, None] ** 2)).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    x = F.pad(pixels, (4, 4, 4, 4), mode="circular").flatten(0, 1)[None]
    x = F.conv2d(
        F.conv2d(x, kernel[:, None, None, :], groups=len(kernel)),
        kernel[:, None, :, None],
        groups=len(kernel),
    )
    return x[0].unflatten(0, pixels.shape[:2])


def _coded(pixels: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Code 8x8 blocks by a cosine transform rounded to multiples of ``step``, and back.

    It is coarser for finer detail.
    """
    k = torch.arange(8.0)
    # orthonormal rows
    dct = (
        torch.cos((k[None] + 0.5) * k[:, None] * math.pi / 8)
        * (0.125 + 0.125 * (k[:, None] > 0)) ** 0.5
    )
    blocks = pixels.unfold(2, 8, 8).unfold(3, 8, 8)
    step = (step[..., None, None] * (1 + (k[None] + k[:, None]) / 4)).clamp(min=1e-3)
    coded = ((dct @ blocks @ dct.T) / step).round() * step
    return (dct.T @ coded @ dct).transpose(3, 4).reshape(pixels.shape)


def train_classifier(seed: int = 0, steps: int = 1200) -> AttributeNet:
    """The network, trained from its seeded start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "attributes", "init").initial_seed())
        network = AttributeNet()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.1
    )
    for step in range(steps):
        generator = stream(seed, "attributes", step)
        pixels, labels = frames(generator, BATCH)
        loss = sum(
            F.cross_entropy(logit, labels[name])
            for name, logit in network(spoil(pixels, generator)).items()
        )
        if not loss.isfinite():
            raise RuntimeError(
                f"attribute network: loss {loss.item()} at step {step}; lower RATE or change the seed"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    return network.requires_grad_(False).eval()


def unseen_frames(seed: int, stories: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Every eighth frame of stories, and their labels, from the truth."""
    pixels: list[torch.Tensor] = []
    labels: dict[str, list[int]] = {name: [] for name in HEADS}
    for i in range(stories):
        story = write_story(seed, "attributes-test", i, blocks=10)
        truth, video = story.truth(), story.render()
        for t in range(0, len(video), 8):
            scene, shown = story.scenes[int(truth.scene[t])], 1 - float(truth.hidden[t])
            pixels.append(video[t])
            labels["object"].append(0 if shown < HIDDEN else 1 if shown >= VISIBLE else -100)
            labels["place"].append(HEADS["place"].index(scene.place))
            labels["pillar"].append(int(scene.pillar))
            for name in ("shape", "colour", "size"):
                labels[name].append(
                    HEADS[name].index(getattr(scene, name)) if shown >= VISIBLE else -100
                )
    return torch.stack(pixels), {name: torch.tensor(values) for name, values in labels.items()}


@torch.inference_mode()
def examine(network: AttributeNet, seed: int = 1, stories: int = 48) -> dict[str, dict[str, float]]:
    """Accuracy by attribute, and mean confidence minus accuracy ("excess").

    They are measured on unseen clean and spoilt frames.
    """
    clean, labels = unseen_frames(seed, stories)
    report: dict[str, dict[str, float]] = {}
    for kind, pixels in (
        ("clean", clean),
        ("spoilt", spoil(clean, stream(seed, "attributes-test", "spoil"))),
    ):
        logits = {name: torch.cat(parts) for name, parts in _collect(network, pixels).items()}
        report[kind] = {}
        for name, logit in logits.items():
            at = labels[name] >= 0
            confidence, guess = logit[at].softmax(-1).max(-1)
            right = (guess == labels[name][at]).float().mean()
            report[kind] |= {
                name: round(right.item(), 4),
                f"{name} excess": round((confidence.mean() - right).item(), 4),
            }
    return report


def _collect(network: AttributeNet, pixels: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    out: dict[str, list[torch.Tensor]] = {name: [] for name in HEADS}
    for part in pixels.split(256):
        for name, logit in network(part).items():
            out[name].append(logit)
    return out


def save(network: AttributeNet, path: Path, about: dict) -> None:
    """Weights and their card, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(
        {k: v.contiguous() for k, v in network.state_dict().items()},
        str(temporary),
        metadata={"card": json.dumps(about)},
    )
    open_to_readers(temporary)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="train the held-out attribute network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    network = train_classifier(options.seed, options.steps)
    about = {
        "seed": options.seed,
        "steps": options.steps,
        "batch": BATCH,
        "unseen": examine(network, options.seed + 1),
    }
    save(network, options.out, about)
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
