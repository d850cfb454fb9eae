"""What --host takes: plain names, users and ports, and nothing a shell or ssh could read otherwise."""

from __future__ import annotations

import pytest

from vit_export.errors import UsageError
from vit_export.runtime.remote_ssh import Host, parse_host, parse_hosts

BAD_HOSTS = [
    "", "device", "user@device", "ssh://", "ssh://-oProxyCommand=touch${IFS}x", "ssh://-o@device",
    "ssh://user@-device", "ssh://user@device:0", "ssh://user@device:65536", "ssh://user@device:22x",
    "ssh://user@device/path", "ssh://user@device?x", "ssh://user@dev ice", "ssh://user@dev;ice",
    "ssh://user@$(id)", "ssh://`id`@device", "ssh://user@device\n-oX", "ssh://user:password@device",
    "ssh://us er@device", "ssh://user@[::1", "ssh://user@[::1];x", "ssh://user@@device", "ssh://device:",
    "http://device", "-oProxyCommand=x", "ssh://user@dévice", "ssh://user@" + "a" * 300, "ssh://../x",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_HOSTS)
def test_hosts_that_are_no_hosts(text: str) -> None:
    """Options, shell characters, passwords and paths are refused before any process is started."""
    with pytest.raises(UsageError):
        parse_host(text)


def test_a_host_without_its_scheme_is_told() -> None:
    """`--host me@pi:2222` is answered with what was meant."""
    with pytest.raises(UsageError) as caught:
        parse_host("me@pi:2222")
    assert caught.value.hint == "--host ssh://me@pi:2222"


def test_hosts_as_they_are_written() -> None:
    """Names, aliases, addresses of both kinds, users and ports."""
    assert parse_host("ssh://jetson") == Host("jetson")
    assert parse_host("ssh://me@192.168.1.7:2222") == Host("192.168.1.7", "me", 2222)
    assert parse_host("ssh://me@[fe80::1%eth0]:22") == Host("[fe80::1%eth0]", "me", 22)
    assert parse_host("ssh://me@[fe80::1%eth0]:22").folder == "me@-fe80-1-eth0-22"
    assert str(parse_host("ssh://me@pi.local/")) == "me@pi.local"
    with pytest.raises(UsageError, match="twice"):
        parse_hosts(["ssh://pi", "ssh://pi/"])
