"""What of the libraries' talk reaches the user."""

import logging
import warnings


def quiet_libraries() -> None:
    """Leave out what a user cannot act on: Lightning's devices and tips, a deprecation in it, a folder that resumes."""
    for package in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{package}.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (".*LeafSpec.*is deprecated", "Checkpoint directory .* exists and is not empty"):
        warnings.filterwarnings("ignore", message)
