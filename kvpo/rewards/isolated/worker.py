"""A reward in a process of its own: it reads requests, scores, and replies.

It talks on pipes, or as an HTTP server.

    python worker.py --reward scorer.py --params '{"stride": 4}'              on pipes: `kvpo.rewards.isolated.reward` starts it
    python worker.py --reward scorer.py --device cuda --http 8100       a server on 127.0.0.1

--reward is a file that defines SPEC and load(device, **params) (docs/isolated_rewards.md), for which this environment
needs numpy and what the file imports; or any reward's name, for which it needs kvpo.
Standard library and numpy only, for Python 3.8 and later.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import platform
import select
import signal
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, HTTPServer

# Found by its place, since kvpo may not be installed here; and its folder off the path again, since
# the rewards in it
# have the names of the very packages that they port (`import hpsv3`).
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, HERE)
import wire  # noqa: E402

sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != HERE]

GRACE = 2.0
"""Seconds in which a worker without a parent may end by itself."""
LOOPBACK = ("127.0.0.1", "localhost")


class FileScorer:
    """A scorer file: what it loads is asked for numbers.

    It moves between devices where it has ``to(device)``.
    """

    def __init__(self, path, params):
        spec = importlib.util.spec_from_file_location("kvpo_scorer", path)
        # dataclasses look for their module there
        self.module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.params, self.scorer, self.weights = params, None, ""

    def load(self, device):
        if self.scorer is None:
            self.scorer = self.module.load(device, **self.params)
            self.weights = identity(getattr(self.scorer, "weights", ()))
        elif hasattr(self.scorer, "to"):
            self.scorer.to(device)
        return {**self.module.SPEC, "weights": self.weights}

    def offload(self):
        if hasattr(self.scorer, "to"):
            self.scorer.to("cpu")

    def score(self, frames, header):
        answer = self.scorer.score(frames, header["fps"], header["prompts"], header["history"])
        return numbers("score", answer["scores"]), {
            name: numbers(name, values) for name, values in answer.get("parts", {}).items()
        }


class KvpoReward:
    """A reward of kvpo's, by any name that a recipe can give."""

    def __init__(self, name, params):
        from kvpo.rewards.registry import make_reward

        self.reward = make_reward(name, params)

    def load(self, device):
        self.reward.load(device)
        low, high = self.reward.spec.bounds
        return {
            **dataclasses.asdict(self.reward.spec),
            "bounds": [low if math.isfinite(low) else None, high if math.isfinite(high) else None],
        }

    def offload(self):
        self.reward.offload()

    def score(self, frames, header):
        import torch

        from kvpo.rewards.base import VideoBatch, check_output

        batch = VideoBatch(
            torch.from_numpy(frames),
            header["fps"],
            tuple(header["prompts"]),
            tuple(header["history"]),
        )
        output = check_output(self.reward.spec, batch, self.reward.score(batch))
        scores = [
            score if valid else None
            for score, valid in zip(output.scores.tolist(), output.valid.tolist())
        ]
        return scores, {
            name: [v if math.isfinite(v) else None for v in values.tolist()]
            for name, values in output.parts.items()
        }


def identity(files):
    """Name and hash of the weights in one or several files."""
    names = []
    for path in [files] if isinstance(files, str) else files:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(1 << 22), b""):
                digest.update(piece)
        names.append(f"{os.path.basename(path)} sha256:{digest.hexdigest()[:16]}")
    return ", ".join(names)


def numbers(name, values):
    """Turn a scorer's values into plain numbers, None for a clip that can not be measured.

    Raises ValueError for NaN and infinity: a calculation that failed, not a verdict.
    """
    plain = [None if value is None else float(value) for value in values]
    for clip, value in enumerate(plain):
        if value is not None and not math.isfinite(value):
            raise ValueError(
                f"{name} of clip {clip} is {value}; give None for a clip that can not be measured"
            )
    return plain


