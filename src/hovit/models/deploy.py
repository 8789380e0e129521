"""Convert a model for inference: the same function in evaluation mode, without BatchNorm.

Paper: `LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference`
    - https://arxiv.org/abs/2104.01136
`EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027
Both fold BatchNorm before timing. The identity inside a kernel is from
`RepVGG: Making VGG-style ConvNets Great Again`
    - https://arxiv.org/abs/2101.03697
Upstream: the fusion formulas are PyTorch's (torch/nn/utils/fusion.py).

`deploy(model)` reads the graph of each module's `forward` (torch.fx):

1. conv -> BN and linear -> BN become one conv or linear, as does BN -> conv or linear;
2. x + conv(x) becomes one conv, with the identity in its kernel;
3. an activation becomes in-place if it alone reads the output of a conv or linear.

Only exact types with default arguments are changed, and only if no other module uses them. After
this the layers of EfficientViT are replaced by those of `efficientvit_deploy`.
"""

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_weights

from .efficientvit_deploy import DEPLOYED_PARTS, Parts

NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # in evaluation mode
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Hardtanh, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid,
)  # fmt: skip
CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # they have no forward of their own


@torch.no_grad()
def deploy(model: nn.Module, parts: bool = True) -> nn.Module:
    """Copy a model for inference: evaluation mode, no gradients, no BatchNorm.

    The copy is called like the model; outputs differ by rounding only. Its state dict differs from
    the model's, and the conversion cannot be undone: train the model and deploy a copy of it.

    A module whose `forward` torch.fx cannot trace is assumed to call its children and to use none
    of their parts.

    Args:
        model: any module; it is not changed. Without BatchNorm, only steps 2 and 3 apply.
        parts: also replace the layers of EfficientViT.

    Returns:
        the copy, on the device and in the dtype of the model, in channels-last order.

    Raises:
        ValueError: if a BatchNorm cannot be folded; the message names it. A BatchNorm is never
            left in silently, because the measured time would then be misleading. A folded
            BatchNorm1d raises it when called, for an input of another rank than [B, C] (or
            [B, N, C] in timm's LinearNorm).
    """
    for module in model.modules():  # timm's caches can hold tensors that cannot be copied
        getattr(module, "attention_bias_cache", {}).clear()
    net = copy.deepcopy(model).eval().requires_grad_(False)
    net = _Deployment(net, DEPLOYED_PARTS if parts else {}).run()
    net = net.to(memory_format=torch.channels_last)
    for linear in (m for m in net.modules() if isinstance(m, nn.Linear)):
        linear.weight = nn.Parameter(linear.weight.t().contiguous().t(), requires_grad=False)
    return net


class FixedRankLinear(nn.Linear):
    """A Linear with a folded BatchNorm1d. The fold is valid for inputs of one rank only.

    Args:
        linear: the layer to replace.
        rank: number of dimensions of the input.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.rank = rank
        self.weight, self.bias = linear.weight, linear.bias
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.rank:
            raise ValueError(
                f"BatchNorm1d was folded for inputs of rank {self.rank}, not {tuple(x.shape)}"
            )
        return F.linear(x, self.weight, self.bias)


class _ShallowTracer(fx.Tracer):
    """Traces the forward of one module; its children are single nodes."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module) -> fx.Graph:
    """Graph of a module's forward.

    Raises:
        ValueError: if there is none, or optional arguments could change it.
    """
    for parameter in inspect.signature(module.forward).parameters.values():
        plain = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if not plain or parameter.default is not parameter.empty:
            raise ValueError(f"it has the optional argument {parameter.name}")
    try:
        return _ShallowTracer().trace(module)
    except Exception as error:  # a forward can raise anything on symbolic inputs
        raise ValueError(str(error).strip().split("\n")[0]) from None


def _is_plain(module: nn.Module | None, types: tuple[type, ...]) -> bool:
    """Whether a module has exactly one of these types, without hooks or a patched forward."""
    if module is None or type(module) not in types or "forward" in vars(module):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def _attribute_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that a module holds in plain attributes, lists, tuples or dicts."""
    for name, value in vars(module).items():
        if name != "_modules":
            values = value.values() if isinstance(value, dict) else value
            candidates = values if isinstance(value, list | tuple | dict) else [value]
            yield from (m for m in candidates if isinstance(m, nn.Module))


def _called_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the children, including those in containers."""
    for name, child in module.named_children():
        if isinstance(child, CONTAINERS):
            yield from ((f"{name}.{n}", m) for n, m in _called_children(child))
        else:
            yield name, child


