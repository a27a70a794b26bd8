"""The planner: what it counts is what the code does."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from test_align import settings, write_recipe
from tiny import GEOMETRY, draw
from torch.utils.checkpoint import checkpoint

from kvpo.commands import main as cli
from kvpo.commands.plan import Plan
from kvpo.common.progress import Progress
from kvpo.config import RECIPES, from_dict, load_config, recipe_path
from kvpo.convert.wan_base import new_transformer
from kvpo.planning.amounts import (
    amounts,
    contexts_of,
    last_forks,
    longest,
    own_past,
    replay_rows,
    reward_memory,
    velocities_of,
    with_changes,
)
from kvpo.planning.cards import CARDS, sold_as
from kvpo.planning.costs import WAN_1_3B, WAN_5B, WAN_14B, costs, sizes_of
from kvpo.planning.memory import fitted, stages
from kvpo.planning.network import at_full_depth, network_costs
from kvpo.planning.peak import Ledger, cost, fake, flops
from kvpo.planning.plan import shares_of
from kvpo.planning.work import SWITCHES, as_options, savings, work
from kvpo.policy.policy import Policy
from kvpo.runs.parts import Parts
from kvpo.train import Alignment


def run(capsys, *argv) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["plan", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out, said.err.strip()


def config_of(folder, **changes):
    return from_dict(settings(folder, **changes))


# --- The ledger ---


def work_of_hand(n: int) -> None:
    a = torch.zeros(n, n)
    b = a @ a
    b.add_(1.0)
    (b[: n // 2] + 1).sum()


def test_bytes_by_hand():
    """a and b of 4 n^2 bytes, half of b again, views and in-place work nothing; fake and real
    tensors alike."""
    n = 64
    for opened in (fake, Ledger):
        with opened() as ledger, cost(ledger) as found:
            work_of_hand(n)
        assert found.bytes == 4 * n * n * 2 + 4 * n * n // 2 + 4 and found.kept == 0


def test_operations_by_hand():
    with fake() as ledger, flops() as counted, cost(ledger) as found:
        q, k = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8)
        torch.nn.functional.scaled_dot_product_attention(q, k, k)
        torch.zeros(4, 6) @ torch.zeros(6, 9)
    by_hand = 2 * (2 * 2 * 3 * 5 * 7 * 8) + 2 * 4 * 6 * 9
    assert counted.get_total_flops() == found.flops == by_hand


def test_operations_of_a_backward_pass_are_those_of_torch_s_counter():
    """Convolution, linear map, attention and what checkpointing computes again."""

    def forward(x: torch.Tensor, w: torch.Tensor, conv: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.conv3d(x, conv, padding=1).flatten(2)
        y = torch.nn.functional.linear(y, w)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(y, y, y).square().mean()

    with fake() as ledger:
        x, w = torch.zeros(2, 3, 4, 4, 4), torch.zeros(16, 64, requires_grad=True)
        conv = torch.zeros(5, 3, 3, 3, 3, requires_grad=True)
        found = []
        for counter in (flops, contextlib.nullcontext):
            before = ledger.flops
            with counter() as counted:
                checkpoint(forward, x, w, conv, use_reentrant=False).backward()
            found.append(ledger.flops - before)
            if counted is not None:
                found.append(counted.get_total_flops())
    assert len(set(found)) == 1 and found[0] > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_costs_what_is_planned(folder, checkpointing):
    """The same pass on real tensors, counted by the same ledger, beside the gradients of a pass
    before it: the plan took the peak of a first pass less all gradients, of which few are there
    when the activations are, and said too little by about as many bytes."""
    config = config_of(
        folder, gradient_checkpointing=checkpointing, policy={"train": "lora", "rank": 2}
    )
    sizes = sizes_of(config)
    planned, rows, g = costs(config, sizes), replay_rows(config, sizes.geometry), sizes.geometry
    model = Parts(config, Progress()).pipeline.generator
    cache = model.new_cache(20, g.latent_height, g.latent_width, sink=g.sink)
    frames = list(range(g.window, g.window + g.block))
    cache.reserve(range(g.window))
    past = g.history.past(frames[0], g.block)

    def backward() -> None:
        v = model.velocity(
            draw(rows, g.block, 4, 4, 4),
            torch.full((rows,), 0.5),
            torch.zeros(1, g.text_length, 16),
            [frames] * rows,
            cache,
            [past] * rows,
            [0] * rows,
        )
        v.square().mean().backward()

    with Ledger() as ledger:
        backward()
        with cost(ledger) as found:
            backward()
    assert found.bytes == pytest.approx(planned.gradient.bytes, rel=0.05)


@pytest.mark.parametrize(
    ("train", "checkpointing", "dtype"),
    [("lora", True, "bfloat16"), ("full", False, "float32")],
)
def test_a_deep_network_lies_on_the_line_of_two_shallow_ones(folder, train, checkpointing, dtype):
    """`kvpo plan longlive` ran all 30 layers of every pass and took 41 s of CPU to answer. Layers
    are alike, so two depths say what any costs: here all of 4 are run, and every number is equal."""
    config = config_of(
        folder,
        gradient_checkpointing=checkpointing,
        dtype=dtype,
        policy={"train": train, "rank": 2},
        rows_per_pass=5,
    )
    sizes = sizes_of(config)
    deep = replace(sizes, transformer={**sizes.transformer, "num_layers": 4})
    found, whole = network_costs(config, deep), at_full_depth(config, deep)
    assert found == whole
    assert found.gradient.bytes > found.replay.bytes > 0


# --- What is counted ---


def test_calls_are_those_of_a_run(folder, tmp_path):
    """A video with a single eligible fork, so that the mean over forks is one run's."""
    for changes in (
        {},
        {"rows_per_pass": 5},
        {"rollout": {"branches": 3, "cache_frames": 12, "together": 2}},
        {"groups": 2, "rollout": {"branches": 3, "cache_frames": 12, "prefixes": 2}},
    ):
        config = config_of(
            folder,
            data={"blocks": 5, "segments": 1, "memory": 0.0},
            policy={"train": "full", "sync_interval": 1},
            **changes,
        )
        counted = amounts(config, sizes_of(config).geometry)
        alignment = Alignment(config, tmp_path, Progress())
        alignment.step(0)
        calls = alignment.step(1)["calls/generator"]
        unscored = counted.replays - 1 + counted.energies_first
        assert (
            calls / config.groups
            == counted.prefix_calls + counted.branch_calls + (unscored + 1) * counted.replay_calls
        )
        assert counted.fork == 3.0 and counted.replays == 2


