"""SPECs: what each source loads, with its preprocessing, and what it says when it cannot."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from vit_export.artifacts import CropMode, Interpolation, Positions
from vit_export.errors import CheckpointError, InputError, UntrustedInput, UsageError
from vit_export.models import LoadOptions, adapt, available, describe, load
from vit_export.models import download as download_module
from vit_export.models.hf_images import preprocessing_of

_VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 8,
}


_OWN_CODE = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

class MyConfig(PreTrainedConfig):
    model_type = "my-vit"
    image_size: int = 16

class MyModel(PreTrainedModel):
    config_class = MyConfig
    def __init__(self, config):
        super().__init__(config)
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.classifier = nn.Linear(8, config.num_labels)
        self.post_init()
    def forward(self, pixel_values):
        return {"logits": self.classifier(self.stem(pixel_values).mean((2, 3)))}
"""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name resolves, whatever machine the test runs on."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(download_module, "getproxies", dict)


def hf_folder(path: Path, model: Any = None, **processor: Any) -> Path:
    """A folder as save_pretrained leaves it."""
    if model is None:
        transformers.ViTConfig(**_VIT, architectures=["ViTForImageClassification"]).save_pretrained(path)
    else:
        model.save_pretrained(path)
    if processor:
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def test_the_embedded_default() -> None:
    """digits-vit loads with its trained weights and its own preprocessing, and takes other sizes."""
    model = load()
    assert (model.spec, model.num_classes, model.positions) == ("digits-vit", 10, Positions.ABSOLUTE)
    assert model.preprocessing.size == model.image_size == model.source_image_size
    step = model.multiple[0]
    other = adapt(model, (model.image_size[0] - step, model.image_size[1]))
    assert torch.isfinite(other.module(torch.zeros(1, 3, *other.image_size))).all()
    with pytest.raises(UsageError, match="digits-vit has 10 classes"):
        load("digits-vit", LoadOptions(num_classes=3))


def test_timm_brings_its_data_config() -> None:
    """Size, statistics, interpolation and crop are timm's own, in the words of our contract."""
    model = load("timm:test_vit", LoadOptions(num_classes=7))
    data = resolve_model_data_config(model.module)
    ours = model.preprocessing
    assert (ours.size, ours.mean, ours.std) == (data["input_size"][1:], data["mean"], data["std"])
    assert (ours.interpolation.value, ours.crop_pct) == (data["interpolation"], data["crop_pct"])
    assert create_transform(**data) is not None
    assert (model.num_classes, model.family) == (7, "vision_transformer")
    assert model.notes == ("random weights: neither --pretrained nor --checkpoint was given",)
    assert load("timm:test_vit", LoadOptions(num_classes=0)).num_classes == 0


def test_torchvision_brings_the_transforms_of_its_weights() -> None:
    """swin_t: bicubic, resize 232, crop 224."""
    model = load("torchvision:swin_t", LoadOptions(num_classes=3))
    ours = model.preprocessing
    assert (ours.size, ours.interpolation, ours.crop_pct) == ((224, 224), Interpolation.BICUBIC, 224 / 232)
    assert (model.num_classes, model.multiple) == (3, (32, 32))


def test_a_folder_with_weights_is_loaded_with_them(tmp_path: Path) -> None:
    """The same logits as transformers gives, preprocessing from preprocessor_config.json."""
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**_VIT, num_labels=4)).eval()
    folder = hf_folder(tmp_path, theirs, size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3],
                       image_std=[0.4, 0.5, 0.6], resample=3)  # fmt: skip
    model = load(f"hf:{folder}")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.module(images), theirs(images).logits, atol=1e-6)
    assert (model.family, model.num_classes, model.output) == ("vit", 4, "logits")
    assert model.preprocessing.mean == (0.1, 0.2, 0.3)
    assert model.preprocessing.interpolation is Interpolation.BICUBIC
    assert model.notes == ()


def test_a_folder_with_a_config_alone_has_random_weights_and_says_so(tmp_path: Path) -> None:
    """The architecture of config.json; the missing processor is said too."""
    model = load(f"hf:{hf_folder(tmp_path)}", LoadOptions(num_classes=6))
    assert model.num_classes == 6
    assert "random weights" in model.notes[0]
    assert "no preprocessor_config.json: ViTImageProcessor" in model.notes[1]


def test_a_processor_of_another_size_is_said(tmp_path: Path) -> None:
    """DINOv2's processor makes 224 images for a table of 518: the model's size is kept, the other named."""
    crop = {"height": 24, "width": 24}
    model = load(f"hf:{hf_folder(tmp_path, size={'shortest_edge': 28}, do_center_crop=True, crop_size=crop)}")
    assert model.image_size == (32, 32)
    assert model.preprocessing.crop_pct == 24 / 28
    assert "the image processor makes images of 24x24, the model was made for 32x32" in model.notes


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    """--pretrained with --checkpoint is a question, not a guess."""
    options = LoadOptions(pretrained=True, checkpoint=tmp_path / "w.pt")
    for spec in ("timm:vit_tiny_patch16_224", "torchvision:vit_b_16"):
        with pytest.raises(UsageError, match="two sets of weights"):
            load(spec, options)


