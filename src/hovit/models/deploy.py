"""A model's deploy form: the same function in evaluation mode, every BatchNorm folded away.

`deploy(model)` looks at what a module's `forward` does (torch.fx), not at which model it is:

1. conv -> BN and linear -> BN become one conv or linear, and so does BN -> linear (in heads);
2. x + conv(x) becomes one conv, with the identity in its kernel;
3. an activation that alone reads what a conv or linear made works in place.

Then EfficientViT's parts become those below, which do the same in fewer and larger operations. BN
is folded before timing in the papers of LeViT (arXiv 2104.01136) and EfficientViT (2305.07027); the
identity in a kernel is RepVGG's (2101.03697); the rest is ours.
"""

import copy
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .efficientvit import FFN, CascadedGroupAttention, InvertedResidual, Residual, WindowAttention

Parts = Mapping[type, Callable[[Any], nn.Module]]
NOTHING = (nn.Identity, nn.Dropout)  # what they do in evaluation mode


@torch.no_grad()
def deploy(model: nn.Module, parts: bool = True) -> nn.Module:
    """A copy for inference: evaluation mode, no gradients, no BatchNorm.

    It is called as the model is, and its output differs by rounding. Its state dict is not the
    model's, and there is no way back: train the model, and deploy a copy of it.

    Args:
        model: any module; left as it is. Without BatchNorm, only 2 and 3 are done.
        parts: also build EfficientViT's parts anew, as below.

    Returns:
        the copy, on the model's device and in its precision. The weights of its convolutions are
        in channels-last order, and so is what they make of an image in any order.

    Raises:
        ValueError: for a BatchNorm that cannot be folded, by its name. None is left in silently: a
            time would be taken for what it is not.
    """
    for module in model.modules():  # timm's attention: tensors that may have a history, hence
        getattr(module, "attention_bias_cache", {}).clear()  # cannot be copied
    net = copy.deepcopy(model).eval().requires_grad_(False)
    parents = Counter(child for module in net.modules() for child in module.children())
    shared = {module for module, n in parents.items() if n > 1}
    made = INFERENCE if parts else {}
    net = _simplified(net, "", shared, made, {}).to(memory_format=torch.channels_last)
    for linear in (m for m in net.modules() if isinstance(m, nn.Linear)):
        linear.weight = nn.Parameter(linear.weight.t().contiguous().t(), requires_grad=False)
    return net


# Any model ---------------------------------------------------------------------------------------


