"""Which known faults fit what is installed, or what a result was measured with."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from vit_export.artifacts import Precision
from vit_export.runtime.environment import cpu_features
from vit_export.runtime.known_bad_table import KNOWN_BAD, Kind, KnownBad

SERIOUS: tuple[Kind, ...] = ("wrong", "refused")


def known_bad(
    package: str,
    version: str,
    *,
    models: Sequence[str] = (),
    precision: Precision | None = None,
    capability: str = "",
    features: Sequence[str] | None = None,
    jetson: bool = False,
    kinds: Sequence[Kind] = ("wrong", "slow", "refused"),
    table: Iterable[KnownBad] = KNOWN_BAD,
) -> Iterator[KnownBad]:
    """The entries that fit. What is not given does not exclude an entry, but for `features` and `jetson`,
    which are this machine's.

    version: `10.3.0`, `11.4.0.106`. models: family, name (any case). capability: `8.7`. features: of the
    CPU, read from the system without it.
    """
    have = cpu_features() if features is None else features
    for bad in table:
        if (
            bad.package == package
            and bad.kind in kinds
            and within(version, bad.first, bad.last)
            and (not models or _matches(models, bad.models))
            and (precision is None or not bad.precisions or precision in bad.precisions)
            and (not capability or not bad.capabilities or capability in bad.capabilities)
            and (not bad.feature or bad.feature in have)
            and (jetson or not bad.jetson)
        ):
            yield bad


def problems(
    versions: Mapping[str, str],
    *,
    jetson: bool = False,
    features: Sequence[str] | None = None,
    table: Sequence[KnownBad] = KNOWN_BAD,
) -> tuple[str, ...]:
    """What is known against these versions on this machine, in words. versions: distribution → version."""
    return tuple(
        words(bad, version)
        for package, version in versions.items()
        for bad in known_bad(package, version, features=features, jetson=jetson, table=table)
    )


def against(
    runtime: str, *, models: Sequence[str], precision: Precision, capability: str = "", slow: bool = False
) -> tuple[str, ...]:
    """What is known against the runtime of a result, as it names itself: `tensorrt_rtx 1.7.1.116`.

    slow: whether entries about speed are wanted too (a result that was slow).
    """
    name, _, version = runtime.partition(" ")
    package = name.replace("_", "-")
    kinds: tuple[Kind, ...] = (*SERIOUS, "slow") if slow else SERIOUS
    found = known_bad(
        package, version, models=models, precision=precision, capability=capability, kinds=kinds
    )
    return tuple(words(bad, version) for bad in found)


def words(bad: KnownBad, version: str) -> str:
    """`tensorrt 10.3.0 (reported wrong): symptom; advice (source)`."""
    return f"{bad.package} {version} (reported {bad.kind}): {bad.symptom}; {bad.advice} ({bad.sources[0]})"


def within(version: str, first: str, last: str) -> bool:
    """first <= version <= last, where `last` covers everything below it: 10.16 covers 10.16.1."""
    parts, low, high = (_parts(text) for text in (version, first, last))
    parts += (0,) * (max(len(low), len(high)) - len(parts))
    return parts[: len(low)] >= low and parts[: len(high)] <= high


def _parts(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else (0,)


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern) for name in names for pattern in patterns)
