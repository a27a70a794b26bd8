"""Legibility of the text that a prompt puts in quotes: PP-OCRv6 of the package rapidocr.

    a shop with a sign that says "OPEN"

For every frame, over the lines of text that the detector finds in it (with ``detect: false`` the
frame itself is the line):

    likelihood   largest P(asked | line)^(1 / characters), by the recogniser's CTC, case as asked
    similarity   largest of what is read, line by line and all lines together, to what is asked (difflib's ratio, whatever the case)
    score        mean of both over quoted texts and frames

The similarity leads to the text from afar, the likelihood still ranks clips that all read right, or
all wrong.

What it falls for: text anywhere, of any look, over any picture: a caption burnt into a still image
is perfect. Use it beside rewards that see the rest.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpo.common.weights import identity
from kvpo.rewards.base import RewardSpec, VideoBatch
from kvpo.rewards.measured import Measured, require
from kvpo.rewards.pretrained.packaged import packaged

QUOTED = re.compile(
    r""" "([^"]+)" | “([^”]+)” | ‘([^’]+)’ | (?<!\w) ' ((?:[^'] | \b'\b)+) ' (?!\w) """, re.VERBOSE
)
RECOGNISER = "models/PP-OCRv6_rec_small.onnx"
HEIGHT = 48
"""Pixels, of a line as the recogniser takes it."""
WIDTH = 320
"""Pixels, of the narrowest picture that it was trained on; shorter lines are padded."""
SIDE = 320
"""Smaller frames are enlarged to this shorter side before text is looked for in them."""


def quoted(prompt: str) -> tuple[str, ...]:
    """The texts that a prompt has in double or single quotes, straight or curly.

    An apostrophe is no quote.
    """
    texts = (" ".join("".join(alternatives).split()) for alternatives in QUOTED.findall(prompt))
    return tuple(filter(None, texts))


def likelihood(p_TV: torch.Tensor, ids: Sequence[int]) -> float:
    """P(ids | p)^(1 / characters) of a CTC output [steps, classes], class 0 = blank.

    0 where the text is longer than the line has steps for.
    """
    log_p = p_TV.clamp(min=1e-12).log()[:, None]
    loss = torch.nn.functional.ctc_loss(
        log_p,
        torch.tensor([list(ids)]),
        torch.tensor([len(p_TV)]),
        torch.tensor([len(ids)]),
        reduction="none",
    )
    return math.exp(-loss.item() / len(ids))


def similarity(asked: str, lines: Sequence[str]) -> float:
    """Similarity of a text to the nearest line, or to all lines together, in [0, 1].

    0 where there are no lines.
    """
    return max(
        difflib.SequenceMatcher(None, asked.casefold(), read.casefold()).ratio()
        for read in {*lines, " ".join(lines)}
    )


