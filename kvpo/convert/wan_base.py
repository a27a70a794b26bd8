"""Parts of Wan2.1 that a released generator checkpoint does not hold.

They are text encoder, tokenizer, VAE, and the transformer's sizes.

They come from Wan2.1 itself, in one of its two public layouts, as a local folder or a hub id:

    diffusers   Wan-AI/Wan2.1-T2V-1.3B-Diffusers   model_index.json transformer/ vae/ text_encoder/ tokenizer/
    original    Wan-AI/Wan2.1-T2V-1.3B             config.json Wan2.1_VAE.pth models_t5_umt5-xxl-enc-bf16.pth google/umt5-xxl/
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from kvpo.common.access import check_readable
from kvpo.common.files import first_line
from kvpo.common.finite import check_finite
from kvpo.common.hub import hub_faults
from kvpo.common.weights import State, account, read_checkpoint

ORIGINAL_T5 = "models_t5_umt5-xxl-enc-bf16.pth"
ORIGINAL_VAE = "Wan2.1_VAE.pth"
ORIGINAL_TOKENIZER = "google/umt5-xxl"
PARTS = ("vae", "text_encoder", "tokenizer")
WANTED = (
    "*.json",
    "vae/*",
    "text_encoder/*",
    "tokenizer/*",
    "transformer/config.json",
    ORIGINAL_T5,
    ORIGINAL_VAE,
    f"{ORIGINAL_TOKENIZER}/*",
)
"""Patterns of the files downloaded of a hub id: all but its own transformer's weights."""


class BaseFolder(Protocol):
    @property
    def folder(self) -> Path: ...

    def transformer_config(self) -> dict[str, Any]:
        """Arguments of `WanTransformer3DModel`."""
        ...

    def write_parts(self, folder: Path) -> None:
        """``vae``, ``text_encoder`` and ``tokenizer`` in diffusers layout."""
        ...


def open_base(name: str) -> BaseFolder:
    """Open the base of a local folder or hub id.

    Raises FileNotFoundError or ValueError that says what is missing.
    """
    folder = Path(name)
    if not folder.is_dir():
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            raise FileNotFoundError(
                f"--base {name} is no folder; give Wan2.1's own folder, in diffusers or original layout, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
            )
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(WANTED)))
        except hub_faults() as error:
            raise FileNotFoundError(
                f"--base {name} is no local folder, and could not be downloaded ({first_line(error)}); where there is a network: hf download {name} --local-dir FOLDER, then give --base FOLDER"
            ) from None
    base: BaseFolder
    if (folder / "model_index.json").is_file():
        base, needed = DiffusersBase(folder), ("transformer/config.json", *PARTS)
    else:
        needed = ("config.json", ORIGINAL_VAE, ORIGINAL_T5, ORIGINAL_TOKENIZER)
        base = OriginalBase(folder)
    if missing := [part for part in needed if not (folder / part).exists()]:
        raise FileNotFoundError(
            f"--base {name} is neither a whole diffusers folder nor a whole Wan2.1 folder: {', '.join(missing)} missing; fetch the base once more"
        )
    return base


@dataclass(frozen=True)
class DiffusersBase:
    folder: Path

    def transformer_config(self) -> dict[str, Any]:
        check_readable(self.folder / "transformer" / "config.json")
        config = json.loads((self.folder / "transformer" / "config.json").read_text())
        if config.get("_class_name") != "WanTransformer3DModel" or config.get("image_dim"):
            raise ValueError(
                f"{self.folder} holds a {config.get('_class_name')}{' for images' if config.get('image_dim') else ''}; the base must be a Wan2.1 text-to-video model"
            )
        return arguments(config)

    def write_parts(self, folder: Path) -> None:
        for part in PARTS:  # as they are: their dtype is chosen when they are loaded
            _check_part(self.folder / part)
            copy_tree(self.folder / part, folder / part)


@dataclass(frozen=True)
class OriginalBase:
    folder: Path

    def transformer_config(self) -> dict[str, Any]:
        config = json.loads((self.folder / "config.json").read_text())
        if config.get("model_type") != "t2v":
            raise ValueError(
                f"{self.folder / 'config.json'} describes a model of type {config.get('model_type')!r}; the base must be a text-to-video model, t2v"
            )
        return {
            "patch_size": (1, 2, 2),
            "num_attention_heads": config["num_heads"],
            "attention_head_dim": config["dim"] // config["num_heads"],
            "in_channels": config["in_dim"],
            "out_channels": config["out_dim"],
            "text_dim": config.get("text_dim", 4096),
            "freq_dim": config["freq_dim"],
            "ffn_dim": config["ffn_dim"],
            "num_layers": config["num_layers"],
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": config["eps"],
        }

    def write_parts(self, folder: Path) -> None:
        _vae(self.folder / ORIGINAL_VAE).save_pretrained(folder / "vae")
        _text_encoder(self.folder / ORIGINAL_T5).save_pretrained(folder / "text_encoder")
        AutoTokenizer.from_pretrained(
            self.folder / ORIGINAL_TOKENIZER, local_files_only=True
        ).save_pretrained(folder / "tokenizer")


