"""The attention forms by name, with their properties. Imports no torch.

The functions are in `similarity` (softmax forms) and `linear`, the modules in `modules`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias


@dataclass(frozen=True)
class AttentionForm:
    """Properties of one form of attention.

    Args:
        options: keyword arguments of its module.
        softmax: it ends in a softmax, so it takes a position bias and a mask. The other forms are
            linear in the number of tokens and take neither.
        fused: it runs in PyTorch's fused kernel (`scaled_dot_product_attention`).
        temperature: it learns a temperature for each head.
        pairwise: its scores need memory for [N, M, d], not [N, M].
        needs_grid: it convolves over the grid of tokens, so no token may be left out.
        output_gate: it gates its own output, so that no activation follows.
    """

    options: tuple[str, ...] = ()
    softmax: bool = True
    fused: bool = False
    temperature: bool = False
    pairwise: bool = False
    needs_grid: bool = False
    output_gate: bool = False


ATTENTION_FORMS = {
    "dot": AttentionForm(fused=True),
    "euclidean": AttentionForm(("plain",)),
    "sqeuclidean": AttentionForm(fused=True),
    "jaccard": AttentionForm(("plain",), temperature=True),
    "jaccard_minmax": AttentionForm(temperature=True, pairwise=True),
    "focused": AttentionForm(("power", "kernel"), softmax=False, needs_grid=True),
    "gated": AttentionForm(("tau", "rank", "two_way", "chunk"), softmax=False, output_gate=True),
}
if TYPE_CHECKING:
    FormName: TypeAlias = str
else:
    FormName = Literal[tuple(ATTENTION_FORMS)]
ATTENTION_OPTIONS = sorted({name for form in ATTENTION_FORMS.values() for name in form.options})


def get_form(name: str) -> AttentionForm:
    """The properties of a form.

    Raises:
        ValueError: if no form has this name.
    """
    if name not in ATTENTION_FORMS:
        raise ValueError(f"attention {name!r}: there are {', '.join(ATTENTION_FORMS)}")
    return ATTENTION_FORMS[name]
