"""Passes in ONNX Runtime on a CPU, the last of the speeds that EfficientViT's paper tells of.

Paper: https://arxiv.org/abs/2305.07027 (Table 2). The exporter is PyTorch's; of ONNX Runtime's
settings only the threads are set, which are PyTorch's.
"""

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from ..utils.errors import HovitError, one_line
from .latency import timed

TOLERANCE = 1e-5  # of the outputs' norm: untrained outputs hardly vary with the image


def session(model: nn.Module, *inputs: Tensor) -> onnxruntime.InferenceSession:
    """A model in evaluation mode as an ONNX Runtime session, for inputs of these shapes.

    Raises:
        HovitError: if it cannot be exported.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    try:
        with torch.no_grad():
            program = torch.onnx.export(model.eval(), inputs, dynamo=True, verbose=False)
        assert program is not None
        graph = program.model_proto.SerializeToString()
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exporter, and ONNX Runtime, raise what they will
        what = f"{type(model).__name__} does not run in ONNX Runtime"
        raise HovitError(f"{what}: {one_line(error)}") from None


def run(made: onnxruntime.InferenceSession, *inputs: Tensor) -> Tensor:
    """A session's first output."""
    names = [value.name for value in made.get_inputs()]
    arrays = [np.ascontiguousarray(x.numpy()) for x in inputs]
    return torch.from_numpy(made.run(None, dict(zip(names, arrays, strict=True)))[0])


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Give what is initialised to zero (a residual branch's last norm) small random weights.

    At zero whole branches do nothing, and no comparison of outputs could tell if they were wrong.
    """
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and not tensor.any():
            tensor.normal_(std=0.02)


class OnnxPass:
    """Times passes in ONNX Runtime, of models whose outputs there are PyTorch's to 1e-5."""

    def __init__(self) -> None:
        self.sessions: dict[tuple[int, torch.Size], onnxruntime.InferenceSession] = {}

    def __call__(self, model: nn.Module, *inputs: Tensor) -> float:
        """Milliseconds of one pass; the first one of a model and shape exports it before.

        Raises:
            HovitError: if the model cannot be exported, or its outputs differ.
        """
        key = (id(model), inputs[0].shape)
        if key not in self.sessions:
            self.sessions[key] = self._checked(model, *inputs)
        made = self.sessions[key]
        return timed(lambda *xs: run(made, *xs), *inputs)

    def _checked(self, model: nn.Module, *inputs: Tensor) -> onnxruntime.InferenceSession:
        fill_zeros(model)
        made = session(model, *inputs)
        with torch.no_grad():
            expected = model(*inputs)
        error = (run(made, *inputs) - expected).norm()
        if not error <= TOLERANCE * expected.norm():
            share = float(error / expected.norm())
            raise HovitError(
                f"{type(model).__name__}: ONNX Runtime's outputs differ from PyTorch's by "
                f"{share:.2g} of their norm, more than {TOLERANCE}"
            )
        return made
