"""Checkpoints: taken whole or refused, never executed, never half ignored."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm.models as zoo
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionVit

from vit_export.artifacts import Preprocessing
from vit_export.errors import CheckpointError, InputError, NumericsError, UntrustedInput
from vit_export.models import LoadOptions
from vit_export.models.checkpoint import load_checkpoint
from vit_export.models.finish import finish
from vit_export.models.positions import resample_positions


def vit(size: int = 32, classes: int = 3, seed: int = 0, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    shape = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return zoo.VisionTransformer(img_size=size, num_classes=classes, **shape, **arguments)


def same(one: nn.Module, state: dict[str, Tensor]) -> bool:
    own = one.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own)


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda s: s, None),
        (lambda s: {"model": s, "epoch": 3}, "took 'model'"),
        (lambda s: {"state_dict": s, "optimizer": {"lr": 0.1}}, "took 'state_dict'"),
        (lambda s: {"model": {"x": torch.zeros(1)}, "model_ema": s}, "took 'model_ema'"),
        (lambda s: {"module." + k: v for k, v in s.items()}, "dropped the prefix 'module.'"),
        (lambda s: {"state_dict": {"model." + k: v for k, v in s.items()}}, "dropped the prefix 'model.'"),
        (lambda s: {"module._orig_mod." + k: v for k, v in s.items()}, "dropped the prefix '_orig_mod.'"),
    ],
)
def test_containers_and_prefixes_are_unwrapped_and_said(tmp_path: Path, wrap: Any, note: str | None) -> None:
    """What trainers wrap around the weights comes off, and the notes tell what was taken."""
    source = vit(seed=1).state_dict()
    path = tmp_path / "checkpoint.pt"
    torch.save(wrap(source), path)
    module = vit(seed=2)
    notes = load_checkpoint(module, path)
    assert same(module, source)
    assert (note in " ".join(notes)) if note else notes == ()


def test_safetensors_and_half_weights(tmp_path: Path) -> None:
    """float16 safetensors load as the float32 values they hold."""
    source = {k: v.half() for k, v in vit(seed=1).state_dict().items()}
    save_file(source, tmp_path / "w.safetensors")
    module = vit(seed=2)
    load_checkpoint(module, tmp_path / "w.safetensors")
    assert same(module, {k: v.float() for k, v in source.items()})


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_a_pickle_is_refused_without_running_it(tmp_path: Path, save: Any) -> None:
    """A checkpoint that needs code to be read is UntrustedInput, and the code has not run."""
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    save({"state_dict": vit().state_dict(), "hook": Payload(trace)}, path)
    with pytest.raises(UntrustedInput, match=r"evil\.pt holds more than tensors"):
        load_checkpoint(vit(), path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.pt", None, "no checkpoint at"),
        ("text.pt", b"not a checkpoint at all", "is not a"),
        ("empty.pt", b"", "is not a"),
        ("cut.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "not a readable safetensors"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    """Missing, empty, truncated or foreign files are InputError with the file's name."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        load_checkpoint(vit(), path)
    assert name in caught.value.message
    assert "\n" not in caught.value.message


def test_a_truncated_checkpoint_is_an_input_error(tmp_path: Path) -> None:
    """Half of a real file, as a broken download leaves it."""
    path = tmp_path / "half.pt"
    torch.save(vit().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError):
        load_checkpoint(vit(), path)


def test_nothing_but_numbers_in_it(tmp_path: Path) -> None:
    """A file without tensors lists the keys it has."""
    torch.save({"epoch": 1, "loss": 0.5}, tmp_path / "log.pt")
    with pytest.raises(CheckpointError, match="no tensors under its keys: epoch, loss"):
        load_checkpoint(vit(), tmp_path / "log.pt")


def test_another_model_lists_what_does_not_match(tmp_path: Path) -> None:
    """Missing, unexpected and differently shaped weights are all named; the module is unchanged."""
    state = vit(seed=1).state_dict()
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(7, 16)
    state["extra.weight"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "other.pt")
    module = vit(seed=2)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(module, tmp_path / "other.pt")
    assert "1 missing: norm.weight" in caught.value.message
    assert "1 not in the model: extra.weight" in caught.value.message
    assert "blocks.0.mlp.fc1.weight [7, 16] for [64, 16]" in caught.value.message
    assert same(module, before)


