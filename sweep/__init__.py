"""Many models, sizes, targets and devices at once, on Dask. Needs the `sweep` extra.

    sweep.toml ─matrix─▶ Cells ─plan─▶ tasks ─Dask─▶ stages in one store ─collect─▶ reports, Pareto fronts

A task calls the functions that `vit-export` itself runs (`one_size`, `pipeline.examine`) with a store, so a
cell's row is the one a single process would give, and what the store has is not made again.
"""
