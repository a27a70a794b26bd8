"""A tab of the studio without a browser."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from starlette.testclient import TestClient

from kvpo.studio.images import unpacked

TOKEN, HOST = "secret-token", "127.0.0.1:8765"
OURS = {"host": HOST, "origin": f"http://{HOST}"}
FORK = {"do": "fork", "block": 3, "by": "kv_routing", "branches": 2, "window": 1, "draw": 0}


class Tab:
    """A page that does what it is told: it takes blocks as they come, unless it is slow."""

    def __init__(self, socket):
        self.socket, self.blocks, self.got, self.slow = socket, [], [], False

    def do(self, do: str, **what) -> None:
        self.socket.send_text(json.dumps({"do": do, **what}))

    def next(self) -> dict:
        """Take the next message; of a block its head, with its frames."""
        message = self.socket.receive()
        if (data := message.get("bytes")) is None:
            self.got.append(json.loads(message["text"]))
            return self.got[-1]
        head, strips = unpacked(data)
        rows = [np.array(Image.open(io.BytesIO(strip))) for strip in strips]
        shape = (head["frames"], head["height"], head["width"], 3)
        pixels = [torch.from_numpy(row.reshape(shape)).permute(0, 3, 1, 2) for row in rows]
        self.blocks.append({"is": "block", **head, "pixels": pixels})
        if not self.slow:
            self.do("seen", blocks=len(self.blocks))
        return self.blocks[-1]

    def until(self, what: str, **facts) -> dict:
        """Take messages up to one of a kind, which has these facts."""
        for _ in range(200):
            message = self.next()
            if message["is"] == what and all(message.get(k) == v for k, v in facts.items()):
                return message
            if message["is"] == "error" and what != "error":
                raise AssertionError(message["message"])
        raise AssertionError(f"no message {what} {facts}")

    def play_to(self, number: int) -> None:
        """Take blocks up to one, then pause."""
        while not (self.blocks and self.blocks[-1]["number"] >= number):
            self.next()
        self.do("pause")
        self.until("story", playing=False)


@contextlib.contextmanager
def tab(client: TestClient, **headers) -> Iterator[Tab]:
    with client.websocket_connect(f"/{TOKEN}/socket", headers=OURS | headers) as socket:
        opened = Tab(socket)
        assert opened.next()["is"] == "hello"
        yield opened
