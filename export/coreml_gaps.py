"""What coremltools 9 and Core ML do not take as it is, and where each gap is closed.

- `aten.alias` (timm Swin) has no conversion: `fold.drop_no_ops` removes it, for every target.
- transformers' BEiT computes its relative position index in the graph, with in-place writes that do not
  convert, and torchvision's SwinV2 a mask with `zero_`: `fold.fold_constants` leaves only the result.
- A classifier with one more output makes coremltools' writer fail: `forget_output_types` below.
- int8 in `constexpr_affine_dequantize` (iOS 17) is reported to be misread on the GPU and the Neural
  Engine (apple/coremltools pull request 2675): `coreml_graph.unsigned_weights` stores uint8.
- Classifiers cannot be functions of a package (NotImplementedError): they stay one package a size.
- `fuse_elementwise_to_batchnorm` turns a product and a sum into a batch_norm with epsilon 1e-5, which is
  off by 5e-6 of the value: `pipeline` leaves it out.
"""

from __future__ import annotations

from functools import cache
from typing import Any


def pipeline(palettes: Any = None, blocks: Any = None) -> Any:
    """coremltools' default graph passes, without the one that changes numbers and with ours at the end.

    palettes, blocks: configurations of palettisation and of linear quantisation, done last.
    """
    import coremltools as ct

    _register_passes()
    passes = ct.PassPipeline()
    passes.remove_passes({"common::fuse_elementwise_to_batchnorm"})
    passes.append_pass("vit_export::forget_output_types")
    for name, config in (("palettize_weights", palettes), ("linear_quantize_weights", blocks)):
        if config is not None:
            passes.append_pass(f"compression::{name}")
            passes.set_options(f"compression::{name}", {"config": config})
    return passes


@cache
def _register_passes() -> None:
    """Make our graph passes known to coremltools, once."""
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    @register_pass(namespace="vit_export")
    class forget_output_types(AbstractGraphPass):  # type: ignore[misc]
        """Once the outputs have their types, drop the list of those that were asked for.

        A classifier has one output more than asked for, and the writer looks each up in that list.
        """

        def apply(self, prog: Any) -> None:
            for function in prog.functions.values():
                function.output_types = None