PAIRS = {
    "regression": ("kv_routing", {}),
    "nft": ("start_noise", {"levels": 3, "kl_beta": 0.1}),
    "rvm": ("best_of", {}),
    "kernel_grpo": ("renoise", {"kl_beta": 0.1}),
    "sde_grpo": ("sde", {}),
    "denoised_distance": ("start_noise", {"kl_beta": 0.0}),
}


def paired(folder, kind, **changes):
    """A recipe of an objective with one of its explorers."""
    explorer, own = PAIRS[kind]
    pair = {
        "objective": {"kind": kind} | own,
        "explorer": explorer,
        "sampler": "ode" if explorer == "sde" else "renoise",
        explorer: {"window_blocks": 1 if explorer == "best_of" else 2},
        "data": {"blocks": 5, "segments": 1, "memory": 0.0},
    }
    return config_of(folder, **pair | changes)


@pytest.mark.parametrize("kind", PAIRS)
def test_calls_of_every_objective_are_those_of_a_run(folder, tmp_path, monkeypatch, kind):
    """`kvpo plan` counted the replay of every objective as that of tve_ppo. Here the old policy lags
    and passes are small, so that who replays what shows; all groups fork at one block."""
    policy = {"train": "full", "behaviour_decay": 0.5}
    config = paired(folder, kind, rows_per_pass=5, policy=policy)
    if config.explorer != "best_of":
        only = classmethod(lambda cls, blocks, geometry: [3])
        monkeypatch.setattr(type(config.exploring), "eligible_forks", only)
    alignment = Alignment(config, tmp_path, Progress())
    counted = amounts(config, alignment.parts.pipeline.geometry)
    alignment.step(0)
    calls = alignment.step(1)["calls/generator"]
    replays = counted.replays + counted.energies_first
    assert (
        calls / config.groups
        == counted.prefix_calls + counted.branch_calls + replays * counted.replay_calls
    )


