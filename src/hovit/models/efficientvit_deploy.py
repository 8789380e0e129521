"""The layers of EfficientViT in their deploy form: the same function in fewer, larger operations.

Paper: `EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027
Upstream: none; this form is our addition.

Maps are in channels-last order, so that their tokens, [B, H, W, C], are a view and a 1 x 1
convolution is a Linear on them. Each layer is built from one with its BatchNorm already folded.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .efficientvit_layers import (
    FFN,
    CascadedGroupAttention,
    InvertedResidual,
    Residual,
    WindowAttention,
)

Parts = Mapping[type, Callable[[Any], nn.Module]]


def _are_folded(*modules: nn.Module) -> bool:
    return all(type(m) is nn.Conv2d for m in modules)


def _in_place(act: Any) -> Any:
    """A copy of an activation that overwrites its input."""
    act = copy.deepcopy(act)
    act.inplace = True
    return act


def _linear(conv: Any) -> nn.Linear:
    """Convert a 1 x 1 convolution to a Linear on tokens."""
    linear = nn.Linear(conv.in_channels, conv.out_channels, bias=conv.bias is not None)
    linear.weight, linear.bias = nn.Parameter(conv.weight.flatten(1), False), conv.bias
    return linear.requires_grad_(False)


class TokenFFN(nn.Module):
    """FFN(x), or x + FFN(x) with `residual`."""

    residual = False

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.pw1, self.pw2 = _linear(ffn.pw1), _linear(ffn.pw2)
        self.act = _in_place(ffn.act)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        tokens = x.permute(0, 2, 3, 1)
        y = self.pw2(self.act(self.pw1(tokens)))
        return (y.add_(tokens) if self.residual else y).permute(0, 3, 1, 2)


class TokenInvertedResidual(nn.Module):
    """The inverted residual, with all 1 x 1 convolutions as Linears on tokens."""

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        se: Any = block.se
        self.conv1, self.conv2, self.conv3 = _linear(block.conv1), block.conv2, _linear(block.conv3)
        self.fc1, self.fc2 = _linear(se.fc1), _linear(se.fc2)
        self.act = _in_place(block.act)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H / 2, W / 2]
        x = self.act(self.conv1(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = self.act(self.conv2(x)).permute(0, 2, 3, 1)  # [B, H / 2, W / 2, 4 C]
        gate = self.fc2(self.act(self.fc1(x.mean(dim=(1, 2), keepdim=True)))).sigmoid_()
        return self.conv3(x.mul_(gate)).permute(0, 3, 1, 2)


class _Head(nn.Module):
    """Constants of one head: projection to Q, K, V, convolution on Q, and bias of the scores.

    On a window of N tokens the convolution on Q is an N x N matrix for each channel. N is at most
    49 in the paper's models, where one batched product is faster than a convolution.
    """

    weight: Tensor
    bias: Tensor
    q_matrix: Tensor
    q_bias: Tensor
    scores: Tensor

    def __init__(self, attn: CascadedGroupAttention, j: int) -> None:
        super().__init__()
        qkv: Any = attn.qkvs[j]
        dw: Any = attn.dws[j]
        window, n = attn.window, attn.window**2
        one_hot = torch.eye(n, device=qkv.weight.device, dtype=qkv.weight.dtype)
        one_hot = one_hot.view(n, 1, window, window).expand(-1, attn.qk_dim, -1, -1)
        q_matrix = F.conv2d(one_hot, dw.weight, None, padding=dw.padding, groups=dw.groups)
        for name, value in {
            "weight": qkv.weight.flatten(1),  # [2 qk + v, c]
            "bias": qkv.bias,
            "q_matrix": q_matrix.flatten(2).transpose(0, 1) * attn.scale,  # [qk, N from, N to]
            "q_bias": dw.bias.view(-1, 1, 1) * attn.scale,
            "scores": attn.bias()[j],  # [N, N]
        }.items():
            self.register_buffer(name, value.detach().contiguous())


class TokenAttention(nn.Module):
    """Attention over windows of x, plus x with `residual`; heads run sequentially."""

    residual = False

    def __init__(self, old: WindowAttention) -> None:
        super().__init__()
        attn = old.attn
        self.window = attn.window
        self.dims = (attn.qk_dim, attn.qk_dim, attn.v_dim)
        self.heads: Any = nn.ModuleList(_Head(attn, j) for j in range(attn.heads))
        self.act = _in_place(attn.proj[0])
        self.proj = _linear(attn.proj[1])

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        w, tokens = self.window, x.permute(0, 2, 3, 1)
        b, height, width, c = tokens.shape
        if (height, width) == (w, w):
            y = self.proj(self.act(self.attend(tokens.reshape(-1, c)))).view(b, w, w, c)
        else:
            below, right = -height % w, -width % w
            y = F.pad(tokens, (0, 0, 0, right, 0, below)) if below or right else tokens
            y = y.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3)
            shape = y.shape  # [B, nH, nW, w, w, C]
            y = self.proj(self.act(self.attend(y.reshape(-1, c)))).view(shape)
            y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]
        return (y.add_(tokens) if self.residual else y).permute(0, 3, 1, 2)

    def attend(self, tokens: Tensor) -> Tensor:  # [windows N, C] -> [windows N, H v]
        n = self.window**2
        outs: list[Tensor] = []
        splits = tokens.chunk(len(self.heads), dim=1)
        for head, split in zip(self.heads, splits, strict=True):
            feat = split + outs[-1].view(split.shape) if outs else split
            qkv = F.linear(feat, head.weight, head.bias).view(-1, n, sum(self.dims))
            q, k, v = qkv.split(self.dims, dim=2)  # [windows, N, d]
            q = q.permute(2, 0, 1).contiguous()  # otherwise bmm runs channel by channel
            # Not baddbmm: Inductor (torch 2.15, CPU) compiles two chained baddbmm to NaN.
            q = torch.bmm(q, head.q_matrix).add_(head.q_bias)  # [qk, windows, N]
            scores = torch.baddbmm(head.scores, q.permute(1, 2, 0), k.transpose(1, 2))
            outs.append(torch.bmm(scores.softmax(dim=-1), v))
        return torch.cat(outs, dim=2).flatten(0, 1)


def _ffn(ffn: FFN) -> nn.Module:
    return TokenFFN(ffn) if _are_folded(ffn.pw1, ffn.pw2) else ffn


def _inverted(block: InvertedResidual) -> nn.Module:
    folded = _are_folded(block.conv1, block.conv2, block.conv3)
    return TokenInvertedResidual(block) if folded else block


def _attention(old: WindowAttention) -> nn.Module:
    attn = old.attn
    if not _are_folded(*attn.qkvs, *attn.dws, attn.proj[1]):
        return old
    as_published = attn.cascade and attn.heads * attn.v_dim == attn.proj[1].out_channels
    return TokenAttention(old) if as_published else old


def _residual(block: Residual) -> nn.Module:
    if not isinstance(block.m, TokenFFN | TokenAttention):
        return block
    part: Any = block.m
    part.residual = True
    return block.m


DEPLOYED_PARTS: Parts = {
    FFN: _ffn,
    InvertedResidual: _inverted,
    WindowAttention: _attention,
    Residual: _residual,
}
