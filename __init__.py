"""vit-export: put a Vision Transformer on a device and prove that it still works there.

The stages as functions are in `vit_export.pipeline`; the command line is `vit-export`.
"""

__version__ = "0.1.0"
