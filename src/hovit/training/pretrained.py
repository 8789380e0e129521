"""What a pretrained part starts from: a run of this artifact, timm's weights, or a file.

Only safetensors are read; nothing is unpickled.
"""

from pathlib import Path
from typing import Any

import timm

from ..config.runs import Run, Weights
from ..utils.errors import HovitError, one_line
from ..utils.files import file_digest
from .checkpoint import load_weights


def load_pretrained(model: Any, run: Run, root: Path, weights_file: Path | None) -> str:
    """Load pretrained weights, all but the classifier, into the model (a Launcher: its ResNet50).

    Images must be as large as in the pretraining where the weights' shapes depend on it (a ViT's
    position embedding, EfficientViT's attention biases): nothing is interpolated.

    Args:
        model: any with timm's `get_classifier`, or a Launcher.
        run: says where from.
        root: top of the artifact, under which other runs' weights lie.
        weights_file: what `--weights` named, if it did: a file, or a folder of them.

    Returns:
        the sha256 of the file that they came from.

    Raises:
        HovitError: if there are none to be had, or they are not this model's.
    """
    assert run.weights is not None
    path = _locate(run, run.weights, root, weights_file)
    part = getattr(model, "resnet", model)
    heads = tuple(
        f"{name}."
        for name, module in [*part.named_modules(), ("fc", part)]
        if name == "fc" or module is part.get_classifier()
    )
    wanted = {k: v.shape for k, v in part.state_dict().items() if not k.startswith(heads)}
    made = {
        k for k, _ in part.named_buffers()
    } - part.state_dict().keys()  # the model's own indices
    given = {k: v for k, v in load_weights(path).items() if not k.startswith(heads)}
    given = {k: v for k, v in given.items() if k not in made}
    wrong = [k for k in wanted if k not in given or given[k].shape != wanted[k]]
    wrong += [k for k in given if k not in wanted]
    if wrong:
        whose = "" if part is model else "'s ResNet50"
        raise HovitError(
            f"{path}: not the weights of {run.model}{whose} at {run.image_size} px: {wrong[0]} "
            f"{'is missing or has another shape' if wrong[0] in wanted else 'is not of it'} "
            f"({len(wrong)} tensors differ)"
        )
    part.load_state_dict(given, strict=False)
    return file_digest(path)


def _locate(run: Run, weights: Weights, root: Path, weights_file: Path | None) -> Path:
    if weights.sha256:
        assert weights_file is not None
        return _of_digest(weights_file, weights.sha256)
    if weights.run:
        folder = root / "results/runs" / run.scale / weights.run / f"seed{weights.seed}"
        path = folder / "weights.safetensors"
        if not path.exists():
            raise HovitError(
                f"{path}: not there: run {weights.run} comes first "
                f"(`hovit train {weights.run} --scale {run.scale}`)"
            )
        return path
    return download_timm(str(weights.timm))


def _of_digest(given: Path, sha256: str) -> Path:
    """The file itself; of a folder, the one that the plan read."""
    if not given.is_dir():
        return given
    for path in sorted(given.glob("*.safetensors")):
        if file_digest(path) == sha256:
            return path
    raise HovitError(f"{given}: no .safetensors in it with sha256 {sha256[:12]} any more")


def download_timm(name: str) -> Path:
    """timm's weights of that model and tag, from the hub's cache or the hub.

    Raises:
        HovitError: if they are in neither.
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
