"""Released files: names both ways, every tensor accounted for, adapters, and what is refused."""

from __future__ import annotations

import pickle

import pytest
import torch
from released import new_wan, released_lora, released_state
from safetensors.torch import save_file
from tiny import draw

from kvpo.common.weights import account, read_checkpoint
from kvpo.convert.lora import adapter_of, is_adapter, merge
from kvpo.convert.wan_names import (
    diffusers_to_original,
    generator_state,
    keeps_float32,
    original_to_diffusers,
)

# --- Names ---


def test_names_go_there_and_back():
    names = list(new_wan().state_dict())
    original = list(diffusers_to_original({n: torch.zeros(1) for n in names}))
    assert len(set(original)) == len(names)
    assert list(original_to_diffusers({n: torch.zeros(1) for n in original})) == names


@pytest.mark.parametrize(
    ("original", "diffusers"),
    [
        ("blocks.3.self_attn.o.bias", "blocks.3.attn1.to_out.0.bias"),
        ("blocks.3.cross_attn.norm_k.weight", "blocks.3.attn2.norm_k.weight"),
        ("blocks.3.norm3.weight", "blocks.3.norm2.weight"),
        ("blocks.3.modulation", "blocks.3.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("head.head.weight", "proj_out.weight"),
        ("time_projection.1.bias", "condition_embedder.time_proj.bias"),
        ("blocks.0.ffn.0.lora_A.weight", "blocks.0.ffn.net.0.proj.lora_A.weight"),
    ],
)
def test_names_by_hand(original, diffusers):
    assert list(original_to_diffusers({original: torch.zeros(1)})) == [diffusers]
    assert list(diffusers_to_original({diffusers: torch.zeros(1)})) == [original]


@pytest.mark.parametrize(
    "wrapper",
    [
        "_fsdp_wrapped_module.",
        "_orig_mod.",
        "_checkpoint_wrapped_module.",
        "_fsdp_wrapped_module._orig_mod.",
    ],
)
def test_wrappers_of_training_are_taken_off(wrapper):
    assert list(
        original_to_diffusers(
            {f"model.{wrapper}blocks.0.{wrapper}self_attn.q.weight": torch.zeros(1)}
        )
    ) == ["blocks.0.attn1.to_q.weight"]


def test_the_reader_s_own_mapping_is_left_alone():
    """diffusers' converter empties what it is given."""
    state = released_state(new_wan())
    before = list(state)
    original_to_diffusers(state)
    assert list(state) == before


# --- Which tensors a file holds ---


def test_the_preferred_key_is_taken(tmp_path):
    content = {
        "generator": released_state(new_wan(0)),
        "generator_ema": released_state(new_wan(1)),
        "step": 600,
    }
    for prefer, seed in ((("generator_ema", "generator"), 1), (("generator", "generator_ema"), 0)):
        state, key = generator_state(content, tmp_path, prefer)
        assert key == prefer[0] and torch.equal(
            state["proj_out.weight"], new_wan(seed).proj_out.weight
        )


def test_a_bare_state_is_a_generator(tmp_path):
    """The paper's own trainer writes one without `model.`."""
    state, key = generator_state(diffusers_to_original(new_wan().state_dict()), tmp_path)
    assert key == "" and state.keys() == new_wan().state_dict().keys()


def test_no_generator(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"x.pt holds no generator: none of generator, .* its top holds \['critic', 'step'\]",
    ):
        generator_state({"critic": {}, "step": 3}, tmp_path / "x.pt")


def test_every_fault_is_listed():
    found = {"a": torch.zeros(2), "b": torch.zeros(2), "x": torch.zeros(1)}
    wanted = {"a": torch.Size([2]), "b": torch.Size([3]), "c": torch.Size([1])}
    with pytest.raises(
        ValueError,
        match=r"f.pt does not fit the base: 1 missing: c; 1 surplus: x; 1 misshapen: b \[2\] for \[3\]",
    ):
        account(found, wanted, "f.pt", "the base")


# --- Adapters ---


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("default", ["", "default."])
def test_an_adapter_is_its_pairs(tmp_path, nested, default):
    lora = {
        n.replace(".weight", f".{default}weight"): t for n, t in released_lora(new_wan()).items()
    }
    content = {"generator_lora": lora} if nested else lora
    assert is_adapter(content)
    adapter = adapter_of(content, tmp_path)
    assert (
        len(adapter) == 20
        and adapter["blocks.1.attn2.to_out.0"][0].shape == (4, 24)
        and adapter["blocks.1.ffn.net.2"][1].shape == (24, 4)
    )


def test_merging_by_hand(tmp_path):
    state = {
        "m.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16),
        "m.bias": torch.zeros(2),
    }
    merge(state, {"m": (torch.tensor([[1.0, 0.5]]), torch.tensor([[0.001], [2.0]]))}, 0.5, "f")
    torch.testing.assert_close(
        state["m.weight"], torch.tensor([[1.0005, 2.00025], [4.0, 4.5]]), rtol=0, atol=1e-7
    )


def test_an_adapter_of_another_base(tmp_path):
    state, adapter = new_wan(dim=32).state_dict(), adapter_of(released_lora(new_wan()), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"f is the LoRA of another base: 20 of its 20 modules do not fit, first blocks\.0\.",
    ):
        merge(state, adapter, 1.0, "f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("base_model.model.blocks.0.ffn.0.lora_B.weight"),
            r"the LoRA of blocks\.0\.ffn\.net\.0\.proj has \{'A': \[4, 24\]\}",
        ),
        (
            lambda s: s.update(
                {"base_model.model.blocks.0.ffn.0.lora_B.weight": torch.zeros(32, 3)}
            ),
            "must share their rank",
        ),
        (
            lambda s: s.update(
                {"base_model.model.blocks.0.ffn.0.lora_magnitude_vector": torch.zeros(32)}
            ),
            "is a DoRA, which also rescales",
        ),
        (
            lambda s: s.update({"base_model.model.blocks.0.ffn.0.strange": torch.zeros(32)}),
            "no half of a LoRA",
        ),
    ],
)
def test_adapters_that_are_refused(tmp_path, change, message):
    lora = released_lora(new_wan())
    change(lora)
    with pytest.raises(ValueError, match=message):
        adapter_of(lora, tmp_path / "lora.pt")


