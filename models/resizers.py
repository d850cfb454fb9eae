"""Who knows how a module's positions depend on the image size.

A Resizer is bound to one module that is fed the image. `find` picks it by the module's class, so a timm
backbone inside a user's own model is treated as timm's. A module of no known class is a plain one
(user_module.py). New families: a Resizer subclass and one line in RESIZERS.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from math import lcm
from typing import ClassVar

from torch import nn

from vit_export.artifacts import Positions, Size
from vit_export.models.config import AdaptConfig
from vit_export.models.geometry import Geometry, show
from vit_export.models.positions import Table

# Class of a module, by its own path or a base's → "module:Resizer". The first match on the MRO wins.
RESIZERS: Mapping[str, str] = {
    "torch.fx.graph_module.GraphModule": "fixed:Fixed",
    "vit_export.models.onnx_module.OnnxModule": "fixed:Fixed",
    "timm.models.swin_transformer.SwinTransformer": "timm_resize:TimmSwin",
    "timm.models.swin_transformer_v2.SwinTransformerV2": "timm_resize:TimmSwin",
    "timm.models.pvt_v2.PyramidVisionTransformerV2": "timm_resize:TimmFree",
    "torchvision.models.vision_transformer.VisionTransformer": "torchvision_resize:TorchvisionVit",
    "torchvision.models.swin_transformer.SwinTransformer": "torchvision_resize:TorchvisionSwin",
    "transformers.models.vit.modeling_vit.ViTEmbeddings": "hf_resize:HfTable",
    "transformers.models.deit.modeling_deit.DeiTEmbeddings": "hf_resize:HfTable",
    "transformers.models.vit_mae.modeling_vit_mae.ViTMAEEmbeddings": "hf_resize:HfTable",
    "transformers.models.vit_msn.modeling_vit_msn.ViTMSNEmbeddings": "hf_resize:HfTable",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Embeddings": "hf_resize:HfTable",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
    ".Dinov2WithRegistersEmbeddings": "hf_resize:HfTable",
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTRopePositionEmbedding": "hf_resize:HfRotary",
    "transformers.models.pvt.modeling_pvt.PvtEncoder": "hf_resize:HfPvt",
    "transformers.models.pvt_v2.modeling_pvt_v2.PvtV2Model": "hf_resize:HfPvt2",
    "transformers.models.swin.modeling_swin.SwinModel": "hf_swin:HfSwin",
    "transformers.models.swinv2.modeling_swinv2.Swinv2Model": "hf_swin:HfSwin",
    "transformers.models.beit.modeling_beit.BeitModel": "hf_beit:HfBeit",
}
# Any class of timm that can set its own input size.
_TIMM = "timm_resize:TimmSized"


class Resizer(ABC):
    """Changes the image size of one module, in place.

    size: what the module takes now, where the caller knows it and the module does not.
    hint: what it may take, where nobody knows.
    """

    positions: ClassVar[Positions]
    hint: Size | None = None

    def __init__(self, module: nn.Module, size: Size | None = None) -> None:
        self.module = module
        self._size = size

    @abstractmethod
    def geometry(self) -> Geometry:
        """The sizes the module takes."""

    def scheme(self) -> Positions:
        """How the module encodes positions; `positions` unless an instance decides otherwise."""
        return self.positions

    def tables(self) -> tuple[Table, ...]:
        """The learned absolute tables, for checkpoints of another resolution."""
        return ()

    def prepare(self) -> None:  # noqa: B027 - most modules need nothing
        """Make positions constants at the present size, where the family computes them in forward."""

    def resize(self, size: Size, config: AdaptConfig, model: str) -> tuple[str, ...]:
        """Make the module take `size`; says what was done. The present size changes nothing.

        Raises BadSize when it cannot, naming the nearest sizes that work.
        """
        geometry = self.geometry()
        geometry.check(size, model)
        if size == geometry.size:
            return ()
        return (*self._resize(size, config), f"image size {show(geometry.size)} → {show(size)}")

    @abstractmethod
    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        """Do it; `size` is valid and new."""


class Several(Resizer):
    """Modules side by side that see the same image (an ensemble)."""

    def __init__(self, module: nn.Module, parts: tuple[Resizer, ...]) -> None:
        super().__init__(module)
        self.parts = parts

    def scheme(self) -> Positions:
        return self.parts[0].scheme()

    def geometry(self) -> Geometry:
        all_parts = [part.geometry() for part in self.parts]
        first, *rest = all_parts
        multiple, minimum = first.multiple, first.minimum
        for part in rest:
            multiple = (lcm(multiple[0], part.multiple[0]), lcm(multiple[1], part.multiple[1]))
            minimum = (max(minimum[0], part.minimum[0]), max(minimum[1], part.minimum[1]))
        return Geometry(first.size, multiple, minimum, first.reason)

    def prepare(self) -> None:
        for part in self.parts:
            part.prepare()

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        return tuple(note for part in self.parts for note in part._resize(size, config))


def find(
    module: nn.Module,
    size: Size | None = None,
    config: AdaptConfig | None = None,
    hint: Size | None = None,
) -> Resizer:
    """The Resizer of a module, or of the known models inside it.

    size: what the module takes now, where the caller knows. config: a table or its prefix named in it
    makes any module a plain one, with that table. hint: what a module may take, where nobody knows.
    """
    config = config or AdaptConfig()
    settled = (config.pos_embed, config.prefix_tokens) != (None, None)
    found = () if settled else tuple(parts(module, size))
    for part in found:
        part.hint = hint
    if found:
        return found[0] if len(found) == 1 else Several(module, found)
    from vit_export.models.user_module import PlainModule

    return PlainModule(module, size, config, hint)


def parts(module: nn.Module, size: Size | None = None) -> list[Resizer]:
    """Resizers of the topmost known modules in the tree."""
    target = _target(module)
    if target is not None:
        return [target(module, size)]
    return [part for child in module.children() for part in parts(child, size)]


def _target(module: nn.Module) -> type[Resizer] | None:
    for base in type(module).__mro__:
        path = RESIZERS.get(f"{base.__module__}.{base.__qualname__}")
        if path is not None:
            return _import(path)
    of_timm = any(base.__module__.startswith("timm.models.") for base in type(module).__mro__)
    sized = of_timm and hasattr(module, "set_input_size") and hasattr(module, "patch_embed")
    return _import(_TIMM) if sized else None


def _import(path: str) -> type[Resizer]:
    name, _, attribute = path.partition(":")
    resizer: type[Resizer] = getattr(import_module(f"vit_export.models.{name}"), attribute)
    return resizer
