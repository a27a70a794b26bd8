"""The public code's planning, advantages and objective, reproduced list by list from
policy_math.json.

Every number and every option comes from the file, so that another file with the same lists tests as
well.
"""

from __future__ import annotations

import golden
import pytest
import torch
from reference import inputs, planning, policy

FILE = "policy_math"
TESTED: set[str] = set()


def cases(key: str):
    TESTED.add(key)
    return pytest.mark.parametrize("case", golden.cases(FILE, key))


def tensor(numbers, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype)


def close(numbers, rel: float = 1e-9, abs: float = 1e-11):
    """Double precision: the files' numbers, to rounding."""
    return pytest.approx(numbers, rel=rel, abs=abs)


def close_single(numbers):
    """Single precision, in which the public code fuses advantages and tabulates sigmas."""
    return close(numbers, rel=2e-6, abs=1e-6)


def chosen(case: dict, **renamed: str) -> dict:
    """Options of a case under our names; those it leaves out keep their defaults."""
    return {ours: case[theirs] for ours, theirs in renamed.items() if theirs in case}


# --- Advantages and objective ---


@cases("anchor_advantage")
def test_golden_anchor_advantage(case):
    A_G, A_KG = policy.component_advantages(
        tensor([[*case["branch"], case["anchor"]]]), tensor([1.0])
    )
    assert A_G.tolist() == close(case["advantage"])
    assert A_KG[0].tolist() == close(case["advantage"])


@cases("component_aggregation")
def test_golden_component_aggregation(case):
    keys = [component["key"] for component in case["components"]]
    r_KB = tensor([[*case["branch_rewards"][key], case["anchor_rewards"][key]] for key in keys])
    weights = tensor([component["weight"] for component in case["components"]])
    total, per_component = policy.component_advantages(
        r_KB, weights, **chosen(case, of_weighted_sum="use_raw_weighted_reward_advantage")
    )
    assert total.tolist() == close(case["total"])
    assert dict(zip(keys, per_component.tolist())) == {
        key: close(A) for key, A in case["per_component"].items()
    }


@cases("advantage_fusion")
def test_golden_advantage_fusion(case):
    signals = [
        None if (A := case.get(name)) is None else tensor(A, torch.float32)
        for name in ("local", "global_")
    ]
    fused = policy.fuse(*signals, case["mode"], case["weight_local"], case["weight_global"])
    assert fused.tolist() == close_single(case["fused"])
    for bound, expected in case["clamped"].items():
        assert policy.clamped(fused, float(bound)).tolist() == close_single(expected)


@cases("branch_log_pi")
def test_golden_branch_log_pi(case):
    assert policy.branch_log_pi(tensor(case["scores"])).tolist() == close(case["log_pi"])


@cases("discrete_kl")
def test_golden_discrete_kl(case):
    assert policy.discrete_kl(
        tensor(case["theta_scores"]), tensor(case["ref_scores"])
    ).item() == close(case["kl"])


@cases("mechanism_2")
def test_golden_mechanism_2(case):
    shield = policy.mechanism_2(policy.branch_log_pi(tensor(case["scores"])), case["safe"])
    assert (shield.scale, shield.entropy, shield.pi_anchor) == close(
        (case["loss_scale"], case["entropy"], case["pi_anchor"])
    )


@cases("policy_objective")
def test_golden_policy_objective(case):
    reference = case["scores_initial" if case["kl_reference_initial"] else "scores_old"]
    mine = policy.objective(
        *(
            tensor(scores)
            for scores in (case["scores_theta"], case["scores_old"], reference, case["advantage"])
        ),
        case["clip_low"],
        case["clip_high"],
        case["kl_coef"],
        case["protect"],
        case["safe"],
    )
    rounding = 1e-11 * max(1.0, *case["ratio"])  # large ratios of both signs cancel
    assert (mine.total, mine.policy, mine.kl) == close(
        (case["total_loss"], case["loss_policy"], case["loss_kl"]), abs=rounding
    )
    assert mine.gradient.tolist() == close(case["grad_scores_theta"], abs=rounding)
    assert mine.log_ratio.tolist() == close(case["log_ratio"])
    assert mine.log_ratio.exp().tolist() == close(case["ratio"])
    assert mine.log_ratio.std().item() == close(case["log_ratio_std"])
    assert mine.clip_fraction == close_single(case["clip_fraction"])
    for found, expected in (
        (mine.protection.entropy, case["entropy"]),
        (mine.protection.pi_anchor, case["pi_anchor"]),
    ):
        assert found == (None if expected is None else close(expected))


