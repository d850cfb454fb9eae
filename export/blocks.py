"""How oneDNN cuts an integer product among threads: what a count of rows costs, which products are wide.

OpenVINO's linears on x86 are oneDNN's. Its work items are blocks of at most 64 rows by 64 output
channels, which the threads share in order. Rows of a block are the largest divisor of all rows up to 64, so
that blocks are equal; where no divisor is above 5, or a product has more than `WIDE` items, blocks have
64 rows and the last one the rest. Then two threads take as long for 257 rows as for 320, since one of
them has the small block. The rule was read in oneDNN's `jit_brgemm_inner_product_utils.cpp` and WIDE
measured, both with two threads (docs/performance.md has the times).
"""

from __future__ import annotations

WIDE = 100  # work items from which on blocks have 64 rows whatever divides the rows
_BLOCK = 64  # rows, and output channels
_LEAST = 6  # rows of a block; also rows that a kernel's registers hold
_WORTH = 0.9  # of the time, for a change to be made


def equal_rows(rows: int) -> int:
    """A count from `rows` to a twentieth more whose blocks take the least time; `rows` if none gains."""
    if rows > _WORTH * _uneven(rows):
        return rows
    best = min(range(rows, rows + max(8, rows // 20) + 1), key=row_time)
    return best if row_time(best) < _WORTH * row_time(rows) else rows


def row_time(rows: int) -> int:
    """What a product over so many rows takes on two threads, in rows of a kernel that is always full."""
    size = max(size for size in range(1, _BLOCK + 1) if rows % size == 0)
    if size < _LEAST:
        return _uneven(rows)
    return rows // size * -(-size // _LEAST) * _LEAST


def narrow_parts(rows: int, channels: int) -> int:
    """Into how many equal products one over `rows` to `channels` is best cut; 1 where nothing is gained."""
    if _items(rows, channels) <= WIDE or row_time(rows) >= _WORTH * _uneven(rows):
        return 1
    limit = channels // _BLOCK
    fitting = (n for n in range(2, limit + 1) if channels % n == 0 and _items(rows, channels // n) <= WIDE)
    return next(fitting, 1)


def _uneven(rows: int) -> int:
    """`row_time` in blocks of 64: each of two threads has half of the blocks, the small one counted whole."""
    return -(-rows // _BLOCK) * _BLOCK


def _items(rows: int, channels: int) -> int:
    return -(-rows // _BLOCK) * -(-channels // _BLOCK)
