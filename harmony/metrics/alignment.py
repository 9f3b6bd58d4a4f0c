"""How far an output's background has moved: large editors zoom and shift what they were told to keep.

Images are uint8 H x W x 3 RGB, masks bool H x W.
"""

import math

import cv2
import numpy as np
from skimage.registration import phase_cross_correlation

SMALLEST_SHARE = 0.05  # of the picture that background must be
SMALLEST_SPREAD = 1.0  # gray levels: standard deviation of a background that has something to align
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
    dy, dx = phase_cross_correlation(reference, gray, **masks)[0]
    warp = np.float32([[1, 0, -dx], [0, 1, -dy]])
    try:
        valid = background.astype(np.uint8)
        warp = cv2.findTransformECC(reference, gray, warp, cv2.MOTION_TRANSLATION, CRITERIA, valid, 3)[1]
    except cv2.error:  # nothing that correlates
        return math.nan
    return float(np.hypot(*warp[:, 2]))