def test_what_objectives_replay_by_hand(folder):
    """Three branches, two blocks of four steps; members that start alike are computed once.

    regression: 3 x 8 - 2, old weights never. nft at three drawn levels: 3 x 6, old and start
    weights. kernel_grpo: three of four steps, 3 x 6 - 2, start weights alone. denoised_distance:
    the anchor's 8, before the gradient where they take more than a pass."""
    configs = {kind: paired(folder, kind, policy={"behaviour_decay": 0.5}) for kind in PAIRS}
    g = sizes_of(configs["nft"]).geometry
    found = {
        kind: (velocities_of(c, g), (n := amounts(c, g)).replays, n.energies_first, n.anew)
        for kind, c in configs.items()
    }
    assert found == {
        "regression": (22, 1, False, 0),
        "nft": (18, 3, False, 2),
        "rvm": (10, 2, False, 1),
        "kernel_grpo": (16, 2, False, 1),
        "sde_grpo": (16, 1, False, 0),
        "denoised_distance": (8, 3, False, 0),
    }
    small = amounts(replace(configs["denoised_distance"], rows_per_pass=4), g)
    assert small.energies_first and small.replay_calls == 1 + 2
    assert not amounts(replace(configs["nft"], rows_per_pass=4), g).energies_first


def test_what_is_kept_of_a_rollout_is_what_is_recorded(folder):
    """Of 4 rows, 2 blocks, 4 steps: inputs, velocities and clean latents for kernel_grpo, and its
    results of 3 steps; clean latents alone for nft, which makes inputs and targets of 3 levels."""
    configs = {kind: paired(folder, kind) for kind in ("kernel_grpo", "nft")}
    sizes = sizes_of(configs["nft"])
    memory = {k: stages(c, sizes, costs(c, sizes))["gradient"] for k, c in configs.items()}
    latent, tail = 4 * 2 * 4 * 4 * 4, 4 * (5 - 2)
    parts = {
        k: (m["trajectories"] / latent, m["made for the replay"] / latent)
        for k, m in memory.items()
    }
    assert parts == {"kernel_grpo": (8 * 9 + tail, 8 * 3), "nft": (8 + tail, 8 * 3 * 2)}


def test_prefixes_by_hand(folder):
    """The longer of two draws from 2 and 4 is 3.5 on average; a card with a single group has no
    other beside it; each has a cache, and its decoder's state."""
    assert longest([4.0, 2.0], 1) == 3.0 and longest([4.0, 2.0], 2) == 3.5
    one, two = (
        config_of(folder, groups=2, rollout={"branches": 3, "cache_frames": 12, "prefixes": n})
        for n in (1, 2)
    )
    sizes = sizes_of(one)
    found = costs(one, sizes)
    assert (
        amounts(two, sizes.geometry, world=2) == amounts(one, sizes.geometry)
        and amounts(two, sizes.geometry).prefix_calls < amounts(one, sizes.geometry).prefix_calls
    )
    assert stages(two, sizes, found, world=2) == stages(one, sizes, found, world=2)
    alone, beside = stages(one, sizes, found), stages(two, sizes, found)
    assert (
        beside["replay"]["shared past"] == 2 * alone["replay"]["shared past"]
        and beside["prefix"]["one pass"] == 2 * alone["prefix"]["one pass"]
    )
    assert beside["decoding"]["decoder at work"] > alone["decoding"]["decoder at work"]
    assert work(two, sizes, found, amounts(two, sizes.geometry)) == work(
        one, sizes, found, amounts(one, sizes.geometry)
    ), "fewer calls, not less work"


def test_own_past_by_hand(folder):
    """Blocks of 2, window 7: a replay keeps P - 1 blocks, and a whole window more where a prompt
    switch re-encodes it."""
    none, switched = (
        config_of(folder, data={"blocks": 8, "segments": n, "memory": 0.0}) for n in (1, 4)
    )
    assert own_past(none, sizes_of(none).geometry) == (GEOMETRY.window + 2, 2)
    assert own_past(switched, sizes_of(switched).geometry) == (
        GEOMETRY.window + 2,
        2 + GEOMETRY.window,
    )


