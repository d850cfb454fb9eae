"""What a worker process and its client say to each other: one JSON object a line, tagged by type.

The client sends a request and reads replies until one that is not Progress. Arrays never cross the pipe:
requests name .npy files, and the worker reads and writes them memory-mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from vit_export.artifacts import Preprocessing, Runnable, Size

# Called with what is being done, how many steps are done and how many there are.
ProgressCallback = Callable[[str, int, int], None]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """One line; the `type` field is the class name."""


class Open(Message, frozen=True):
    """Open an artifact; answered by Opened. Any other request needs this first."""

    runnable: Runnable


class Time(Message, frozen=True):
    """Time single calls; answered by Timed. Without `pixels` the input is seeded normal noise."""

    batch: int
    warmup: int
    runs: int
    min_seconds: float
    max_seconds: float
    pixels: Path | None = None
    preprocessing: Preprocessing | None = None


class Rate(Message, frozen=True):
    """Count calls of `batch` images for `seconds`, as many at once as the runner has streams; answered by
    Rated. Without `pixels` the input is seeded normal noise."""

    batch: int
    seconds: float
    pixels: Path | None = None
    preprocessing: Preprocessing | None = None


class Infer(Message, frozen=True):
    """Run all images of `pixels` (uint8 NHWC .npy), write float32 [N, K] to `out`; answered by Inferred."""

    pixels: Path
    preprocessing: Preprocessing
    batch: int
    out: Path


class Describe(Message, frozen=True):
    """Ask how the runtime runs the artifact (Runner.details) on `batch` images; answered by Described."""

    batch: int
    pixels: Path
    preprocessing: Preprocessing


class Ask(Message, frozen=True):
    """Ask for Info."""


class Close(Message, frozen=True):
    """Close the runner and end the process; not answered."""


class Opened(Message, frozen=True):
    """The artifact is loaded. seconds: what that took, the import of the SDK included."""

    image_size: Size
    batch: int | None
    version: str
    seconds: float


class Timed(Message, frozen=True):
    """Nanoseconds of each call."""

    ns: list[int]


class Rated(Message, frozen=True):
    """`images` went through in `seconds`, over `streams` calls at once."""

    images: int
    seconds: float
    streams: int


class Inferred(Message, frozen=True):
    """`out` is complete."""

    images: int
    outputs: int


class Described(Message, frozen=True):
    """details: JSON's own types, as the report carries them."""

    details: dict[str, Any]


class Info(Message, frozen=True):
    """peak_rss_bytes: of the worker so far, None where the system does not tell."""

    version: str
    peak_rss_bytes: int | None


class Progress(Message, frozen=True):
    """A sign of life within a long request."""

    done: int
    total: int


class Failed(Message, frozen=True):
    """The request failed with an error of vit_export.errors named `kind`."""

    kind: str
    message: str
    hint: str


class Missing(Message, frozen=True):
    """The runner's SDK is not installed (errors.MissingExtra)."""

    package: str
    extra: str


Request = Open | Time | Rate | Infer | Describe | Ask | Close
Reply = Opened | Timed | Rated | Inferred | Described | Info | Progress | Failed | Missing


def encode(message: Message) -> bytes:
    """A message as one line."""
    return msgspec.json.encode(message, enc_hook=_encode_path) + b"\n"


def decode_request(line: bytes) -> Request:
    """A line as a request. Raises msgspec.DecodeError if it is not one."""
    return _requests.decode(line)


def decode_reply(line: bytes) -> Reply:
    """A line as a reply. Raises msgspec.DecodeError if it is not one."""
    return _replies.decode(line)


def _encode_path(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} in a message")


def _decode_path(kind: type, value: Any) -> Any:
    if issubclass(kind, Path) and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"{kind.__name__} in a message")


_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request, dec_hook=_decode_path)
_replies: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply, dec_hook=_decode_path)
