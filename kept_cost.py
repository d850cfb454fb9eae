"""What the layers that --max-drop keeps float cost in time: each artifact is timed beside one without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from vit_export.artifacts import LayerPlan, Precision, Runnable
from vit_export.build_size import Calibrated, SizeBuilder
from vit_export.export.target import Target
from vit_export.runtime.latency import Timings
from vit_export.runtime.report_schema import Result
from vit_export.search.sensitivity import WITHIN

_TWIN = "all int8"


@dataclass(frozen=True, slots=True)
class KeptCost:
    """known: whose plan may keep layers float within --max-drop."""

    known: Calibrated

    @property
    def kept(self) -> tuple[str, ...]:
        """The layers that int8 would lose too much in."""
        return tuple(layer.name for layer in self.known.plan.layers if layer.reason == WITHIN)

    def twin(self, builder: SizeBuilder, target: Target, folder: Path) -> tuple[str, Runnable]:
        """(name, runnable) of the artifact with the kept layers in int8 too, built in `folder`."""
        plan = self.known.plan
        everything = replace(plan, layers=tuple(_quantized(layer) for layer in plan.layers))
        other = replace(builder, calibration=replace(self.known, plan=everything))
        built = other.make(target, Precision.INT8, folder)
        height, width = built.image_size
        return _twin(f"{target.name} int8 {height}x{width}"), target.runnable(built, builder.job.threads)

    def told(self, result: Result, timings: Timings) -> Result:
        """The result with what each kept layer bought and cost, or why that is unknown; others unchanged."""
        names = result.name, _twin(result.name)
        if failed := timings.failed.get(names[1]):
            note = f"what layers kept float within --max-drop cost in time is not known: {failed}"
            return msgspec.structs.replace(result, notes=(*result.notes, note))
        if not all(name in timings.rounds for name in names):
            return result
        with_float, without = (timings.latency(name).p50 for name in names)
        costs = self.shared(with_float - without)
        facts = {"ms": with_float - without, "of_ms": with_float, "layers": costs}
        return msgspec.structs.replace(
            result,
            details={**result.details, "kept_float_cost": facts},
            notes=(*result.notes, self._words(costs, with_float, without)),
        )

    def shared(self, total: float) -> dict[str, float]:
        """A total in ms, shared out among the kept layers by their products."""
        macs = {layer.name: layer.macs for layer in self.known.program.layers if layer.name in self.kept}
        return {name: total * count / sum(macs.values()) for name, count in macs.items()}

    def _words(self, costs: Mapping[str, float], with_float: float, without: float) -> str:
        alone = {row.layer: row.sqnr_alone_db for row in self.known.plan.sensitivity}
        layers = ", ".join(f"{name} ({ms:+.2f} ms{_bought(alone.get(name))})" for name, ms in costs.items())
        return (
            f"kept float within --max-drop: {layers}; together {with_float - without:+.2f} ms, measured: "
            f"{with_float:.2f} ms with them, {without:.2f} ms in int8 throughout; shared out by products"
        )


def _quantized(layer: LayerPlan) -> LayerPlan:
    return replace(layer, quantized=True, reason="") if layer.reason == WITHIN else layer


def _twin(name: str) -> str:
    return f"{name} {_TWIN}"


def _bought(alone_db: float | None) -> str:
    return "" if alone_db is None else f", {alone_db:.1f} dB if it alone were int8"
