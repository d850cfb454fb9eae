"""The command line: parse, call the pipeline, print, exit. Imports no SDK, and stages only when needed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vit_export import __version__
from vit_export.cli_attention import attention as attention_command
from vit_export.cli_gate import gate
from vit_export.cli_options import METHODS, TUNE_MINUTES, export_job
from vit_export.cli_sweep import sweep, worker
from vit_export.cli_verify import verify
from vit_export.errors import UsageError, VitExportError

if TYPE_CHECKING:
    from vit_export.artifacts import Size
    from vit_export.job import ExportJob

_MAX_CONFIG_BYTES = 1 << 20
_TARGETS = ("onnx", "openvino", "tensorrt", "coreml")
# ClickException: of the click package, or of the copy that newer typer carries and has no public name for.
_UsageMistake: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Path_ = Annotated[Path, typer.Argument(help="report.json, or the folder that holds it")]


def _config(context: typer.Context, path: Path | None) -> Path | None:
    """Read --config before the other options: its values become their defaults."""
    if path is not None:
        from vit_export.python310 import tomllib

        try:
            if path.exists() and not path.is_file():  # a device or a pipe may never end
                raise UsageError(f"--config {path} is not a file")
            if path.stat().st_size > _MAX_CONFIG_BYTES:
                raise UsageError(f"--config {path} is too large: {path.stat().st_size} bytes")
            values = tomllib.loads(path.read_text("utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"cannot read --config {path}: {error}") from error
        names = {flag.lstrip("-"): p.name for p in context.command.params for flag in p.opts}
        if unknown := sorted(values.keys() - names.keys()):
            raise UsageError(f"--config {path}: unknown key {unknown[0]}", "keys are option names without --")
        context.default_map = {names[key]: value for key, value in values.items()}
    return path


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"vit-export {__version__}")
        raise typer.Exit


@app.callback()
def export(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            help="SPEC: digits-vit, timm:NAME, hf:DIR_OR_ID, torchvision:NAME, file.py:FACTORY, "
            "model.onnx, program.pt2"
        ),
    ] = "digits-vit",
    checkpoint: Annotated[
        Path | None, typer.Option(help="safetensors or state dict to load over the model")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="download the model's weights")] = False,
    num_classes: Annotated[
        int | None, typer.Option(min=0, help="of the head; 0 for none: embeddings are compared")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that an hf: model brings")
    ] = False,
    image_size: Annotated[
        list[str] | None, typer.Option(help="N or HxW; repeat for several artifacts")
    ] = None,
    pos_embed: Annotated[
        str | None, typer.Option(help="parameter that is the position table of your own model")
    ] = None,
    prefix_tokens: Annotated[
        int | None, typer.Option(min=0, help="rows of it that belong to class and other tokens")
    ] = None,
    pos_embed_mode: Annotated[str, typer.Option(help="bicubic, bilinear or nearest")] = "bicubic",
    antialias: Annotated[
        bool, typer.Option("--antialias/--no-antialias", help="when a position table shrinks")
    ] = True,
    target: Annotated[
        list[str] | None, typer.Option(help="onnx, openvino, tensorrt, coreml or all; repeat for several")
    ] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="float32 artifact (the default)")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="float16 artifact")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="int8 artifact; needs --calib")] = False,
    calib: Annotated[
        str | None, typer.Option(help="calibration images: folder, folder a class, .npz, or URL of a folder")
    ] = None,
    calib_size: Annotated[int, typer.Option(min=1, help="calibration images at most")] = 128,
    calib_method: Annotated[
        str, typer.Option(help=f"{', '.join(METHODS)}; auto judges the choices below by the network's output")
    ] = "auto",
    rotate: Annotated[
        str | None, typer.Option(help="spread outlier channels over all others: auto, on or off")
    ] = None,
    equalize: Annotated[
        str | None, typer.Option(help="move outlier channels into weights: auto, off, or alpha in 0..1")
    ] = None,
    divide_outliers: Annotated[
        str | None, typer.Option(help="behind a GELU, by an operator of their own: auto, on or off")
    ] = None,
    rounding: Annotated[str | None, typer.Option(help="of weights: auto, nearest or gptq")] = None,
    bias_correction: Annotated[str | None, typer.Option(help="auto, on or off")] = None,
    search_budget: Annotated[
        float | None, typer.Option(min=0, help="minutes; by default about three plain calibrations")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="images to judge on, as for --calib")
    ] = None,
    eval_size: Annotated[int | None, typer.Option(min=2, help="evaluation images at most")] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="top-1 points an artifact may lose; more gives exit 1")
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="measure what int8 costs each layer alone, and all but it")
    ] = False,
    keep_float: Annotated[
        list[str] | None, typer.Option(help="GLOB of layers that stay float; repeat")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="R,G,B on the 0..1 scale")] = None,
    std: Annotated[str | None, typer.Option(help="R,G,B on the 0..1 scale")] = None,
    interpolation: Annotated[str | None, typer.Option(help="nearest, bilinear, bicubic or lanczos")] = None,
    crop_pct: Annotated[
        float | None, typer.Option(min=0.1, help="share of the resized short side that the crop keeps")
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="N fixes the batch; MIN,OPT,MAX is a TensorRT profile; else dynamic")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="of every runtime; 0: all physical cores")] = 0,
    opset: Annotated[int | None, typer.Option(help="ONNX opset instead of the target's own")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder of artifacts, reports and bundle")
    ] = Path("vit-export-out"),
    config: Annotated[
        Path | None, typer.Option(callback=_config, is_eager=True, help="TOML file with any of these options")
    ] = None,
    seed: Annotated[int, typer.Option(help="of sampling and of intervals")] = 0,
    timeout: Annotated[
        float, typer.Option(min=1, help="seconds a runtime or a vendor's build step may take")
    ] = 600,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="reuse the finished stages of an interrupted run")
    ] = True,
    store: Annotated[
        str | None,
        typer.Option(help="folder or URL that keeps finished stages for any later run; else OUTPUT/.cache"),
    ] = None,
    require_run: Annotated[
        bool, typer.Option("--require-run", help="exit 3 when an artifact cannot be run here")
    ] = False,
    bundle_images: Annotated[
        int, typer.Option(min=16, help="evaluation images that OUTPUT/bundle carries to a device")
    ] = 256,
    bundle: Annotated[
        bool, typer.Option("--bundle/--no-bundle", help="write OUTPUT/bundle for vit-export verify")
    ] = True,
    zipped: Annotated[bool, typer.Option("--zip", help="also OUTPUT/bundle.zip")] = False,
    attention: Annotated[
        int, typer.Option(min=0, max=16, help="evaluation images whose attention the report shows")
    ] = 0,
    tune: Annotated[
        bool, typer.Option("--tune", help="choose options of ONNX Runtime and OpenVINO by their speed here")
    ] = False,
    tune_budget: Annotated[
        float | None, typer.Option(min=0, help=f"minutes --tune may take; {TUNE_MINUTES:g} without it")
    ] = None,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="images a second over batches 1 to 32 and threads")
    ] = False,
    weights: Annotated[
        str | None, typer.Option(help="of int8: quantise weights alone, in int8 or int4; not for TensorRT")
    ] = None,
    coreml_target: Annotated[str | None, typer.Option(help="oldest system: iOS17 or iOS18")] = None,
    coreml_input: Annotated[str | None, typer.Option(help="Core ML input: tensor or image")] = None,
    coreml_activations: Annotated[
        str | None, typer.Option(help="of Core ML int8: symmetric or asymmetric")
    ] = None,
    palettize: Annotated[int | None, typer.Option(help="4 or 6 bits a Core ML weight")] = None,
    labels: Annotated[Path | None, typer.Option(help="class names, one a line: a Core ML classifier")] = None,
    author: Annotated[str | None, typer.Option(help="for the Core ML package")] = None,
    license: Annotated[str | None, typer.Option(help="for the Core ML package")] = None,
    onnx_operators: Annotated[
        str | None, typer.Option(help="of ONNX int8: onnxruntime (fastest there) or standard")
    ] = None,
    openvino_precision: Annotated[
        str | None, typer.Option(help="of OpenVINO's float part: auto, f32, bf16, f16; f32 unless int8")
    ] = None,
    openvino_products: Annotated[
        str | None, typer.Option(help="of OpenVINO int8: balanced (even work for x86 threads) or plain")
    ] = None,
    int8_attention: Annotated[str | None, typer.Option(help="TensorRT: auto, on or off")] = None,
    trt_flavor: Annotated[str | None, typer.Option(help="TensorRT SDK: auto, tensorrt or rtx")] = None,
    trt_workspace_mib: Annotated[
        int | None, typer.Option(min=1, help="memory TensorRT may use while building")
    ] = None,
    trt_optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="how long TensorRT searches")
    ] = None,
    trt_compatibility: Annotated[
        str | None, typer.Option(help="other GPUs to run on: none, ampere+, same")
    ] = None,
    trt_dla_core: Annotated[int | None, typer.Option(min=0, help="Jetson's DLA core to build for")] = None,
    trt_version_compatible: Annotated[
        bool | None, typer.Option("--trt-version-compatible", help="later TensorRT versions may run it too")
    ] = None,
    trt_compute_capabilities: Annotated[
        str | None, typer.Option(help="GPUs TensorRT-RTX builds for, as 8.6,8.9; default: all it knows")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only the result")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="a line a stage with its time; traceback with errors")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="report.json on stdout, everything else on stderr")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and exit")
    ] = False,
) -> None:
    """Export a Vision Transformer, quantise it, and prove the artifact against FP32 PyTorch.

    Without a subcommand this is the main job; without --model it uses the embedded digits-vit and its
    images:  vit-export --target onnx --target openvino --int8
    """
    if context.invoked_subcommand is not None:
        return
    _run(export_job(context.params), quiet=quiet or json, verbose=verbose, as_json=json)


def _run(job: ExportJob, *, quiet: bool, verbose: bool, as_json: bool) -> None:
    from vit_export.runtime.console import make_console, print_report
    from vit_export.runtime.report_cells import printable
    from vit_export.terminal import progress_display

    console = make_console(stderr=True) if as_json else make_console()
    command = shlex.join(["vit-export", *sys.argv[1:]])
    with progress_display(console, quiet, verbose) as notify:
        notify("import PyTorch", 0, 1)
        from vit_export import pipeline

        report = pipeline.run(job, command, notify)
    for note in report.model.notes:
        console.print(f"note: {printable(note)}", style="dim", soft_wrap=True)
    if report.reused:
        names = ", ".join(dict.fromkeys(report.reused))
        console.print(f"note: not run again (--no-resume to do so): {names}", style="dim", soft_wrap=True)
    print_report(report, console)
    for what, line in _next_steps(job, [result.status for result in report.results]):
        console.print(f"{what:<10} {line}", style="dim", soft_wrap=True)
    if as_json:
        from vit_export.runtime.report_schema import encode

        sys.stdout.buffer.write(encode(report))
    raise typer.Exit(pipeline.exit_code(report, max_drop=job.max_drop, require_run=job.require_run))


def _next_steps(job: ExportJob, states: list[str]) -> list[tuple[str, str]]:
    """Where the result is and what to do with it."""
    output = job.output.relative_to(Path.cwd()) if job.output.is_relative_to(Path.cwd()) else job.output
    steps = [("\nreport", str(output / "report.html"))]
    if (job.output / "bundle").is_dir():
        bundle = shlex.quote(str(output / "bundle"))
        steps.append(("on device", f"vit-export verify {bundle}"))
    if "failed" in states:
        steps.append(("diagnose", "vit-export doctor"))
    return steps


@app.command(short_help="print a report again; compare several on one page")
def report(
    reports: Annotated[list[Path], typer.Argument(help="report.json, or the folder that holds it")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="the page that compares several reports")
    ] = Path("comparison.html"),
) -> None:
    """Print a report's table again and write its other formats beside it; compare several on one page."""
    from vit_export.runtime import comparison, report_files
    from vit_export.runtime.console import make_console, print_report

    console = make_console()
    if len(reports) > 1:
        runs = comparison.read_runs(reports)
        comparison.write(runs, output)
        comparison.print_runs(runs, console)
        console.print(f"wrote {output}", style="dim", soft_wrap=True)
        return
    path = reports[0]
    data = report_files.read(path)
    formats = [name for name in report_files.WRITERS if name != "json"]
    written = report_files.write(data, path if path.is_dir() else path.parent, formats)
    print_report(data, console)
    console.print("wrote " + ", ".join(path.name for path in written), style="dim")


