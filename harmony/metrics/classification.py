"""How well probabilities of two classes tell them apart, and how far they can be believed."""

import numpy as np

BINS = 10  # of the calibration error


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error in [0, 1] of N probabilities of class 1: by how much its frequency misses them, over
    ten bins of equal width, weighted by how many fall into each (Guo 2017).
    """
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    missed = (abs(np.sum(labels[bins == b] - probabilities[bins == b])) for b in np.unique(bins))
    return float(sum(missed) / len(labels))


def judged(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``auc``, ``accuracy`` (at 0.5) and ``ece`` of N probabilities of class 1 against labels 0 and 1, float64."""
    from sklearn.metrics import roc_auc_score  # slow to load, and no other task wants it

    return {
        "auc": float(roc_auc_score(labels, probabilities)),
        "accuracy": float(np.mean((probabilities > 0.5) == labels)),
        "ece": calibration_error(probabilities, labels),
    }
