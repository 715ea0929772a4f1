"""The audit of a large file: bounded memory per row, and told in advance how long it takes."""

from __future__ import annotations

import sys

import pytest
from makers import script


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured in Linux's unit")
def test_memory_grows_by_little_with_each_row() -> None:
    measure = script("audit_speed").measure
    small, large = measure(10_000), measure(50_000)
    per_row = (large["peak_mib"] - small["peak_mib"]) * 2**20 / 40_000
    # Two million rows at this rate stay below 1.5 GiB; most of it are the texts of the samples, which stop growing.
    assert small["peak_mib"] + per_row * 100_000 / 2**20 < 1536
    assert per_row < 4000


@pytest.mark.slow
def test_unbiased_labels_alarm_in_at_most_one_file_of_twenty() -> None:
    alarms = script("audit_false_alarms").rates(60, 50, 6, {}, start=1000)
    assert max(alarms.values()) <= 6  # 5% of 60 is 3; a rate of 2% exceeds 6 once in ten thousand