def _check_part(folder: Path) -> None:
    """Check that a part's files may be read and its weights are finite.

    Raises PermissionError or FloatingPointError where not.
    """
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        check_readable(path)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                check_finite(
                    ((name, file.get_tensor(name)) for name in file.keys()),  # noqa: SIM118
                    str(path),
                    "fetch the base once more",
                )


def _vae(path: Path) -> AutoencoderKLWan:
    """Wan2.1's autoencoder; only its width is read from the weights."""
    state = convert_wan_vae_to_diffusers(read_checkpoint(path))
    if "encoder.conv_in.weight" not in state:
        raise ValueError(
            f"{path} holds no Wan2.1 VAE: encoder.conv1.weight is not in it; fetch the base once more"
        )
    return _filled(
        lambda: AutoencoderKLWan(base_dim=len(state["encoder.conv_in.weight"])), state, path
    )


def _text_encoder(path: Path) -> UMT5EncoderModel:
    """The UMT5 encoder with Wan's names; its sizes are those of the weights."""
    found = read_checkpoint(path)
    state = {_t5_name(name): tensor for name, tensor in found.items()}
    if "shared.weight" not in state:
        raise ValueError(
            f"{path} holds no UMT5 encoder: token_embedding.weight is not in it; fetch the base once more"
        )
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    first = "encoder.block.0.layer"
    buckets, heads = state[f"{first}.0.SelfAttention.relative_attention_bias.weight"].shape
    config = UMT5Config(
        vocab_size=state["shared.weight"].shape[0],
        d_model=state["shared.weight"].shape[1],
        d_kv=len(state[f"{first}.0.SelfAttention.q.weight"]) // heads,
        d_ff=len(state[f"{first}.1.DenseReluDense.wi_0.weight"]),
        num_layers=1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.block.")),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return _filled(lambda: UMT5EncoderModel(config), state, path)


T5_NAMES = (
    ("token_embedding.", "shared."),
    ("blocks.", "encoder.block."),
    (".norm1.", ".layer.0.layer_norm."),
    (".attn.", ".layer.0.SelfAttention."),
    (".pos_embedding.embedding.", ".layer.0.SelfAttention.relative_attention_bias."),
    (".norm2.", ".layer.1.layer_norm."),
    (".ffn.gate.0.", ".layer.1.DenseReluDense.wi_0."),
    (".ffn.fc1.", ".layer.1.DenseReluDense.wi_1."),
    (".ffn.fc2.", ".layer.1.DenseReluDense.wo."),
)


def _t5_name(name: str) -> str:
    for old, new in T5_NAMES:
        name = name.replace(old, new)
    return "encoder.final_layer_norm.weight" if name == "norm.weight" else name


def _filled(build, state: State, path: Path):
    """A stock model that holds exactly ``state``, in its dtype."""
    with torch.device("meta"):
        model = build()
    account(
        state, {n: t.shape for n, t in model.state_dict().items()}, str(path), type(model).__name__
    )
    check_finite(state.items(), str(path), "fetch the base once more")
    model.load_state_dict(state, assign=True)
    return model


def new_transformer(config: dict[str, Any]) -> WanTransformer3DModel:
    """Make a transformer without memory for its weights.

    It is to be compared with, or filled by ``load_state_dict(assign=True)``.
    """
    with torch.device("meta"):
        return WanTransformer3DModel(**config)


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a stock class, from its config.json without the library's own notes."""
    return {k: v for k, v in config.items() if not k.startswith("_")}


def save_transformer(config: dict[str, Any], state: State, folder: Path) -> None:
    """``state`` as the `transformer` of a pipeline folder."""
    transformer = new_transformer(config)
    transformer.load_state_dict(state, assign=True)
    transformer.save_pretrained(folder / "transformer", max_shard_size="4GB")


LARGE = 64 << 20
"""Bytes from which on a file of weights is linked instead of copied.

A text encoder is 11 GB, and nothing here changes it.
"""


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder of a pipeline; large weights are linked where the disk allows.

    Whatever is small enough to be edited by hand is a file of its own: of a linked config.json an
    edit would reach into the installed package, or into a hub's cache.
    """
    shutil.copytree(source, target, copy_function=copy_file)


def copy_file(source: str | Path, target: str | Path) -> str:
    """A file, with the access that new files have here, not the source's."""
    source = os.path.realpath(source)  # the hub's cache is made of symbolic links
    if os.path.getsize(source) >= LARGE and source.endswith(
        (".safetensors", ".bin", ".pth", ".pt")
    ):
        try:
            os.link(source, target)
            return str(target)
        except OSError:  # another disk, or one without links
            pass
    return str(shutil.copyfile(source, target))