@app.command(short_help="what can be built and run here")
def doctor() -> None:
    """Which targets can be built and run here, with versions and known faults."""
    from rich.padding import Padding
    from rich.text import Text

    from vit_export.runtime.console import make_console, plain_table
    from vit_export.runtime.doctor import diagnose
    from vit_export.runtime.environment import collect

    here, console = collect(), make_console()
    features = " ".join(here.cpu_features) or "no int8 instructions"
    console.print(f"{here.cpu}, {here.cores} cores, {features}\n{here.os}, Python {here.python}\n")
    found = diagnose()
    yes = {True: "yes", False: "no"}
    body = [
        (d.target, yes[d.builds], yes[d.runs], " ".join(f"{k} {v}" for k, v in d.versions.items()))
        for d in found
    ]
    console.print(plain_table(("target", "builds", "runs", "installed"), body))
    for d in found:
        if lines := list(filter(None, (d.problem, d.fix, *d.notes))):
            console.print(f"\n{d.target}")
            for line in lines:
                console.print(Padding(Text(line), (0, 0, 0, 2)))


@app.command(short_help="what can be loaded, and at which sizes")
def models(
    pattern: Annotated[str | None, typer.Argument(help="GLOB, or a SPEC to describe")] = None,
) -> None:
    """What can be loaded: native size, sizes it can take, and how it encodes positions."""
    from vit_export.models import available, describe
    from vit_export.runtime.console import make_console, plain_table

    one = pattern is not None and (":" in pattern or pattern == "digits-vit") and "*" not in pattern
    rows = [describe(str(pattern))] if one else available(pattern)
    if not rows:
        raise UsageError(f"no model matches {pattern}", "vit-export models '*deit*'")
    body = [(r.spec, _shown(r.size), _shown(r.multiple), str(r.positions)) for r in rows]
    console = make_console()
    console.print(plain_table(("spec", "native", "multiple of", "positions"), body))
    if one:
        console.print(f"--image-size: {rows[0].rule}", soft_wrap=True, markup=False)


