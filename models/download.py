"""Downloads that fail in one clear line, at once when there is no network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

from vit_export.errors import InputError, VitExportError

_PROBE_SECONDS = 5.0


@contextmanager
def downloading(what: str, wanted: bool = True, host: str | None = None) -> Iterator[None]:
    """Around a call that may download: offline, only the cache is asked, and failure says what to do.

    `wanted` False leaves the call alone. host: where from, the Hugging Face hub if None. The hub's client
    retries for a minute when a name does not resolve, hence the probe.

    Raises InputError naming `what` when it can be had neither from the network nor from the cache.
    """
    if not wanted:
        yield
        return
    online, before = _online(host), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not online
    try:
        yield
    except VitExportError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        why = reason if online else "no network, and not in the local cache"
        raise InputError(
            f"cannot download {what}: {why}",
            "connect once, or give the weights with --checkpoint FILE and leave out --pretrained",
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _online(host: str | None) -> bool:
    """Whether the host answers; behind a proxy its name need not resolve here, so assume it does."""
    if getproxies():
        return True
    address = urlsplit(f"https://{host}" if host else constants.ENDPOINT)
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=_PROBE_SECONDS).close()
    except OSError:
        return False
    return True
