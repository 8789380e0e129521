"""Settings and strategies of the Hypothesis tests that read random or damaged files."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def fuzz(cases: int) -> settings:
    """Settings for this number of cases; the environment variable HOVIT_FUZZ sets another."""
    return settings(
        max_examples=int(os.environ.get("HOVIT_FUZZ", cases)),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


where = st.floats(0, 1, exclude_max=True)
near_the_start = st.floats(0, 1, exclude_max=True).map(lambda x: x**4)
change = st.tuples(
    st.sampled_from(["flip", "flip", "overwrite", "insert", "delete", "cut"]),
    where | near_the_start,
    st.binary(min_size=1, max_size=8),
)
damages = st.lists(change, min_size=1, max_size=3) | st.binary(max_size=200)


def damaged(data: bytes, damage: "list[tuple[str, float, bytes]] | bytes") -> bytes:
    """The bytes of a file after some changes, or other bytes."""
    if isinstance(damage, bytes):
        return damage
    for kind, place, some in damage:
        at = int(place * len(data))
        if kind == "flip":
            flipped = bytes([data[at] ^ 1 << some[0] % 8]) if data else b""
            data = data[:at] + flipped + data[at + 1 :]
        else:
            skip = {"overwrite": len(some), "insert": 0, "delete": some[0], "cut": len(data)}[kind]
            data = (
                data[:at] + (some if kind in ("overwrite", "insert") else b"") + data[at + skip :]
            )
    return data