def test_a_checkpoint_over_a_config(tmp_path: Path) -> None:
    """--checkpoint gives a config its weights."""
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**_VIT)).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    model = load(f"hf:{hf_folder(tmp_path)}", LoadOptions(checkpoint=tmp_path / "w.safetensors"))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.module(images), theirs(images).logits, atol=1e-6)


def test_missing_weights_in_a_folder_are_listed(tmp_path: Path) -> None:
    """Transformers fills what is missing with random numbers and a warning; here it is an error."""
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**_VIT))
    hf_folder(tmp_path, theirs)
    state = {k: v for k, v in theirs.state_dict().items() if "layernorm_before" not in k}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no weights for 2 parameters"):
        load(f"hf:{tmp_path}")


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickled_weights_in_a_folder_are_refused(tmp_path: Path) -> None:
    """pytorch_model.bin with more than tensors is UntrustedInput, and nothing has run."""
    hf_folder(tmp_path)
    torch.save({"weight": Payload(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UntrustedInput, match="would have to be executed"):
        load(f"hf:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_broken_weights_in_a_folder_are_one_clear_line(tmp_path: Path) -> None:
    """A truncated model.safetensors."""
    hf_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"the weights of hf:.* cannot be read"):
        load(f"hf:{tmp_path}")


def test_a_folder_with_another_head_is_fitted_when_asked(tmp_path: Path) -> None:
    """--num-classes over weights with another head: a random head, and said so; without it the folder's."""
    config = transformers.ViTConfig(**_VIT, num_labels=4)
    folder = hf_folder(tmp_path, transformers.ViTForImageClassification(config))
    model = load(f"hf:{folder}", LoadOptions(num_classes=7))
    assert model.num_classes == 7
    assert any("random weights, as --num-classes asks: classifier.bias" in note for note in model.notes)
    assert load(f"hf:{folder}").num_classes == 4


def test_a_backbone_without_pooler_gives_its_class_token(tmp_path: Path) -> None:
    """DINO's folders have no pooler; a random one must not decide the embedding."""
    theirs = transformers.ViTModel(transformers.ViTConfig(**_VIT), add_pooling_layer=False).eval()
    model = load(f"hf:{hf_folder(tmp_path, theirs)}")
    assert (model.num_classes, model.output) == (0, "class token of last_hidden_state")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.module(images), theirs(images).last_hidden_state[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("processor", "mode", "share"),
    [
        ({"size": {"height": 224, "width": 224}}, CropMode.SQUASH, 1.0),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
         CropMode.CENTER, 224 / 256),
        ({"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224}, CropMode.SQUASH,
         224 / 256),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.9}, CropMode.CENTER, 0.9),
    ],
)  # fmt: skip
def test_image_processors_as_contracts(processor: dict[str, Any], mode: CropMode, share: float) -> None:
    """The ways transformers writes resize and crop, at another size than the processor's own."""
    contract = preprocessing_of(processor, (64, 96))
    assert (contract.size, contract.crop_mode, contract.crop_pct) == ((64, 96), mode, share)


def test_image_statistics_follow_the_rescaling() -> None:
    """mean and std are on the 0..1 scale whatever the processor rescales to; neutral without normalising."""
    plain = preprocessing_of({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, (8, 8))
    assert (plain.mean, plain.std) == ((0.5,) * 3, (0.25,) * 3)
    doubled = preprocessing_of(
        {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "rescale_factor": 2 / 255}, (8, 8)
    )
    assert doubled.mean == pytest.approx((0.25,) * 3)
    assert doubled.std == pytest.approx((0.125,) * 3)
    off = preprocessing_of({"do_normalize": False}, (8, 8))
    assert (off.mean, off.std) == ((0.0,) * 3, (1.0,) * 3)


def test_preprocessing_flags_win(tmp_path: Path) -> None:
    """--mean, --std, --interpolation and --crop-pct replace the model's own; a std of 0 is refused."""
    options = LoadOptions(
        mean=(0.0, 0.1, 0.2), std=(1.0, 1.0, 1.0), interpolation=Interpolation.LANCZOS, crop_pct=0.5
    )
    ours = load(f"hf:{hf_folder(tmp_path)}", options).preprocessing
    assert (ours.mean, ours.std, ours.interpolation, ours.crop_pct) == (
        (0.0, 0.1, 0.2), (1.0, 1.0, 1.0), Interpolation.LANCZOS, 0.5,
    )  # fmt: skip
    with pytest.raises(UsageError, match="--std"):
        load(f"hf:{tmp_path}", LoadOptions(std=(0.0, 1.0, 1.0)))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "spec", ["timm:vit_tiny_patch16_224", "hf:google/no-such-vit", "torchvision:vit_b_16"]
)
def test_pretrained_offline_fails_in_one_clear_line(
    spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a network --pretrained says at once what to do, and nothing hangs in retries."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path), raising=False)
    with pytest.raises(InputError, match=r"cannot download .*: no network") as caught:
        load(spec, LoadOptions(pretrained=True))
    assert "--checkpoint" in caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("timm:vit_tiny_patch16_225", UsageError, "timm has no model"),
        ("torchvision:vit_b_17", UsageError, "torchvision has no classification model"),
        ("hf:no/such-folder", InputError, "no folder"),
        ("vit_tiny", UsageError, "is no SPEC"),
        ("model.bin", UsageError, "is no SPEC"),
        ("net.py", UsageError, "is no SPEC"),
        ("none.onnx", InputError, "no file at"),
        ("none.pt2", InputError, "no file at"),
    ],
)
def test_a_wrong_spec_is_one_clear_line(spec: str, error: Any, says: str) -> None:
    """Unknown names and forms say what is wrong and what there is."""
    with pytest.raises(error, match=says) as caught:
        load(spec)
    assert "\n" not in caught.value.message


