"""Whether a server can be asked at all: the clients of hubs try one that is not there for half a minute a file."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from functools import cache

PATIENCE = 5.0
"""Seconds that a server has for its first answer."""


@cache
def unreachable(server: str) -> str | None:
    """Why nothing can be fetched from a server, `https://host`; None where it answers, whatever it says. It is asked once.

    HF_HUB_OFFLINE forbids to ask any. One whose certificate is not known here has answered: the clients may have authorities of their own.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(urllib.request.Request(server, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        return None if isinstance(why, ssl.SSLCertVerificationError) else f"{server} does not answer ({why})"
    return None


def no_hub() -> str | None:
    """Why the hub cannot be asked for anything; None where it can."""
    from huggingface_hub import constants

    return unreachable(constants.ENDPOINT)
