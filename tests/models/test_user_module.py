"""A user's own module: finding its table, its output and its preprocessing, from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts.families import UserVit, images
from vit_export.artifacts import LoadedModel, Positions, Preprocessing, Size
from vit_export.errors import AmbiguousPositions, BadSize, InputError, UsageError
from vit_export.models import AdaptConfig, LoadOptions, adapt, load
from vit_export.models.finish import finish
from vit_export.models.positions import resample_positions


def loaded(module: nn.Module, **options: Any) -> LoadedModel:
    return finish(
        module,
        family=type(module).__name__,
        preprocessing=Preprocessing((224, 224)),
        options=LoadOptions(**options),
    )


class Patches(nn.Module):
    """Patches of 8, mean over tokens; subclasses add positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, 8)
        self.head = nn.Linear(16, 3)

    def tokens(self, x: Tensor) -> Tensor:
        return self.stem(x).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.tokens(x).mean(1))


class TwoTables(Patches):
    """Two parameters of the same shape: nothing tells which holds the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(1, 16, 16))
        self.two = nn.Parameter(torch.randn(1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x) + self.one
        return self.head((tokens * self.two.mean()).mean(1))


class LookedUp(Patches):
    """A table in nn.Embedding, looked up through a buffer of ids, and the size in an attribute."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        count = 1 + size[0] // 8 * (size[1] // 8)
        self.img_size, self.num_patches = size, count - 1
        self.places = nn.Embedding(count, 16)
        self.register_buffer("ids", torch.arange(count)[None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        assert tuple(x.shape[2:]) == self.img_size
        tokens = nn.functional.pad(self.tokens(x), (0, 0, 1, 0)) + self.places(self.ids)
        return self.head(tokens.mean(1))


class Returns(Patches):
    """Returns what it is told to make of scores [N, 3] and tokens [N, T, 16]."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        tokens = self.tokens(x)
        return self.how(self.head(tokens.mean(1)), tokens)


class WithClassToken(Returns):
    def __init__(self, how: Any) -> None:
        super().__init__(how)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))


def test_the_table_is_found_by_shape_and_said() -> None:
    """A parameter without a telling name is resampled as prefix + grid, and the note says which."""
    model = loaded(UserVit())
    assert (model.image_size, model.multiple, model.positions) == ((32, 32), (8, 8), Positions.ABSOLUTE)
    adapted = adapt(model, (48, 64))
    expected = resample_positions(model.module.where, (4, 4), (6, 8), 1)  # type: ignore[arg-type]
    assert torch.equal(adapted.module.where, expected)  # type: ignore[arg-type]
    assert "where taken for the positions (1 prefix token + 4x4), resampled to 6x8" in adapted.notes


def test_two_tables_are_ambiguous_and_the_flag_settles_it() -> None:
    """The error lists both and the flag; with --pos-embed the named one is resampled."""
    model = loaded(TwoTables())
    with pytest.raises(AmbiguousPositions, match=r"one = 0 .*4x4; two = 0 .*4x4") as caught:
        adapt(model, (64, 64))
    assert caught.value.hint == "say which: --pos-embed NAME --prefix-tokens N"
    adapted = adapt(model, (64, 64), AdaptConfig(pos_embed="one"))
    assert adapted.module.one.shape == (1, 64, 16)
    assert torch.equal(adapted.module.two, model.module.two)  # type: ignore[arg-type]


def test_the_wrong_table_does_not_pass_unnoticed() -> None:
    """--pos-embed naming the other table fails on the trial run, not on the device."""
    with pytest.raises(BadSize, match="failed on an image of 64x64"):
        adapt(loaded(TwoTables()), (64, 64), AdaptConfig(pos_embed="two"))


def test_the_flag_wins_over_what_the_library_knows() -> None:
    """--pos-embed on a library's model resamples that table, with the same result here."""
    from contracts.families import FAMILIES

    model = FAMILIES["timm vit"].load()
    flagged = adapt(model, (48, 32), AdaptConfig(pos_embed="pos_embed"))
    with torch.no_grad():
        batch = images((48, 32))
        assert torch.equal(flagged.module(batch), adapt(model, (48, 32)).module(batch))


def test_a_flag_that_fits_nothing_lists_what_there_is() -> None:
    """--pos-embed with an unknown name lists the parameters it could have been."""
    with pytest.raises(UsageError, match="--pos-embed missing") as caught:
        adapt(loaded(UserVit()), (64, 64), AdaptConfig(pos_embed="missing"))
    assert "where" in caught.value.hint
    with pytest.raises(UsageError):
        loaded(UserVit(), pos_embed="head.weight")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            {"pos_embed": "where", "prefix_tokens": 3},
            r"--pos-embed where --prefix-tokens 3: .* 3 prefix tokens",
        ),
        ({"prefix_tokens": 3}, r"--prefix-tokens 3: .* 3 prefix tokens \+ a square grid"),
    ],
)
def test_a_split_that_fits_nothing_tells_the_rows_there_are(flags: Any, says: str) -> None:
    """17 rows are no 3 + a square, whether or not the table is named: the error gives the rows of each."""
    with pytest.raises(UsageError, match=says) as caught:
        loaded(UserVit(), **flags)
    assert "first (1 row), where (17 rows)" in caught.value.hint


