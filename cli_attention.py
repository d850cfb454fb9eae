"""`vit-export attention`: where the model looks, in FP32 and in int8."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def attention(
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGE", help="image files, folders or .npz files")
    ] = None,
    model: Annotated[str, typer.Option(help="SPEC, as for the main job")] = "digits-vit",
    checkpoint: Annotated[
        Path | None, typer.Option(help="safetensors or state dict to load over the model")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="download the model's weights")] = False,
    num_classes: Annotated[int | None, typer.Option(min=0, help="of the head; 0 for none")] = None,
    image_size: Annotated[str | None, typer.Option(help="N or HxW")] = None,
    calib: Annotated[
        Path | None, typer.Option(help="calibration images; without them only FP32 is shown")
    ] = None,
    calib_size: Annotated[int, typer.Option(min=1, help="calibration images at most")] = 128,
    calib_method: Annotated[str, typer.Option(help="as for the main job")] = "auto",
    keep_float: Annotated[
        list[str] | None, typer.Option(help="GLOB of layers that stay float; repeat")
    ] = None,
    target: Annotated[str, typer.Option(help="whose int8 is shown")] = "onnx",
    limit: Annotated[int, typer.Option(min=1, help="images taken from a folder or .npz")] = 4,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder of attention.html and the pictures")
    ] = Path("vit-export-attention"),
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only the result")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="a line a stage; traceback with errors")
    ] = False,
) -> None:
    """Draw the class token's attention and its rollout over images, FP32 beside int8 and their difference.

    Writes OUTPUT/attention.html and a picture for each layer with a column a head. The maps are computed
    from the traced graph, so any model that can be exported can be looked at. KL(FP32 || int8) tells which
    layer's attention changed most:  vit-export attention --model SPEC --calib photos/ cat.jpg
    """
    from vit_export.cli_options import attention_job
    from vit_export.runtime import attention_html
    from vit_export.runtime.console import make_console, plain_table
    from vit_export.runtime.files import write_atomic
    from vit_export.terminal import progress_display

    options = locals()
    console = make_console()
    with progress_display(console, quiet, verbose) as notify:
        notify("import PyTorch", 0, 1)
        from vit_export import attention_job as attending

        found = attending.run(attention_job(options), images or [], limit, notify)
    page = output / "attention.html"
    write_atomic(page, attention_html.render(found, output))
    console.print(plain_table(*attention_html.table_of(found)))
    console.print(f"int8: {found.int8}", style="dim", soft_wrap=True)
    console.print(f"wrote {page}", style="dim", soft_wrap=True)