class Recogniser:
    """The recognition network by itself, for its probabilities.

    rapidocr keeps its best guess only, and a reward wants the probabilities.
    """

    def __init__(self, path: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        characters = self.session.get_modelmeta().custom_metadata_map["character"].splitlines()
        self.classes = ("", *characters, " ")  # class 0 is CTC's blank, the last one the space
        self.class_of = {character: i for i, character in enumerate(self.classes)}

    def probabilities(self, line_HWC: np.ndarray) -> torch.Tensor:
        """[steps, classes] of a picture of one line, BGR uint8."""
        import cv2

        height, width = line_HWC.shape[:2]
        wide = max(1, math.ceil(HEIGHT * width / height))
        x = np.zeros((1, 3, HEIGHT, max(WIDTH, wide)), np.float32)
        x[0, :, :, :wide] = cv2.resize(line_HWC, (wide, HEIGHT)).transpose(2, 0, 1) / 127.5 - 1
        return torch.from_numpy(
            self.session.run(None, {self.session.get_inputs()[0].name: x})[0][0]
        )

    def text(self, p_TV: torch.Tensor) -> str:
        """The likeliest class of every step, repeats and blanks left out."""
        return "".join(
            self.classes[i] for i in p_TV.argmax(1).unique_consecutive().tolist()
        ).strip()

    def ids(self, text: str) -> list[int]:
        """Classes of its characters.  ValueError for one that it does not know."""
        if unknown := {c for c in text if c not in self.class_of}:
            raise ValueError(
                f"the prompt asks for {text!r}, and {''.join(sorted(unknown))!r} is none of the characters that the reward 'ocr' reads; leave that prompt out"
            )
        return [self.class_of[c] for c in text]


@dataclass
class TextReward(Measured):
    """Legibility of the prompt's quoted texts, in [0, 1]; NaN where the prompt has none.

    It runs on the CPU, whatever the device.
    """

    detect: bool = True
    """Look for lines of text in the frame; False: the whole frame is one line."""
    spec: RewardSpec = RewardSpec(
        "ocr",
        "ocr",
        looks_at="whether the text that the prompt quotes can be read",
        fps=2.0,
        packages=("rapidocr", "onnxruntime"),
        extra="offline",
        licence="Apache-2.0 (RapidOCR, PP-OCRv6)",
    )
    recogniser: Recogniser | None = field(default=None, init=False, repr=False)
    detector: Any = field(default=None, init=False, repr=False)

    def load(self, device: str | torch.device = "cpu") -> None:
        if self.recogniser is not None:
            return
        require(self.spec)
        path = packaged("rapidocr", RECOGNISER)
        self.recogniser, self.detector = Recogniser(path), _detector() if self.detect else None
        self.spec = replace(self.spec, weights=identity("rapidocr", [path]))

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.recogniser is None:
            raise RuntimeError("ocr is not loaded; call load(device) before score(batch)")
        frames_BTHWC = batch.frames.cpu().movedim(2, -1).flip(-1).numpy()  # BGR, as OpenCV has it
        rows = [
            self._clip(clip, quoted(prompt)) for clip, prompt in zip(frames_BTHWC, batch.prompts)
        ]
        parts = dict(zip(("likelihood", "similarity"), torch.tensor(rows).T))
        return (parts["likelihood"] + parts["similarity"]) / 2, parts

    def _clip(self, frames_THWC: np.ndarray, asked: tuple[str, ...]) -> tuple[float, float]:
        """Mean likelihood and similarity over frames and asked texts."""
        if not asked:
            return math.nan, math.nan
        assert self.recogniser is not None, "measure has asked"
        wanted = [(text, self.recogniser.ids(text)) for text in asked]
        return tuple(
            np.mean(
                [found for frame in frames_THWC for found in self._frame(frame, wanted)], axis=0
            ).tolist()
        )

    def _frame(
        self, frame_HWC: np.ndarray, wanted: Sequence[tuple[str, Sequence[int]]]
    ) -> list[tuple[float, float]]:
        """Likelihood and similarity of every wanted text; 0 where the frame has no text."""
        assert self.recogniser is not None, "measure has asked"
        outputs = [self.recogniser.probabilities(line) for line in self._lines(frame_HWC)]
        read = [self.recogniser.text(p) for p in outputs]
        return [
            (max((likelihood(p, ids) for p in outputs), default=0.0), similarity(text, read))
            for text, ids in wanted
        ]

    def _lines(self, frame_HWC: np.ndarray) -> list[np.ndarray]:
        """Upright pictures of the lines of text in a frame, from top to bottom."""
        if not self.detect:
            return [frame_HWC]
        boxes = self.detector(frame_HWC, use_rec=False).boxes
        return [] if boxes is None else self.detector.crop_text_regions(frame_HWC, boxes)


def _detector() -> Any:
    """rapidocr, set to find lines and to say nothing."""
    from rapidocr import RapidOCR

    threads = {
        f"EngineConfig.onnxruntime.{kind}_op_num_threads": torch.get_num_threads()
        for kind in ("intra", "inter")
    }
    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,
            "Det.limit_side_len": SIDE,
            **threads,
        }
    )
