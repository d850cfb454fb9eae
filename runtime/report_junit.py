"""junit.xml: what CI systems show. One test suite a target; one case an artifact and one a gate."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from vit_export.runtime.report_cells import printable
from vit_export.runtime.report_schema import Gate, Report, Result


def render(report: Report) -> bytes:
    """The report as JUnit XML, UTF-8.

    An artifact that failed is an error, one not run here is skipped; a gate that failed is a failure,
    one that could not be decided is skipped.
    """
    root = ET.Element("testsuites", name="vit-export")
    for target in dict.fromkeys(result.target for result in report.results):
        suite = ET.SubElement(root, "testsuite", name=printable(target))
        for result in report.results:
            if result.target == target:
                _artifact(suite, result)
                for gate in result.gates:
                    _gate(suite, result, gate)
        _count(suite)
    _count(root)
    ET.indent(root)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _artifact(suite: ET.Element, result: Result) -> None:
    case = _case(suite, result, "runs")
    if result.latency_ms is not None:
        case.set("time", f"{result.latency_ms.mean * result.latency_ms.runs * 1e-3:.3f}")
    if result.status == "failed":
        ET.SubElement(case, "error", message=printable(result.reason))
    elif result.status == "not_run":
        ET.SubElement(case, "skipped", message=printable(result.reason))
    elif result.verdict_reason:
        ET.SubElement(case, "system-out").text = printable(f"{result.verdict}: {result.verdict_reason}")


def _gate(suite: ET.Element, result: Result, gate: Gate) -> None:
    case = _case(suite, result, gate.rule)
    value = "not measured" if gate.value is None else f"{gate.value:g}"
    why = gate.reason or f"{value}, limit {gate.limit:g}"
    if gate.passed is False:
        ET.SubElement(case, "failure", message=printable(f"{gate.rule}: {value}, limit {gate.limit:g}"))
    elif gate.passed is None:
        ET.SubElement(case, "skipped", message=printable(f"undecided: {why}"))


def _case(suite: ET.Element, result: Result, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=printable(result.name), name=printable(name))


def _count(element: ET.Element) -> None:
    """Set the totals that JUnit readers expect on a suite and on the root."""
    element.set("tests", str(len(element.findall(".//testcase"))))
    element.set("failures", str(len(element.findall(".//failure"))))
    element.set("errors", str(len(element.findall(".//error"))))
    element.set("skipped", str(len(element.findall(".//skipped"))))
