"""A standard Dask worker that announces what this machine can do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vit_export.errors import UsageError
from vit_export.runtime.doctor import diagnose
from vit_export.sweep.cluster import PATIENT, Tls, reachable, require, resources


def serve(
    scheduler: str, more: tuple[str, ...], name: str | None, probe: bool, tls: Tls, say: Callable[[str], None]
) -> None:
    """Work for a scheduler until it goes away or Ctrl-C. more: resources besides those that are found. probe:
    try each SDK in a process of its own.

    Raises UsageError if the scheduler cannot be reached.
    """
    require()
    reachable(scheduler, tls.security() is not None)
    found = {**resources(diagnose(probe=probe)), **dict.fromkeys(more, 1.0)}
    say("resources: " + " ".join(found))
    try:
        asyncio.run(_serve(scheduler, found, name, tls))
    except (OSError, TimeoutError) as error:
        raise UsageError(f"cannot reach the scheduler {scheduler}: {error}") from error


async def _serve(scheduler: str, found: dict[str, float], name: str | None, tls: Tls) -> None:
    import dask
    from distributed import Nanny

    # The nanny starts the worker again when a vendor's library takes it down.
    with dask.config.set(PATIENT):
        async with Nanny(
            scheduler,
            nthreads=1,
            resources=found,
            name=name,
            memory_limit=0,
            security=tls.security(),
            death_timeout=60,
        ) as nanny:
            await nanny.finished()