def test_another_number_of_classes_names_the_flag(tmp_path: Path) -> None:
    """Where only the head differs, the hint is the option that makes it fit."""
    torch.save(vit(classes=12).state_dict(), tmp_path / "twelve.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(vit(classes=3), tmp_path / "twelve.pt")
    assert caught.value.hint == "only the classifier differs: pass --num-classes 12"


def test_a_checkpoint_of_another_resolution_is_resampled_and_said(tmp_path: Path) -> None:
    """A table from 48x48 images fits a 32x32 model, by the same resampling as --image-size."""
    source = vit(48, seed=1).state_dict()
    torch.save(source, tmp_path / "large.pt")
    module = vit(32, seed=2)
    notes = load_checkpoint(module, tmp_path / "large.pt")
    assert notes == ("checkpoint: pos_embed resampled from 6x6 to 4x4",)
    assert torch.equal(module.pos_embed, resample_positions(source["pos_embed"], (6, 6), (4, 4), 1))
    assert torch.equal(module.norm.weight, source["norm.weight"])


def test_the_same_for_torchvision_names(tmp_path: Path) -> None:
    """torchvision's encoder.pos_embedding is known too."""
    source = TorchvisionVit(48, 8, 1, 2, 16, 16, num_classes=3).state_dict()
    torch.save(source, tmp_path / "tv.pt")
    module = TorchvisionVit(32, 8, 1, 2, 16, 16, num_classes=3)
    notes = load_checkpoint(module, tmp_path / "tv.pt")
    assert notes == ("checkpoint: encoder.pos_embedding resampled from 6x6 to 4x4",)


def test_relative_tables_of_another_window(tmp_path: Path) -> None:
    """A Swin trained with another window fits: its bias tables are resampled by timm's method."""
    shape = {"patch_size": 2, "embed_dim": 16, "depths": (2,), "num_heads": (2,), "num_classes": 3}
    source = zoo.SwinTransformer(img_size=48, window_size=6, **shape).state_dict()
    torch.save(source, tmp_path / "swin.pt")
    module = zoo.SwinTransformer(img_size=32, window_size=4, **shape)
    notes = load_checkpoint(module, tmp_path / "swin.pt")
    assert len(notes) == 2
    assert "resampled from 121 to 49 rows" in notes[0]


def test_a_table_of_another_width_is_not_resampled(tmp_path: Path) -> None:
    """Only the grid may differ: another embedding width is another model."""
    torch.save(vit(seed=1).state_dict() | {"pos_embed": torch.zeros(1, 37, 24)}, tmp_path / "wide.pt")
    with pytest.raises(CheckpointError, match=r"pos_embed \[1, 37, 24\] for \[1, 17, 16\]"):
        load_checkpoint(vit(), tmp_path / "wide.pt")


def test_names_of_the_authors_are_translated_by_timm(tmp_path: Path) -> None:
    """A DINOv2 checkpoint under Meta's names loads through timm's own conversion."""
    state = vit(seed=1, init_values=1e-5).state_dict()
    torch.save(state | {"mask_token": torch.zeros(1, 16)}, tmp_path / "dinov2.pt")
    module = vit(seed=2, init_values=1e-5)
    notes = load_checkpoint(module, tmp_path / "dinov2.pt")
    assert same(module, state)
    assert notes == ("checkpoint: names translated by timm",)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_broken_weights_are_named(value: float, kind: str) -> None:
    """NaN or Inf in any weight stops the load with the parameter's name and the count."""
    module = vit()
    with torch.no_grad():
        module.blocks[0].attn.qkv.weight[3, 5] = value
    with pytest.raises(NumericsError, match=rf"blocks\.0\.attn\.qkv\.weight holds 1 {kind} in 768 values"):
        finish(module, family="vit", preprocessing=Preprocessing((32, 32)), options=LoadOptions())