# --- Planning ---


def backend_of(case: dict) -> planning.Backend:
    options = chosen(case, block="block", sink="sink") | chosen(
        case.get("arguments", {}), sink="sink_size"
    )
    return planning.Backend(
        case["backend"], case["window"], case["capacity"], case["m_nearest_frames"], **options
    )


@cases("chunk_layout")
def test_golden_chunk_layout(case):
    chunks = planning.chunk_layout(case["total"], case["first"], case["new"])
    assert chunk_records(chunks, case["first"]) == case["chunks"]


def chunk_records(chunks: list[planning.Chunk], size: int) -> list[dict]:
    return [
        {"chunk_idx": c.index, "start_frame": c.start, "new_frames": c.frames, "chunk_size": size}
        for c in chunks
    ]


@cases("eligible_forks")
def test_golden_eligible_forks(case):
    chunks = planning.chunk_layout(case["total_frames"], case["first_chunk"], case["next_chunks"])[
        : case["within_first_chunks"]
    ]
    forks = planning.eligible_forks(backend_of(case), chunks, case["perturbed_blocks"])
    assert [
        {
            "frame": f.frame,
            "chunk": f.chunk,
            "block_in_chunk": f.block_in_chunk,
            "pool": len(f.pool),
        }
        for f in forks
    ] == case["eligible"]


@cases("dispersed_selection")
def test_golden_dispersed_selection(case):
    seeds = planning.Seeds(case["base_seed"], case["sample_idx"], case["seed_context"])
    branches = planning.selected_frames(range(*case["pool"]), case["n"], case["K"], seeds)
    assert [list(frames) for frames in branches] == case["branches"]


@cases("branch_plans")
def test_golden_branch_plans(case):
    asked, backend = case["arguments"], backend_of(case)
    seeds = planning.Seeds(asked["base_seed"], asked["sample_idx"], asked["seed_context"])
    chunks = planning.chunk_layout(
        asked["total_frames"], asked["chunk_size"], asked["min_new_frame"]
    )
    forced = chosen(
        asked, chunk="forced_perturb_chunk_idx", block_in_chunk="forced_perturb_block_local_idx"
    )
    window_blocks = asked["perturb_num_blocks"]
    plan = planning.plan(
        backend,
        chunks[: asked["perturb_within_first_x_chunks"]],
        window_blocks,
        asked["K"],
        seeds,
        **forced,
    )
    record = {
        **{
            name: asked[name]
            for name in ("sample_idx", "seed_context", "base_seed", "perturb_num_blocks")
        },
        "perturb_chunk_idx": plan.fork.chunk,
        "perturb_block_abs_frame": plan.fork.frame,
        "perturb_block_end_frame": plan.fork.frame + window_blocks * backend.block,
        "perturb_block_local_idx": plan.fork.block_in_chunk,
        "forced_perturb_chunk_idx": forced.get("chunk"),
        "forced_perturb_block_local_idx": forced.get("block_in_chunk"),
        "m_nearest_frames": backend.nearest,
        "n_random_frames": backend.routed,
        "num_older_available": len(plan.fork.pool),
        "stable_older_frame_start": plan.fork.pool.start,
        "stable_older_frame_end": plan.fork.pool.stop,
        "local_attn_size": backend.window,
        "eligible_blocks_count": plan.eligible,
        "chunks": chunk_records(chunks, asked["chunk_size"]),
        "branch_plans": [
            {
                "branch_k": k,
                "seed": seeds.branch(k, asked["K"]),
                "selected_older_frame_indices": list(frames),
            }
            for k, frames in enumerate(plan.branches)
        ],
    }
    assert {name: record[name] for name in case["plan"]} == case["plan"]


