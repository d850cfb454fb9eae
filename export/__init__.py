"""Trace, fold, quantise, lower: from a module to what a runtime loads. Needs the `export` extra."""
