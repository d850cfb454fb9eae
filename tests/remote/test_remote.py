"""verify over SSH against a real sshd: copied, run, brought back; broken, late, missing or refused."""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts import sshd
from contracts.bundles import fake_bundle
from vit_export import __version__
from vit_export.errors import InputError, TargetError
from vit_export.runtime import remote_copy, report_files
from vit_export.runtime.bundle_open import Bundle, open_bundle
from vit_export.runtime.remote import HostOutcome, host_table, verify_on_hosts
from vit_export.runtime.remote_copy import copy
from vit_export.runtime.remote_ssh import Connection, SshOptions, parse_host, parse_hosts
from vit_export.runtime.verify import VerifyJob


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Server]:
    """A server with rsync."""
    with sshd.start(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Server]:
    """A server without rsync."""
    with sshd.start(tmp_path_factory.mktemp("bare"), rsync=False) as running:
        yield running


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of the fake runner, a folder with a space in its name, grown to 12 MB by its artifact."""
    folder = tmp_path_factory.mktemp("local") / "my bundle's [1] $HOME"
    folder.mkdir()
    path = fake_bundle(folder / "out", size=12_000_000)
    return open_bundle(path, folder)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    place = tmp_path / "work"
    place.mkdir()
    return place


def connect(url: str, server: sshd.Server, work: Path, **options: Any) -> Connection:
    """A connection with the throw-away keys."""
    given = SshOptions(config=server.config, python=sys.executable, **options)
    return Connection(parse_host(url), given, work, threading.Event())


def verify_on(
    urls: list[str], bundle: Bundle, server: sshd.Server, tmp_path: Path, **options: Any
) -> tuple[HostOutcome, ...]:
    """verify_on_hosts with this interpreter on the far side."""
    given = SshOptions(**{"config": server.config, "python": sys.executable, **options})
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return verify_on_hosts(bundle, parse_hosts(urls), VerifyJob(), given, tmp_path / "reports", work)


def there(server: sshd.Server, bundle: Bundle, name: str) -> Path:
    """A file of the bundle on the host."""
    return server.home / "copy" / name


def test_several_hosts_one_table(
    server: sshd.Server, bare: sshd.Server, bundle: Bundle, tmp_path: Path
) -> None:
    """Two devices and one that is off, side by side: two whole reports, one error, one table, clean hosts."""
    off = f"ssh://127.0.0.1:{sshd.free_port()}"
    combined = tmp_path / "ssh_config"  # each server has its own keys
    combined.write_text(
        "".join(
            f'Match host 127.0.0.1 exec "test %p = {s.port}"\n{s.config.read_text().replace("Host *", "")}'
            for s in (server, bare)
        )
    )
    outcomes = verify_on([server.url, off, bare.url], bundle, server, tmp_path, config=combined)
    first, refused, second = outcomes
    assert refused.report is None
    assert isinstance(refused.error, TargetError)
    assert "cannot connect" in refused.error.message
    assert "refused" in refused.error.message
    for outcome in (first, second):
        assert outcome.report is not None, outcome.error
        (result,) = outcome.report.results
        assert (result.status, result.agreement) == ("ok", 1.0)
        assert outcome.report.device is not None
        assert outcome.report.device.host == str(outcome.host)
        assert report_files.read(tmp_path / "reports" / outcome.host.folder) == outcome.report
    assert sorted(p.name for p in (tmp_path / "reports").iterdir()) == sorted(
        o.host.folder for o in (first, second)
    )
    table = host_table(outcomes)
    assert table.row_count == 3
    assert [str(cell) for cell in table.columns[0].cells] == [str(o.host) for o in outcomes]
    assert server.left == bare.left == []


@pytest.mark.parametrize("tool", ["rsync", "sftp"])
def test_a_dropped_connection_is_taken_up_again(
    server: sshd.Server, bare: sshd.Server, bundle: Bundle, work: Path, tool: str
) -> None:
    """A copy cut in the middle of the artifact goes on from there: what had arrived is not sent again."""
    target = server if tool == "rsync" else bare
    # With sftp, one more connection asks what is there.
    before = [None] if tool == "rsync" else [None, None]
    with sshd.CuttingProxy(target.port, [*before, 9_000_000]) as proxy:
        connection = connect(proxy.url, target, work)
        connection.shell("rm -rf copy && mkdir copy")
        copy(bundle, connection, "copy", rsync=tool == "rsync")
    for name in (file.path for file in bundle.manifest.files):
        assert there(target, bundle, name).read_bytes() == bundle.path(name).read_bytes()
    total = sum(file.bytes for file in bundle.manifest.files)
    cut = len(before)
    assert 9_000_000 <= proxy.sent[cut] < 9_100_000
    assert sum(proxy.sent[cut + 1 :]) < total - 4_000_000  # what was on the way is lost: ssh's window is 2 MB
    open_bundle(target.home / "copy", work)


@pytest.mark.parametrize("tool", ["rsync", "sftp"])
def test_a_connection_that_keeps_breaking(
    server: sshd.Server,
    bare: sshd.Server,
    bundle: Bundle,
    work: Path,
    tool: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After four breaks the error says that the next call goes on; and the next call does."""
    monkeypatch.setattr(remote_copy, "PAUSE_SECONDS", 0.0)
    target = server if tool == "rsync" else bare
    with sshd.CuttingProxy(target.port, [None, *[2_500_000] * 20]) as proxy:
        connection = connect(proxy.url, target, work)
        connection.shell("rm -rf copy && mkdir copy")
        with pytest.raises(TargetError, match="broke 4 times") as caught:
            copy(bundle, connection, "copy", rsync=tool == "rsync")
        assert "same command again" in caught.value.hint
    arrived = sum(p.stat().st_size for p in (target.home / "copy").rglob("*") if p.is_file())
    assert arrived > 1_000_000
    copy(bundle, connect(target.url, target, work), "copy", rsync=tool == "rsync")
    open_bundle(target.home / "copy", work)


