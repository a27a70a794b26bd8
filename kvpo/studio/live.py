"""A story that is told block by block: other prompts, forks, choices, and ways back.

Everything here is synchronous and knows nothing of pages or sockets. A frame shown is the frame
that `kvpo generate` writes for the same prompts and seed, bit for bit.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator

import torch

from kvpo.generators.pipeline import Pipeline
from kvpo.generators.sampler import SAMPLERS, NamedNoise, StackedNoise, Stream
from kvpo.studio.group import Group
from kvpo.studio.made import Made, digest
from kvpo.studio.reading import check_prompt
from kvpo.studio.state import Kept, State
from kvpo.studio.tree import Fork, Node, Tree
from kvpo.types import Script

NOISE = ("generate", "story")
"""Name of a story's noise: that of `kvpo generate --prompt`, so both make the same video."""


class Live:
    """One story of one generator, between two blocks of which anything may be asked."""

    def __init__(self, pipeline: Pipeline, tree: Tree, blocks: int, cache_frames: int, budget: int):
        """Stand before a story's first block.

        ``blocks``: longest story; ``cache_frames``: latent frames that routing can draw from;
        ``budget``: bytes of states that are kept for ways back.
        """
        self.pipeline = pipeline
        self.tree = tree
        self.blocks = blocks
        g = pipeline.geometry
        self.capacity = max(cache_frames, g.resident(blocks))
        self.kept = Kept(budget)
        self.group: Group | None = None
        self.noise = NamedNoise(pipeline.latent_shape(g.block), tree.seed, NOISE)
        self.state: State | None = None
        self.block = 0
        """Number of the next block."""

    @property
    def here(self) -> State:
        """State before the next block."""
        assert self.state is not None, "one that was lost to an error is made again first"
        return self.state

    # --- Prompts ---

    def say(self, text: str) -> None:
        """Let another prompt hold from the next block on.

        Where blocks have been made from here on already, they stay in the tree, and the story goes
        on beside them. Raises ValueError for a prompt that the generator can not read.
        """
        if self.group is not None:
            raise ValueError(
                "the branches were made under the prompt before; choose one or leave the fork, then give another prompt"
            )
        self._check_end()
        text = check_prompt(self.pipeline, text)
        node, block = self.tree.nodes[self.tree.at], self.block
        held = [t for start, t in self.tree.prompts(self.tree.at).items() if start <= block]
        if held[-1] == text:
            return
        if block < node.stop:
            self.tree.leave(Node(self.tree.at, block, prompts={block: text}))
        else:
            node.prompts[block] = text
        if self.state is not None:
            self._tell(self.state.stream)

    def _script(self) -> Script:
        prompts = self.tree.prompts(self.tree.at)
        return Script("story", tuple(prompts.values()), tuple(prompts), self.blocks)

    def _tell(self, videos: Stream) -> None:
        """Give a stream the prompts of the present node."""
        script = self._script()
        videos.embeddings = dict(zip(script.texts, self.pipeline.encode_text(script.texts)))
        videos.scripts = [script]

    # --- Blocks ---

    @torch.no_grad()
    def advance(self) -> Made:
        """Make the next block.  ValueError at the end of what the generator can tell."""
        self._check_end()
        if self.state is None:  # lost to an error
            self.return_to(self.tree.at, self.block)
        state, started = self.here, time.perf_counter()
        self.state = None
        self.kept.keep(self.tree.at, state)
        pixels = state.decoder(state.stream.advance()).cpu()
        state.stream.forget()
        self.state = state
        self.block += 1
        return self._made(self.block - 1, pixels, started)

    def _check_end(self) -> None:
        if self.block >= self.blocks:
            raise ValueError(
                f"the story has {self.blocks} blocks, the most that this generator or --longest allows; use another story, or go back to an earlier block"
            )

    def _made(self, block: int, pixels: torch.Tensor, started: float) -> Made:
        node, found = self.tree.nodes[self.tree.at], digest(pixels[0])
        same = None
        if block < node.stop:
            same = node.digests[block - node.first] == found
        else:
            node.digests.append(found)
        return Made(self.tree.at, block, pixels, time.perf_counter() - started, same)

    # --- Ways back ---

    def go(self, node: int, block: int) -> Generator[Made]:
        """Go to a block of a node, and give the blocks that had to be made for it.

        They are made from the nearest state that is kept, else from the story's beginning.
        """
        if not 0 <= node < len(self.tree.nodes):
            raise ValueError(
                f"the story has no node {node}; choose one of 0 to {len(self.tree.nodes) - 1}"
            )
        self.group = None
        own = self.tree.nodes[node]
        if not own.first <= block <= own.stop:
            raise ValueError(
                f"node {node} has no block {block}; choose one of {own.first} to {own.stop}"
            )
        path = self.tree.path(node)
        ends = {n: self.tree.nodes[child].first for n, child in itertools.pairwise(path)} | {
            node: block
        }
        at = self._nearest(path, ends)
        for number in path[at:]:
            yield from self._enter(number, ends[number])
        self.block = block

    def _nearest(self, path: list[int], ends: dict[int, int]) -> int:
        """Stand at the latest kept state of a path; returns the place of its node in the path."""
        for at in range(len(path) - 1, -1, -1):
            node = self.tree.nodes[path[at]]
            first = node.fork.stop if node.fork else node.first
            if (state := self.kept.latest(path[at], first, ends[path[at]])) is not None:
                self.tree.at, self.state, self.block = path[at], state, state.block
                self._tell(state.stream)
                return at
        self.tree.at, self.state, self.block = path[0], self._fresh(path[0]), 0
        return 0

    def _enter(self, number: int, end: int) -> Generator[Made]:
        """Make a node's blocks up to ``end``, from its parent's state or from within it."""
        node = self.tree.nodes[number]
        entered, self.tree.at = self.tree.at == number, number
        self._tell(self.here.stream)
        if node.fork is not None and not (entered and self.block >= node.fork.stop):
            if end < node.fork.stop:
                raise ValueError(_inside(node.fork))
            yield from self._rolled(node, node.fork)
        while self.block < end:
            yield self.advance()

    def _rolled(self, node: Node, fork: Fork) -> Generator[Made]:
        """Make a node's fork once more, and go on from the row that was chosen.

        Whoever stops on the way stands in the parent, before the fork.
        """
        assert node.parent is not None, "a fork leaves another node"
        group, whole = Group(self, fork), False
        try:
            while not group.complete:
                yield self._of_group(group.advance(), node.chosen)
            whole = True
        finally:
            if not whole:
                self.tree.at = node.parent
                self._tell(self.here.stream)
        self.state = group.chosen(node.chosen, self._script())
        self.block = fork.stop

    def _of_group(self, made: Made, row: int) -> Made:
        return self._made(
            made.block, made.pixels[row : row + 1], time.perf_counter() - made.seconds
        )

    def return_to(self, node: int, block: int) -> None:
        """Go to a block of a node, whatever has to be made for it."""
        for _ in self.go(node, block):
            pass

    def _fresh(self, node: int) -> State:
        p, script = self.pipeline, self._script()
        embeddings = dict(zip(script.texts, p.encode_text(script.texts)))
        cache, noise = p.new_cache(self.capacity), StackedNoise((self.noise,))
        sampler = SAMPLERS[self.tree.sampler]
        videos = Stream(p.generator, p.geometry, sampler, [script], embeddings, noise, cache)
        return State(videos, p.decoder())

    # --- Forks ---

    def place(self, block: int) -> tuple[int, int]:
        """Node and block at which a fork of the present story at ``block`` stands.

        Raises ValueError within a branch that was chosen, which is one piece.
        """
        number = self.tree.at
        while block <= (node := self.tree.nodes[number]).first and node.parent is not None:
            number = node.parent
        if node.fork is not None and block < node.fork.stop:
            raise ValueError(_inside(node.fork))
        if block > node.stop:
            raise ValueError(f"block {block} has not been made yet; fork at one up to {node.stop}")
        return number, block

    def check_fork(self, fork: Fork) -> None:
        """Check that a block may be forked as asked.  ValueError where not."""
        eligible = fork.explorer().eligible_forks(self.blocks, self.pipeline.geometry)
        if fork.block not in eligible:
            raise ValueError(
                f"block {fork.block} can not be forked by {fork.by}; choose one of {eligible[0]} to {eligible[-1]}, or another window"
            )

    def fork(self, fork: Fork) -> Group:
        """Begin the branches of the next block; `go` leads to another one first."""
        self.check_fork(fork)
        if fork.block != self.block:
            raise ValueError(f"the story stands at block {self.block}; go to {fork.block} first")
        if self.state is None:
            self.return_to(self.tree.at, self.block)
        self.kept.keep(self.tree.at, self.here)
        self.group = Group(self, fork)
        return self.group

    def choose(self, row: int) -> None:
        """Go on from one row of the group; row G is the anchor.

        What the parent had made beyond the fork stays in the tree.
        """
        group = self.group
        if group is None or not group.complete:
            raise ValueError(
                "there is nothing to choose from; fork a block and let its branches end"
            )
        if row not in range(len(group.plans)):
            raise ValueError(
                f"the group has no row {row!r}; choose one of 0 to {len(group.plans) - 1}"
            )
        fork = group.fork
        self.tree.leave(Node(self.tree.at, fork.block, fork, row))
        self.tree.nodes[-1].digests = [digest(pixels[row]) for pixels in group.pixels]
        self.state, self.block = group.chosen(row, self._script()), fork.stop
        self.group = None

    def undo(self) -> Generator[Made]:
        """Go back to what was told before the latest choice or change of the story."""
        node = self.tree.nodes[self.tree.at]
        if node.parent is None:
            raise ValueError("no choice has been made that could be undone; fork a block first")
        return self.go(node.parent, self.tree.nodes[node.parent].stop)


def _inside(fork: Fork) -> str:
    return f"blocks {fork.block} to {fork.stop - 1} are one piece, the branch that was chosen; fork at {fork.block} or from {fork.stop} on"


def start(live: Live) -> Live:
    """Stand at a story's first block, ready to advance."""
    live.return_to(0, 0)
    return live


def longest_story(pipeline: Pipeline, longest: int) -> int:
    """Most blocks that a story can have: by the generator's positions, and by ``longest`` (0: none).

    Raises ValueError where the generator reads everything, so that its memory would grow.
    """
    g = pipeline.geometry
    if longest < 0:
        raise ValueError(f"--longest {longest} must be 1 or more, or 0 for no limit")
    if g.window < 0 and not longest:
        raise ValueError(
            "this generator reads all of the past (window -1), so its memory grows with the story; give --longest, the most blocks of a story"
        )
    most = len(pipeline.generator.transformer.rope.freqs_cos) // g.block
    return min(most, longest or most)
