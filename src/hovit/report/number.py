"""Format numbers for readers."""

import math
import re


def significant(number: float, digits: int = 3) -> str:
    """Format a number with `digits` significant digits: `0.0184`, `20.4`, `131,000`."""
    if not number or not math.isfinite(number):
        return f"{number:g}"
    places = digits - 1 - math.floor(math.log10(abs(number)))
    rounded = round(number, places)  # may carry: 9.996 becomes 10.0
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(places, 0)}f}"


def minus(text: str) -> str:
    """Text with minus signs in place of the hyphens before negative numbers."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)
