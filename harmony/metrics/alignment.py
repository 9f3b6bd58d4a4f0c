"""How far an output's background has moved: large editors zoom and shift what they were told to keep.

Images are uint8 H x W x 3 RGB, masks bool H x W.
"""

import math

import cv2
import numpy as np
from skimage.registration import phase_cross_correlation

SMALLEST_SHARE = 0.05  # of the picture that background must be
SMALLEST_SPREAD = 1.0  # gray levels: standard deviation of a background that has something to align
FILTER = 3  # px: Gaussian window before alignment
CRITERIA = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 1e-4)


def shift(output: np.ndarray, original: np.ndarray, hole: np.ndarray) -> float:
    """Length in pixels by which the background, all outside ``hole``, stands elsewhere than in the original.

    Whole pixels by masked normalized phase correlation (Padfield 2012), fractions by the enhanced correlation
    coefficient (Evangelidis 2008), which ignores changes of brightness and contrast. NaN where the background is too
    small or too smooth to tell.
    """
    background = ~hole
    gray, reference = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) for image in (output, original))
    if background.mean() < SMALLEST_SHARE or min(x[background].std() for x in (gray, reference)) < SMALLEST_SPREAD:
        return math.nan
    if np.array_equal(gray[background], reference[background]):
        return 0.0
    masks = {"reference_mask": background, "moving_mask": background}
    whole = phase_cross_correlation(reference, gray, **masks)[0]
    fits = [align(gray, reference, background, start) for start in ((0.0, 0.0), (-whole[1], -whole[0]))]
    return max(fits)[1] if any(fits) else math.nan


def align(
    gray: np.ndarray, reference: np.ndarray, background: np.ndarray, start: tuple[float, float]
) -> tuple[float, float] | tuple[()]:
    """(correlation, length) of the shift found from ``start`` = (x, y); empty where nothing correlates."""
    warp = np.float32([[1, 0, start[0]], [0, 1, start[1]]])
    try:
        valid = background.astype(np.uint8)
        correlation, warp = cv2.findTransformECC(reference, gray, warp, cv2.MOTION_TRANSLATION, CRITERIA, valid, FILTER)
    except cv2.error:
        return ()
    return correlation, float(np.hypot(*warp[:, 2]))