class _Shallow(fx.Tracer):
    """Looks into no module but the one that it is given."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _simplified(
    module: nn.Module,
    name: str,
    shared: set[nn.Module],
    parts: Parts,
    done: dict[nn.Module, nn.Module],
) -> nn.Module:
    """The module with its parts simplified, or what takes its place; parts come first."""
    if module in done:
        return done[module]
    for child_name, child in list(module.named_children()):
        child_path = f"{name}.{child_name}".lstrip(".")
        module.set_submodule(child_name, _simplified(child, child_path, shared, parts, done))
    children = list(module.children())
    norms = [n for n, m in module.named_children() if isinstance(m, _BatchNorm)]
    acts = any(getattr(m, "inplace", None) is False for m in children)
    result = module
    if norms or acts or [type(m) for m in children] == [nn.Conv2d]:
        try:
            graph = _Shallow().trace(module)
        except Exception as error:  # whatever a forward makes of a symbol
            if norms:
                why = str(error).strip().split("\n")[0]
                what = f"{type(module).__name__}'s forward cannot be traced: {why}"
                raise ValueError(f"BatchNorm {name}.{norms[0]} cannot be folded: {what}") from None
        else:
            result = _Rewriter(module, graph, name, shared).rewritten()
    done[module] = parts.get(type(result), lambda m: m)(result)
    return done[module]


class _Rewriter:
    """Simplifies one module by the graph of its forward, in which its children are nodes."""

    def __init__(
        self, module: nn.Module, graph: fx.Graph, name: str, shared: set[nn.Module]
    ) -> None:
        self.module, self.graph, self.name, self.shared = module, graph, name, shared
        self.calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def rewritten(self) -> nn.Module:
        """The module, or the only layer that is left of it."""
        self.drop_nothing()
        self.fold_norms()
        for node in self.graph.nodes:
            act: Any = self.called(node)
            if getattr(act, "inplace", None) is False and self.is_layer(node.all_input_nodes[0]):
                act.inplace = (
                    len(node.all_input_nodes[0].users) == 1 and self.calls[node.target] == 1
                )
        return self.only_layer() or self.module

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def is_layer(self, node: fx.Node) -> bool:
        return isinstance(self.called(node), nn.Conv2d | nn.Linear)

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def drop_nothing(self) -> None:
        """Take out Identity and Dropout, and reshapes around a BN of tokens.

        timm's LinearNorm is reshape_as(bn(flatten(y, 0, 1)), y): a BN over the last dimension.
        """
        for node in list(self.graph.nodes):
            if isinstance(self.called(node), NOTHING):
                self.replace(node, node.all_input_nodes[0])
            elif node.op == "call_method" and node.target == "reshape_as":
                bn, like = node.args
                flat = bn.args[0] if isinstance(self.called(bn), nn.BatchNorm1d) else None
                wanted = ("flatten", (like, 0, 1))
                if flat is not None and (flat.target, flat.args) == wanted:
                    self.replace(node, bn)
                    self.replace(flat, like)

    def fold_norms(self) -> None:
        for node in list(self.graph.nodes):
            bn: Any = self.called(node)
            if not isinstance(bn, _BatchNorm):
                continue
            before, readers = node.all_input_nodes[0], list(node.users)
            single = self.calls[node.target] == 1 and bn.running_mean is not None
            if single and self.fits(before, bn) and len(before.users) == 1:
                layer: Any = self.called(before)
                fuse: Any = (
                    fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
                )
                self.module.set_submodule(str(before.target), fuse(layer, bn))
            elif single and len(readers) == 1 and self.fits(readers[0], bn, reads=True):
                layer = self.called(readers[0])
                self.module.set_submodule(str(readers[0].target), _fuse_bn_into_next(bn, layer))
            else:
                raise ValueError(
                    f"BatchNorm {self.name}.{node.target} cannot be folded: there is no conv or "
                    f"linear of its own before or after it in {type(self.module).__name__}"
                )
            rest = (
                nn.Sequential(bn.drop, bn.act) if isinstance(bn, BatchNormAct2d) else nn.Identity()
            )
            self.module.set_submodule(str(node.target), rest)
        self.drop_nothing()

    def fits(self, node: fx.Node, bn: nn.Module, reads: bool = False) -> bool:
        """Whether a node is a layer into which a BN before (`reads`) or after it can be folded."""
        layer = self.called(node)
        if layer in self.shared or self.calls[node.target] != 1:
            return False
        if isinstance(layer, nn.Linear):
            return isinstance(bn, nn.BatchNorm1d)
        if not isinstance(layer, nn.Conv2d) or not isinstance(bn, nn.BatchNorm2d):
            return False
        whole = layer.padding == (0, 0) and layer.groups == 1 and not isinstance(bn, BatchNormAct2d)
        return whole or not reads

    def only_layer(self) -> nn.Module | None:
        """The layer y of a module that is y(x), or x + y(x) with a kernel that can hold x."""
        nodes = list(self.graph.nodes)
        layers = [node for node in nodes if self.is_layer(node)]
        if len(layers) != 1 or nodes[0].op != "placeholder":
            return None
        x, y, out = nodes[0], layers[0], nodes[-1]
        layer = self.called(y)
        if layer in self.shared or y.args != (x,):
            return None
        if nodes == [x, y, out]:
            return layer
        added = len(nodes) == 4 and nodes[2].target in (operator.add, torch.add)
        if added and set(nodes[2].args) == {x, y} and isinstance(layer, nn.Conv2d):
            return _with_identity(layer)
        return None


def _fuse_bn_into_next(bn: Any, layer: Any) -> nn.Module:
    """layer(bn(x)) as one layer: of weight W diag(s) and bias b + W t, where bn(x) = s x + t."""
    scale = torch.rsqrt(bn.running_var + bn.eps)
    scale = scale if bn.weight is None else scale * bn.weight
    shift = -bn.running_mean * scale if bn.bias is None else bn.bias - bn.running_mean * scale
    shape = (1, -1) + (1,) * (layer.weight.dim() - 2)  # over input channels
    bias = (layer.weight * shift.view(shape)).flatten(1).sum(1)
    new = copy.deepcopy(layer)
    new.weight.mul_(scale.view(shape))
    new.bias = nn.Parameter(bias if layer.bias is None else bias + layer.bias, requires_grad=False)
    return new


def _with_identity(conv: nn.Conv2d) -> nn.Conv2d | None:
    """x + conv(x) as one conv, if its output is as large as its input."""
    middle = tuple(k // 2 for k in conv.kernel_size)
    same = conv.stride == conv.dilation == (1, 1) and conv.padding == middle
    odd = all(k % 2 for k in conv.kernel_size)
    if not (same and odd and conv.in_channels == conv.out_channels):
        return None
    new = copy.deepcopy(conv)
    channel = torch.arange(conv.out_channels)
    new.weight[channel, channel % new.weight.shape[1], middle[0], middle[1]] += 1
    return new


# EfficientViT ------------------------------------------------------------------------------------
# Maps are in channels-last order, so that their tokens, [B, H, W, C], are a view: a 1 x 1 conv is
# a Linear on them. Each part is built from one whose BN is folded already.


def _are_layers(*modules: nn.Module) -> bool:
    return all(isinstance(m, nn.Conv2d) for m in modules)


def _linear(conv: Any) -> nn.Linear:
    """A 1 x 1 convolution as a Linear on tokens."""
    linear = nn.Linear(conv.in_channels, conv.out_channels, bias=conv.bias is not None)
    linear.weight, linear.bias = nn.Parameter(conv.weight.flatten(1), False), conv.bias
    return linear.requires_grad_(False)


class TokenFFN(nn.Module):
    """[x +] FFN(x)."""

    residual = False

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.pw1, self.pw2 = _linear(ffn.pw1), _linear(ffn.pw2)
        self.act: Any = ffn.act
        self.act.inplace = True

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        tokens = x.permute(0, 2, 3, 1)
        y = self.pw2(self.act(self.pw1(tokens)))
        return (y.add_(tokens) if self.residual else y).permute(0, 3, 1, 2)


class TokenInvertedResidual(nn.Module):
    """The inverted residual with its 1 x 1 convolutions, squeeze-excite's too, on tokens."""

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        se: Any = block.se
        self.conv1, self.conv2, self.conv3 = _linear(block.conv1), block.conv2, _linear(block.conv3)
        self.fc1, self.fc2 = _linear(se.fc1), _linear(se.fc2)
        self.act: Any = block.act
        self.act.inplace = True

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H / 2, W / 2]
        x = self.act(self.conv1(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = self.act(self.conv2(x)).permute(0, 2, 3, 1)  # [B, H / 2, W / 2, 4 C]
        gate = self.fc2(self.act(self.fc1(x.mean(dim=(1, 2), keepdim=True)))).sigmoid_()
        return self.conv3(x.mul_(gate)).permute(0, 3, 1, 2)


class _Head(nn.Module):
    """One head's constants: of Q, K, V; of the convolution on Q; and what its scores have added.

    On a window of N tokens the convolution on Q is a matrix N x N for each channel. N is 49 at
    most in the paper's models, and one batched product is quicker than a convolution.
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
        at = torch.eye(n, device=qkv.weight.device, dtype=qkv.weight.dtype)  # one token each
        at = at.view(n, 1, window, window).expand(-1, attn.qk_dim, -1, -1)
        q_matrix = F.conv2d(at, dw.weight, None, padding=dw.padding, groups=dw.groups)
        for name, value in {
            "weight": qkv.weight.flatten(1),  # [2 qk + v, c]
            "bias": qkv.bias,
            "q_matrix": q_matrix.flatten(2).transpose(0, 1) * attn.scale,  # [qk, N from, N to]
            "q_bias": dw.bias.view(-1, 1, 1) * attn.scale,
            "scores": attn.bias()[j],  # [N, N]
        }.items():
            self.register_buffer(name, value.detach().contiguous())


class TokenAttention(nn.Module):
    """[x +] attention over windows of x; in a window, heads one after the other."""

    residual = False

    def __init__(self, old: WindowAttention) -> None:
        super().__init__()
        attn = old.attn
        self.window = attn.window
        self.dims = (attn.qk_dim, attn.qk_dim, attn.v_dim)
        self.heads: Any = nn.ModuleList(_Head(attn, j) for j in range(attn.heads))
        act: Any = attn.proj[0]
        act.inplace = True
        self.act = act
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
        shares = tokens.chunk(len(self.heads), dim=1)
        for head, share in zip(self.heads, shares, strict=True):
            feat = share + outs[-1].view(share.shape) if outs else share
            qkv = F.linear(feat, head.weight, head.bias).view(-1, n, sum(self.dims))
            q, k, v = qkv.split(self.dims, dim=2)  # [windows, N, d]
            q = q.permute(2, 0, 1).contiguous()  # without it, bmm goes channel by channel
            # Not baddbmm: with the next one, Inductor (torch 2.15, CPU) compiles the pair to NaN.
            q = torch.bmm(q, head.q_matrix).add_(head.q_bias)  # [qk, windows, N]
            scores = torch.baddbmm(head.scores, q.permute(1, 2, 0), k.transpose(1, 2))
            outs.append(torch.bmm(scores.softmax(dim=-1), v))
        return torch.cat(outs, dim=2).flatten(0, 1)


def _ffn(ffn: FFN) -> nn.Module:
    return TokenFFN(ffn) if _are_layers(ffn.pw1, ffn.pw2) else ffn


def _inverted(block: InvertedResidual) -> nn.Module:
    folded = _are_layers(block.conv1, block.conv2, block.conv3)
    return TokenInvertedResidual(block) if folded else block


def _attention(old: WindowAttention) -> nn.Module:
    attn = old.attn
    if not _are_layers(*attn.qkvs, *attn.dws, attn.proj[1]):
        return old
    as_published = attn.cascade and attn.heads * attn.v_dim == attn.proj[1].out_channels
    return TokenAttention(old) if as_published else old


def _residual(block: Residual) -> nn.Module:
    if not isinstance(block.m, TokenFFN | TokenAttention):
        return block
    part: Any = block.m
    part.residual = True
    return block.m


INFERENCE: Parts = {
    FFN: _ffn,
    InvertedResidual: _inverted,
    WindowAttention: _attention,
    Residual: _residual,
}
