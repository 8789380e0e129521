"""EfficientViT M0-M5, with a switch for every row of the paper's ablation.

Paper: `EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027 (Table 1: the family; Table 6 and Fig. 7: the ablation)
Upstream: https://github.com/microsoft/Cream/tree/main/EfficientViT

With the default switches, the state dict has the names and shapes of timm's `efficientvit_m0` ...
`efficientvit_m5`. `hovit.models.deploy` converts a model to the form that is timed.
"""

from dataclasses import fields
from typing import Any, Literal

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resize_rel_pos_bias_table_levit, to_2tuple
from timm.models import (
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .build import build_model
from .efficientvit_layers import (
    Block,
    CascadedGroupAttention,
    Head,
    PatchEmbed,
    Stage,
    Subsample,
    Switches,
    check_stages,
    is_positive,
)

PATCH = 16  # pixels per side of a token of the first stage


class EfficientViT(nn.Module):
    """Patch embedding, three stages, mean over the map, norm and Linear.

    Args:
        img_size: height and width in pixels. The shorter side sets the window size of stages whose
            map is smaller than `window_size`. Images of other sizes are split into such windows.
        in_chans: channels of the image.
        num_classes: outputs; with 0 the model returns pooled features.
        embed_dim, depth, num_heads: C, L, H of each stage (Table 1).
        window_size: maximum height and width of an attention window.
        kernels: kernel size of the depthwise convolution on Q for each head; same in all stages.
        drop_rate: dropout before the classifier.
        global_pool: `'avg'`, or `''` to return the map.
        device, dtype: of parameters and buffers.
        switches: fields of `Switches`.

    Raises:
        ValueError: for an argument that does not fit; it names the argument.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: tuple[int, ...] = (64, 128, 192),
        depth: tuple[int, ...] = (1, 2, 3),
        num_heads: tuple[int, ...] = (4, 4, 4),
        window_size: int = 7,
        kernels: tuple[int, ...] = (5, 5, 5, 5),
        drop_rate: float = 0.0,
        global_pool: Literal["", "avg"] = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **switches: Any,
    ) -> None:
        super().__init__()
        if unknown := set(switches) - {field.name for field in fields(Switches)}:
            raise ValueError(f"EfficientViT has no switch {', '.join(sorted(unknown))}")
        self.switches = Switches(**switches)
        check_stages(embed_dim, depth, num_heads)
        if not is_positive(window_size):
            raise ValueError(f"window_size={window_size!r}: a whole number above 0")
        resolution = min(to_2tuple(img_size)) // PATCH
        if resolution < 1:
            raise ValueError(f"img_size={img_size}: {PATCH} x {PATCH} pixels at least")
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.global_pool: str = global_pool
        self.grad_checkpointing = False
        self.num_features = self.head_hidden_size = embed_dim[-1]
        self.patch_embed = PatchEmbed(in_chans, embed_dim[0], self.switches)
        self.stages = nn.Sequential()
        self.feature_info = []
        for i, (dim, blocks, heads) in enumerate(zip(embed_dim, depth, num_heads, strict=True)):
            down: nn.Module = nn.Identity()
            if i:
                down = Subsample(embed_dim[i - 1], dim, self.switches)
                resolution = (resolution + 1) // 2
            args = (dim, heads, min(window_size, resolution), kernels, self.switches)
            attns = [CascadedGroupAttention(*args) for _ in range(blocks)]
            self.stages.append(Stage(down, [Block(dim, attn, self.switches) for attn in attns]))
            info = {"num_chs": dim, "reduction": PATCH * 2**i, "module": f"stages.{i}"}
            self.feature_info.append(info)
        self.reset_classifier(num_classes, global_pool)
        self.to(device=device, dtype=dtype)

    def load_resized(self, state_dict: dict[str, Tensor]) -> None:
        """Load weights of the same model for another image size."""
        self.load_state_dict(resize_biases(state_dict, self))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: the attention biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group the parameters by depth, as in timm's EfficientViT."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.\w+\.(\d+)", None),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each stage in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The Linear of the head."""
        return self.head.linear if isinstance(self.head, Head) else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; with `num_classes=0` remove it.

        Raises:
            ValueError: for a pooling other than `'avg'` or `''`, or classes without pooling.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", "") or (num_classes and not pool):
            raise ValueError(f"global_pool={pool!r}: 'avg', or '' (none) with num_classes=0")
        self.global_pool = pool
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            head = Head(self.num_features, num_classes, self.switches.norm, self.drop_rate)
            # The device and dtype of the model.
            self.head = head.to(next(self.patch_embed.parameters())).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen stages, as in timm.

        Args:
            x: [B, 3, H, W].
            indices: the last n stages if an int, these stages if a list, all if None.
            norm: not used, as no stage is followed by a norm.
            stop_early: skip the stages after the last chosen one.
            output_fmt: `'NCHW'`.
            intermediates_only: return only the list.

        Returns:
            the map of the last stage, and a list of maps [B, C, H, W].
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        wanted, last = feature_take_indices(len(self.stages), indices)
        features = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = self._run(stage, x)
            if i in wanted:
                features.append(x)
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one of `indices`, and the head; as in timm."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        pruned = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return wanted

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(stage, x) if self.grad_checkpointing else stage(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C3, H / 64, W / 64], rounded up at each stride."""
        x = self.patch_embed(x)
        for stage in self.stages:
            x = self._run(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, C3, h, w] -> [B, classes]."""
        if self.global_pool:
            x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def resize_biases(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Interpolate the attention biases of weights for another image size to the model's windows."""
    wanted = model.state_dict()
    resized = dict(state_dict)
    for name, biases in state_dict.items():  # [heads, window^2]
        if name.endswith("attention_biases") and biases.shape != wanted[name].shape:
            size = (wanted[name].shape[1], wanted[name].shape[0])
            resized[name] = resize_rel_pos_bias_table_levit(biases.T, size).T.contiguous()
    return resized


def _cfg(timm_name: str) -> dict[str, Any]:
    """timm's configuration of the same model, with the authors' weights."""
    return {
        "hf_hub_id": timm.get_pretrained_cfg_value(timm_name, "hf_hub_id"),
        "license": "mit",
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": (4, 4),
        "num_classes": 1000,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "first_conv": "patch_embed.conv1.conv",
        "classifier": "head.linear",
    }


default_cfgs = generate_default_cfgs(
    {f"efficientvit_paper_m{i}": _cfg(f"efficientvit_m{i}") for i in range(6)}
)

# Table 1; the kernel sizes are in the upstream code only.
K5555, K7533 = (5, 5, 5, 5), (7, 5, 3, 3)
MODEL_ARGS: dict[str, dict[str, Any]] = {
    "efficientvit_paper_m0": {
        "embed_dim": (64, 128, 192), "depth": (1, 2, 3), "num_heads": (4, 4, 4), "kernels": K5555,
    },
    "efficientvit_paper_m1": {
        "embed_dim": (128, 144, 192), "depth": (1, 2, 3), "num_heads": (2, 3, 3), "kernels": K7533,
    },
    "efficientvit_paper_m2": {
        "embed_dim": (128, 192, 224), "depth": (1, 2, 3), "num_heads": (4, 3, 2), "kernels": K7533,
    },
    "efficientvit_paper_m3": {
        "embed_dim": (128, 240, 320), "depth": (1, 2, 3), "num_heads": (4, 3, 4), "kernels": K5555,
    },
    "efficientvit_paper_m4": {
        "embed_dim": (128, 256, 384), "depth": (1, 2, 3), "num_heads": (4, 4, 4), "kernels": K7533,
    },
    "efficientvit_paper_m5": {
        "embed_dim": (192, 288, 384), "depth": (1, 3, 4), "num_heads": (3, 3, 4), "kernels": K7533,
    },
}  # fmt: skip


def _efficientvit(variant: str, pretrained: bool, **kwargs: Any) -> EfficientViT:
    return build_model(
        EfficientViT,
        variant,
        pretrained,
        pretrained_filter_fn=resize_biases,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2)},
        **MODEL_ARGS[variant] | kwargs,
    )


@register_model
def efficientvit_paper_m0(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """2.3 M parameters, 79 M multiply-adds as published."""
    return _efficientvit("efficientvit_paper_m0", pretrained, **kwargs)


@register_model
def efficientvit_paper_m1(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """3.0 M parameters, 167 M multiply-adds as published."""
    return _efficientvit("efficientvit_paper_m1", pretrained, **kwargs)


@register_model
def efficientvit_paper_m2(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """4.2 M parameters, 201 M multiply-adds as published."""
    return _efficientvit("efficientvit_paper_m2", pretrained, **kwargs)


@register_model
def efficientvit_paper_m3(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """6.9 M parameters, 263 M multiply-adds as published."""
    return _efficientvit("efficientvit_paper_m3", pretrained, **kwargs)


@register_model
def efficientvit_paper_m4(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """8.8 M parameters, 299 M multiply-adds as published."""
    return _efficientvit("efficientvit_paper_m4", pretrained, **kwargs)


@register_model
def efficientvit_paper_m5(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """12.4 M parameters, 522 M multiply-adds as published."""
    return _efficientvit("efficientvit_paper_m5", pretrained, **kwargs)