# --- Files ---


def test_files_of_both_kinds(tmp_path):
    x = draw(3, 2)
    torch.save({"x": x}, tmp_path / "new.pt")
    torch.save({"x": x}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file({"x": x}, tmp_path / "safe.safetensors")
    for path in sorted(tmp_path.iterdir()):
        assert torch.equal(read_checkpoint(path)["x"], x), path.name


class Evil:
    def __reduce__(self):
        return (print, ("code from a file was run",))


def test_a_pickle_with_code_is_refused_unread(tmp_path, capsys):
    torch.save({"x": torch.zeros(1), "y": Evil()}, tmp_path / "torch.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"y": Evil()}))
    for name in ("torch.pt", "plain.pt"):
        with pytest.raises(
            ValueError, match=rf"{name} holds more than tensors \(.*\); reading it would run code"
        ):
            read_checkpoint(tmp_path / name)
    assert "code from a file" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    save_file({"x": draw(100)}, path) if suffix == ".safetensors" else torch.save(
        {"x": draw(100)}, path
    )
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=rf"w{suffix} is not a whole checkpoint \(.*\); copy it again"
    ):
        read_checkpoint(path)


def test_no_file_and_no_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="w.pt does not exist"):
        read_checkpoint(tmp_path / "w.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, not named tensors"):
        read_checkpoint(tmp_path / "list.pt")


def test_what_stays_float32():
    kept = {n for n in new_wan().state_dict() if keeps_float32(n)}
    assert {
        "scale_shift_table",
        "blocks.0.scale_shift_table",
        "blocks.0.norm2.weight",
        "condition_embedder.time_embedder.linear_1.weight",
    } <= kept
    assert (
        not {
            "blocks.0.attn1.norm_q.weight",
            "proj_out.weight",
            "condition_embedder.time_proj.weight",
        }
        & kept
    )
