"""HPSv3 as its authors' own class computes it: the yardstick of kvpo's port.

It runs in the environment that `kvpo reward-env create hpsv3` makes.

Source: https://github.com/MizzenAI/HPSv3 (MIT), class HPSv3RewardInferencer, package hpsv3 1.0.0.
"""

import numpy as np

SPEC = {
    "name": "hpsv3_original",
    "family": "qwen-vl",
    "bounds": None,
    "licence": "MIT",
    "memory_gb": 18.0,
}


class Original:
    """Mean preference mu of every ``stride``-th frame.

    Part ``log_sigma`` is the mean of its second output, the logarithm of its doubt.
    """

    def __init__(self, device, checkpoint, config, stride):
        from hpsv3 import HPSv3RewardInferencer
        from huggingface_hub import hf_hub_download

        self.stride = stride
        self.weights = checkpoint or hf_hub_download("MizzenAI/HPSv3", "HPSv3.safetensors")
        self.inferencer = HPSv3RewardInferencer(config or None, self.weights, device)

    def to(self, device):
        self.inferencer.model.to(device)
        self.inferencer.device = device

    def score(self, frames, fps, prompts, history):
        mean = np.array(
            [
                self.judge(clip, prompt).mean(axis=0)
                for clip, prompt in zip(frames[:, :: self.stride], prompts)
            ]
        )
        return {"scores": mean[:, 0], "parts": {"log_sigma": mean[:, 1]}}

    def judge(self, clip, prompt):
        """[T, 2]: mu and log sigma of every frame."""
        import torch
        from PIL import Image

        images = [Image.fromarray(frame.transpose(1, 2, 0)) for frame in clip]
        with torch.inference_mode():
            return self.inferencer.reward(images, [prompt] * len(images)).float().cpu().numpy()


def load(device, checkpoint="", config="", stride=1):
    """Load HPSv3.safetensors from ``checkpoint``; "" = from the hub.

    ``config``: a YAML like the package's own, to name another place of the base model.
    """
    return Original(device, checkpoint, config, stride)
