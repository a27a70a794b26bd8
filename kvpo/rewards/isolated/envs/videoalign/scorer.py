"""VideoReward as its authors' own class computes it: the yardstick of kvpo's port.

It runs in the environment that `kvpo reward-env create videoalign` makes.

Source: https://github.com/KwaiVGI/VideoAlign (MIT), class VideoVLMRewardInference of inference.py.
"""

import glob
import os
import sys

SPEC = {
    "name": "videoreward_original",
    "family": "qwen-vl",
    "bounds": None,
    "min_frames": 4,
    "licence": "Apache-2.0, code MIT",
    "memory_gb": 6.0,
    "report": ("VQ", "MQ", "TA"),
}
PARTS = ("VQ", "MQ", "TA")


class Original:
    """The sum of visual quality, motion quality and text alignment; each of them is a part.

    They are normalised as the checkpoint's config says.
    """

    def __init__(self, device, code, checkpoint):
        self.clips, self.fps = {}, 0.0
        os.environ["FORCE_QWENVL_VIDEO_READER"] = "memory"
        sys.path.insert(0, code)
        import inference
        import vision_process

        configure = inference.TrainingConfig
        # The class asks for flash attention whatever its config says; torch's own computes the
        # same.
        inference.TrainingConfig = lambda **options: configure(
            **{**options, "disable_flash_attn2": True}
        )
        vision_process.VIDEO_READER_BACKENDS["memory"] = self.read
        self.frames_to_take = vision_process.smart_nframes
        self.inferencer = inference.VideoVLMRewardInference(checkpoint, device=device)
        self.weights = sorted(glob.glob(os.path.join(checkpoint, "checkpoint-*", "*model*")))

    def to(self, device):
        self.inferencer.model.to(device)
        self.inferencer.device = device

    def read(self, wanted):
        """uint8 [T, 3, H, W] of the frames that the original takes of a file.

        No file is written, which would lose digits.
        """
        import torch

        clip = self.clips[os.path.basename(wanted["video"])]
        count = self.frames_to_take(wanted, total_frames=len(clip), video_fps=self.fps)
        return torch.from_numpy(clip)[torch.linspace(0, len(clip) - 1, count).round().long()]

    def score(self, frames, fps, prompts, history):
        import torch

        self.fps, self.clips = fps, {str(number): clip for number, clip in enumerate(frames)}
        with torch.inference_mode():
            rewards = self.inferencer.reward(list(self.clips), prompts)
        return {
            "scores": [r["Overall"] for r in rewards],
            "parts": {part: [r[part] for r in rewards] for part in PARTS},
        }


def load(device, code, checkpoint):
    """Load VideoReward with its authors' code.

    ``code``: a checkout of VideoAlign. ``checkpoint``: the folder with model_config.json and
    checkpoint-N.
    """
    return Original(device, code, checkpoint)
