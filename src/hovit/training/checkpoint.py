"""Checkpoints and weights as safetensors files, which execute no code when they are read.

A file holds the tensors of model and optimizer. Everything else is JSON in the header, together
with the sha256 of all contents, because safetensors itself does not detect a changed tensor byte.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ..utils.errors import HovitError, one_line
from ..utils.files import atomic, digest


@dataclass
class State:
    """Progress of a run: what it needs to resume, apart from model and optimizer.

    Args:
        made_by: hashes of spec and code, fingerprint of the images, hash of the pretrained weights.
            A run resumes only from a state with equal values.
        epoch: finished epochs, validation included.
        step: finished batches of the current epoch.
        losses: training loss of each of these batches.
        history: one dict per finished epoch.
        seconds: time spent so far, over all interruptions.
        interruptions: number of times the run was resumed.
    """

    made_by: list[str]
    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    interruptions: int = 0

    @property
    def best(self) -> dict[str, float] | None:
        """History entry with the highest validation accuracy; the earliest one on a tie."""
        return max(self.history, key=lambda epoch: epoch["val_top1"], default=None)


def save_weights(path: Path, model: nn.Module, **metadata: Any) -> None:
    """Save parameters and buffers of a model, atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    _save(path, tensors, metadata)


def load_weights(path: Path, spec_hash: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Args:
        path: the file.
        spec_hash: of the run that the weights must come from, if the file names its run.

    Raises:
        HovitError: if the file is missing, truncated, changed, in another format, or from a run
            with another spec.
    """
    tensors, header = _load(path)
    if spec_hash and header.get("spec_hash", spec_hash) != spec_hash:
        raise HovitError(f"{path}: from a run with other settings than config has; train it again")
    return tensors


def _save(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    with_checksum = json.dumps(header | {"sha256": _checksum(tensors, header)})
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary, {"hovit": with_checksum})
    except SafetensorError as error:  # safetensors wraps OSError
        raise HovitError(f"{path}: cannot be written: {one_line(error)}") from None


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header. The header is empty if another program wrote the file."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            header = json.loads((file.metadata() or {}).get("hovit", "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        reason = one_line(error)
        raise HovitError(f"{path}: not a readable safetensors file ({reason})") from None
    if not isinstance(header, dict):
        raise HovitError(f"{path}: not a readable safetensors file (its header is not an object)")
    checksum = header.pop("sha256", None)
    if checksum is None:
        return tensors, {}
    if checksum != _checksum(tensors, header):
        raise HovitError(f"{path}: sha256 does not match the contents: the file was changed")
    return tensors, header


def _checksum(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """sha256 in hex over tensors and header."""
    total = hashlib.sha256(digest(header).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(digest([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_state(
    path: Path,
    state: State,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: Any = None,
    averaged: nn.Module | None = None,
) -> None:
    """Save model, optimizer, progress and averaged weights of a run, atomically."""
    tensors = _tensors("model.", model)
    if averaged:
        tensors |= _tensors("averaged.", averaged)
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if value is not None:
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value).cpu().contiguous()
    header = asdict(state) | {"scaler": scaler.state_dict() if scaler else None}
    _save(path, tensors, header)


def _tensors(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model on the CPU, with a prefix before each name."""
    state = model.state_dict().items()
    return {f"{prefix}{name}": t.detach().cpu().contiguous() for name, t in state}


def load_state(
    path: Path,
    made_by: list[str],
    model: nn.Module,
    optimizer: Optimizer,
    scaler: Any = None,
    averaged: nn.Module | None = None,
) -> State:
    """Restore model, optimizer and averaged weights, and return the progress of the run.

    Returns a new `State` if there is no file, or if spec, code, images or pretrained weights differ
    from `made_by`.

    Raises:
        HovitError: if the file is unreadable or was changed.
    """
    if not path.exists():
        return State(made_by)
    tensors, header = _load(path)
    try:
        scaling = header.pop("scaler")
        state = State(**header)
    except (KeyError, TypeError):
        raise HovitError(f"{path}: not a checkpoint of a run; delete it to start over") from None
    if state.made_by != made_by:
        return State(made_by)
    for prefix, module in (("model.", model), ("averaged.", averaged)):
        found = {k: v for k, v in tensors.items() if k.startswith(prefix)}
        if module is not None:
            module.load_state_dict({k.removeprefix(prefix): v for k, v in found.items()})
    saved: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            saved.setdefault(int(index), {})[key] = tensor.clone()  # not mapped from the file
    optimizer.load_state_dict(optimizer.state_dict() | {"state": saved})
    if scaler and scaling:
        scaler.load_state_dict(scaling)
    state.interruptions += 1
    return state
