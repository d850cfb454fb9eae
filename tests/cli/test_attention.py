"""`vit-export attention` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import msgspec
from PIL import Image

from vit_export.runtime.attention_file import AttentionFile


def test_attention_of_the_default_model(vit_export, tmp_path: Path) -> None:
    """The embedded model needs no argument: a table, a page with its pictures inside, a PNG a layer."""
    done = vit_export("attention", "--limit", 1, "--calib-size", 16, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "blocks.3.attn 3     1 on 145 12x12, class token" in done.out and "int8: as for onnx" in done.out
    assert max(map(len, done.out.splitlines()[:6])) <= 80
    page = (tmp_path / "out" / "attention.html").read_bytes()
    assert page.count(b"data:image/jpeg;base64,") == 6  # rollout, all layers, four layers
    folder = tmp_path / "out" / "attention"
    found = msgspec.json.decode((folder / "attention.json").read_bytes(), type=AttentionFile)
    (image,) = found.images
    assert image.float_class is not None and image.rollout_picture
    assert all(layer.kl and 0 < layer.kl < 0.1 for layer in image.layers)
    with Image.open(folder / str(image.layers[0].picture)) as picture:
        assert picture.format == "PNG" and picture.width > 500


def test_other_models_need_images(vit_export, tmp_path: Path) -> None:
    """Without an image there is nothing to attend to, and the message shows how to give one."""
    done = vit_export("attention", "--model", "timm:vit_tiny_patch16_224", "-o", tmp_path / "out")
    assert done.code == 2 and "vit-export attention --model SPEC photo.jpg" in done.err
    assert not (tmp_path / "out").exists()
