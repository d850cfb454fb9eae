"""`path/program.pt2`: a program saved by torch.export.save."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from vit_export.artifacts import LoadedModel, Size
from vit_export.errors import InputError
from vit_export.models.config import LoadOptions
from vit_export.models.finish import assumed, finish
from vit_export.models.program_check import checked_archive

_TRAINING = (torch.ops.aten.dropout.default, torch.ops.aten.batch_norm.default)


def load(name: str, options: LoadOptions) -> LoadedModel:
    """The program as a module with its parameters under their own names.

    Raises InputError for a broken file or a program that does not take one float32 [batch, 3, H, W],
    UntrustedInput when the archive holds anything that reading or running it would execute.
    """
    path = Path(name)
    if options.checkpoint or options.num_classes is not None:
        raise InputError(
            f"{name} brings its own weights and classes", "leave out --checkpoint, --num-classes"
        )
    module, size, batch = _read(path)
    preprocessing, said = assumed(options)
    fixed = () if batch is None else (f"the program takes batches of {batch} only",)
    return finish(
        module,
        family="exported program",
        preprocessing=preprocessing,
        options=options,
        size=size,
        batch=batch or 2,
        notes=(*said, *fixed),
    )


def _read(path: Path) -> tuple[nn.Module, Size, int | None]:
    """The program's module, and the size and batch it takes."""
    if not path.is_file():
        raise InputError(f"no file at {path}")
    try:
        with TemporaryFile() as clean:
            checked_archive(path, clean)
            clean.seek(0)
            program = torch.export.load(clean)
        size, batch = _input(program, path)
        module = program.module(check_guards=False)
        _set_eval(module, path)
        return module, size, batch
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is no program of torch.export.save: {reason}") from error


def _input(program: ExportedProgram, path: Path) -> tuple[Size, int | None]:
    """(height, width) and the batch, None where it is dynamic."""
    names = program.graph_signature.user_inputs
    values = [n.meta["val"] for n in program.graph.find_nodes(op="placeholder") if n.name in names]
    shape = values[0].shape if len(values) == 1 and isinstance(values[0], torch.Tensor) else ()
    if len(shape) != 4 or shape[1] != 3 or values[0].dtype is not torch.float32:
        taken = ", ".join(str(list(getattr(v, "shape", ()))) for v in values)
        raise InputError(f"{path} must take one float32 [batch, 3, height, width]; it takes {taken}")
    if not all(isinstance(side, int) for side in shape[2:]):
        raise InputError(f"{path} was exported with dynamic height or width", "export it at one image size")
    return (int(shape[2]), int(shape[3])), shape[0] if isinstance(shape[0], int) else None


def _set_eval(module: nn.Module, path: Path) -> None:
    """Programs refuse eval(): what they do was decided when they were traced."""
    graph: Any = module
    for node in graph.graph.nodes:
        if node.target in _TRAINING and any(value is True for value in node.args[2:6]):
            raise InputError(
                f"{path} was exported in training mode ({node.name})", "call model.eval() before"
            )
    for part in module.modules():
        part.training = False
