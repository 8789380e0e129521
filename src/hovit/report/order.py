"""Order of papers and studies in lists: by paper, then by place in the paper's text."""

from collections.abc import Iterable

from ..config.schema import Study

NAMES = {
    "hovit": "HoViT",
    "skipvit": "SkipViT",
    "efficientvit": "EfficientViT",
    "ours": "added here",
}
PAPERS = {
    "hovit": "HoViT (slides)",
    "skipvit": "SkipViT (poster)",
    "efficientvit": "EfficientViT (paper)",
    "ours": "Added here",
}
# A study that is not named here follows the other studies of its paper.
STORY = {
    "hovit": (
        "hovit", "launcher", "launcher_imagenet", "pretraining", "scratch", "conv_stage",
        "checkerboard", "depth", "conv_shrink", "dropout", "hovit_cifar100", "levit_attention",
        "attention_models", "swin_similarity", "swin_flatten", "attention_speed",
        "attention_gradients", "attention_length", "backbones", "datasets",
    ),
    "skipvit": ("skipvit", "skipvit_warmup"),
    "efficientvit": (
        "efficientvit_imagenet", "efficientvit_family", "efficientvit_onnx",
        "efficientvit_ablation", "efficientvit_downstream", "efficientvit_pretraining",
        "efficientvit_detection", "mhsa_share", "efficientvit_speed", "efficientvit_steps",
        "efficientvit_allocator",
    ),
}  # fmt: skip


def source_text(paper: str, place: str) -> str:
    """Return where a table, an analysis or a sentence is from: `HoViT, 05 Conclusion`."""
    return f"{NAMES[paper]}: {place}" if paper == "ours" else f"{NAMES[paper]}, {place}"


def paper_of(study: Study) -> str:
    """The paper to which a study belongs; a study added here belongs to the paper it extends."""
    named = [paper for paper, studies in STORY.items() if study.id in studies]
    return named[0] if named else study.source.paper


def in_order(studies: Iterable[Study]) -> list[Study]:
    """Sort studies by paper, then by their order in `STORY`."""

    def place(study: Study) -> tuple[int, int]:
        paper = paper_of(study)
        story = STORY.get(paper, ())
        at = story.index(study.id) if study.id in story else len(story)
        return list(PAPERS).index(paper), at

    return sorted(studies, key=place)
