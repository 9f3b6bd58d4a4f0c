"""How far an output's background has moved: large editors shift and zoom what they were told to keep.

Images are uint8 H x W x 3 RGB, masks bool H x W.
"""

import math

import cv2
import numpy as np
from skimage.registration import phase_cross_correlation

SMALLEST_SHARE = 0.05  # of the picture that background must be
SMALLEST_SPREAD = 1.0  # gray levels: standard deviation of a background that has something to align
SMALLEST_CORRELATION = 0.8  # below it the background is another one; drawn anew by a small autoencoder it has 0.99
LARGEST_DISTANCE = 0.1  # of the longer side: what lies farther fits by chance
FILTER = 3  # px: Gaussian window before alignment
CRITERIA = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 1e-4)


def shift(output: np.ndarray, original: np.ndarray, hole: np.ndarray) -> float:
    """Mean distance in pixels by which the background, all outside ``hole``, stands elsewhere than in the original.

    Whole pixels by masked normalized phase correlation (Padfield 2012), then fractions, zoom and rotation as the affine
    map of the largest enhanced correlation coefficient (Evangelidis 2008), which ignores changes of brightness and
    contrast. NaN where the background is too small or too smooth to tell, or is another one.
    """
    background = cv2.erode((~hole).astype(np.uint8), np.ones((FILTER, FILTER), np.uint8)) > 0  # the filter sees no hole
    gray, reference = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) for image in (output, original))
    if background.mean() < SMALLEST_SHARE or min(x[background].std() for x in (gray, reference)) < SMALLEST_SPREAD:
        return math.nan
    if np.array_equal(gray[background], reference[background]):
        return 0.0
    masks = {"reference_mask": background, "moving_mask": background}
    dy, dx = phase_cross_correlation(reference, gray, **masks)[0]
    fits = [align(gray, reference, background, start) for start in ((0.0, 0.0), (-dx, -dy))]
    correlation, distance = max(fits)
    is_same = correlation >= SMALLEST_CORRELATION and distance <= LARGEST_DISTANCE * max(hole.shape)
    return distance if is_same else math.nan


def align(
    gray: np.ndarray, reference: np.ndarray, background: np.ndarray, start: tuple[float, float]
) -> tuple[float, float]:
    """(correlation, mean distance) of the affine map found from the shift ``start`` = (x, y); (0, 0) for none."""
    warp, valid = np.float32([[1, 0, start[0]], [0, 1, start[1]]]), background.astype(np.uint8)
    correlation = 0.0
    for kind in (cv2.MOTION_TRANSLATION, cv2.MOTION_AFFINE):
        try:
            correlation, warp = cv2.findTransformECC(reference, gray, warp, kind, CRITERIA, valid, FILTER)
        except cv2.error:  # it does not converge; a shift that was found counts
            break
    if not correlation:
        return 0.0, 0.0
    y, x = np.nonzero(background)
    moved = warp @ np.stack([x, y, np.ones_like(x)])
    return correlation, float(np.hypot(*(moved - np.stack([x, y]))).mean())
