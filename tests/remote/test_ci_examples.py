"""examples/ci: every command in it is one that this version takes, and the rules are rules."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from contracts.sample_report import report, result
from vit_export.cli import app
from vit_export.runtime import report_files
from vit_export.runtime.gate import gate
from vit_export.runtime.gate_rules import read_rules

CI = Path(__file__).parents[2] / "examples" / "ci"
FILES = sorted(CI.rglob("*.yml"))


def scripts(node: Any) -> list[str]:
    """Every shell line below `run:` and `script:`."""
    if isinstance(node, list):
        return [line for item in node for line in scripts(item)]
    if not isinstance(node, dict):
        return []
    own = node.get("run", []), node.get("script", [])
    lines = [line for value in own for line in ([value] if isinstance(value, str) else value)]
    return [part for line in lines for part in line.splitlines()] + scripts(list(node.values()))


def commands() -> list[tuple[str, str]]:
    """(file, line) of every vit-export call."""
    found = [(path.name, line) for path in FILES for line in scripts(yaml.safe_load(path.read_text()))]
    return [(name, line) for name, line in found if re.match(r"vit-export\b", line.strip())]


def test_there_is_an_example_for_each() -> None:
    """A GitHub workflow, a composite action and a GitLab pipeline, each with calls of vit-export."""
    assert {path.name for path in FILES} == {"workflow.yml", "action.yml", "gitlab-ci.yml"}
    assert {name for name, _ in commands()} == {path.name for path in FILES}
    assert (
        yaml.safe_load((CI / "github/vit-export-gate/action.yml").read_text())["runs"]["using"] == "composite"
    )


@pytest.mark.parametrize(("name", "line"), commands())
def test_options_exist(name: str, line: str) -> None:
    """Each option of each example is one of the command's."""
    root: Any = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    command = root.commands.get(words[0], root) if words else root
    known = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    for word in words:
        if word.startswith("--") and word != "--":
            assert word.partition("=")[0] in known, f"{name}: {word}"


def test_the_rules_judge_a_report() -> None:
    """gate.toml reads, and a report passes against itself by it."""
    rules = read_rules(CI / "gate.toml")
    same = report(result())
    assert gate(same, same, rules).outcome == "passed"


def test_the_actions_script_runs(tmp_path: Path) -> None:
    """The composite action's own bash, with its inputs as GitHub sets them: red is 1, and junit is there."""
    action = yaml.safe_load((CI / "github/vit-export-gate/action.yml").read_text())
    (step,) = action["runs"]["steps"]
    report_files.write(report(result()), tmp_path / "good dir")
    report_files.write(report(result(status="failed", reason="x")), tmp_path / "bad")
    for folder, code in (("good dir", 0), ("bad", 1)):
        inputs = {"REPORT": folder, "BASELINE": "good dir/report.json", "RULES": "", "JUNIT": "gate.xml"}
        assert set(step["env"]) == set(inputs)
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", step["run"]], cwd=tmp_path, check=False, capture_output=True,
            text=True, env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **inputs,
                            "GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert (tmp_path / "gate.xml").exists()
        assert ("::error" in done.stdout) == bool(code)
    assert (tmp_path / "summary.md").read_text().count("## vit-export gate") == 2
