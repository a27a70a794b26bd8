"""A story that is told, forked, chosen from, undone and replayed is the same bit for bit; no page,
no socket."""

from __future__ import annotations

import pytest
import torch
from tiny import BLUE, RED, SMALL, with_geometry

from kvpo.generators.generate import streamed
from kvpo.generators.sampler import SAMPLERS
from kvpo.studio.live import NOISE, Live, longest_story, start
from kvpo.studio.made import digest
from kvpo.studio.tree import Fork, Tree, new_tree
from kvpo.types import Script

ROUTED = Fork(4, "kv_routing", {"window_blocks": 2}, 3)
NOISY = Fork(4, "start_noise", {"window_blocks": 2}, 3)


def told(pipeline, tree: Tree | None = None, budget: int = 2**26, blocks: int = 20) -> Live:
    tree = tree or new_tree("story", "tiny", "renoise", 5, RED)
    return start(Live(pipeline, tree, blocks, 20, budget))


def forked(live: Live, fork: Fork, row: int) -> None:
    group = live.fork(fork)
    while not group.complete:
        group.advance()
    live.choose(row)


def frames(made) -> torch.Tensor:
    return torch.cat([m.pixels[0] for m in made])


def test_a_story_is_what_generate_makes(pipeline):
    """With two switches, the second of them typed twice; only the later wording counts."""
    live, made = told(pipeline), []
    for block in range(8):
        if block == 3:
            live.say(BLUE)
        if block == 6:
            live.say(RED)
            live.say(f"  {SMALL} ")
        made.append(live.advance())
    script = Script("story", (RED, BLUE, SMALL), (0, 3, 6), 8)
    whole = torch.cat(list(streamed(pipeline, SAMPLERS["renoise"], [script], 5, [NOISE])), dim=1)
    assert torch.equal(frames(made), whole[0])
    assert live.tree.prompts(0) == {0: RED, 3: BLUE, 6: SMALL}


@pytest.mark.parametrize("fork", [ROUTED, NOISY], ids=["routed", "noisy"])
@pytest.mark.parametrize("budget", [2**26, 0], ids=["kept states", "from the start"])
def test_a_tree_is_replayed_bit_for_bit(pipeline, tmp_path, fork, budget):
    """Two choices one after the other, a prompt between them; written, read, and made again."""
    live = told(pipeline, budget=budget)
    for _ in range(4):
        live.advance()
    forked(live, fork, 1)
    live.say(BLUE)
    made = [live.advance() for _ in range(3)]
    forked(live, Fork(9, "kv_routing", {"window_blocks": 1}, 2, draw=3), 2)
    made.append(live.advance())
    read = Tree.read(live.tree.write(tmp_path / "a.json"))
    assert read == live.tree
    again = Live(pipeline, read, 20, 20, budget)
    replayed = list(again.go(2, read.nodes[2].stop))
    assert [m.block for m in replayed] == list(range(11)) and all(m.same for m in replayed)
    assert torch.equal(frames(replayed[6:9]), frames(made[:3]))
    assert torch.equal(live.advance().pixels, again.advance().pixels)


def test_branches_differ_and_the_anchor_is_the_story(pipeline):
    """Row G reads what the story would; another draw gives others; a fork leaves the story alone."""
    live = told(pipeline)
    for _ in range(4):
        live.advance()
    group = live.fork(ROUTED)
    pixels = [group.advance().pixels, group.advance().pixels]
    other = live.fork(Fork(4, "kv_routing", {"window_blocks": 2}, 3, draw=1))
    assert other.plans != group.plans
    reads = group.reads()
    assert len(reads) == 4 and all(len(row) == 2 for row in reads)
    assert reads[3] == [[0, 4, 5, 6, 7], [0, 6, 7, 8, 9]] and reads[0][0] != reads[3][0]
    main = [live.advance().pixels[0] for _ in range(2)]
    anchor = [p[3].int() for p in pixels]
    assert all((m.int() - a).abs().max() <= 1 for m, a in zip(main, anchor))
    assert any(not torch.equal(p[0], p[1]) for p in pixels)


def test_undo_leads_back_and_the_choice_stays_in_the_tree(pipeline):
    live = told(pipeline)
    first = [live.advance() for _ in range(6)]
    for _ in live.go(*live.place(4)):
        pass
    forked(live, ROUTED, 0)
    chosen = live.advance()
    for _ in live.undo():
        pass
    assert (live.tree.at, live.block) == (0, 6) and len(live.tree.nodes) == 2
    with pytest.raises(ValueError, match="no choice has been made"):
        live.undo()
    again = list(live.go(1, live.tree.nodes[1].stop))
    assert all(m.same for m in again) and torch.equal(again[-1].pixels, chosen.pixels)
    assert live.tree.nodes[0].digests == [digest(m.pixels[0]) for m in first]