@cases("backward_chunks")
def test_golden_backward_chunks(case):
    assert planning.backward_chunks(case["branches"], case["chunk"]) == case["chunks"]


# --- Clips and switches ---


@cases("latent_to_pixel_frame")
def test_golden_latent_to_pixel_frame(case):
    assert planning.latent_to_pixel_frame(case["latent"], case["stride"]) == case["pixel"]


@cases("clip_window")
def test_golden_clip_window(case):
    assert planning.clip_window(case["center"], case["total"], case["length"]) == tuple(
        case["window"]
    )


@cases("segment_clips")
def test_golden_segment_clips(case):
    clips = planning.segment_clips(
        case["pixel_frames"],
        case["segments"],
        case["switch_frames"],
        case["clip_length"],
        **chosen(case, stride="stride"),
    )
    assert [{"start": c.start, "end": c.stop, "segment": c.segment} for c in clips] == case["clips"]


@cases("segment_of_frame")
def test_golden_segment_of_frame(case):
    assert planning.segment_of_frame(case["frame"], case["switches"]) == case["segment"]


@cases("switch_alignment")
def test_golden_switch_alignment(case):
    chunks = planning.chunk_layout(case["total"], **chosen(case, first="first", following="new"))
    expect(
        case,
        "switches",
        lambda: planning.align_switches(case["raw"], case["segments"], chunks, case["align"]),
    )


@cases("switch_frames_for_inference")
def test_golden_switch_frames_for_inference(case):
    expect(case, "switches", lambda: planning.switch_frames(case["raw"], case["segments"]))


def expect(case: dict, key: str, compute) -> None:
    """The case's result, or an error where the public code failed, by assertion or otherwise."""
    if "error" in case:
        with pytest.raises(ValueError):
            compute()
    else:
        assert compute() == case[key]


# --- Sigmas and prompt files ---


@cases("sigma_tables")
def test_golden_sigma_tables(case):
    table = inputs.SigmaTable(case["shift"], case["steps"])
    assert len(table.sigmas) == case["length"]
    for row in case["samples"]:
        assert table.sigmas[row["index"]].item() == close_single(row["sigma"])
        assert table.timesteps[row["index"]].item() == close_single(row["timestep"])
    for step, timestep in case["warped"].items():
        assert table.warped(int(step)) == close_single(timestep)
    for row in case["nearest"]:
        assert int(table.nearest(row["timestep"])) == row["index"]
        assert table.sigma(row["timestep"]).item() == close_single(row["sigma"])
    for timestep, by_floor in case["score_sigma_at_integer_timestep"].items():
        for floor, sigma in by_floor.items():
            assert table.score_sigma(float(timestep), float(floor)) == close_single(sigma)
    mixed = {name: tensor(numbers, torch.float32) for name, numbers in case["add_noise"].items()}
    assert table.add_noise(
        mixed["clean"], mixed["noise"], mixed["timestep"]
    ).tolist() == close_single(mixed["noisy"].tolist())


@cases("prompt_files")
def test_golden_prompt_files(case):
    field = case["options"].get("field", "prompts")
    assert [
        {field: prompts}
        for prompts in inputs.read_prompts(case["content"], case["suffix"], **case["options"])
    ] == case["items"]


@golden.skip_without(f"{FILE}.json")
def test_golden_every_list_is_reproduced():
    """A file with a list that nothing here reproduces must not pass unnoticed."""
    lists = {
        key
        for key, value in golden.read_json(FILE).items()
        if isinstance(value, list) or (isinstance(value, dict) and "cases" in value)
    }
    assert lists <= TESTED