def test_a_close_name_is_suggested() -> None:
    """A typo in a timm name gets the names next to it."""
    with pytest.raises(UsageError) as caught:
        load("timm:vit_tiny_patch16_225")
    assert "vit_tiny_patch16_224" in caught.value.hint


def test_a_config_with_its_own_code_is_refused(tmp_path: Path) -> None:
    """auto_map means code beside the weights: refused until --trust-remote-code."""
    config = {"model_type": "my-vit", "auto_map": {"AutoConfig": "config.MyConfig", "AutoModel": "m.My"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "config.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(UntrustedInput, match="comes with its own code"):
        load(f"hf:{tmp_path}")


def test_code_of_the_folder_runs_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With trust_remote_code a folder's own model loads like any other."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "my_vit.py").write_text(_OWN_CODE)
    auto = {"AutoConfig": "my_vit.MyConfig", "AutoModelForImageClassification": "my_vit.MyModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "my-vit", "auto_map": auto}))
    model = load(f"hf:{folder}", LoadOptions(trust_remote_code=True, num_classes=4))
    assert (model.family, model.num_classes, model.image_size) == ("my-vit", 4, (16, 16))


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no-such-type"}'])
def test_a_broken_folder_is_one_clear_line(tmp_path: Path, content: str | None) -> None:
    """No config.json, one that is not JSON, one of an unknown type."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="cannot be read"):
        load(f"hf:{tmp_path}")


def test_the_catalogue_tells_size_step_and_scheme() -> None:
    """`vit-export models` knows the families without making a model; describe asks the model itself."""
    rows = {row.spec: row for row in available()}
    assert len(rows) > 200
    assert rows["timm:vit_base_patch14_dinov2"].size == (518, 518)
    assert rows["timm:vit_base_patch14_dinov2"].multiple == (14, 14)
    assert rows["digits-vit"].size == load().image_size
    for spec in ("timm:deit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224", "timm:pvt_v2_b0",
                 "timm:beit_base_patch16_224", "timm:vit_small_patch16_dinov3"):  # fmt: skip
        assert describe(spec).rule.startswith("each side must be a multiple of ")
        assert replace(describe(spec), rule="") == rows[spec]


def test_the_catalogue_is_searched() -> None:
    """Part of a name or a glob, with or without the source."""
    assert {row.spec for row in available("digits")} == {"digits-vit"}
    swins = available("torchvision:swin*")
    assert swins
    assert all(row.spec.startswith("torchvision:swin") for row in swins)
    assert available("nothing-like-it") == []
    assert describe("digits-vit").multiple == load().multiple
    with pytest.raises(UsageError):
        describe("timm:nothing-like-it")


def test_public_names_stay_functions_after_use() -> None:
    """Using adapt or load imports modules of the package; none of them takes a public function's place."""
    import vit_export.models as package

    model = package.load()
    package.adapt(model, (model.image_size[0] * 2, model.image_size[1]))
    assert all(callable(getattr(package, name)) for name in package.__all__)
    assert package.adapt(model, model.image_size).module is model.module


def test_the_package_imports_without_torch() -> None:
    """A device without torch can import the package; asking for a model names the extra."""
    script = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "timm", "transformers", "torchvision", "onnx", "safetensors"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
from vit_export import models
from vit_export.errors import MissingExtra
for spec in ("digits-vit", "hf:folder", "model.onnx"):
    try:
        models.load(spec)
    except MissingExtra as error:
        print(error.package, error.hint)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    hint = "pip install 'vit-export[export]'"
    assert result.stdout.splitlines() == [f"timm {hint}", f"transformers {hint}", f"onnx {hint}"]
