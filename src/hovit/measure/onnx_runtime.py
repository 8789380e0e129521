"""Forward passes in ONNX Runtime on a CPU.

Paper: EfficientViT, https://arxiv.org/abs/2305.07027 (Table 2, ONNX speed). Models are exported by
PyTorch. ONNX Runtime gets the number of threads of PyTorch and otherwise its default settings.
"""

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from ..utils.errors import HovitError, one_line
from .latency import timed

TOLERANCE = 1e-5  # relative to the norm: outputs of an untrained model hardly vary with the image


def make_session(model: nn.Module, *inputs: Tensor) -> onnxruntime.InferenceSession:
    """Export a model in evaluation mode to an ONNX Runtime session, for inputs of these shapes.

    Raises:
        HovitError: if the model cannot be exported.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    try:
        with torch.no_grad():
            program = torch.onnx.export(model.eval(), inputs, dynamo=True, verbose=False)
        assert program is not None
        graph = program.model_proto.SerializeToString()
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exporter and ONNX Runtime raise errors of many types
        what = f"{type(model).__name__} does not run in ONNX Runtime"
        raise HovitError(f"{what}: {one_line(error)}") from None


def run_session(session: onnxruntime.InferenceSession, *inputs: Tensor) -> Tensor:
    """Run a session and return its first output."""
    names = [value.name for value in session.get_inputs()]
    arrays = [np.ascontiguousarray(x.numpy()) for x in inputs]
    return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Replace all-zero weights (such as the last norm of a residual branch) by small random values.

    With zero weights a branch contributes nothing, and comparing outputs would not test it.
    """
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and not tensor.any():
            tensor.normal_(std=0.02)


class OnnxPass:
    """Times passes in ONNX Runtime, after checking its outputs against PyTorch's to 1e-5."""

    def __init__(self) -> None:
        self.sessions: dict[tuple[int, torch.Size], onnxruntime.InferenceSession] = {}

    def __call__(self, model: nn.Module, *inputs: Tensor) -> float:
        """Milliseconds of one pass. The first call for a model and shape exports the model.

        Raises:
            HovitError: if the model cannot be exported or its outputs differ.
        """
        key = (id(model), inputs[0].shape)
        if key not in self.sessions:
            self.sessions[key] = self._export(model, *inputs)
        session = self.sessions[key]
        return timed(lambda *xs: run_session(session, *xs), *inputs)

    def _export(self, model: nn.Module, *inputs: Tensor) -> onnxruntime.InferenceSession:
        fill_zeros(model)
        session = make_session(model, *inputs)
        with torch.no_grad():
            expected = model(*inputs)
        error = (run_session(session, *inputs) - expected).norm()
        if not error <= TOLERANCE * expected.norm():
            share = float(error / expected.norm())
            raise HovitError(
                f"{type(model).__name__}: ONNX Runtime's outputs differ from PyTorch's by "
                f"{share:.2g} of their norm, more than {TOLERANCE}"
            )
        return session
