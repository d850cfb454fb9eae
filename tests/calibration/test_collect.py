"""Calibrating a traced program: the right tensors are seen, once, and nothing is kept."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vit_export.artifacts import Images, Layer, LoadedModel, Positions, Preprocessing, Program, Range
from vit_export.calibration.collect import calibrate, channel_statistics, watch
from vit_export.calibration.observers import METHODS, MinMaxConfig, ObserverConfig
from vit_export.errors import InputError, NumericsError
from vit_export.export.program import trace

SIZE = (16, 24)


class Net(nn.Module):
    """A convolution and attention whose q, k and v read one tensor; names as in a ViT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        x = x + self.fc2(nn.functional.gelu(self.fc1(x)))
        out: Tensor = self.head(x.mean(1))
        return out


def program(net: nn.Module, batch: int | None = None) -> Program:
    """The network as the pipeline traces it, for any batch or for one of this size."""
    contract = Preprocessing(SIZE)
    model = LoadedModel(net.eval(), "net", "test", contract, 5, SIZE, (8, 8), Positions.NONE)
    return trace(model, batch_size=batch or 1, dynamic_batch=batch is None)


def inputs_by_hooks(net: nn.Module, images: Images) -> dict[str, Tensor]:
    """What PyTorch's own hooks see at the input of each layer."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0].detach()))
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.inference_mode():
        net(torch.from_numpy(images))
    for hook in hooks:
        hook.remove()
    return seen


def images(count: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).standard_normal((count, 3, *SIZE), dtype=np.float32)


@pytest.mark.parametrize("sizes", [[12], [5, 5, 2], [1] * 12])
def test_minmax_ranges_are_what_hooks_see(sizes: list[int]) -> None:
    """Each layer's range is the extremes of its true input over all images, however they are batched."""
    net, everything = Net(), images(12)
    ranges = calibrate(program(net), np.split(everything, np.cumsum(sizes)[:-1]), MinMaxConfig())
    seen = inputs_by_hooks(net, everything)
    assert (ranges.method, ranges.images, list(ranges.inputs)) == ("minmax", 12, list(seen))
    for name, tensor in seen.items():
        chosen = ranges.inputs[name]
        np.testing.assert_allclose([chosen.low, chosen.high], [tensor.min(), tensor.max()], rtol=1e-5)


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_every_method_calibrates(config: ObserverConfig) -> None:
    """Every method names itself and gives a range inside min-max for every layer."""
    net = program(Net())
    wide = calibrate(net, [images(8)], MinMaxConfig()).inputs
    ranges = calibrate(net, [images(8)], config)
    assert ranges.method == config.method and set(ranges.inputs) == set(wide)
    for name, chosen in ranges.inputs.items():
        assert wide[name].low <= chosen.low <= chosen.high <= wide[name].high


def test_one_tensor_is_observed_once() -> None:
    """q, k and v read one tensor and share one watcher, which sees it once a batch."""
    made: list[str] = []

    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def update(self, values: Tensor, where: str = "") -> None:
            self.count += 1

    def make(layer: Layer) -> Counter:
        made.append(layer.name)
        return Counter()

    watchers, count = watch(program(Net()), [images(2), images(2)], make)
    assert made == ["patch", "q", "fc1", "fc2", "head"] and count == 4
    assert watchers["q"] is watchers["k"] is watchers["v"]
    assert {watcher.count for watcher in watchers.values()} == {2}


def test_channel_statistics_are_per_input_channel() -> None:
    """Linears count channels last, convolutions first; the extremes are those of the true inputs."""
    net, everything = Net(), images(6)
    stats = channel_statistics(program(net), [everything[:4], everything[4:]])
    for name, tensor in inputs_by_hooks(net, everything).items():
        axes = (0, 2, 3) if name == "patch" else tuple(range(tensor.ndim - 1))
        np.testing.assert_allclose(stats[name].abs_max(), tensor.abs().amax(axes), rtol=1e-5)


def test_activations_are_freed() -> None:
    """When a batch is asked for, no activation of earlier batches is alive: memory is flat in images."""
    alive: list[weakref.ref[Tensor]] = []

    class Keeper:
        def update(self, values: Tensor, where: str = "") -> None:
            if where != "the input of patch":  # the image batch itself
                alive.append(weakref.ref(values))

    def stream() -> Iterator[Images]:
        for seed in range(5):
            assert [ref for ref in alive if ref() is not None] == []
            yield images(2, seed)

    watch(program(Net()), stream(), lambda layer: Keeper())
    assert len(alive) == 5 * 4


def test_progress_counts_images() -> None:
    """The callback hears how many images are done after each batch."""
    heard: list[int] = []
    calibrate(program(Net()), [images(3), images(3), images(1)], MinMaxConfig(), progress=heard.append)
    assert heard == [3, 6, 7]


def test_a_fixed_batch_is_cut_and_filled() -> None:
    """A program traced for four images takes batches of any size; the last is filled with its own images."""
    net = Net()
    free = calibrate(program(net), [images(7)], MinMaxConfig())
    fixed = calibrate(program(net, batch=4), [images(7)], MinMaxConfig())
    assert fixed.images == 7
    for name, expected in free.inputs.items():
        chosen = fixed.inputs[name]
        np.testing.assert_allclose([chosen.low, chosen.high], [expected.low, expected.high], rtol=1e-5)


def test_nan_names_the_layer_it_reaches_first() -> None:
    """A NaN weight is reported at the next layer downstream, one in the head at the output."""
    for broken, place in {"patch": "the input of q", "fc1": "the input of fc2", "head": "the output"}.items():
        net = program(Net())
        with torch.no_grad():
            net.graph.get_parameter(f"{broken}.weight").fill_(torch.nan)
        with pytest.raises(NumericsError, match=place):
            calibrate(net, [images(2)], MinMaxConfig())
    with pytest.raises(NumericsError, match="the input of patch"):
        calibrate(program(Net()), [images(2) * np.float32(np.inf)], MinMaxConfig())


def test_no_images_and_wrong_images_are_input_errors() -> None:
    """An empty stream and images of another size are said in one line."""
    net = program(Net())
    with pytest.raises(InputError, match="no calibration images"):
        calibrate(net, [], MinMaxConfig())
    with pytest.raises(InputError, match="the model takes"):
        calibrate(net, [np.zeros((2, 3, 16, 16), np.float32)], MinMaxConfig())


def test_dead_inputs_have_a_zero_range() -> None:
    """A layer that only ever sees zeros gets the range 0 to 0, not an error."""
    net = Net()
    with torch.no_grad():
        net.fc1.weight.zero_()
        net.fc1.bias.zero_()
    assert calibrate(program(net), [images(2)], MinMaxConfig()).inputs["fc2"] == Range(0.0, 0.0)
