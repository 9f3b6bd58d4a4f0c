"""Metrics of two-class probabilities: how well they separate the classes, and how well they are calibrated."""

import numpy as np

BINS = 10  # number of bins of the calibration error


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error in [0, 1] of N probabilities of class 1 (Guo 2017, arXiv 1706.04599).

    The mean difference between probability and frequency of the class over ten bins of equal width, weighted by the
    number of samples in each bin.
    """
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = (abs(np.sum(labels[bins == b] - probabilities[bins == b])) for b in np.unique(bins))
    return float(sum(gaps) / len(labels))


def classification_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``auc``, ``accuracy`` (at 0.5) and ``ece`` of N probabilities of class 1 against labels 0 and 1, float64."""
    from sklearn.metrics import roc_auc_score  # imported here because it loads slowly

    return {
        "auc": float(roc_auc_score(labels, probabilities)),
        "accuracy": float(np.mean((probabilities > 0.5) == labels)),
        "ece": calibration_error(probabilities, labels),
    }
