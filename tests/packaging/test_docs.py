"""The documentation site builds, needs no network, and says what the program says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from vit_export import cli, errors
from vit_export.calibration.observers import METHODS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as one command builds it; strict, so a broken link or a missing page fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_option_is_there(site: Path) -> None:
    """The page of the command line has every option of every command."""
    page = (site / "cli.html").read_text()
    group = typer.main.get_command(cli.app)
    for command in (group, *group.commands.values()):  # type: ignore[attr-defined]
        for param in command.params:
            assert all(f"<code>{opt}</code>" in page for opt in param.opts if opt.startswith("--")), param
            assert getattr(param, "help", None), f"{param.name} of {command.name} has no help"


def test_methods_and_errors_come_from_the_code(site: Path) -> None:
    """Every calibration method and every error a user can meet is on its page."""
    methods, trouble = (site / "methods.html").read_text(), (site / "troubleshooting.html").read_text()
    assert all(f"<code>{name}</code>" in methods for name in METHODS)
    assert "drop_no_ops" in methods and "fold_weight_transposes" in methods
    assert all(name in trouble for name in re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))


def test_the_site_asks_nobody(site: Path) -> None:
    """No page loads a font, script, style or picture from another host."""
    loads = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//""")
    for page in site.rglob("*.html"):
        found = [m for m in loads.findall(page.read_text()) if 'rel="canonical"' not in m]
        assert not found, page.name
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", styles)


def test_troubleshooting_quotes_the_program() -> None:
    """Each message listed is a text that some module raises."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(
        r"^\| `([^`]+)` \|", page.partition("## By message")[2].partition("## By symptom")[0], re.M
    )
    packages = [
        path for path in ROOT.rglob("*.py") if "tests" not in path.parts and ".venv" not in path.parts
    ]
    source = "\n".join(path.read_text() for path in packages)
    assert len(quoted) > 15
    assert [text for text in quoted if text not in source] == []
