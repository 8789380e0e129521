"""Where one token looks: a row of the attention matrix, by form of attention.

Seed: the HoViT deck (seeds/000) compares similarities by loss and time; the maps are ours.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..attention.modules import Size, to_heads


def attention_maps(model: nn.Module, images: Tensor, block: int = 0) -> dict[str, Any]:
    """The attention of an image's middle token to all tokens, mean over heads.

    Args:
        model: one whose blocks call a form of `hovit.attention` that has `weights`.
        images: [B, 3, H, W], normalised; the first is looked at.
        block: which of those forms, from the input.

    Returns:
        `map`, rows of weights that add up to 1; `entropy`, in nats, of that distribution (the
        logarithm of the number of tokens if it is flat).

    Raises:
        ValueError: if the model has no such form.
    """
    forms = [m for m in model.modules() if hasattr(m, "weights") and hasattr(m, "heads")]
    if block >= len(forms):
        raise ValueError(f"no attention {block} with weights: there are {len(forms)}")
    seen: list[tuple[Tensor, Size]] = []

    def look(form: Any, args: tuple[Any, ...]) -> None:
        q, k, _, _, size, *rest = args
        heads = (to_heads(t[:1], form.heads) for t in (q, k))
        seen.append((form.weights(*heads, rest[0] if rest else None)[0], size))

    hook = forms[block].register_forward_pre_hook(look)
    try:
        with torch.inference_mode():
            model.eval()(images[:1])
    finally:
        hook.remove()
    weights, (height, width) = seen[0]  # [heads, N, N]
    row = weights.float().mean(0)[(height // 2) * width + width // 2]
    entropy = -(row * row.clamp(min=1e-12).log()).sum()
    values = [[round(float(x), 6) for x in line] for line in row.view(height, width)]
    return {"map": values, "entropy": round(float(entropy), 6)}