@pytest.mark.parametrize("tool", ["rsync", "sftp"])
def test_a_copy_is_what_the_bundle_is(
    server: sshd.Server, bare: sshd.Server, bundle: Bundle, work: Path, tool: str
) -> None:
    """Files of an older copy that do not belong, or are longer than they should be, do not survive."""
    target = server if tool == "rsync" else bare
    connection = connect(target.url, target, work)
    connection.shell("rm -rf copy && mkdir -p copy/onnx")
    (target.home / "copy" / "onnx" / "old.onnx").write_bytes(b"old")
    (target.home / "copy" / "plan.json").write_bytes(b"x" * 10_000)
    copy(bundle, connection, "copy", rsync=tool == "rsync")
    open_bundle(target.home / "copy", work)


def test_a_connection_lost_while_verifying(
    server: sshd.Server, bundle: Bundle, tmp_path: Path, work: Path
) -> None:
    """A drop while the device works: one error, no report, and nothing goes on running there."""
    slow = server.home / "slow-python"
    slow.write_text(f'#!/bin/sh\ncase "$*" in *verify*) exec sleep 300;; esac\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    with sshd.CuttingProxy(server.port, []) as proxy:

        def cut() -> None:
            while not any("sleep 300" in line for line in sshd.running(server.home)):
                time.sleep(0.05)
            for session in _sessions(server.port):
                os.kill(session, 15)

        thread = threading.Thread(target=cut, daemon=True)
        thread.start()
        (outcome,) = verify_on([proxy.url], bundle, server, tmp_path, python=str(slow))
        thread.join(10)
    assert outcome.report is None
    assert outcome.error is not None
    assert "broke while verifying" in outcome.error.message
    assert not (tmp_path / "reports").exists()
    for _ in range(100):
        if not sshd.running(server.home):
            break
        time.sleep(0.1)
    assert sshd.running(server.home) == []


def _sessions(port: int) -> list[int]:
    """Process ids of sshd's children that serve connections to `port` (never the listener itself)."""
    listener = next(
        int(p.name) for p in Path("/proc").glob("[0-9]*")
        if _cmdline(p).startswith(("sshd: /usr/sbin/sshd", "/usr/sbin/sshd")) and _port_of(p) == port
    )  # fmt: skip
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if _parent(p) == listener]


