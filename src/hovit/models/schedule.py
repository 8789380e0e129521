"""Drop schedules of SkipViT: where tokens are dropped and where they return. Imports no torch.

Paper: `SkipViT: Speeding Up Vision Transformers with a Token-Level Skip Connection`
    - https://arxiv.org/abs/2401.15293
Source: the SkipViT poster, Table 1, column "Dropping": `6(45%)+11`,
`4,7(30%,30%)+10`, `6(45%)+fused token`.
Upstream: none is published.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

_RATIO = r"\d{1,3}(?:\.\d{1,4})?\s*%"
NOTATION = re.compile(
    rf"\s*(?P<layers>\d+(?:\s*,\s*\d+)*)\s*"
    rf"\(\s*(?P<ratios>{_RATIO}(?:\s*,\s*{_RATIO})*)\s*\)\s*"
    r"\+\s*(?P<end>\d+|fused(?:\s+token)?)\s*",
    re.ASCII,
)


@dataclass(frozen=True)
class Schedule:
    """`4,7(30%,30%)+10`: drop 30 % in layer 4 and 30 % of the rest in layer 7, return in layer 10.

    Layers count from 1, as on the poster ("the 6th transformer layer").

    Args:
        layers: layers that drop tokens, ascending; empty for a plain ViT.
        ratios: for each of them, the dropped fraction of the active patch tokens.
        back: layer before which the tokens return; None if they are fused instead.
    """

    layers: tuple[int, ...] = ()
    ratios: tuple[Fraction, ...] = ()
    back: int | None = None

    @classmethod
    def parse(cls, text: str, depth: int) -> "Schedule":
        """Parse a schedule for a network of `depth` layers; `''` drops nothing.

        Accepts both `+fused` and `+fused token` as on the poster. A ratio of 0 % drops nothing.

        Raises:
            ValueError: for another notation, or a schedule that does not fit the depth.
        """
        if not isinstance(text, str):
            raise ValueError(f"schedule {text!r}: write a string, as in '6(45%)+11'")
        if not text.strip():
            return cls()
        match = NOTATION.fullmatch(text)
        if match is None:
            raise ValueError(
                f"schedule {text!r}: write LAYERS(RATIOS)+LAYER or +fused, "
                "as in '6(45%)+11', '4,7(30%,30%)+10' or '6(45%)+fused'"
            )
        schedule = cls(
            layers=tuple(map(int, match["layers"].split(","))),
            ratios=tuple(Fraction(r.strip(" \t%")) / 100 for r in match["ratios"].split(",")),
            back=None if match["end"].startswith("fused") else int(match["end"]),
        )
        if problem := schedule._problem(depth):
            raise ValueError(f"schedule {text!r}: {problem}")
        return schedule

    def _problem(self, depth: int) -> str:
        """Reason why the schedule does not fit this depth, or ''."""
        layers, back = self.layers, self.back
        if len(layers) != len(self.ratios):
            return f"{len(layers)} layers but {len(self.ratios)} ratios; give one for each"
        if list(layers) != sorted(set(layers)):
            return "name the layers that drop once each, in ascending order"
        for layer in (*layers, *([] if back is None else [back])):
            if not 1 <= layer <= depth:
                return f"layer {layer} is out of range; layers count from 1 to {depth}"
        if back is not None and back <= layers[-1]:
            return f"layer {back} returns what layer {layers[-1]} drops; return in a later layer"
        for ratio in self.ratios:
            if ratio >= 1:
                return f"dropping {percent(ratio)} leaves no token; drop less than 100%"
        return ""

    @property
    def fused(self) -> bool:
        """Whether the dropped tokens are fused into one token instead of returning."""
        return bool(self.layers) and self.back is None

    def kept(self, patches: int) -> tuple[int, ...]:
        """Number of active patch tokens after each layer that drops, out of `patches`."""
        counts = []
        for ratio in self.ratios:
            patches = keep_count(patches, ratio)
            counts.append(patches)
        return tuple(counts)

    def __str__(self) -> str:
        """The poster's notation without spaces; `parse` accepts it."""
        if not self.layers:
            return ""
        layers, ratios = ",".join(map(str, self.layers)), ",".join(map(percent, self.ratios))
        return f"{layers}({ratios})+{'fused' if self.back is None else self.back}"


def percent(ratio: Fraction) -> str:
    """Fraction(9, 20) -> '45%'."""
    return f"{float(100 * ratio):.10g}%"


def keep_count(patches: int, ratio: Fraction) -> int:
    """ceil((1 - ratio) * patches), exactly: 108 of 196 at 45 %. At least 1 for a ratio below 1."""
    return -((ratio.numerator - ratio.denominator) * patches // ratio.denominator)
