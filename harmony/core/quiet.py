"""What of the libraries' talk reaches the user."""

import logging
import warnings


def quiet_libraries() -> None:
    """Leave out what a user cannot act on.

    Lightning's devices and tips, a deprecation in it, a folder that resumes, and each request to a model hub.
    """
    rank_zero = [f"lightning.{package}.utilities.rank_zero" for package in ("pytorch", "fabric")]
    for name in (*rank_zero, "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*LeafSpec.*is deprecated", "Checkpoint directory .* exists and is not empty"):
        warnings.filterwarnings("ignore", message)