class Service:
    """Answers requests, one at a time."""

    def __init__(self, reward, params):
        self.name, self.params, self.scorer = reward, params, None

    def load(self, header, payload=b""):
        """The handshake.  Only here the model's library is imported."""
        begin = time.perf_counter()
        if self.scorer is None:
            self.scorer = (FileScorer if self.name.endswith(".py") else KvpoReward)(
                self.name, self.params
            )
        spec = self.scorer.load(header["device"])
        return {
            "spec": spec,
            "params": self.params,
            "packages": packages(),
            "seconds": time.perf_counter() - begin,
        }

    def offload(self, header, payload):
        self.scorer.offload()
        return {}

    def score(self, header, payload):
        begin = time.perf_counter()
        scores, parts = self.scorer.score(wire.frames_of(header, payload), header)
        return {"scores": scores, "parts": parts, "seconds": time.perf_counter() - begin}

    def __call__(self, header, payload=b""):
        """Whatever a scorer raises is the reply: its process lives on."""
        try:
            if header["protocol"] != wire.PROTOCOL:
                raise ValueError(
                    f"protocol {header['protocol']} is asked for, this worker speaks {wire.PROTOCOL}; both sides need the same kvpo"
                )
            reply = {"load": self.load, "score": self.score, "offload": self.offload}[header["do"]](
                header, payload
            )
        except Exception as error:
            traceback.print_exc()
            where = traceback.extract_tb(error.__traceback__)[-1]
            reply = {"error": f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"}
        return {"protocol": wire.PROTOCOL, **reply}


def packages():
    """Versions of Python and of all installed packages that have been imported."""
    from importlib.metadata import distributions

    found = {str(d.metadata["Name"]): d.version for d in distributions()}
    return {
        "python": platform.python_version(),
        **{name: found[name] for name in sorted(found) if name.replace("-", "_") in sys.modules},
    }


def serve_pipes(service):
    """Answer requests until the pipe ends.

    Whatever a library prints, from Python or from C, goes to stderr, and not between the messages.
    """
    requests, replies = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    threading.Thread(target=end_with_parent, args=(requests.fileno(),), daemon=True).start()
    while True:
        try:
            header, payload = wire.read(requests)
        except EOFError:
            # for what it has started; itself ends in order
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            return end_group(signal.SIGTERM)
        wire.write(replies, service(header, payload))


def end_with_parent(pipe):
    """End this process and all that it has started once nobody can ask any more.

    It does so even in the middle of a call: a killed run leaves no model on the card.
    """
    poll = select.poll()
    poll.register(pipe, 0)  # nothing but the other end's closing, which is always reported
    poll.poll()
    time.sleep(GRACE)
    end_group(signal.SIGKILL)
    os._exit(1)


def end_group(how):
    """Send a signal to this process and all it has started; to none if the group is a shell's."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), how)


class Handler(BaseHTTPRequestHandler):
    """GET /spec is the handshake, POST /score a request to score; nothing else."""

    timeout = 60.0
    """Seconds without a byte after which a client is dropped."""

    def do_GET(self):
        if self.path != "/spec":
            return self.send_error(404, "GET /spec or POST /score")
        self.reply({**self.server.hello, "most": self.server.most})

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if self.path != "/score":
            return self.send_error(404, "GET /spec or POST /score")
        if self.headers.get_content_type() != wire.CONTENT_TYPE:
            return self.send_error(415, "the body must be " + wire.CONTENT_TYPE)
        if not length.isdigit():
            return self.send_error(411)
        if int(length) > wire.PREFIX.size + wire.HEADER + self.server.most:
            return self.send_error(413, f"at most {self.server.most} bytes of frames")
        try:
            header, payload = wire.read(self.rfile, self.server.most)
        except (EOFError, ValueError) as error:
            return self.send_error(400, str(error))
        if header.get("do") != "score":
            return self.send_error(400, "a request here must be to score")
        self.reply(self.server.service(header, payload))

    def reply(self, header):
        body = b"".join(wire.pack(header))
        self.send_response(200)
        self.send_header("Content-Type", wire.CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def serve_http(service, args):
    hello = service({"protocol": wire.PROTOCOL, "do": "load", "device": args.device})
    if "error" in hello:
        sys.exit(f"reward {args.reward!r} can not be loaded: {hello['error']}")
    if args.host not in LOOPBACK:
        print(
            f"warning: {args.host} can be reached by others, and whoever reaches it can use this model; there is no password",
            file=sys.stderr,
        )
    server = HTTPServer((args.host, args.http), Handler)  # one request at a time; five may wait
    server.service, server.hello, server.most = service, hello, args.most_mb << 20
    print(f"{args.reward} at http://{args.host}:{server.server_port}", flush=True)
    server.serve_forever()


def main():
    parser = argparse.ArgumentParser(description="A reward in a process of its own.")
    parser.add_argument(
        "--reward", required=True, help="a scorer file (.py), or the name of a reward of kvpo's"
    )
    parser.add_argument(
        "--params", type=json.loads, default={}, help="what it takes, a JSON object"
    )
    parser.add_argument(
        "--http",
        type=int,
        metavar="PORT",
        help="serve on this port, 0 = any free one, instead of on pipes",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to serve on")
    parser.add_argument("--device", default="cpu", help="where a server's model lies")
    parser.add_argument(
        "--most-mb",
        type=int,
        default=2048,
        help="most frames that a server takes in a request, MiB",
    )
    args = parser.parse_args()
    service = Service(args.reward, args.params)
    if args.http is None:
        serve_pipes(service)
    else:
        serve_http(service, args)


if __name__ == "__main__":
    main()
