"""Settings of the tests by Hypothesis that read random or damaged files."""

import os

from hypothesis import HealthCheck, settings


def fuzz(cases: int) -> settings:
    """Settings for this number of cases; the environment variable HOVIT_FUZZ sets another."""
    return settings(
        max_examples=int(os.environ.get("HOVIT_FUZZ", cases)),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
