"""Area resize of uint8 images, exact: every target pixel is the mean of the area it covers.

Weights are integer overlaps, so sums are exact in floating point whatever their order, and the
result is the same bit for bit on every machine. Nothing but numpy is needed.
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=64)
def overlaps(source: int, target: int) -> np.ndarray:
    """Overlap (target, source) of cells i and j in units of 1 / target source pixels."""
    low = np.maximum(np.arange(target)[:, None] * source, np.arange(source) * target)
    high = np.minimum((np.arange(target)[:, None] + 1) * source, (np.arange(source) + 1) * target)
    return np.maximum(high - low, 0).astype(np.float32)


def area_resize(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resizes (H, W, C) uint8 to (size, size, C), or (*size, C), uint8, halves rounded up."""
    height, width, channels = image.shape
    tall, wide = (size, size) if isinstance(size, int) else size
    if (height, width) == (tall, wide):
        return image
    area = height * width
    dtype = np.float32 if 255 * area < 2**24 else np.float64  # integers up to there are exact
    rows = overlaps(height, tall).astype(dtype, copy=False)
    columns = overlaps(width, wide).astype(dtype, copy=False)
    summed = (rows @ image.reshape(height, -1).astype(dtype)).reshape(tall, width, channels)
    total = np.matmul(columns, summed).astype(np.int64)
    return ((2 * total + area) // (2 * area)).astype(np.uint8)