def test_parts_by_hand(folder):
    config = config_of(folder, policy={"train": "full"})
    sizes = sizes_of(config)
    found = costs(config, sizes)
    memory = stages(config, sizes, found)
    model = Parts(config, Progress())
    numbers = sum(p.numel() for p in model.pipeline.generator.parameters())
    assert (
        found.trainable == numbers
        and found.weights == 4 * numbers
        and found.sets == 3 * 4 * numbers
    )
    assert (
        memory["gradient"]["optimizer"] == 8 * numbers
        and memory["branches"]["shared past"] == 12 * found.frame
    )
    assert found.frame == 2 * 2 * 4 * 24 * 4, (
        "keys and values of 2 layers, 4 tokens of 24 numbers in float32"
    )
    assert (
        work(config, sizes, found, amounts(config, sizes.geometry))["prefix"]
        == found.prefix.flops * amounts(config, sizes.geometry).prefix_calls
    )


def test_a_member_anchor_has_a_past_of_its_own(folder):
    """It is replayed with the branches when it is a member, from its own blocks; the plan left its
    past out, so three branches and the anchor counted as three."""
    plain, member = (config_of(folder, advantages={"anchor": anchor}) for anchor in (False, True))
    sizes = sizes_of(plain)
    found = costs(plain, sizes)
    own, of_member = (
        stages(c, sizes, found)["replay"]["branches' own past"] for c in (plain, member)
    )
    assert plain.rollout.branches == 3 and own % 3 == 0 and of_member == own // 3 * 4


def test_shards_by_hand(folder):
    """Of four cards each keeps a quarter of four sets and two moments; whole are the module's
    weights, the gradient, and reference and behaviour for the groups."""
    config = config_of(
        folder, policy={"train": "full", "shard": True, "sync_interval": 2}, groups=4
    )
    sizes = sizes_of(config)
    found = costs(config, sizes)
    n, memory = found.trainable, stages(config, sizes, found, world=4)["update"]
    assert (
        memory["generator"] == 4 * n
        and memory["trained copies"] == 16 * n // 4
        and memory["optimizer"] == memory["optimizer at work"] == 8 * n // 4
    )
    assert (
        memory["sets at hand"] == 2 * 4 * n
        and memory["gradient"] == 4 * n
        and "gradient so far" not in memory
    ), "a card has one of the four groups"
    alone = stages(config, sizes, found)["update"]
    assert (
        alone["optimizer"] == 8 * n
        and alone["trained copies"] == 12 * n
        and alone["gradient so far"] == 4 * n
        and "sets at hand" not in alone
    )


def test_rewards_by_hand(folder):
    """Two judges of one network count once; who comes and goes counts where it scores, the
    largest of them; who has another card, not at all."""
    entries = [
        {"name": "hpsv3"},
        {"name": "videoreward", "params": {"judge": "MQ"}},
        {"name": "videoreward", "params": {"judge": "TA"}},
        {"name": "clip", "role": "eval"},
    ]

    def memory(**changes):
        return reward_memory(
            config_of(folder, rewards=[e | changes for e in entries[:3]] + entries[3:])
        )

    gib = 2**30
    assert memory() == (27 * gib, 0) and memory(offload=True) == (0, 20 * gib)
    assert (
        memory(isolation="http", url="http://host:1")
        == memory(isolation="process", devices="1")
        == (0, 0)
    )
    config = config_of(folder, rewards=[entries[0], entries[1] | {"offload": True}])
    sizes = sizes_of(config)
    planned = stages(config, sizes, costs(config, sizes))
    assert (
        all(parts["rewards"] == 20 * gib for parts in planned.values())
        and planned["scoring"]["reward at work"] == 7 * gib
    )


def test_a_policy_on_meta_is_the_policy():
    """What is counted without memory: every trained number, in the adapter's precision and in
    float32."""
    with torch.device("meta"):
        from kvpo.generators.causal_wan import CausalWan
        from kvpo.policy.policy import PolicyConfig

        policy = Policy(CausalWan(new_transformer(WAN_1_3B)), PolicyConfig(rank=256), 0)
    assert policy.num_trainable == pytest.approx(350e6, rel=0.01), (
        "300 modules of rank 256, as the paper's code has"
    )


def test_shapes_of_14b_construct_without_memory():
    assert sum(p.numel() for p in new_transformer(WAN_14B).parameters()) == pytest.approx(
        14.3e9, rel=0.01
    )


