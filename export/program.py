"""Tracing a model into a Program and turning a Program into what exporters take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen

from vit_export.artifacts import LoadedModel, Program, Size
from vit_export.errors import InputError, NumericsError, ParityError, TargetError
from vit_export.export.fold import FOLDS
from vit_export.export.graph import Edit, exact_attention
from vit_export.export.layers import Shapes, attention_macs, find_layers, first_bad

PARITY = 1e-4  # largest |difference| over largest |value| that a lossless step may show
_MAX_BATCH = 4096


def trace(model: LoadedModel, *, batch_size: int = 1, dynamic_batch: bool = True) -> Program:
    """Trace with torch.export, fold what inference does not need and check the numbers.

    A model whose code fixes the batch (a reshape to a literal, say) is traced at `batch_size`
    instead and the program's notes say so.

    Raises TargetError when torch.export cannot trace the model, ParityError when the folded graph
    differs from the module, NumericsError for NaN or Inf on ordinary input.
    """
    notes: tuple[str, ...] = ()
    if dynamic_batch:
        source = _try_export(model, 2, dynamic=True)
        if isinstance(source, ExportedProgram) and _takes_any_batch(model, source):
            return _program(model, source, batch_size, dynamic=True, notes=notes)
        notes = (f"the model's code fixes the batch: exported for batch {batch_size} only",)
    source = _try_export(model, batch_size, dynamic=False)
    if isinstance(source, Exception):
        raise TargetError(f"torch.export cannot trace {model.spec}: {_first_line(source)}") from source
    return _program(model, source, batch_size, dynamic=False, notes=notes)


def _try_export(model: LoadedModel, batch: int, *, dynamic: bool) -> ExportedProgram | Exception:
    try:
        return _export(model.module, model.image_size, batch, dynamic)
    except Exception as error:  # noqa: BLE001 - torch.export raises many types; all mean "not traceable so"
        return error


@torch.inference_mode()
def _takes_any_batch(model: LoadedModel, source: ExportedProgram) -> bool:
    """Whether two images at once give what each gives alone: some traces only look dynamic."""
    images = example(model.image_size, 2)
    together = source.module(check_guards=False)(images)
    if len(together) != 2:
        return False
    alone = torch.cat([model.module(image[None]) for image in images])
    return relative_difference(alone, together) < PARITY


def fold(graph: GraphModule) -> GraphModule:
    """Run every lossless rewrite of `fold.FOLDS`."""
    edit = Edit.of(graph)
    for apply in FOLDS:
        apply(edit)
    return edit.build()


def exported(program: Program, *, batch_size: int | None = None) -> ExportedProgram:
    """The ExportedProgram of a program; batch_size fixes the batch, None keeps it dynamic if it is."""
    dynamic = program.dynamic_batch and batch_size is None
    batch = 2 if dynamic else batch_size or program.batch_size
    return _export(program.graph, program.image_size, batch, dynamic)


def save_decomposed(program: Program, batch_size: int, path: Path) -> None:
    """Write the program (.pt2) in torch's core operators at a fixed batch: what coremltools reads."""
    with exact_attention():
        torch.export.save(exported(program, batch_size=batch_size).run_decompositions({}), path)


def save_baseline(program: Program, path: Path) -> None:
    """Write the model as traced, before any rewrite, for the baseline's worker to open."""
    torch.export.save(program.source, path)


def example(size: Size, batch: int) -> Tensor:
    """Seeded standard-normal float32 [batch, 3, H, W]: what parity checks run on."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, *size, generator=generator)


def relative_difference(reference: Tensor, other: Tensor) -> float:
    """max |a - b| / max |a|."""
    reference, other = reference.detach(), other.detach()
    return float((reference - other).abs().max() / reference.abs().max().clamp_min(1e-12))


def _export(module: nn.Module, size: Size, batch: int, dynamic: bool) -> ExportedProgram:
    shapes = ({0: Dim("batch", min=1, max=_MAX_BATCH)},) if dynamic else None
    with exact_attention(), torch.no_grad():
        return torch.export.export(module, (example(size, batch),), dynamic_shapes=shapes)


def _plain(exported: ExportedProgram) -> GraphModule:
    """One placeholder in, one tensor out, no pytree, no guards."""
    module = exported.module(check_guards=False)
    assert isinstance(module, GraphModule)
    graph: Graph = module.graph
    graph.set_codegen(CodeGen())
    output = next(iter(graph.find_nodes(op="output")))
    result = output.args[0]
    if isinstance(result, tuple | list):
        if len(result) != 1:
            raise InputError(f"the program returns {len(result)} tensors; one is needed")
        output.args = (result[0],)
    module.recompile()
    return module


def _program(
    model: LoadedModel, source: ExportedProgram, batch_size: int, *, dynamic: bool, notes: tuple[str, ...]
) -> Program:
    graph = fold(_plain(source))
    count = 1 if dynamic else batch_size
    images = example(model.image_size, count)
    output, shapes = Shapes(graph)(images)
    with torch.inference_mode():
        difference = relative_difference(model.module(images), output)
    if difference != difference:
        where = first_bad(graph, images)
        raise NumericsError(f"{model.spec} gives NaN or Inf on standard-normal input", where)
    if not difference < PARITY:
        raise ParityError(
            f"the traced graph differs from {model.spec} by {difference:.2e} (limit {PARITY:g})"
        )
    layers = find_layers(graph, shapes)
    return Program(
        graph=graph,
        source=source,
        layers=tuple(replace(layer, macs=layer.macs // count) for layer in layers),
        image_size=model.image_size,
        dynamic_batch=dynamic,
        batch_size=batch_size,
        attention_macs=attention_macs(graph, shapes) // count,
        notes=notes,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
