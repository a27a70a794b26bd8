"""`kvpo env` says what is installed, and what is needed where that is another version."""

from __future__ import annotations

from importlib.metadata import version

from kvpo.commands import env


def test_versions_are_held_against_what_is_needed(monkeypatch):
    """A local part says how torch was built, not that it is too old; extras' packages are not
    asked for."""
    lines = ["numpy>=1.0", "torch>=999", "no-such-package>=2", 'ruff>=999; extra == "dev"']
    monkeypatch.setattr(env, "requires", lambda name: lines)
    assert env.needed() == {
        "numpy": version("numpy"),
        "torch": f"{version('torch')}, but >=999 is needed",
        "no-such-package": "missing, >=2 is needed",
    }
    monkeypatch.setattr(env, "requires", lambda name: ["torch>=2.13.0"])
    monkeypatch.setattr(env, "version_of", lambda name: "2.13.0+cpu")
    assert env.needed() == {"torch": "2.13.0+cpu"}
