"""Where tasks run: a cluster of this machine's own, or one that is already there."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_export.errors import MissingExtra, UsageError
from vit_export.runtime.doctor import Diagnosis, diagnose
from vit_export.runtime.environment import installed, memory_bytes, physical_cores

if TYPE_CHECKING:
    from distributed import Client
    from distributed.security import Security

MEMORY_A_WORKER = 4 << 30  # bytes; a trace of a ViT-L with its weights and a calibration batch fits
NO_DASHBOARD = "" if installed("bokeh") else " (its pages need bokeh)"
# A task holds the interpreter for seconds (tracing, conversion), a loaded machine answers late: both live.
PATIENT = {
    "distributed.admin.tick.limit": "10 m",
    "distributed.comm.timeouts.tcp": "5 m",
    "distributed.worker.profile.enabled": False,
}
_PATIENCE = 30  # seconds to wait for a scheduler, and for its first worker
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files for an encrypted cluster; all three or none."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def security(self) -> Security | None:
        """Dask's own security settings. Raises UsageError for some of the three without the others."""
        given = [path for path in (self.ca, self.cert, self.key) if path is not None]
        if not given:
            return None
        if len(given) < 3:
            raise UsageError("TLS needs --tls-ca-file, --tls-cert and --tls-key together")
        if absent := next((path for path in given if not path.is_file()), None):
            raise UsageError(f"there is no file {absent}")
        from distributed.security import Security

        ca, cert, key = map(str, given)
        sides = {f"tls_{side}_{kind}": value for side in ("client", "scheduler", "worker")
                 for kind, value in (("cert", cert), ("key", key))}  # fmt: skip
        return Security(tls_ca_file=ca, require_encryption=True, **sides)


def require() -> None:
    """Raise MissingExtra without Dask."""
    if installed("distributed") is None:
        raise MissingExtra("dask.distributed", "sweep")


@contextmanager
def connected(scheduler: str | None, tls: Tls, workers: int | None = None) -> Iterator[tuple[Client, int]]:
    """(client, threads of one task): of a scheduler by its address, or of workers on this machine.

    workers: how many here, default `local_size`. threads is 0 for a scheduler elsewhere: each worker then
    has its own machine.
    """
    require()
    import dask
    from distributed import Client, LocalCluster

    if scheduler is not None:
        with dask.config.set(PATIENT), _joined(Client, scheduler, tls) as client:
            yield client, 0
        return
    count = workers or local_size()
    threads = max(1, physical_cores() // count)
    found = resources(diagnose(probe=False))
    with (
        dask.config.set(PATIENT),
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,  # Dask would pause or restart a worker for what a vendor's library holds
            resources=found,
            dashboard_address=":0",
            env=dict.fromkeys(_THREAD_VARIABLES, str(threads)),
            silence_logs="ERROR",
            security=tls.security(),
        ) as cluster,
        Client(cluster, security=tls.security()) as client,
    ):
        yield client, threads


def _joined(client_of: Any, scheduler: str, tls: Tls) -> Any:
    """A client of a running scheduler that has a worker. Raises UsageError if there is no such thing."""
    address = reachable(scheduler, tls.security() is not None)
    try:
        client = client_of(address, security=tls.security(), timeout=_PATIENCE)
    except (OSError, TimeoutError) as error:
        raise UsageError(f"there is no Dask scheduler at {address}: {error}") from error
    try:
        client.wait_for_workers(1, timeout=_PATIENCE)
    except TimeoutError as error:
        client.close()
        hint = f"vit-export worker --scheduler {address}"
        raise UsageError(f"the scheduler at {address} has no worker", hint) from error
    return client


def local_size() -> int:
    """Worker processes for this machine: one a core, as far as memory goes."""
    memory = memory_bytes()
    return max(1, min(physical_cores(), memory // MEMORY_A_WORKER if memory else 1))


def resources(found: list[Diagnosis] | tuple[Diagnosis, ...]) -> dict[str, float]:
    """What a worker can do, as Dask resources: 1 of each, and a worker does one task at a time.

    `pytorch`: load, trace, calibrate. `build-TARGET`, `TARGET`: build its artifacts, run them;
    `TARGET-X.Y` with the SDK's version. `coreml-ane`: a Mac with a Neural Engine. `latency`: time them.
    """
    names = ["latency"] + (["pytorch"] if installed("torch") else [])
    for one in found:
        names += [f"build-{one.target}"] if one.builds else []
        names += [one.target, *_versions(one)] if one.runs else []
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        names.append("coreml-ane")
    return dict.fromkeys(names, 1.0)


def announced(client: Any) -> Mapping[str, int]:
    """How many workers of a cluster announce each resource."""
    counts: dict[str, int] = {}
    for worker in client.scheduler_info(n_workers=-1)["workers"].values():
        for name in worker["resources"]:
            counts[name] = counts.get(name, 0) + 1
    return counts


def _versions(one: Diagnosis) -> list[str]:
    """`tensorrt-10.3` for what runs TensorRT 10.3.0.26."""
    runtimes = {"onnx": "onnxruntime", "coreml": "coremltools"}
    wanted = (runtimes.get(one.target, one.target), f"{one.target}-rtx")
    found = [version for name, version in one.versions.items() if name in wanted]
    return [f"{one.target}-{'.'.join(version.split('.')[:2])}" for version in found]


def reachable(address: str, encrypted: bool) -> str:
    """The address, checked to be one that Dask knows."""
    if "://" not in address:
        raise UsageError(f"--scheduler {address} is no address", "as tcp://host:8786 or tls://host:8786")
    if address.startswith("tls://") and not encrypted:
        raise UsageError(f"{address} is encrypted", "give --tls-ca-file, --tls-cert and --tls-key")
    return address
