"""Stands in for cuda-bindings' package where there is no GPU."""
