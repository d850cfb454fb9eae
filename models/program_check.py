"""A `.pt2` made safe to give to torch.export.load, which runs what it is given.

Read in torch 2.14, its ways to code of the file's choosing are: pickles (weights and constants marked so,
custom and opaque objects, example inputs), compiled libraries under data/aotinductor, SymPy expressions
(`sympify` is `eval`), names of operators (any attribute path below `torch`: `torch.os.system`), tree specs
that import modules, guards, and names that end up in generated Python. Two zip readers may also see two
archives in one file. So the archive is read once, every part is matched against what torch.export.save
writes for an image model, and only what was matched is written to a new archive.
"""

from __future__ import annotations

import ast
import io
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from vit_export.errors import InputError, UntrustedInput

_AVOID = "do not use it"
_SAVE_AGAIN = "save the program again with plain tensors as weights and example inputs"

MAX_FILES = 100_000
MAX_JSON_BYTES = 256 << 20
MAX_EXPRESSION = 1024  # characters
EXPANSION = 64  # a stored tensor may be viewed as this many times its elements (`expand`)

_MEMBERS = re.compile(
    r"archive_(format|version)|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
)
_IGNORED = ("extra/",)  # text for the user who saved it
_CODE = (
    ("data/aotinductor/", "compiled code"),
    ("data/executorch/", "compiled code"),
    ("custom_obj_", "pickled objects"),
    ("opaque_obj_", "pickled objects"),
)
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed|torchvision)\.(?!(save|from_file|_print|warn)\b)"
    r"(?!__)[a-z]\w*(\.\w+)?|torch\.ops\.aten\._(?!_|print\b)\w+(\.\w+)?"
    r"|torch\.ops\.aten\.__(and|or|xor|lshift|rshift)__(\.\w+)?"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
    r"|torch\.sym_(int|float|ite|max|min|not|sum)|math\.(trunc|floor|ceil)"
)
_NAME = re.compile(r"[\w.\-/:+@ ]*")  # nothing that could end a string in generated code
_SYMBOL = re.compile(r"[a-z]{1,8}\d{1,5}")
_FUNCTIONS = {
    "Symbol", "Integer", "Add", "Mul", "Max", "Min", "Mod", "FloorDiv", "CeilDiv", "CleanDiv", "PythonMod",
    "ModularIndexing", "Where", "TruncToInt", "FloorToInt", "CeilToInt", "ToFloat", "IntTrueDiv",
    "FloatTrueDiv", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Not", "And", "Or", "Equality", "Unequality",
    "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan",
}  # fmt: skip  # no powers: a few characters of them are a number that fills the memory
_SYNTAX = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.UnaryOp, ast.USub, ast.BinOp,
    ast.Add, ast.Sub, ast.Mult,
)  # fmt: skip
_METADATA = ("nn_module_stack", "torch_fn")  # what later stages read; text, never resolved to objects


def checked_archive(path: Path, target: IO[bytes]) -> None:
    """Write to `target` the archive at `path` with nothing in it that torch.export.load would run.

    Raises UntrustedInput for what would run code, InputError for what torch.export.save does not write,
    zipfile.BadZipFile and the like for what is no archive at all.
    """
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
        members = _members(source, path)
        for name, info in members.items():
            clean = _READERS.get(name)
            if clean is not None:
                out.writestr(f"model/{name}", clean(_bounded(source, info, path), path))
                continue
            with source.open(info) as content, out.open(f"model/{name}", "w", force_zip64=True) as member:
                while chunk := content.read(1 << 20):
                    member.write(chunk)
        for config, folder in (
            ("data/weights/model_weights_config.json", "data/weights/"),
            ("data/constants/model_constants_config.json", "data/constants/"),
        ):
            if config in members:
                stored = {n.removeprefix(folder): i.file_size for n, i in members.items()}
                _check_tensors(json.loads(source.read(members[config])), stored, path)


def _members(archive: zipfile.ZipFile, path: Path) -> Mapping[str, zipfile.ZipInfo]:
    """Entry of every part by its name below the archive's root folder; all of them known kinds."""
    entries = archive.infolist()
    if not entries:
        raise zipfile.BadZipFile("an empty archive")
    if len(entries) > MAX_FILES or sum(e.file_size for e in entries) > path.stat().st_size:
        raise UntrustedInput(f"{path} announces more than it holds", _AVOID)
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        name = entry.orig_filename.partition("/")[2]
        if code := next((what for start, what in _CODE if start in name), None):
            raise UntrustedInput(
                f"{path} holds {code} ({name}) that would be executed when read", _SAVE_AGAIN
            )
        if name.startswith(_IGNORED):
            continue
        if not _MEMBERS.fullmatch(name):
            raise InputError(f"{path} holds {entry.filename!r}, which this torch does not write", _SAVE_AGAIN)
        if name in found or entry.compress_type != zipfile.ZIP_STORED:
            raise UntrustedInput(f"{path} holds {name} twice or compressed", _AVOID)
        found[name] = entry
    return found