def test_prefix_tokens_are_not_ignored_for_a_model_of_a_library() -> None:
    """timm's ViT has one class token; told that it has three, the error says that no table is so."""
    from contracts.families import FAMILIES

    model = FAMILIES["timm vit"].load()
    assert adapt(model, (48, 32), AdaptConfig(prefix_tokens=1)).image_size == (48, 32)
    with pytest.raises(UsageError, match=r"no such table of 3 prefix tokens \+ 4x4"):
        adapt(model, (48, 32), AdaptConfig(prefix_tokens=3))


def test_an_ambiguous_split_is_settled_by_running_the_module() -> None:
    """9 rows read as 0 + 3x3 or as 5 + 2x2; the module takes 24x24, so it is the first."""

    class Nine(Patches):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.tokens(x) + self.table).mean(1))

    model = loaded(Nine())
    assert model.image_size == (24, 24)
    assert adapt(model, (24, 40)).module.table.shape == (15, 16)


def test_embeddings_ids_and_stated_sizes_follow() -> None:
    """A non-square native size, an nn.Embedding with its ids and an img_size attribute are all carried."""
    module = LookedUp((32, 48))
    model = loaded(module)
    assert model.image_size == (32, 48)
    adapted: Any = adapt(model, (64, 24)).module
    assert adapted.img_size == (64, 24)
    assert adapted.num_patches == 24
    assert adapted.ids.shape == (1, 25)
    expected = resample_positions(module.places.weight[None], (4, 6), (8, 3), 1)[0]
    assert torch.equal(adapted.places.weight, expected)


def test_weights_of_layers_are_no_candidates() -> None:
    """A 16x16 linear weight has the shape of a 4x4 table; it is a layer's, so it is left alone."""

    class Square(Patches):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(self.tokens(x)).mean(1))

    model = loaded(Square())
    assert model.positions is Positions.NONE
    adapted = adapt(model, (32, 64))
    assert "no position table found by shape, none resampled" in adapted.notes


def test_a_library_model_inside_is_treated_as_the_librarys() -> None:
    """A timm backbone and a transformers one, side by side in a user's module, are both resized."""
    import transformers
    from timm.models.vision_transformer import VisionTransformer

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
            self.left = VisionTransformer(img_size=32, patch_size=8, **shape)
            config = transformers.ViTConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                image_size=32, patch_size=16, num_labels=3,
            )  # fmt: skip
            self.right = transformers.ViTForImageClassification(config)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x) + self.right(x).logits, x

    model = loaded(Ensemble())
    assert model.multiple == (16, 16)
    assert model.output.startswith("item 0")
    adapted = adapt(model, (48, 16))
    assert adapted.module.left.pos_embed.shape == (1, 1 + 12, 16)  # type: ignore[union-attr]
    with torch.no_grad():
        assert adapted.module(images((48, 16))).shape == (2, 3)


@pytest.mark.parametrize(
    ("how", "words", "classes"),
    [
        (lambda s, t: s, "the returned tensor", 3),
        (lambda s, t: (t, s), "item 1 (also returned: item 0)", 3),
        (lambda s, t: [s], "item 0", 3),
        (lambda s, t: {"tokens": t, "logits": s}, "logits (also returned: tokens)", 3),
        (lambda s, t: {"out": {"main": s}, "n": 7}, "out.main", 3),
        (lambda s, t: Result(None, s), "logits", 3),
        (lambda s, t: {"loss": s, "x_norm_clstoken": t.mean(1)}, "x_norm_clstoken", 0),
        (lambda s, t: t, "mean of tokens in the returned tensor", 0),
        (lambda s, t: t.transpose(1, 2).unflatten(2, (4, 4)), "mean of pixels in the returned tensor", 0),
    ],
)
def test_the_output_is_found_and_said(how: Any, words: str, classes: int) -> None:
    """Tensors, tuples, lists, dicts: one [N, K] tensor comes out, under the module's own parameter names."""
    module = Returns(how).eval()
    names = [name for name, _ in module.named_parameters()]
    module.img_size = 32  # type: ignore[assignment]
    batch = images((32, 32))
    with torch.no_grad():
        scores, tokens = module.head(module.tokens(batch).mean(1)), module.tokens(batch)
    model = loaded(module)
    assert (model.output, model.num_classes) == (words, classes)
    assert [name for name, _ in model.module.named_parameters()] == names
    with torch.no_grad():
        expected = scores if classes else tokens.mean(1)
        assert torch.allclose(model.module(batch), expected, atol=1e-6)


