"""PyTorch: runs a saved `torch.export` program (.pt2), float or with Q/DQ. The baseline's runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import msgspec

from vit_export.artifacts import Images, Logits
from vit_export.errors import RunnerError
from vit_export.runtime.runner import Runner, Signature

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class TorchOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PyTorch takes no options: it runs the program eagerly on the CPU, as saved."""


class TorchRunner(Runner):
    """Runs a .pt2 program in eager mode. `threads` sets torch's intra-op threads for the process.

    For programs that vit-export saved: torch.export.load may unpickle what an archive holds, so a
    user's .pt2 is checked by models.program_source before anything comes here.
    """

    package: ClassVar[str] = "torch"
    extra: ClassVar[str] = "export"

    def _open(self) -> Signature:
        self._options(TorchOptions)
        self._torch = self._sdk("torch")
        self._sdk("torch.ao.quantization.fx._decomposed")  # registers quantized_decomposed::*
        if self.runnable.threads:
            self._torch.set_num_threads(self.runnable.threads)
        program = self._torch.export.load(str(self.runnable.path))
        signature = _signature(program)
        self._module = program.module(check_guards=False)  # Runner.infer has checked the shape
        return signature

    def _infer(self, images: Images) -> Logits:
        with self._torch.inference_mode():
            output = self._module(self._torch.from_numpy(images))
        logits: Logits = (output[0] if isinstance(output, (tuple, list)) else output).numpy()
        return logits

    def _close(self) -> None:
        self._module = None


def _signature(program: ExportedProgram) -> Signature:
    """The program's one tensor input, read from its graph: a symbolic first dimension is a free batch."""
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    if len(names) != 1:
        raise RunnerError(f"the program has {len(names)} tensor inputs, expected one")
    node = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == names[0])
    batch, _, height, width = node.meta["val"].shape
    if not (isinstance(height, int) and isinstance(width, int)):
        raise RunnerError(f"input {names[0]} has no fixed image size: {height}x{width}")
    return Signature((height, width), batch if isinstance(batch, int) else None, names[0])
