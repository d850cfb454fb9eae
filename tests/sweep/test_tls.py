"""A cluster behind Dask's own TLS: who has the certificate works in it, who has not stays outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_export.errors import UsageError
from vit_export.sweep import cluster
from vit_export.sweep.cluster import Tls


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_scheduler_worker_and_client_speak_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vit-export worker` and the sweep's client join a TLS scheduler; without certificates nobody does."""
    cert, key, file = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "scheduler.json"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-keyout", key, "-out", cert], check=True, capture_output=True,
    )  # fmt: skip
    files = ["--tls-ca-file", str(cert), "--tls-cert", str(cert), "--tls-key", str(key)]
    scheduler = ["distributed.cli.dask_scheduler", "--host", "tls://127.0.0.1", "--port", "0",
                 "--no-dashboard", "--scheduler-file", str(file), *files]  # fmt: skip
    started = [_start(scheduler)]
    try:
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text().endswith("}"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        assert address.startswith("tls://")
        worker = [
            "vit_export",
            "worker",
            "--scheduler",
            address,
            "--no-probe",
            "--resource",
            "jetson",
            *files,
        ]
        started.append(_start(worker))
        with cluster.connected(address, Tls(cert, cert, key)) as (client, _):
            able = cluster.announced(client)
            assert able["jetson"] == able["pytorch"] == able["build-onnx"] == able["onnx"] == 1
        with pytest.raises(UsageError, match="is encrypted"):
            cluster.connected(address, Tls()).__enter__()
        monkeypatch.setattr(cluster, "_PATIENCE", 3)
        with pytest.raises(UsageError, match="no Dask scheduler at tcp"):
            cluster.connected(address.replace("tls:", "tcp:"), Tls()).__enter__()
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", *command], start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No scheduler, and one without workers, are clear errors."""
    monkeypatch.setattr(cluster, "_PATIENCE", 1)
    with pytest.raises(UsageError, match="no Dask scheduler at tcp"):
        cluster.connected("tcp://127.0.0.1:9", Tls()).__enter__()