def test_embeddings_are_told_from_class_scores() -> None:
    """The same timm backbone is a classifier with a head and an embedding without, inside any module."""
    from timm.models.vision_transformer import VisionTransformer

    class Wrapped(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.body = VisionTransformer(
                img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=classes
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    assert loaded(Wrapped(16)).num_classes == 16
    assert loaded(Wrapped(0)).num_classes == 0


def test_a_subclass_of_a_library_model_is_resized_as_its_base() -> None:
    """A user's subclass of timm's ViT goes through timm's own resizing."""
    from timm.models.vision_transformer import VisionTransformer

    class Mine(VisionTransformer):
        pass

    model = loaded(Mine(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3))
    assert "pos_embed resampled from 4x4 to 6x4" in adapt(model, (48, 32)).notes


def test_a_library_model_made_by_its_class_takes_the_size_it_is_given() -> None:
    """timm's PVTv2 states a size only when timm.create_model made it: else the size asked for is it."""
    from timm.models.pvt_v2 import PyramidVisionTransformerV2

    def made(size: Size | None) -> LoadedModel:
        small = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 1, 1, 2)}
        module = PyramidVisionTransformerV2(num_classes=4, **small)
        return finish(
            module, family="own", preprocessing=Preprocessing((224, 224)),
            options=LoadOptions(image_size=size),
        )  # fmt: skip

    assert made((64, 96)).source_image_size == (64, 96)
    assert made(None).source_image_size == (224, 224)


def test_the_class_token_is_taken_where_there_is_one() -> None:
    """Token maps of a model with a class token give that token, not the mean."""
    module = WithClassToken(lambda s, t: t)
    module.img_size = 32  # type: ignore[assignment]
    model = loaded(module)
    assert model.output == "class token of the returned tensor"
    batch = images((32, 32))
    with torch.no_grad():
        assert torch.equal(model.module(batch), module.tokens(batch)[:, 0])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (lambda s, t: "text", "returns no .* tensor: str"),
        (lambda s, t: s.sum(), r"output \[\]|tensor"),
        (lambda s, t: 1 / 0, "failed on an image of 32x32: division by zero"),
    ],
)
def test_a_forward_without_scores_is_refused(how: Any, says: str) -> None:
    """No tensor, a scalar, an exception: one line that says what the forward gave."""
    module = Returns(how)
    module.img_size = 32  # type: ignore[assignment]
    with pytest.raises(InputError, match=says):
        loaded(module)


_FILE = """
import torch
from torch import nn
from helper_of_the_file import PATCH

preprocessing = {"size": (32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}

class Net(nn.Module):
    img_size = 32
    def __init__(self, num_classes=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, PATCH, PATCH)
        self.head = nn.Linear(8, num_classes)
    def forward(self, x):
        return self.head(self.stem(x).flatten(2).mean(2))

def make(num_classes=4):
    return Net(num_classes)

def plain():
    return Net()

def broken():
    raise ValueError("no such weights")

ready = Net(9)
not_a_model = [1]
number = lambda: 3
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "helper_of_the_file.py").write_text("PATCH = 8\n")
    path = tmp_path / "my_net.py"
    path.write_text(_FILE)
    return path


def test_a_file_gives_its_model_and_preprocessing(script: Path) -> None:
    """FACTORY may be a function, a class or a module; the file's neighbours and preprocessing are used."""
    model = load(f"{script}:make", LoadOptions(num_classes=6))
    assert (model.num_classes, model.image_size, model.spec) == (6, (32, 32), f"{script}:make")
    assert model.preprocessing.mean == (0.1, 0.2, 0.3)
    assert load(f"{script}:Net").num_classes == 4
    assert load(f"{script}:ready").num_classes == 9
    given = load(f"{script}:plain", LoadOptions(mean=(0.0, 0.0, 0.0), crop_pct=0.5)).preprocessing
    assert (given.mean, given.std, given.crop_pct) == ((0.0, 0.0, 0.0), (0.5, 0.5, 0.5), 0.5)


def test_a_timm_model_from_a_file_keeps_its_data_config(tmp_path: Path) -> None:
    """real_dinov2 through file.py:FACTORY: timm's statistics and crop, not assumed ones."""
    path = tmp_path / "mine.py"
    path.write_text("import timm\ndef make():\n    return timm.create_model('test_vit', num_classes=0)\n")
    model, theirs = load(f"{path}:make"), load("timm:test_vit")
    assert model.preprocessing == theirs.preprocessing
    assert (model.num_classes, model.notes) == (0, ())


