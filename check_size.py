"""Running the artifacts of one image size on the evaluation images, against the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np

from vit_export.artifacts import BuiltArtifact, EvalSet, Logits, Precision, QuantPlan
from vit_export.blame_size import Blame, Predict
from vit_export.build_size import Built, Tuned
from vit_export.errors import ParityError
from vit_export.export.program import PARITY
from vit_export.export.target import Target
from vit_export.job import ExportJob
from vit_export.runtime.accuracy import compare, predictions
from vit_export.runtime.report_schema import Result, StageLoss
from vit_export.stages import Stages, failure


@dataclass(frozen=True, slots=True)
class SizeChecker:
    """Compares every artifact with the baseline's `reference` outputs for `images`.

    resized: what the image size alone changed. outputs: of those that ran here, by `Result.name`; filled by
    `check`.
    """

    job: ExportJob
    stages: Stages
    plan: QuantPlan | None
    images: EvalSet
    reference: Logits
    predict: Predict
    blame: Blame
    resized: tuple[StageLoss, ...]
    tuned: Mapping[tuple[str, Precision], Tuned]
    embeddings: bool
    outputs: dict[str, Logits] = field(default_factory=dict)

    def check(self, item: Built) -> Result:
        """Run one artifact on the evaluation images and compare it with the baseline."""
        if isinstance(item, Result):
            return item
        target, artifact = item
        result = self._result(target, artifact)
        try:
            name = f"{artifact.target} {artifact.precision}"
            if (reason := target.not_run()) and name not in self.stages.answers:
                result = msgspec.structs.replace(result, status="not_run", reason=reason)
                return self._graph_alone(target, artifact, result)
            prediction = self.predict(name, target.runnable(artifact, self.job.threads), self.images)
            _check_parity(artifact, self.reference, prediction.logits)
            accuracy = compare(
                self.reference, prediction.logits, self.images.labels,
                embeddings=self.embeddings, seed=self.job.seed,
            )  # fmt: skip
            self.outputs[result.name] = prediction.logits
            result = msgspec.structs.replace(
                result,
                reason=target.not_timed(),
                runtime_version=prediction.version,
                peak_rss_bytes=prediction.peak_rss_bytes,
                details={**result.details, **prediction.details},
                stages=self.resized + self.blame.split(target, artifact, prediction.logits)[0],
            )
            return result.with_accuracy(accuracy, None if self.embeddings else predictions(prediction.logits))
        except Exception as error:  # noqa: BLE001  (`failure` sorts them)
            return msgspec.structs.replace(result, status="failed", reason=failure(error, self.job.output))

    def _graph_alone(self, target: Target, artifact: BuiltArtifact, result: Result) -> Result:
        """What can be said where the runtime is not: the numbers of the graph the artifact is made from."""
        split, logits = self.blame.split(target, artifact, None)
        stages = self.resized + split
        if logits is None:
            return msgspec.structs.replace(result, stages=stages)
        before = self.reference[: len(logits)]
        _check_parity(artifact, before, logits)
        found = compare(before, logits, embeddings=self.embeddings, resamples=1)
        graph = {
            "sqnr_db": found.sqnr_db,
            "agreement": found.agreement,
            "cosine": found.cosine,
            "images": len(logits),
        }
        quality = "identical" if found.sqnr_db is None else f"{found.sqnr_db:.1f} dB SQNR"
        note = (
            f"its graph, run node by node in ONNX Runtime: {quality}, agreement {found.agreement:.3f} "
            f"with FP32 PyTorch on {len(logits)} images"
        )
        return msgspec.structs.replace(
            result, stages=stages, details={**result.details, "graph": graph}, notes=(note, *result.notes)
        )

    def _result(self, target: Target, artifact: BuiltArtifact) -> Result:
        quantised = artifact.precision is Precision.INT8 and self.plan is not None
        tuned = self.tuned.get((target.name, artifact.precision), Tuned())
        return Result(
            target=artifact.target,
            precision=artifact.precision,
            image_size=artifact.image_size,
            status="ok",
            artifact=artifact.path.relative_to(self.job.output).as_posix(),
            bytes=artifact.size_bytes,
            kept_float=self.plan.kept_float() if quantised and self.plan else (),
            float_fallback_ops=artifact.details.get("float_linears"),
            tuning=tuned.steps,
            details={**artifact.details, **({"session": dict(tuned.session)} if tuned.session else {})},
            notes=target.notes(artifact),
        )


def _check_parity(artifact: BuiltArtifact, reference: Logits, logits: Logits) -> None:
    """An fp32 artifact must reproduce the baseline. Raises ParityError with the numbers."""
    if artifact.precision is not Precision.FP32:
        return
    difference = float(np.abs(reference - logits).max() / max(np.abs(reference).max(), 1e-12))
    if not difference < PARITY:
        raise ParityError(
            f"{artifact.target} fp32 differs from PyTorch by {difference:.2e} relative (limit {PARITY:g})"
        )