def _cmdline(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _port_of(process: Path) -> int | None:
    words = _cmdline(process).split()
    configs = [Path(word) for word in words if word.endswith("sshd_config")]
    return int(configs[0].read_text().split()[1]) if configs else None


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_a_host_that_takes_too_long(server: sshd.Server, bundle: Bundle, tmp_path: Path) -> None:
    """--host-timeout ends it: one error, no report, nothing left running or lying there."""
    slow = server.home / "hanging-python"
    slow.write_text(f'#!/bin/sh\ncase "$*" in *verify*) exec sleep 300;; esac\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    began = time.monotonic()
    (outcome,) = verify_on([server.url], bundle, server, tmp_path, python=str(slow), timeout=6.0)
    assert time.monotonic() - began < 30
    assert outcome.error is not None
    assert "more than 6 s" in outcome.error.message
    assert "--host-timeout" in outcome.error.hint
    assert not (tmp_path / "reports").exists()
    assert server.left == []


@pytest.mark.parametrize("output", ["", "{}", '{"schema": "vit-export.report/1"', "Welcome to device 7\n"])
def test_half_a_report_is_no_report(server: sshd.Server, bundle: Bundle, tmp_path: Path, output: str) -> None:
    """Whatever is not a whole report of verify is an error, and nothing is written."""
    odd = server.home / "odd-python"
    odd.write_text(
        f"#!/bin/sh\ncase \"$*\" in *verify*) printf '%s' '{output}'; echo boom >&2; exit 0;; esac\n"
        f'exec {sys.executable} "$@"\n'
    )
    odd.chmod(0o755)
    (outcome,) = verify_on([server.url], bundle, server, tmp_path, python=str(odd))
    assert outcome.report is None
    assert outcome.error is not None
    assert "no report" in outcome.error.message
    assert not (tmp_path / "reports").exists()
    assert server.left == []


def test_a_missing_install_names_its_command(server: sshd.Server, bundle: Bundle, tmp_path: Path) -> None:
    """A Python without vit-export, and no Python at all: the fix is in the hint, and it is a command."""
    venv.create(tmp_path / "empty", with_pip=False)
    empty = str(tmp_path / "empty" / "bin" / "python")
    (outcome,) = verify_on([server.url], bundle, server, tmp_path, python=empty)
    assert outcome.error is not None
    assert "has no vit-export" in outcome.error.message
    assert "-m pip install" in outcome.error.hint
    assert f"vit-export[onnxruntime]=={__version__}" in outcome.error.hint
    assert outcome.error.hint.startswith(f"ssh -F {server.config} -p {server.port} 127.0.0.1")
    (outcome,) = verify_on([server.url], bundle, server, tmp_path, python="python9")
    assert outcome.error is not None
    assert "no python9" in outcome.error.message
    assert "--python" in outcome.error.hint


def test_an_unknown_host_key_is_not_accepted(server: sshd.Server, bundle: Bundle, tmp_path: Path) -> None:
    """The user's known_hosts decides; nothing is asked, and nothing is accepted for them."""
    config = tmp_path / "ssh_config"
    config.write_text(server.config.read_text().replace("known_hosts", "no_such_hosts"))
    (outcome,) = verify_on([server.url], bundle, server, tmp_path, config=config)
    assert outcome.error is not None
    assert "Host key verification failed" in outcome.error.message
    assert "ssh -F" in outcome.error.hint


def test_keep_leaves_the_bundle_there(server: sshd.Server, bundle: Bundle, tmp_path: Path) -> None:
    """--keep leaves the copy, which the next call completes instead of sending it again."""
    (outcome,) = verify_on([server.url], bundle, server, tmp_path, keep=True)
    assert outcome.report is not None, outcome.error
    assert server.left == [bundle.sha256[:16]]
    assert outcome.kept == f"~/.cache/vit-export/{bundle.sha256[:16]}"
    copied = server.home / ".cache" / "vit-export" / bundle.sha256[:16]
    assert stat.S_IMODE(copied.stat().st_mode) == 0o700
    with sshd.CuttingProxy(server.port, []) as proxy:
        (outcome,) = verify_on([proxy.url], bundle, server, tmp_path)
    assert outcome.report is not None
    assert sum(proxy.sent) < 200_000  # of 12 MB
    assert server.left == []


def test_a_copy_damaged_there_is_refused_there(server: sshd.Server, bundle: Bundle, tmp_path: Path) -> None:
    """The device checks every hash itself: a byte changed after the copy is exit code 2, told as it is."""
    spoiling = server.home / "spoiling-python"
    spoiling.write_text(
        '#!/bin/sh\ncase "$*" in *verify*) for f in .cache/vit-export/*/bundle/plan.json; do\n'
        'printf x >> "$f"; done;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    spoiling.chmod(0o755)
    (outcome,) = verify_on([server.url], bundle, server, tmp_path, python=str(spoiling))
    assert isinstance(outcome.error, InputError)
    assert "plan.json has" in outcome.error.message  # its words, not ours
    assert server.left == []


@pytest.mark.parametrize("python", ["$(touch pwned)", "`touch pwned`", "x; touch pwned", "-c", "a b'\"\\"])
def test_python_is_a_path_never_a_command(
    server: sshd.Server, bundle: Bundle, tmp_path: Path, python: str
) -> None:
    """--python is quoted: shell text in it names a program that does not exist, and runs nothing."""
    (outcome,) = verify_on([server.url], bundle, server, tmp_path, python=python)
    assert outcome.error is not None
    assert "there is no" in outcome.error.message
    assert not list(server.home.rglob("pwned"))
