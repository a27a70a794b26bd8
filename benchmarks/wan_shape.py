"""One group at the paper's shape on one GPU: Wan2.1-1.3B with random weights, 147 latent frames of 60 x 104, G 8, P 5, LoRA.

Random weights make no video, but the same shapes are the same work.  Without rewards and decoding.

    python benchmarks/wan_shape.py [--fork 38] [--rows-per-pass 16] [--schedules batched one-by-one]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import WanTransformer3DModel
from schedule import PAPER, PAPER_GEOMETRY, one_by_one

from kvpo.advantages import Advantage
from kvpo.config import RunConfig
from kvpo.denoise import SAMPLERS
from kvpo.environment import environment
from kvpo.exploration.kv_routing import KVRouting
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.pipeline import Geometry, Pipeline
from kvpo.policy import Policy, PolicyConfig
from kvpo.replay import CONTEXTS, Replay
from kvpo.rng import normal
from kvpo.rollout import roll_out
from kvpo.score import horizon
from kvpo.timing import Phases
from kvpo.types import Rollout
from kvpo.update import Updater

WAN = dict(num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=30)


def new_run(config: RunConfig, shape: dict, geometry: Geometry, device: torch.device) -> SimpleNamespace:
    """The parts of a run that roll out and replay, around a random transformer in bf16."""
    with torch.device(device):
        transformer = WanTransformer3DModel(patch_size=(1, 2, 2), cross_attn_norm=True, qk_norm="rms_norm_across_heads", **shape).to(torch.bfloat16).eval()
    transformer.enable_gradient_checkpointing()
    pipeline = Pipeline(CausalWan(transformer), None, geometry, None, "random")
    policy = Policy(pipeline.generator, config.policy, config.seed)
    updater = Updater(policy, config.optimizer, config.objective, config.temperature, config.unsafe, groups=1)
    return SimpleNamespace(config=config, pipeline=pipeline, policy=policy, updater=updater, sampler=SAMPLERS[config.sampler])


def rolled_out(run: SimpleNamespace, schedule: str, embeddings: dict, fork: int, phases: Phases) -> Rollout:
    if schedule == "one-by-one":
        return one_by_one(run, PAPER, embeddings, fork, ("wan",), phases)
    end = lambda window: horizon(PAPER, window, run.pipeline.geometry, run.config.score)  # noqa: E731
    return roll_out(run.pipeline, run.sampler, run.config.exploring, run.config.rollout, PAPER, embeddings, run.config.seed, ("wan",), phases, fork, end)


def measure(run: SimpleNamespace, schedule: str, fork: int, rows_per_pass: int) -> dict:
    """Seconds by phase, calls, and GiB above the loaded weights.  Three replays, as in a step after the first update: reference, behaviour, gradient."""
    device, g, phases = run.pipeline.device, run.pipeline.geometry, Phases()
    text_dim = run.pipeline.generator.transformer.config.text_dim
    embeddings = {text: normal((g.text_length, text_dim), 0, "text", text).to(device, torch.bfloat16) for text in PAPER.texts}
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    calls = run.pipeline.generator.calls
    with torch.no_grad(), phases("rollout"):
        rollout = rolled_out(run, schedule, embeddings, fork, phases)
        float(rollout.latents.sum())  # waits for the device
    A_G = torch.linspace(-1.0, 1.0, rollout.num_branches, dtype=torch.float64)
    advantage = Advantage(A_G, A_G, torch.zeros(0), torch.zeros(0), torch.ones(len(A_G), dtype=torch.bool), True, {})
    replay = Replay(run.pipeline, rollout, embeddings, CONTEXTS[run.config.context], run.config.energy, rows_per_pass=rows_per_pass)
    with phases("replay_reference"):
        energy = replay.energies()
    norm = run.updater.accumulate(replay, advantage, phases).metrics["optim/grad_norm"]
    run.updater.optimizer.zero_grad(set_to_none=True)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
    return {"seconds": phases.take(), "calls": run.pipeline.generator.calls - calls, "peak GiB above the weights": peak, "energy": energy.tolist(), "gradient norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fork", type=int, default=38, help="fork block of 49")
    parser.add_argument("--rows-per-pass", type=int, default=16, help="velocities replayed together in the batched schedule")
    parser.add_argument("--schedules", nargs="+", default=["batched", "one-by-one"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/wan_shape.json"))
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True  # the adapter is float32
    device = torch.device("cuda")
    config = replace(RunConfig(), kv_routing=KVRouting(window_blocks=5), policy=PolicyConfig(rank=256))
    run = new_run(config, WAN, PAPER_GEOMETRY, device)
    weights = torch.cuda.memory_allocated() / 2**30
    result = {"environment": environment(device), "fork": args.fork, "rows per pass": args.rows_per_pass, "weights GiB": weights, "schedules": {}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for schedule in args.schedules:
        result["schedules"][schedule] = measure(run, schedule, args.fork, args.rows_per_pass if schedule == "batched" else 1)
        print(json.dumps(result["schedules"][schedule]), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
