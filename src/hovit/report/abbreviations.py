"""Abbreviations in labels and claims, spelled out under the table that has them."""

import re
from collections.abc import Iterable

MEANINGS = {
    "BN": "BatchNorm",
    "CGA": "cascaded group attention",
    "FFN": "feed-forward network",
    "FLA": "focused linear attention",
    "GLA": "gated linear attention",
    "LN": "LayerNorm",
    "MHSA": "multi-head self-attention",
    "SDPA": "PyTorch's `scaled_dot_product_attention`",
}


def spelled_out(texts: Iterable[str]) -> str:
    """The abbreviations in these texts with their meanings: `FLA: ...; GLA: ...`; "" for none."""
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    return "; ".join(f"{short}: {long}" for short, long in MEANINGS.items() if short in words)