def test_shapes_of_5b_construct_without_memory():
    """Wan2.2-TI2V-5B, which its own format names."""
    assert sum(p.numel() for p in new_transformer(WAN_5B).parameters()) == pytest.approx(
        5.0e9, rel=0.01
    )
    sizes = sizes_of(load_config(recipe_path("longlive_2")))
    assert sizes.transformer == WAN_5B and sizes.vae["z_dim"] == 48
    assert sizes.source.startswith("Wan2.2-5B as `kvpo import --format longlive-2`")
    assert sizes_of(load_config(recipe_path("krea"))).transformer == WAN_14B


# --- What is not done ---


def test_a_prefix_for_several_groups_by_hand(folder):
    """The last of two forks among four blocks is the third or the fourth; half of it is a
    group's, and each group has a cache."""
    assert last_forks([3, 4, 5, 6], 1) == [3, 4, 5, 6]
    assert sorted(last_forks([3, 4, 5, 6], 2)) == [5, 5, 6, 6]
    assert sorted(last_forks([3, 4, 5], 2)) == [4, 5, 5], "the middle one is in both halves"
    one, two = (
        config_of(
            folder,
            groups=2,
            data={"blocks": 9, "segments": 1, "memory": 0.0},
            rollout={"branches": 3, "cache_frames": 12, "forks": n},
        )
        for n in (1, 2)
    )
    g = sizes_of(one).geometry
    alone, shared = amounts(one, g), amounts(two, g)
    assert alone.prefix_blocks == alone.fork == shared.fork
    assert alone.fork / 2 < shared.prefix_blocks < alone.fork
    assert shared.prefix_calls == 5 * shared.prefix_blocks
    found = costs(one, sizes_of(one))
    planned = [stages(c, sizes_of(one), found)["replay"]["shared past"] for c in (one, two)]
    assert planned[1] == 2 * planned[0]


def test_random_pairs_by_hand(folder):
    """Two blocks of four steps: of one pair the second block's past is needed every other time,
    of eight always; the shared first velocity is drawn as often as any other."""
    changed = {n: config_of(folder, pairs={"count": n}) for n in (0, 1, 2)}
    g = sizes_of(changed[0]).geometry
    assert contexts_of(changed[0], g) == 1.0 and contexts_of(changed[1], g) == 0.5
    assert contexts_of(changed[2], g) == pytest.approx(1 - 6 / 28)
    assert velocities_of(changed[0], g) == 3 * 8 - 2
    assert velocities_of(changed[1], g) == 3 - 2 / 8
    assert replay_rows(changed[1], g) == 3


def test_the_lead_by_hand(folder):
    config = config_of(folder, score={"clip_frames": 8, "min_frames": 4, "lead": 4})
    g, whole = sizes_of(config).geometry, config_of(folder)
    assert amounts(config, g).decoded_prefix == 4.0
    assert amounts(whole, g, field=99) == amounts(whole, g) != amounts(whole, g, field=5)


def test_the_backward_pass_is_counted(folder):
    """Of all weights twice the forward pass and what is recomputed; of an adapter less, because no
    gradient of the maps under it is made."""
    full = costs(*((c := config_of(folder)), sizes_of(c)))
    adapter = config_of(folder, policy={"train": "lora", "rank": 2})
    small = costs(adapter, sizes_of(adapter))
    assert 2.5 < full.gradient.flops / full.replay.flops < 3.2
    assert 1.9 < small.gradient.flops / small.replay.flops < 2.9
    assert 0.7 < small.bare < 1.0 == full.bare and small.maps > 0 == full.maps


def test_savings_are_those_of_the_changed_recipe(folder):
    """Each by itself, as the planner counts the recipe with that option; what is on is left out."""
    config = config_of(folder, groups=2, policy={"train": "lora", "rank": 2, "sync_interval": 2})
    sizes = sizes_of(config)
    found = costs(config, sizes)
    saved = savings(config, sizes, found)
    assert {"--rollout.forks 2", "--policy.merge-rollouts", "--policy.sync-interval 1"} <= set(
        saved
    )
    assert "--objective.kl-beta 0.0 --objective.no-kl-watch" in saved

    def flops(config):
        counted = amounts(config, sizes.geometry, 1, found.full.field)
        return sum(work(config, sizes, found, counted).values())

    fewer = with_changes(config, {"pairs.count": 4})
    assert saved["--pairs.count 4"] == pytest.approx(1 - flops(fewer) / flops(config))
    assert "--pairs.count 4" not in savings(fewer, sizes, found)
    assert all(0.0 < share < 1.0 for share in saved.values())


