"""The one line of progress."""

import re

from harmony.core.progress import MINUTE, Progress


def test_progress_says_how_much_at_what_rate_and_when_it_ends():
    """Guards the line: every step of 4, the end though it is no full step, and nothing between."""
    said = []
    progress = Progress("studio", 10, "scenes", said.append)
    for _ in range(10):
        progress.advance(1, every=4)
    assert [re.match(r"studio: (\d+)/10 scenes, [\d.]+ a second, \d+ s left", line)[1] for line in said] == [
        "4",
        "8",
        "10",
    ]
    assert said[-1].endswith(", 0 s left")


def test_progress_of_large_steps_is_said_each_time():
    """Guards counts larger than ``every``, and the words before the numbers."""
    said = []
    progress = Progress("latents train", 600, "items", said.append, per=MINUTE, decimals=0)
    for n in (1, 2):
        progress.advance(300, f"shard {n}/2", every=250)
    assert said[0].startswith("latents train: shard 1/2, 300/600 items, ") and " a minute, " in said[0]
    assert len(said) == 2
