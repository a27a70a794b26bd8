"""Errors of a hub of released weights that can not be reached, whatever client asks it."""

from __future__ import annotations


def hub_faults() -> tuple[type[Exception], ...]:
    """Classes of the errors with which huggingface_hub says that it got nothing.

    Its own are an OSError or a ValueError.  From version 1 on it also lets its HTTP client's
    pass, which are neither: a machine without network, or a proxy that refuses, ended in a
    traceback.
    """
    from huggingface_hub.errors import HTTPError

    return (OSError, ValueError, HTTPError)
