"""What lies beside a report and is shown in its page: attention, pictures of flipped images, histograms."""

from __future__ import annotations

import shutil
from pathlib import Path

from vit_export.runtime import attention_file, thumbnails

_FOLDERS = (attention_file.FOLDER, thumbnails.FOLDER)


def clear(output: Path) -> None:
    """Remove what an earlier run left in `output`: a page must not show another run's pictures."""
    for name in _FOLDERS:
        shutil.rmtree(output / name, ignore_errors=True)
    for path in output.glob("calibration*.json"):
        path.unlink()