class _Deployment:
    """Converts a network in place, children before parents.

    Args:
        net: the network, in evaluation mode.
        parts: replacement functions by exact type, applied last.
    """

    def __init__(self, net: nn.Module, parts: Parts) -> None:
        self.net, self.parts = net, parts
        self.graphs: dict[str, fx.Graph | str] = {}  # by module name; a string says why not
        self.names: dict[nn.Module, str] = {m: name for name, m in net.named_modules()}
        self.results: dict[nn.Module, nn.Module] = {}
        references = Counter(
            child for m in net.modules() for child in (*m._modules.values(), *_attribute_modules(m))
        )
        # Modules with several users, or used other than by a call from their parent.
        self.shared: set[Any] = {m for m, count in references.items() if count > 1}
        self._trace_all()

    def run(self) -> nn.Module:
        return self.convert(self.net)

    def _trace_all(self) -> None:
        """Trace all modules of a copy, as a forward can store symbolic values in its module."""
        tensors = [*self.net.parameters(), *self.net.buffers()]
        traced = copy.deepcopy(self.net, {id(t): t for t in tensors})
        for name, module in traced.named_modules():
            if not module._modules:
                continue
            try:
                graph = self.graphs[name] = _trace(module)
            except ValueError as error:
                self.graphs[name] = str(error)
                continue
            owner = self.net.get_submodule(name)
            for node in graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    # The parents along the path, and the owner of a parameter, are used directly.
                    path = str(node.target).split(".")[:-1]
                    for i in range(len(path)):
                        self.shared.add(owner.get_submodule(".".join(path[: i + 1])))

    def convert(self, module: nn.Module) -> nn.Module:
        """Convert a module and everything in it; return it or its replacement."""
        if module in self.results:
            return self.results[module]
        for child_name, child in list(module._modules.items()):
            if child is not None:
                module._modules[child_name] = self.convert(child)
        name, result = self.names[module], module
        if isinstance(module, CONTAINERS):
            return module  # its parent calls what it holds
        graph = self.graphs.get(name, "it has no children")
        if module in self.shared:
            graph = "other modules use it or its parts"
        if isinstance(graph, fx.Graph):
            result = _Rewriter(module, graph, name, self.shared).rewrite()
        elif norms := [n for n, m in _called_children(module) if isinstance(m, _BatchNorm)]:
            raise ValueError(
                f"BatchNorm {name}.{norms[0]} cannot be folded: {type(module).__name__}'s forward "
                f"cannot be traced, or not changed: {graph}"
            )
        if type(result) in self.parts:
            result = self.parts[type(result)](result)
        if module in self.shared:
            self.shared.add(result)
        self.results[module] = result
        return result


