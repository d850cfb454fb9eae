"""What every target is: a profile for each precision and a way to build one artifact."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from vit_export.artifacts import (
    BuildRequest,
    BuiltArtifact,
    Precision,
    Program,
    Runnable,
    TargetProfile,
    WeightsOnly,
)
from vit_export.errors import MissingExtra, TargetError, UsageError


class Target(ABC):
    """Builds artifacts for one kind of runtime. A subclass writes `profile`, `_build` and `runnable`.

    name: as on the command line. package, extra: the import a build needs and our extra that installs it.
    weights: what the runtime gains from with float activations, of --weights.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str]
    precisions: ClassVar[tuple[Precision, ...]] = tuple(Precision)
    weights: ClassVar[tuple[WeightsOnly, ...]] = ()

    def require(self) -> None:
        """Raise MissingExtra unless what a build needs is installed. Imports nothing."""
        if importlib.util.find_spec(self.package) is None:
            raise MissingExtra(self.package, self.extra)

    @abstractmethod
    def profile(self, precision: Precision, options: Mapping[str, Any]) -> TargetProfile:
        """What this target accepts at this precision."""

    def build(self, program: Program, request: BuildRequest) -> BuiltArtifact:
        """Build from a program that is already quantised when the precision is int8.

        Raises MissingExtra, UsageError (a precision the target does not have), TargetError (with its
        subclasses) when the toolchain refuses the graph.
        """
        self.require()
        if request.precision not in self.precisions:
            raise UsageError(f"target {self.name} has no {request.precision} precision")
        alone = request.options.get("weights") if request.precision is Precision.INT8 else None
        if alone and alone not in self.weights:
            raise UsageError(
                f"target {self.name} quantises activations with the weights", "leave --weights out for it"
            )
        request.folder.mkdir(parents=True, exist_ok=True)
        path, details = self._build(program, request)
        if not path.exists():
            raise TargetError(f"the {self.name} toolchain reported success but wrote no {path.name}")
        return BuiltArtifact(
            target=self.name,
            precision=request.precision,
            image_size=program.image_size,
            path=path,
            size_bytes=self._size(path),
            details=details,
        )

    @abstractmethod
    def _build(self, program: Program, request: BuildRequest) -> tuple[Path, Mapping[str, Any]]:
        """Write the artifact into request.folder; its path and facts for the report."""

    def _size(self, path: Path) -> int:
        """Bytes of a file with its side files (`model.xml` + `model.bin`), or of a package folder."""
        if path.is_dir():
            return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        return sum(f.stat().st_size for f in path.parent.glob(f"{path.stem}.*") if f.is_file())

    @abstractmethod
    def runnable(self, artifact: BuiltArtifact, threads: int) -> Runnable:
        """How a worker opens the artifact."""

    def lowered(self, artifact: BuiltArtifact, threads: int, work: Path) -> Runnable | None:
        """The same graph before the runtime optimises it, to tell lowering from the runtime; or None.

        work: a scratch folder, for targets that must rewrite the graph to run it here.
        """
        return None

    def notes(self, artifact: BuiltArtifact) -> tuple[str, ...]:
        """What a user should know of how the artifact was made, in sentences for the report."""
        alone = artifact.details.get("weights_only")
        said = f"only weights are stored quantised ({alone}); activations have no fixed range"
        return (said,) if alone else ()

    def shares(self, artifacts: Sequence[BuiltArtifact]) -> bool:
        """Whether artifacts of several sizes can be one that shares their weights (`share`)."""
        return False

    def share(
        self, artifacts: Sequence[BuiltArtifact], folder: Path, *, timeout: float = 600.0
    ) -> tuple[BuiltArtifact, ...]:
        """One artifact in `folder` for several sizes, described once for each, in their order.

        timeout: seconds a vendor's step may take. Raises TargetError when it does not succeed.
        """
        raise NotImplementedError(f"target {self.name} keeps one artifact a size")

    def not_run(self) -> str:
        """Why artifacts of this target cannot run on this machine; empty when they can."""
        return ""

    def not_timed(self) -> str:
        """Why a time measured on this machine would mean nothing; empty when it would."""
        return self.not_run()