def test_assumed_preprocessing_is_said(tmp_path: Path) -> None:
    """A module that says nothing gets ImageNet's statistics and a note; with --mean and --std no note."""
    path = tmp_path / "plain.py"
    path.write_text(_FILE.replace("preprocessing =", "unused =").replace("helper_of_the_file", "patch_of_8"))
    (tmp_path / "patch_of_8.py").write_text("PATCH = 8\n")
    assert "preprocessing assumed" in load(f"{path}:make").notes[0]
    assert load(f"{path}:make", LoadOptions(mean=(0.0,) * 3, std=(1.0,) * 3)).notes == ()


def test_half_precision_modules_become_float32() -> None:
    """Every stage works in float32; what a factory made in half is converted once."""
    model = loaded(UserVit().half())
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}


@dataclass
class Result:
    """What some frameworks return instead of a dict."""

    attentions: Tensor | None
    logits: Tensor


@pytest.mark.parametrize(
    ("factory", "error", "says"),
    [
        ("nothing", UsageError, "has no nothing"),
        ("broken", InputError, r"broken\(\) failed: ValueError: no such weights"),
        ("number", InputError, "returned int, not a torch.nn.Module"),
    ],
)
def test_a_bad_factory_is_one_clear_line(script: Path, factory: str, error: Any, says: str) -> None:
    """A missing, failing or odd factory says so, with what the file defines."""
    with pytest.raises(error, match=says) as caught:
        load(f"{script}:{factory}")
    assert "\n" not in caught.value.message


def test_a_bad_file_is_one_clear_line(tmp_path: Path) -> None:
    """A missing file, one that does not run, and num_classes for a factory without it."""
    with pytest.raises(InputError, match="no file at"):
        load(f"{tmp_path}/none.py:make")
    path = tmp_path / "bad.py"
    path.write_text("import nothing_of_the_kind\n")
    with pytest.raises(InputError, match="failed to run: ModuleNotFoundError"):
        load(f"{path}:make")


def test_num_classes_needs_a_factory_that_takes_it(script: Path) -> None:
    """--num-classes is not dropped silently."""
    with pytest.raises(UsageError, match="plain takes no num_classes"):
        load(f"{script}:plain", LoadOptions(num_classes=3))


class Wide(Patches):
    """A table for 24x40 images that no attribute states: 15 rows and no square reading."""

    def __init__(self, grid: Size = (3, 5)) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, grid[0] * grid[1], 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.tokens(x) + self.table).mean(1))


def test_a_size_that_no_module_states_is_taken_from_the_command_line() -> None:
    """--image-size 24x40 is the size of a 3x5 table; without it the error says what to give."""
    model = loaded(Wide(), image_size=(24, 40))
    assert (model.source_image_size, model.positions) == ((24, 40), Positions.ABSOLUTE)
    assert adapt(model, (48, 40)).module.table.shape == (1, 30, 16)  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"Wide does not state its image size; .* 224x224") as caught:
        loaded(Wide())
    assert "--image-size HxW" in caught.value.hint
    assert loaded(Patches(), image_size=(48, 32)).image_size == (48, 32)


def test_a_size_on_the_command_line_is_only_a_hint() -> None:
    """A table that is made for another size than asked for is resampled from its own, not misread."""
    model = loaded(UserVit(), image_size=(48, 48))
    assert model.source_image_size == (32, 32)
    assert loaded(LookedUp((32, 48)), image_size=(64, 64)).source_image_size == (32, 48)
    # 16 rows are 4x4; asked for 24x40 they could be 1 + 3x5, but the module does not take that.
    assert loaded(Wide((4, 4)), image_size=(24, 40)).source_image_size == (32, 32)


def test_what_a_library_refuses_names_the_size_that_works() -> None:
    """Windows of 7 that do not fit are the model's own complaint, in one line with its own size."""

    class Windows(Patches):
        img_size = 56

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2] % 56 == 0, "height must be divisible by window (7)"
            return self.head(self.tokens(x).mean(1))

    with pytest.raises(BadSize, match=r"divisible by window \(7\); its own 56x56 works"):
        adapt(loaded(Windows()), (64, 56))


def test_the_size_in_a_files_preprocessing_is_the_models(tmp_path: Path) -> None:
    """A file that states its preprocessing states the size its module takes."""
    path = tmp_path / "wide.py"
    path.write_text(
        "import torch\nfrom torch import nn\npreprocessing = {'size': (24, 40)}\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stem, self.table = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.randn(1, 15, 8))\n"
        "    def forward(self, x):\n"
        "        return (self.stem(x).flatten(2).transpose(1, 2) + self.table).mean(1)\n"
    )
    assert load(f"{path}:Net").source_image_size == (24, 40)