def test_a_fork_that_is_left_does_not_hide_a_switch(pipeline):
    """A fork prepares its block: the past is encoded under the prompt that holds there. A prompt
    typed after the fork was left must be encoded all the same."""
    live = told(pipeline)
    made = [live.advance() for _ in range(4)]
    live.fork(ROUTED).advance()
    with pytest.raises(ValueError, match="leave the fork"):
        live.say(BLUE)
    live.group = None
    live.say(BLUE)
    made += [live.advance() for _ in range(2)]
    script = Script("story", (RED, BLUE), (0, 4), 6)
    whole = torch.cat(list(streamed(pipeline, SAMPLERS["renoise"], [script], 5, [NOISE])), dim=1)
    assert torch.equal(frames(made), whole[0])


@pytest.mark.parametrize("switch", [4, 5, 6])
def test_a_fork_before_a_switch_is_replayed(pipeline, switch):
    """A fork in the past whose explored blocks reach over a later switch of the story followed that
    switch, and its replay, which only knows the prompts up to the fork, did not: three blocks came
    out otherwise."""
    live = told(pipeline)
    for block in range(7):
        if block == switch:
            live.say(BLUE)
        live.advance()
    for _ in live.go(*live.place(4)):
        pass
    forked(live, ROUTED, 1)
    live.advance()
    again = Live(pipeline, live.tree, 20, 20, 0)
    assert all(made.same for made in again.go(1, 7))
    assert live.tree.prompts(1) == ({0: RED, 4: BLUE} if switch == 4 else {0: RED})


def test_another_prompt_in_the_past_begins_a_stretch_of_its_own(pipeline):
    live = told(pipeline)
    first = [live.advance() for _ in range(5)]
    assert not list(live.go(0, 2))
    assert live.advance().same
    live.say(BLUE)
    other = live.advance()
    assert live.tree.at == 1 and live.tree.nodes[1].first == 3 and other.same is None
    assert live.tree.nodes[0].stop == 5 and not torch.equal(other.pixels, first[3].pixels)


def test_what_can_not_be_is_refused(pipeline):
    live = told(pipeline, blocks=8)
    for _ in range(4):
        live.advance()
    for fork, said in (
        (Fork(2, "kv_routing", {"window_blocks": 2}, 3), "one of 3 to 6"),
        (Fork(4, "magic", {}, 3), "there is no explorer"),
        (Fork(4, "kv_routing", {"mix": 1}, 3), "has no settings"),
        (Fork(4, "kv_routing", {"window_blocks": 2}, 99), "2 to 16"),
        (Fork(5, "kv_routing", {"window_blocks": 2}, 3), "stands at block 4"),
    ):
        with pytest.raises(ValueError, match=said):
            live.fork(fork)
    with pytest.raises(ValueError, match="nothing to choose"):
        live.choose(0)
    forked(live, ROUTED, 0)
    with pytest.raises(ValueError, match="one piece"):
        live.place(5)
    assert live.place(4) == (0, 4) and live.place(6) == (1, 6)
    with pytest.raises(ValueError, match="not been made yet"):
        live.place(7)
    for text, said in (("\u200b", "not blank"), ("zzz qqq", "knows no word")):
        with pytest.raises(ValueError, match=said):
            live.say(text)
    for _ in range(2):
        live.advance()
    with pytest.raises(ValueError, match="has 8 blocks"):
        live.advance()


def test_memory_does_not_grow_with_the_story(pipeline):
    """Latents are let go of, states are kept within the budget, choices leave no chain of caches."""
    live = told(pipeline, blocks=200, budget=2**20)
    for _ in range(4):
        live.advance()
    sizes = []
    for turn in range(6):
        forked(live, Fork(live.block, "kv_routing", {"window_blocks": 1}, 2), turn % 3)
        for _ in range(6):
            live.advance()
        assert live.state.stream.cache.parent is None
        sizes.append(live.state.nbytes + sum(size for _, size in live.kept._states.values()))
    assert max(sizes[2:]) <= 1.05 * sizes[1] and sizes[-1] < 2**21


def test_the_longest_story(pipeline):
    assert longest_story(pipeline, 0) == 512 and longest_story(pipeline, 30) == 30
    with pytest.raises(ValueError, match="give --longest"):
        longest_story(with_geometry(pipeline, window=-1), 0)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"format": 1', '"format": 2', "format 1"),
        ('"parent": null', '"parent": 0', "leave another"),
        ('"at": 0', '"at": 7', "in range"),
        ('"seed": 5', '"seed": "5"', "whole numbers"),
        ('"0": "a red', '"3": "a red', "without a prompt"),
        ("{", "[", "no story"),
    ],
)
def test_a_damaged_story_is_refused(tmp_path, old, new, said):
    path = new_tree("story", "tiny", "renoise", 5, RED).write(tmp_path / "a.json")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=said) as refused:
        Tree.read(path)
    assert str(path) in str(refused.value)
