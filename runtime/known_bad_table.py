"""Versions reported wrong, slow or unable for vision transformers: data, with where it was reported.

Every runtime of this project is in this one table. An entry is a report by others, not a measurement of
ours: it never changes a verdict by itself. `known_bad` reads it for `doctor` and for reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vit_export.artifacts import Precision

Kind = Literal["wrong", "slow", "refused"]
_TENSORRT = "https://github.com/NVIDIA/TensorRT/issues/"
_TENSORRT_DOCS = "https://docs.nvidia.com/deeplearning/tensorrt/"
_RTX_MATRIX = "https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html"
_ORT = "https://github.com/microsoft/onnxruntime/issues/"


@dataclass(frozen=True, slots=True)
class KnownBad:
    """One report.

    package: distribution it is about. first, last: versions it was seen in, inclusive, compared part by
    part ("10.16" covers 10.16.1.11). models: globs over family or model name. capabilities: of the GPUs it
    needs, () for any. precisions: () for any. feature: only on CPUs that have it. jetson: only on a Jetson.
    advice: what to do about it. sources: URLs.
    """

    package: str
    first: str
    last: str
    kind: Kind
    symptom: str
    advice: str
    sources: tuple[str, ...]
    models: tuple[str, ...] = ("*",)
    precisions: tuple[Precision, ...] = ()
    capabilities: tuple[str, ...] = ()
    feature: str = ""
    jetson: bool = False


_HALF = (Precision.FP16, Precision.INT8)

KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad(
        "onnxruntime",
        "0",
        "1.22",
        "refused",
        "no Attention operator (opset 23), which the exported graph has",
        "use 1.23 or later, or export with --opset 20",
        (f"{_ORT}25156",),
    ),
    KnownBad(
        "onnxruntime",
        "1.23",
        "1.23",
        "wrong",
        "wrong int8 convolutions on CPUs with AMX",
        "use 1.24 or later",
        (f"{_ORT}26324",),
        precisions=(Precision.INT8,),
        feature="amx-int8",
    ),
    KnownBad(
        "openvino",
        "2025.3",
        "2025",
        "wrong",
        "a detector on DINOv2 loses accuracy",
        "compare before shipping, as the report does; 2026 is reported right",
        ("https://github.com/roboflow/rf-detr/issues/515",),
        models=("*dinov2*",),
    ),
    KnownBad(
        "tensorrt",
        "11.0",
        "11.4.0",
        "refused",
        "no support for JetPack",
        "JetPack 7.2.2 takes 11.4.1 and later (the SBSA package); JetPack 6 stays on 10.x",
        (f"{_TENSORRT_DOCS}11.4.1/api/migration/tensorrt-10x-to-11x-jetson.html",),
        jetson=True,
    ),
    KnownBad(
        "tensorrt",
        "10.3",
        "10.3",
        "wrong",
        "FP16 ViTs give wrong outputs (DINOv3 ViT-B/16: one class everywhere)",
        "compare with FP32 before shipping; TensorRT 10.16 (JetPack 7) is reported right",
        (f"{_TENSORRT}4723", f"{_TENSORRT}4558"),
        models=("*dinov3*", "*eva*", "vit*"),
        precisions=_HALF,
    ),
    KnownBad(
        "tensorrt",
        "10.3",
        "10.3",
        "wrong",
        "transformers with dynamic dimensions give wrong outputs (10.5 and 10.8 are right)",
        "on JetPack 6 build with a fixed batch: --batch-size N",
        (f"{_TENSORRT}4419",),
    ),
    KnownBad(
        "tensorrt",
        "10.4",
        "10.4",
        "wrong",
        "DINOv3 ViT-B/16 is miscompiled in FP32 (cosine 0.02) and NaN in FP16",
        "use another version; no build option helps",
        (f"{_TENSORRT}4742",),
        models=("*dinov3*",),
    ),
    KnownBad(
        "tensorrt",
        "10.7",
        "10.7",
        "wrong",
        "self-attention fused from scaled_dot_product_attention is wrong, in FP32 too",
        "scale the queries alone, not queries and keys by its square root; or use another version",
        (f"{_TENSORRT}4333", f"{_TENSORRT}4328"),
    ),
    KnownBad(
        "tensorrt",
        "10.11",
        "11.1",
        "wrong",
        "SegFormer, whose attention reduces keys by a strided convolution, is wrong for batch above 1",
        "check every batch size you serve (--batch-size), or serve batch 1",
        (f"{_TENSORRT}4853",),
        models=("*segformer*", "*pvt*"),
    ),
    KnownBad(
        "tensorrt",
        "10.13",
        "10.14",
        "wrong",
        "on Jetson Thor, engines of max batch 1 corrupt the separate q, k, v products of one LayerNorm",
        'build with max batch 2, or with __LUNOWUD="-peep:fc_h_fusion=off" in the environment',
        ("https://github.com/NVIDIA/TensorRT-Edge-LLM/issues/151",),
        capabilities=("11.0",),
    ),
    KnownBad(
        "tensorrt",
        "10.14",
        "10.14",
        "refused",
        "engines with the opset 23 Attention operator fail to build on some shapes",
        "export with --opset 20, which writes attention out",
        (f"{_TENSORRT}4705",),
    ),
    KnownBad(
        "tensorrt",
        "10.8",
        "10.16",
        "wrong",
        "fused attention in FP16 is wrong on consumer Blackwell (SAM 3's ViT, from its first block on)",
        "compare with FP32 before shipping; FP32 is right",
        (f"{_TENSORRT}4837",),
        precisions=_HALF,
        capabilities=("12.0",),
    ),
    KnownBad(
        "tensorrt",
        "11.1",
        "11.1",
        "wrong",
        "a DETR-style model is wrong in FP32, differently for each row of a batch (10.13 is right)",
        "compare at every batch size you serve",
        (f"{_TENSORRT}4813",),
        models=("*detr*",),
    ),
    KnownBad(
        "tensorrt",
        "10.0",
        "99",
        "slow",
        "int8 attention is not fused above 512 tokens: 384 px at patch 16, 518 px at patch 14",
        "leave attention in FP16 there (--int8-attention auto does)",
        (f"{_TENSORRT}3724",),
        precisions=(Precision.INT8,),
    ),
    KnownBad(
        "tensorrt",
        "10.0",
        "99",
        "slow",
        "int8 ViTs no faster than FP16, mostly because the rest of the graph was left in FP32",
        "the rest of this graph is FP16; still, ship int8 only where the report measured it faster",
        ("https://github.com/NVIDIA/Model-Optimizer/issues/167", f"{_TENSORRT}4273", f"{_TENSORRT}4348"),
        precisions=(Precision.INT8,),
    ),
    KnownBad(
        "tensorrt-rtx",
        "1.0",
        "1.2",
        "refused",
        "TensorRT-RTX 1.2 fails on attention of a whole encoder (addAttention, mScopedOps)",
        "use TensorRT-RTX 1.4 or later",
        ("https://github.com/NVIDIA/TensorRT-RTX/issues/26",),
    ),
    KnownBad(
        "tensorrt-rtx",
        "1.0",
        "99",
        "slow",
        "TensorRT-RTX lists int8 for weight-only products; int8 activations may run no faster than FP16",
        "ship int8 on RTX only where the report measured it faster",
        (_RTX_MATRIX,),
        precisions=(Precision.INT8,),
    ),
)