def _bounded(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> bytes:
    if entry.file_size > MAX_JSON_BYTES:
        raise UntrustedInput(f"{path}: {entry.filename} is larger than {MAX_JSON_BYTES >> 20} MiB")
    return archive.read(entry)


def _clean_inputs(content: bytes, path: Path) -> bytes:
    """Nothing: a program is run without its example inputs, and torch would fall back to any pickle here."""
    if content:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol
                torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UntrustedInput(
                f"{path} holds pickled objects (model.pt) that would be executed when read", _SAVE_AGAIN
            ) from error
    return b""


def _clean_config(content: bytes, path: Path) -> bytes:
    """The list of tensors: none of them a pickle."""
    config = json.loads(content)
    for name, entry in config["config"].items():
        _check_name(name, path)
        _check_name(entry["path_name"], path)
        if entry["use_pickle"] or entry["tensor_meta"] is None:
            raise UntrustedInput(
                f"{path} holds pickled objects ({name}) that would be executed when read", _SAVE_AGAIN
            )
    return json.dumps(config).encode()


def _clean_model(content: bytes, path: Path) -> bytes:
    """The graph: known operators, plain names, arithmetic; no guards, and no metadata that is resolved."""
    model = json.loads(content)
    model["guards_code"] = []
    if not all(map(_SYMBOL.fullmatch, model["range_constraints"])):
        raise UntrustedInput(f"{path} holds a range of no symbol", _AVOID)
    for holder in _objects(model):
        if "metadata" in holder:
            kept = holder["metadata"]
            holder["metadata"] = {key: str(kept[key]) for key in _METADATA if key in kept}
        for key, value in holder.items():
            if key not in ("metadata", "as_string", "as_strings"):
                _check_name(key, path)
                for text in value if isinstance(value, list) else (value,):
                    if isinstance(text, str):
                        _CHECKS.get(key, _check_name)(text, path)
    return json.dumps(model).encode()


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object below `value`, except metadata, whose texts nothing resolves."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield item
            pending += [inner for key, inner in item.items() if key != "metadata"]
        elif isinstance(item, list):
            pending += item


def _check_name(text: str, path: Path) -> None:
    if not _NAME.fullmatch(text):
        raise UntrustedInput(f"{path} holds a name that is none: {text[:80]!r}", _AVOID)


def _check_operator(text: str, path: Path) -> None:
    if not _OPERATORS.fullmatch(text):
        raise UntrustedInput(
            f"{path} calls {text[:80]}, which is no operator of a model that is let in",
            "operators of torch.ops.aten, torchvision and quantized_decomposed are; do not use others' files",
        )


def _check_expression(text: str, path: Path) -> None:
    """Sums and products of symbols, as srepr writes them: `Mul(Integer(2), Symbol('s77', integer=True))`."""
    try:
        tree = ast.parse(text, mode="eval") if len(text) <= MAX_EXPRESSION else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if tree is None or not all(_arithmetic(node) for node in ast.walk(tree)):
        raise UntrustedInput(
            f"{path} holds an expression that is no arithmetic: {text[:80]!r}", "do not use it"
        )


def _arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or bool(_SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Constant):
        value = node.value
        return bool(_SYMBOL.fullmatch(value)) if isinstance(value, str) else isinstance(value, int | float)
    return isinstance(node, _SYNTAX)


def _check_spec(text: str, path: Path) -> None:
    """A tree of containers: its contexts hold plain keys, no enumerations or factories to import."""
    try:
        pending = [json.loads(text)]
    except RecursionError as error:
        raise InputError(f"{path} holds a tree that is too deep") from error
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if item.keys() - {"type", "context", "children_spec"}:
                raise UntrustedInput(f"{path} imports modules when it is read", _AVOID)
            if isinstance(item.get("context"), str):
                pending.append(json.loads(item["context"]))
            _check_name(str(item.get("type")), path)
            pending.append(item.get("children_spec"))
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str):
            _check_name(item, path)


def _check_tensors(config: Mapping[str, Any], stored: Mapping[str, int], path: Path) -> None:
    """No tensor is more than its file holds: torch would make it up out of zeros or repeat it."""
    for name, entry in config["config"].items():
        sizes = [side.get("as_int") for side in entry["tensor_meta"]["sizes"]]
        if not all(isinstance(side, int) and side >= 0 for side in sizes):
            raise InputError(f"{path}: {name} has no fixed shape", _SAVE_AGAIN)
        if math.prod(sizes) > EXPANSION * stored.get(entry["path_name"], 0):
            raise UntrustedInput(
                f"{path}: {name} of shape {sizes} is more than its file holds", "do not use it"
            )


_SAVE_AGAIN = (
    "save the program again with torch.export.save, with plain tensors as weights and example inputs"
)
_READERS: Mapping[str, Callable[[bytes, Path], bytes]] = {
    "models/model.json": _clean_model,
    "data/weights/model_weights_config.json": _clean_config,
    "data/constants/model_constants_config.json": _clean_config,
    "data/sample_inputs/model.pt": _clean_inputs,
}
_CHECKS: Mapping[str, Callable[[str, Path], None]] = {
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": _check_expression,
    "in_spec": _check_spec,
    "out_spec": _check_spec,
}
