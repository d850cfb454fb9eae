"""What `mkdocs build` makes from the code, so that it cannot rot: options, methods, errors, navigation."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from vit_export import errors
from vit_export.calibration.observers import OBSERVERS
from vit_export.cli import app

ROOT = Path(__file__).parents[1]

# Titles in order; a page that does not exist is left out.
PAGES = {
    "index.md": "Quick start",
    "cli.md": "Command line",
    "methods.md": "Methods",
    "quantization.md": "Quantisation",
    "families.md": "Model families",
    "tensorrt.md": "TensorRT",
    "coreml.md": "Core ML",
    "devices.md": "Devices, SSH and CI",
    "fleet.md": "Many devices",
    "reports.md": "Reports",
    "attention.md": "Attention",
    "performance.md": "Performance",
    "extending.md": "Extending",
    "troubleshooting.md": "Troubleshooting",
    "contributing.md": "Contributing",
    "changelog.md": "Changes",
}
_REWRITES = (
    ("The traced graph", "export/fold.py", "FOLDS"),
    ("The ONNX graph", "export/onnx_passes.py", "PASSES"),
)


def on_config(config: Any) -> Any:
    """The navigation: every known page that exists, then every other page of docs/."""
    here = {path.name for path in (ROOT / "docs").glob("*.md")} | GENERATED.keys()
    known = [{title: page} for page, title in PAGES.items() if page in here]
    config.nav = [*known, *sorted(here - PAGES.keys())]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made here, and leave this file out of the site."""
    for name, make in GENERATED.items():
        files.append(File.generated(config, name, content=make()))
    files.remove(next(file for file in files if file.src_uri == "site.py"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put what the code says where a page asks for it: `<!-- NAME -->` on a line of its own."""
    for name, make in INSERTS.items():
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", make())
    return markdown


def command_line() -> str:
    """Every command with its arguments and options, from the typer app itself."""
    group: Any = typer.main.get_command(app)
    parts = ["# Command line", _usage("vit-export", group)]
    parts += [_usage(f"vit-export {name}", command) for name, command in group.commands.items()]
    return "\n\n".join(parts) + "\n"


def _usage(name: str, command: Any) -> str:
    rows = [_option(param) for param in command.params if not getattr(param, "hidden", False)]
    table = ["| option | default | meaning |", "|---|---|---|", *rows]
    return "\n\n".join([f"## {name}", inspect.cleandoc(command.help or ""), "\n".join(table)])


def _option(param: Any) -> str:
    argument = param.param_type_name == "argument"
    names = [(param.metavar or param.name).upper()] if argument else [*param.opts, *param.secondary_opts]
    default = param.default
    shown = "" if default in (None, False, (), []) or callable(default) or argument else f"`{default}`"
    cells = (", ".join(f"`{name}`" for name in names), shown, getattr(param, "help", None) or "")
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def observers() -> str:
    """Each --calib-method with the docstring of its config, which names the source."""
    rows = [
        f"| `{config.method}` | {_cell(' '.join(inspect.getdoc(config).split()))} |" for config in OBSERVERS
    ]
    return "\n".join(["| `--calib-method` | what it does |", "|---|---|", *rows])


def rewrites() -> str:
    """Each rewrite of the traced and the ONNX graph, in order, with the first paragraph of its docstring."""
    rows = [
        f"| {title} | `{name}` | {_cell(said)} |"
        for title, file, table in _REWRITES
        for name, said in _table_of(ROOT / file, table)
    ]
    return "\n".join(["| graph | rewrite | what it does |", "|---|---|---|", *rows])


def _table_of(path: Path, table: str) -> Iterator[tuple[str, str]]:
    """(function, first paragraph) of the functions in a tuple of a module, read without importing it."""
    tree = ast.parse(path.read_text("utf-8"))
    said = {
        node.name: ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.FunctionDef)
    }
    found = (n for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == table)
    for node in found:
        assert isinstance(node.value, ast.Tuple)
        for name in map(ast.unparse, node.value.elts):
            yield name, " ".join(said.get(name, "").partition("\n\n")[0].split())


def error_tree() -> str:
    """Every error a user can meet, with its exit code, from errors.py."""
    kinds = _below(errors.VitExportError)
    rows = [
        f"| `{k.__name__}` | {k.exit_code} | {_cell(' '.join((k.__doc__ or '').split()))} |" for k in kinds
    ]
    return "\n".join(["| error | exit code | meaning |", "|---|---|---|", *rows])


def _below(kind: type[errors.VitExportError]) -> Sequence[type[errors.VitExportError]]:
    return [one for child in kind.__subclasses__() for one in (child, *_below(child))]


def _cell(text: str) -> str:
    """Text in a table: no bar ends the cell, no angle bracket is a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _from_root(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


GENERATED = {
    "cli.md": command_line,
    "contributing.md": lambda: _from_root("CONTRIBUTING.md"),
    "changelog.md": lambda: _from_root("CHANGELOG.md"),
}
INSERTS = {"observers": observers, "rewrites": rewrites, "errors": error_tree}
