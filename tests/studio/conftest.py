"""The studio with the tiny generator, its server, and tabs that speak to it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from browsing import opened_page
from learners import finish, new_panes
from starlette.testclient import TestClient
from tabs import HOST, TOKEN

from kvpo.studio.library import Library
from kvpo.studio.panes import Panes
from kvpo.studio.server import new_app
from kvpo.studio.shared import Studio


@pytest.fixture
def studio(pipeline, tmp_path) -> Iterator[Studio]:
    with ThreadPoolExecutor(1) as worker:
        library = Library(tmp_path / "studio")
        yield Studio(pipeline, "tiny", library, worker, 40, 20, 2**26)


@pytest.fixture
def client(studio) -> Iterator[TestClient]:
    with TestClient(new_app(studio, TOKEN), base_url=f"http://{HOST}") as client:
        yield client


@pytest.fixture
def page() -> Iterator:
    with opened_page() as found:
        yield found


@pytest.fixture
def panes(tmp_path) -> Iterator[Panes]:
    """The panes *Learn* and *Runs* of a folder, with stand-ins for the long work."""
    found = new_panes(tmp_path)
    yield found
    finish(found.learning)


@pytest.fixture
def pane_client(panes) -> Iterator[TestClient]:
    with TestClient(new_app(None, TOKEN, panes=panes), base_url=f"http://{HOST}") as client:
        yield client
