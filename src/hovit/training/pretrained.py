"""Pretrained weights from another run, from timm's hub or from a file.

Reads only safetensors files and unpickles nothing.
"""

from pathlib import Path
from typing import Any

import timm

from ..config.runs import Run, Weights
from ..utils.errors import HovitError, one_line
from ..utils.files import file_digest
from .checkpoint import load_weights


def load_pretrained(model: Any, run: Run, root: Path, weights_file: Path | None) -> str:
    """Load pretrained weights except the classifier into a model (a Launcher: into its ResNet50).

    The image size must equal that of the pretraining where the shape of weights depends on it
    (position embeddings of ViT, attention biases of EfficientViT), because nothing is interpolated.

    Args:
        model: a model with timm's `get_classifier`, or a Launcher.
        run: names the source of the weights.
        root: top folder of the artifact, for weights of another run.
        weights_file: value of `--weights`: a file or a folder of files.

    Returns:
        sha256 of the weights file.

    Raises:
        HovitError: if there are no weights, or they belong to another model.
    """
    assert run.weights is not None
    path = _locate(run, run.weights, root, weights_file)
    part = getattr(model, "resnet", model)
    heads = _classifier_prefixes(part)
    expected = {k: v.shape for k, v in part.state_dict().items() if not k.startswith(heads)}
    # Older files also hold buffers that the model computes itself.
    computed = {k for k, _ in part.named_buffers()} - part.state_dict().keys()
    given = {
        k: v for k, v in load_weights(path).items() if not k.startswith(heads) and k not in computed
    }
    wrong = [k for k in expected if k not in given or given[k].shape != expected[k]]
    wrong += [k for k in given if k not in expected]
    if wrong:
        owner = run.model if part is model else f"{run.model}'s ResNet50"
        reason = "missing or of another shape" if wrong[0] in expected else "not part of it"
        raise HovitError(
            f"{path}: not the weights of {owner} at {run.image_size} px: {wrong[0]} is {reason} "
            f"({len(wrong)} tensors differ)"
        )
    part.load_state_dict(given, strict=False)
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
    return download_timm(str(weights.timm))


def _find_by_digest(given: Path, sha256: str) -> Path:
    """The file itself, or the file in a folder that has this sha256."""
    if not given.is_dir():
        return given
    for path in sorted(given.glob("*.safetensors")):
        if file_digest(path) == sha256:
            return path
    raise HovitError(f"{given}: no .safetensors in it with sha256 {sha256[:12]} any more")


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
            f"put them as {name.split('.')[0]}.safetensors into a folder and give that with "
            "--weights FOLDER (snakemake: --config weights=FOLDER)"
        ) from None