def _shown(size: Size | None) -> str:
    return "its own" if size is None else f"{size[0]}x{size[1]}"


app.command(short_help="judge a bundle here, or on devices over SSH")(verify)
app.command(short_help="turn CI red for a regression")(gate)
app.command(short_help="run a matrix of models, sizes and targets on Dask")(sweep)
app.command(short_help="serve a Dask scheduler with what this machine can do")(worker)
app.command("attention", short_help="where the model looks, FP32 beside int8")(attention_command)


def _plain(error: Exception) -> str:
    """What an error says, without terminal escapes: it may quote a file, a vendor or a host."""
    from vit_export.runtime.report_cells import printable

    return printable(str(error))


def main() -> None:
    """Entry point: every error a user can cause is one message and its exit code; the rest is 4."""
    verbose = any(flag in sys.argv for flag in ("--verbose", "-v"))
    try:
        code = app(standalone_mode=False)  # the code of a typer.Exit comes back as the result
        sys.exit(code if isinstance(code, int) else 0)
    except _UsageMistake as error:
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("stopped", err=True)
        sys.exit(130)
    except VitExportError as error:
        if verbose:
            raise
        typer.echo(f"error: {_plain(error)}", err=True)
        sys.exit(error.exit_code)
    except MemoryError:
        typer.echo("error: not enough memory\n  finished stages are kept: free some and run again", err=True)
        sys.exit(3)
    except Exception as error:
        if verbose:
            raise
        typer.echo(
            f"internal error: {type(error).__name__}: {_plain(error)}\n"
            "  run again with --verbose and report it",
            err=True,
        )
        sys.exit(4)
