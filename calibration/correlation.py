"""How the input channels of a layer move together: what second-order weight rounding needs to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vit_export.errors import NumericsError

if TYPE_CHECKING:
    from torch import Tensor

_STRIDE = 2  # every other token: neighbours say nearly the same, and the products cost more than the network


class Correlation:
    """Sum of x xᵀ over the rows of the tensors seen: float32 [C, C], whatever their number."""

    def __init__(self) -> None:
        self._products: Tensor | None = None

    @property
    def products(self) -> Tensor:
        """float32 [C, C]. Raises ValueError before the first tensor."""
        if self._products is None:
            raise ValueError("nothing was observed")
        return self._products

    def update(self, values: Tensor, where: str = "the tensor") -> None:
        """Take in float [..., C]. Raises NumericsError, naming `where`, for NaN or Inf."""
        import torch

        rows = values.reshape(-1, values.shape[-1]).float()
        rows = rows[::_STRIDE] if len(rows) > _STRIDE else rows
        product = rows.T @ rows
        if not bool(torch.isfinite(product).all()):
            raise NumericsError(f"NaN or Inf at {where}", "look for broken weights or an overflow before it")
        self._products = product if self._products is None else self._products.add_(product)
