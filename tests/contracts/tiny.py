"""A tiny attention model, exported once a session: what runner tests open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vit_export.artifacts import Images, Logits

SIZE = (16, 24)  # not square, so that swapped sides are noticed
CLASSES = 7


class TinyVit(nn.Module):
    """Patch embedding, one attention block and a head: [N, 3, 16, 24] to [N, 7]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.position = nn.Parameter(torch.randn(1, 6, 16))
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.position
        q, k, v = self.qkv(self.norm(tokens)).unsqueeze(1).chunk(3, dim=-1)  # one head
        tokens = tokens + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits


@dataclass(frozen=True)
class Tiny:
    """Files of the model with a free batch and with a batch of 2, and what it answers."""

    folder: Path
    model: TinyVit

    def path(self, suffix: str, *, batch: int | None = None) -> Path:
        """`suffix` is pt2, onnx or xml."""
        return self.folder / f"{'free' if batch is None else batch}.{suffix}"

    def logits(self, images: Images) -> Logits:
        """PyTorch's own answer."""
        with torch.inference_mode():
            logits: Logits = self.model(torch.from_numpy(images)).numpy()
        return logits


def images(count: int, seed: int = 0) -> Images:
    """Standard normal float32 [count, 3, 16, 24]."""
    return np.random.default_rng(seed).standard_normal((count, 3, *SIZE), dtype=np.float32)


def export_tiny(folder: Path) -> Tiny:
    """Export the model to `folder` for every runtime."""
    import openvino

    model = TinyVit().eval()
    for batch in (None, 2):
        free = {"images": {0: torch.export.Dim("batch", min=1, max=64)}} if batch is None else None
        program = torch.export.export(model, (torch.zeros(2, 3, *SIZE),), dynamic_shapes=free)
        tiny = Tiny(folder, model)
        torch.export.save(program, tiny.path("pt2", batch=batch))
        onnx = torch.onnx.export(program, (), dynamo=True, opset_version=20, verbose=False)
        assert onnx is not None
        onnx.save(tiny.path("onnx", batch=batch))
        ir = openvino.Core().read_model(tiny.path("onnx", batch=batch))
        openvino.save_model(ir, tiny.path("xml", batch=batch), compress_to_fp16=False)
    return tiny