def test_savings_of_every_objective_are_of_settings_that_it_has(folder):
    """`kvpo plan longlive_nft` ended with a TypeError: the switch that drops the KL names a setting
    that only the paper's objective has."""
    configs = {kind: paired(folder, kind, groups=2) for kind in PAIRS}
    sizes = sizes_of(configs["nft"])
    found = costs(configs["nft"], sizes)
    saved = {kind: savings(config, sizes, found) for kind, config in configs.items()}
    assert {kind: [o for o in saved[kind] if "kl" in o] for kind in saved} == {
        "regression": [],
        "nft": ["--objective.kl-beta 0.0"],
        "rvm": [],
        "kernel_grpo": ["--objective.kl-beta 0.0"],
        "sde_grpo": [],
        "denoised_distance": ["--objective.kl-beta 0.0 --objective.no-kl-watch"],
    }


def test_options_that_are_said_are_understood():
    for changes in SWITCHES:
        default = cli._parse("plan", ["longlive", *as_options(changes).split()]).settings
        assert default == with_changes(load_config(recipe_path("longlive")), changes)


def test_a_price(capsys, folder, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", settings(folder))
    code, out, _ = run(capsys, recipe, "--price", "3")
    hours = float(out.split(" GPU-hours, ")[0].split()[-1])
    euros = float(out.split(" euros")[0].split()[-1])
    assert code == 0 and euros == pytest.approx(3 * hours, rel=0.01)
    assert "euros" not in run(capsys, recipe)[1]
    assert "--price -1.0 not negative" in run(capsys, recipe, "--price", "-1")[2]


# --- What would fit ---


@pytest.mark.parametrize("share", [0.95, 0.8, 0.65])
def test_what_is_advised_fits(folder, share):
    """And is planned anew at its own shapes: advice that only scales would drift."""
    config = config_of(
        folder,
        policy={"train": "lora", "rank": 64},
        data={"blocks": 9},
        rollout={"branches": 8, "cache_frames": 18},
    )
    sizes = sizes_of(config)
    found = costs(config, sizes)
    peak = max(sum(parts.values()) for parts in stages(config, sizes, found).values()) / 2**30
    made, expected = fitted(config, sizes, found, share * peak)
    changed = with_changes(config, made)
    again = (
        max(sum(parts.values()) for parts in stages(changed, sizes, costs(changed, sizes)).values())
        / 2**30
    )
    assert made and expected <= share * peak and again == pytest.approx(expected, rel=0.1)


def test_too_small_a_card(capsys, folder, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", settings(folder))
    code, out, _ = run(capsys, recipe, "--gpu-memory", "0.0001")
    assert (
        code == 0
        and "It does NOT fit, and no setting here makes it: with " in out
        and "Turn gradient_checkpointing on. Set dtype bfloat16." in out
    )


# --- The command ---


def test_the_miniature_s_plan(capsys, tmp_path):
    code, out, _ = run(capsys, "mini", "--out", tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert (
        code == 0
        and "It fits." in out
        and set(content["stages GiB"])
        == {"prefix", "branches", "decoding", "scoring", "replay", "gradient", "update"}
    )
    assert 0.1 < sum(content["stages GiB"]["gradient"].values()) < 0.25
    # its step was planned as 20 ms, and took 3.5 s on a card
    assert "the host's time between small kernels, which is not counted" in out


def test_a_recipe_at_full_size_without_weights(capsys):
    code, out, _ = run(capsys, "longlive_24gb", "--card", "rtx4090")
    assert (
        code == 0
        and "Wan2.1-1.3B as `kvpo import --format longlive` would write it" in out
        and "It fits." in out
        and "--score.preview taew2_1.safetensors" in out
        and "small kernels" not in out
    )


def test_who_has_which_groups(capsys, folder, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", settings(folder, groups=5))
    code, out, _ = run(capsys, recipe, "--gpus", "2", "--nodes", "2")
    assert code == 0 and out.endswith(
        "2 nodes of 2 cards, up to 2 groups a rank; 3 of 4 ranks wait while the others make their last: set groups to a multiple of 4\n"
        "  node 0: ranks 0 to 1, groups 0 4 | 1\n  node 1: ranks 2 to 3, groups 2 | 3\n"
    )
    shares = shares_of(5, 2, 2)
    assert sorted(g for share in shares for g in share) == list(range(5))
    code, _, err = run(capsys, recipe, "--gpus", "3", "--nodes", "2")
    assert (
        code == 1
        and err
        == "kvpo plan: 5 groups a step leave 1 of 6 ranks idle; set groups to 6 or a multiple, start fewer processes, or let several share a group by branch_parallel"
    )


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_whole(path):
    """It can be read, forks exist, and its generator is one that import knows."""
    config = load_config(recipe_path(path.stem))
    sizes = sizes_of(config)
    assert amounts(
        config, sizes.geometry
    ).branch_calls > 0 and config.rollout.cache_frames >= sizes.geometry.resident(
        config.data.blocks
    )


def test_recipes_of_other_methods_are_planned(capsys):
    """Astrolabe's machine: 48 cards, a group each; 24 videos of 7 blocks and 4 steps are replayed."""
    config = load_config(recipe_path("longlive_nft"))
    g = sizes_of(config).geometry
    assert velocities_of(config, g) == 24 * 7 * 4 - 23 and amounts(config, g, 48).fork == 0.0
    for name in ("longlive_nft", "longlive_kernel", "self_forcing_arcopo"):
        config = load_config(recipe_path(name))
        counted = amounts(config, sizes_of(config).geometry)
        assert counted.replay_calls > 0 and counted.scored > 0
    kernel, g = load_config(recipe_path("longlive_kernel")), sizes_of(config).geometry
    assert velocities_of(kernel, g) == 32 * 7 * 3
    assert velocities_of(config, g) == 4, "AR-CoPO replays the anchor's block alone"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--gpus", "0"), "--gpus 0 and --nodes 1 must be 1 or more"),
        (
            ("--pipeline", "models/unknown"),
            "models/unknown is no pipeline folder, and no format of `kvpo import` has its name",
        ),
        (("--rollout.together", "-1"), "rollout.together = -1"),
    ],
)
def test_bad_input(capsys, argv, message):
    code, out, err = run(capsys, "longlive", *argv)
    assert code in (1, 2) and message in err + out


def test_cards_are_rates_and_rooms():
    """The command's choices are the table's; `--card b200` was none of them."""
    assert get_args(get_type_hints(Plan)["card"]) == tuple(CARDS)
    assert CARDS["b200"].tflops == 2250 and CARDS["b200"].room == sold_as(180) > CARDS["h200"].room
    for card in CARDS.values():
        assert 50 < card.tflops < 3000 and 20 < card.room < 300 and 0.5 < card.bandwidth < 10
        # operations a byte: between a card of little memory bandwidth and one of much
        assert 30 < card.tflops / card.bandwidth < 450


def test_a_plan_for_a_b200(capsys):
    code, out, _ = run(capsys, "longlive_short", "--card", "b200", "--size", "1.3b")
    assert code == 0 and "of 162.6 GiB" in out and "x b200: about" in out
    assert "of 2250 TFLOP/s" in out


# --- A group over several cards ---


def test_a_card_s_share_of_a_group_is_planned_as_a_smaller_group(folder):
    """Five branches on two cards are at most three on one, and the anchor on both."""

    def rollout(branches):
        return {
            "rollout": {"branches": branches, "cache_frames": 12},
            "advantages": {"anchor": True},
        }

    split = config_of(folder, branch_parallel=2, **rollout(5))
    small = config_of(folder, **rollout(3))
    sizes = sizes_of(split)
    found = costs(split, sizes)
    assert amounts(split, sizes.geometry) == amounts(small, sizes.geometry)
    assert found == costs(small, sizes) and stages(split, sizes, found, world=2) == stages(
        small, sizes, found
    )


def test_cards_in_rows(capsys, folder, tmp_path):
    recipe = write_recipe(
        tmp_path / "r.yaml", settings(folder, groups=4, rollout={"branches": 4, "cache_frames": 12})
    )
    said = {
        gpus: run(capsys, recipe, "--branch-parallel", "2", "--gpus", gpus) for gpus in (2, 3, 8)
    }
    assert said[3][0] == 1 and "3 cards are no multiple of branch_parallel = 2" in said[3][2]
    times = {gpus: float(said[gpus][1].split(" about ")[1].split(" ms")[0]) for gpus in (2, 8)}
    assert (
        times[2] == pytest.approx(4 * times[8], rel=0.02)
        and "a card's share of one group" in said[2][1]
    )
