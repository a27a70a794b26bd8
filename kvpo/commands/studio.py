"""`kvpo studio`: watch a stream in the browser, fork it, and choose how it goes on."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvpo.commands.options import Positional
from kvpo.common.environment import pick_device
from kvpo.common.progress import Progress
from kvpo.config import RunConfig, load_config, recipe_path
from kvpo.method.settings import RolloutConfig

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Studio:
    """Open a studio in the browser: watch a stream, fork it, choose how it goes on."""

    generator: Positional[str] = "mini"
    """Pipeline folder, mini, or a run (RUN, RUN:ema, RUN:online, RUN:start)."""
    out: Path = Path("runs/studio")
    """Folder of stories, videos and preferences; one that is there is gone on with."""
    runs: Path = Path("runs")
    """Folder of the runs that the pane *Runs* lists, and that alignments to choices are put into."""
    recipe: str = ""
    """Recipe by which the generator is aligned to choices; default: the miniature's, or the run's.
    Where it is given, its rewards are shown beside the branches of a fork."""
    port: int = 8765
    """Port; 0 = any that is free."""
    host: str = "127.0.0.1"
    """Address that is listened at.
    Any but this machine's own lets others in who know the token, unencrypted."""
    branches: int = RolloutConfig.branches
    """Branches that a fork proposes, beside the anchor."""
    cache_frames: int = RolloutConfig.cache_frames
    """Latent frames that are kept for routing to read."""
    longest: int = 0
    """Most blocks of a story; 0 = as many as the generator has positions for."""
    memory: int = 256
    """MiB of each tab for states to go back to; what is older is made again."""
    sampler: Literal["renoise", "ode"] = RunConfig.sampler
    dtype: Literal["", "float32", "bfloat16"] = ""
    """Precision; default: a run's own, bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    threads: int = 1
    """Threads of the CPU for generation; 0 = as many as PyTorch takes.
    More are faster for large generators on idle cores, and far slower on busy ones."""

    def __call__(self) -> None:
        self.check_options()
        progress = Progress()
        listener = self.listener()
        with listener:
            self.serve(listener, progress)

    def check_options(self) -> None:
        """Check the options before anything is loaded.  ValueError or ImportError for a bad one."""
        try:
            import starlette
            import uvicorn
            import websockets
        except ImportError as error:
            raise ValueError(
                f"the studio needs {error.name}, which is not installed; pip install 'kvpo[studio]', or '.[studio]' in its source folder"
            ) from None
        del starlette, uvicorn, websockets
        from kvpo.studio.tree import MOST_BRANCHES

        if not 2 <= self.branches <= MOST_BRANCHES:
            raise ValueError(f"--branches {self.branches} must lie between 2 and {MOST_BRANCHES}")
        if self.memory < 0 or self.cache_frames < 1:
            raise ValueError(
                f"--memory {self.memory} and --cache-frames {self.cache_frames} must not be below 0 and 1; give more"
            )
        if self.threads < 0:
            raise ValueError(f"--threads {self.threads} must be 1 or more, or 0 for PyTorch's own")
        if self.recipe:
            load_config(recipe_path(self.recipe))

    def listener(self) -> socket.socket:
        """Open the port.  ValueError where that is not possible."""
        if not 0 <= self.port < 2**16:
            raise ValueError(
                f"--port {self.port} must lie between 1 and 65535, or be 0 for any that is free"
            )
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family)
        except OSError as error:
            raise ValueError(
                f"nothing can listen at {self.host} port {self.port} ({error}); give another --port, 0 for any that is free, or another --host"
            ) from None

    def serve(self, listener: socket.socket, progress: Progress) -> None:
        """Load the generator, say the address, and serve until ctrl-C."""
        import uvicorn

        from kvpo.runs.loading import load_generator, precision
        from kvpo.studio.judging import load_judging
        from kvpo.studio.learning import Learning
        from kvpo.studio.library import Library
        from kvpo.studio.live import longest_story
        from kvpo.studio.panes import Panes
        from kvpo.studio.runs import Runs
        from kvpo.studio.server import LARGEST_MESSAGE, new_app, new_token
        from kvpo.studio.shared import Studio as Shared
        from kvpo.studio.shared import new_worker

        library, device = Library(self.out), pick_device(self.device)
        runs = Runs(self.runs)
        panes = Panes(Learning(self.out, runs, self.generator, self.recipe), runs)
        dtype = precision(self.generator, device, self.dtype)
        pipeline, label = load_generator(self.generator, device, dtype or "float32", dtype)
        judging = (
            load_judging(load_config(recipe_path(self.recipe)), device) if self.recipe else None
        )
        blocks, token = longest_story(pipeline, self.longest), new_token()
        with new_worker(self.threads) as worker:
            shared = Shared(
                pipeline,
                label,
                library,
                worker,
                blocks,
                self.cache_frames,
                self.memory * 2**20,
                self.sampler,
                self.branches,
                judging,
            )
            server = uvicorn.Server(
                uvicorn.Config(
                    new_app(shared, token, self.host, panes),
                    ws="websockets-sansio",
                    ws_max_size=LARGEST_MESSAGE,
                    log_level="warning",
                    access_log=False,
                    server_header=False,
                    timeout_graceful_shutdown=10,
                )
            )
            self.say_address(listener.getsockname()[1], token, label, progress)
            with contextlib.suppress(KeyboardInterrupt):
                server.run(sockets=[listener])
        progress.say(f"the studio has ended; its stories are in {self.out}")
        if (left := panes.learning.children.running()) is not None:
            progress.say(
                f"{left.name} goes on without it ({left.kind}); start the studio again to see or stop it, or kill {left.pid}"
            )

    def say_address(self, port: int, token: str, label: str, progress: Progress) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.host not in LOCAL:
            progress.warn(
                f"warning: the studio listens at {self.host}: whoever reaches this machine and knows the token can use it, and can read it on the way, for nothing is encrypted. "
                "Without --host it is open to this machine alone; ssh -L leads there from elsewhere"
            )
        host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
        progress.say(f"{label}: open http://{host}:{port}/{token}/ (ctrl-C ends the studio)")
