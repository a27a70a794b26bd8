"""The report's last section: its words, a line each."""

from __future__ import annotations

import html

from kvpo.evaluation.intervals import VERDICT_PAIRS

TERMS = {
    "start weights": "the generator before training; every comparison is with it unless said otherwise.",
    "online": "the weights that the optimizer changes, as the last update left them.",
    "EMA": "their exponential moving average over the updates, which a run is judged and exported by.",
    "script": "one story: a prompt, or several that follow each other, each from a block on.",
    "block": "latent frames that are generated together; the unit in which prompts switch and branches fork.",
    "branch": "one of a group's videos that, from the fork block on, read other old frames from the cache.",
    "anchor": "the group's video without routing: same past, noise and prompts. Rewards are measured against its.",
    "best": "of a group, the branch of the highest advantage; among curves of rewards, the branch of the highest "
    "value of that very reward; RUN:best are the weights of the best held-out evaluation.",
    "advantage A": "a branch's rewards minus the anchor's, over their spread, weighted, summed and centred.",
    "energy": "how far the unrouted generator's velocities are from a branch's own: mean squared distance.",
    "tau": "temperature of the policy over branches: pi is the softmax of -energy / tau.",
    "pi": "the share that the policy gives a branch; pi_theta by the current weights, pi_old by those that made it.",
    "VQ": "visual quality, a reward: whether the picture is clean and stays what it was.",
    "MQ": "motion quality, a reward: whether things move, and plausibly.",
    "TA": "text alignment, a reward: whether the video shows what the prompts ask.",
    "local, global": "reward of the clip of the explored window; of a clip in every prompt from the fork on.",
    "95 % interval": "BCa bootstrap over scripts: where the mean would lie with other scripts. "
    f"With fewer than {VERDICT_PAIRS} scripts it is too narrow, and nothing is called better or worse by it.",
    "wins": "share of the scripts on which the first weights did better, ties counted half.",
}


def glossary() -> tuple[str, str]:
    """The lead, and the terms as a list of definitions."""
    items = "".join(
        f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in TERMS.items()
    )
    lead = "Which measurement stands behind VQ, MQ and TA is the recipe's choice: the resolved config names it."
    return lead, f'<dl class="glossary">{items}</dl>'