class _Rewriter:
    """Rewrites one module by the graph of its forward.

    Args:
        module: its children are replaced; its forward stays as it is.
        graph: of the forward; it is used up.
        name: of the module in the network.
        shared: modules that must not change.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, name: str, shared: set[Any]) -> None:
        self.module, self.graph, self.name, self.shared = module, graph, name, shared
        self.calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def rewrite(self) -> nn.Module:
        """Rewrite the module; return it, or the only layer that is left of it."""
        self._remove_no_ops()
        for node in list(self.graph.nodes):
            if isinstance(self._module_of(node), _BatchNorm):
                self._fold(node)
        self._remove_no_ops()
        for name, child in _called_children(self.module):
            if isinstance(child, _BatchNorm):
                raise ValueError(f"BatchNorm {self._path(name)} cannot be folded: it is not called")
        for node in self.graph.nodes:
            if self._calls(node, ACTIVATIONS):
                source = node.args[0]
                if self._calls(source, (nn.Conv2d, nn.Linear, FixedRankLinear)):
                    act: Any = self._module_of(node)
                    act.inplace = act.inplace or set(source.users) == {node}
        return self._only_layer() or self.module

    def _module_of(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _path(self, target: Any) -> str:
        """Name of a child in the network."""
        return f"{self.name}.{target}".lstrip(".")

    def _calls(self, node: Any, types: tuple[type, ...]) -> bool:
        """Whether a node is the only call of a plain module of these types, with one argument."""
        if not isinstance(node, fx.Node) or not _is_plain(self._module_of(node), types):
            return False
        path = str(node.target).split(".")[:-1]
        parents = [self.module.get_submodule(".".join(path[: i + 1])) for i in range(len(path))]
        return (
            all(isinstance(parent, CONTAINERS) for parent in parents)
            and self.calls[node.target] == 1
            and self._module_of(node) not in self.shared
            and len(node.args) == 1
            and isinstance(node.args[0], fx.Node)
            and not node.kwargs
        )

    def _remove_no_ops(self) -> None:
        for node in list(self.graph.nodes):
            if _is_plain(self._module_of(node), NO_OPS) and len(node.args) == 1 and not node.kwargs:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    def _fold(self, node: fx.Node) -> None:
        """Fold the BatchNorm that a node calls into the layer before or after it.

        Raises:
            ValueError: if there is no such layer.
        """
        bn: Any = self._module_of(node)
        known = (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)
        folded = False
        if self._calls(node, known) and bn.running_mean is not None and not bn.training:
            folded = self._fold_into_previous(node, bn) or self._fold_into_next(node, bn)
        if not folded:
            raise ValueError(
                f"BatchNorm {self._path(node.target)} cannot be folded: there is no conv or "
                f"linear of its own before or after it in {type(self.module).__name__}"
            )
        rest: list[nn.Module] = []
        if isinstance(bn, BatchNormAct2d):
            rest = [m for m in (bn.drop, bn.act) if not _is_plain(m, NO_OPS)]
        replacement = nn.Identity() if not rest else rest[0] if len(rest) == 1 else None
        self.module.set_submodule(str(node.target), replacement or nn.Sequential(*rest))

    def _fold_into_previous(self, node: fx.Node, bn: Any) -> bool:
        """layer -> BN, or linear -> flatten(0, 1) -> BN -> reshape_as in timm's LinearNorm."""
        source: Any = node.args[0]
        users, rank, view = {node}, 2, None
        if source.op == "call_method" and (source.target, source.args[1:]) == ("flatten", (0, 1)):
            view, source = source, source.args[0]
            reshaped = next(iter(node.users)) if len(node.users) == 1 else node
            pair = (reshaped.op, reshaped.target, reshaped.args)
            if pair != ("call_method", "reshape_as", (node, source)) or set(view.users) != {node}:
                return False
            if view.kwargs or reshaped.kwargs:
                return False
            users, rank = {view, reshaped}, 3
        if set(source.users) != users:
            return False
        layer: Any = self._module_of(source)
        if isinstance(bn, nn.BatchNorm2d) and view is None and self._calls(source, (nn.Conv2d,)):
            if layer.out_channels != bn.num_features:
                return False
            new: nn.Module = fuse_conv_bn_eval(layer, bn)
        elif type(bn) is nn.BatchNorm1d and self._is_linear(source, layer, rank):
            if layer.out_features != bn.num_features:
                return False
            new = FixedRankLinear(_fuse_linear(layer, bn), rank)
        else:
            return False
        self.module.set_submodule(str(source.target), new)
        if view is not None:  # the reshapes stay in the forward; the graph skips them
            reshaped.replace_all_uses_with(source)
            node.replace_all_uses_with(source)
            for used in (reshaped, node, view):
                self.graph.erase_node(used)
        return True

    def _fold_into_next(self, node: fx.Node, bn: Any) -> bool:
        """BN -> linear, or BN -> conv without padding, which would not see the shift of the BN."""
        if len(node.users) != 1:
            return False
        reader = next(iter(node.users))
        layer: Any = self._module_of(reader)
        if type(bn) is nn.BatchNorm2d and self._calls(reader, (nn.Conv2d,)):
            if (layer.padding, layer.groups, layer.in_channels) != ((0, 0), 1, bn.num_features):
                return False
            new = _fuse_into_next(bn, layer)
        elif type(bn) is nn.BatchNorm1d and self._is_linear(reader, layer, 2):
            if layer.in_features != bn.num_features:
                return False
            new = FixedRankLinear(_fuse_into_next(bn, layer), 2)
        else:
            return False
        self.module.set_submodule(str(reader.target), new)
        return True

    def _is_linear(self, node: fx.Node, layer: Any, rank: int) -> bool:
        if not self._calls(node, (nn.Linear, FixedRankLinear)):
            return False
        return type(layer) is nn.Linear or layer.rank == rank

    def _only_layer(self) -> nn.Module | None:
        """The layer y of a module that computes y(x), or x + y(x) if a kernel can hold the x."""
        nodes = list(self.graph.nodes)
        if len(nodes) not in (3, 4) or [nodes[0].op, nodes[-1].op] != ["placeholder", "output"]:
            return None
        x, y, out = nodes[0], nodes[1], nodes[-1]
        plain = _is_plain(self.module, (type(self.module),)) and self.module not in self.shared
        # A parent can read other attributes of the module: keep it then.
        attributes = vars(self.module).keys() - vars(nn.Module()).keys()
        layers = (nn.Conv2d, nn.Linear, FixedRankLinear)
        if not plain or attributes or y.args != (x,) or not self._calls(y, layers):
            return None
        layer: Any = self._module_of(y)
        if len(nodes) == 3:
            return layer if out.args == (y,) else None
        total = nodes[2]
        is_sum = total.target in (operator.add, torch.add) and total.args in ((x, y), (y, x))
        if not is_sum or total.kwargs or out.args != (total,) or type(layer) is not nn.Conv2d:
            return None
        return _with_identity(layer)


def _fuse_linear(linear: Any, bn: Any) -> nn.Linear:
    """bn(linear(x)) for x of rank 2 as one Linear."""
    new = copy.deepcopy(linear)
    new.weight, new.bias = fuse_linear_bn_weights(
        linear.weight, linear.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    return new


def _fuse_into_next(bn: Any, layer: Any) -> Any:
    """layer(bn(x)) as one layer: weight W diag(s) and bias b + W t, where bn(x) = s x + t."""
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
    """x + conv(x) as one conv, or None if the output differs in shape from the input."""
    middle = tuple(k // 2 for k in conv.kernel_size)
    same = conv.stride == conv.dilation == (1, 1) and conv.padding == middle
    odd = all(k % 2 for k in conv.kernel_size)
    if not (same and odd and conv.in_channels == conv.out_channels):
        return None
    new = copy.deepcopy(conv)
    channel = torch.arange(conv.out_channels)
    new.weight[channel, channel % new.weight.shape[1], middle[0], middle[1]] += 1
    return new
