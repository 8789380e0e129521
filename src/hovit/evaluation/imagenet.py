"""A study's models with given weights on ImageNet's validation images.

timm's own validation: each model sees images as its weights want them (size, crop, interpolation,
mean and deviation: `timm.data.resolve_data_config`), in fp32. A row that is timed in a deploy form
is evaluated in it. Weights are timm's (for EfficientViT the authors'), from a folder of
MODEL.safetensors or from the hub.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from ..catalogue import Row, Study
from ..device import describe_device, peak_memory_mb
from ..errors import HovitError, one_line
from ..factory import create_model
from ..files import digest, file_digest, read_sealed, write_sealed
from ..models.deployed import FORMS
from ..plan import Plan
from ..records import Record, make_provenance, write_record
from ..sources import code_hash
from ..training.checkpoint import load_weights
from ..training.weights import download_timm

BATCH = 64


def evaluate_study(
    plan: Plan,
    study: Study,
    folder: Path,
    weights: Path | None,
    device: torch.device,
    root: Path = Path(),
    log: Callable[[str], None] = lambda _: None,
) -> Record:
    """Evaluate the rows of a study whose weights can be had, and write the record.

    A killed call goes on after the last row that was finished.

    Args:
        plan: the catalogue at a scale.
        study: one that is not trained and tells `top1`.
        folder: ImageNet, or its validation images: `val/n01440764/*.JPEG`. A part of them (fewer
            classes, fewer images) is evaluated too, and the record says what it is.
        weights: a folder of MODEL.safetensors; None: timm's hub.
        device: where.
        root: top of the artifact.
        log: told of each row.

    Raises:
        HovitError: if the study has no such rows, the images are not ImageNet's, there are no
            weights of any row, or a download fails.
    """
    begin = time.monotonic()
    spec = plan.evaluation_spec(study)
    if not spec["rows"]:
        raise HovitError(
            f"{study.id}: nothing of it is evaluated: only what is not trained and tells `top1`"
        )
    images = find_images(folder)
    code = code_hash("evaluation")
    fingerprint = _fingerprint(images)
    begun = {"spec_hash": digest(spec), "code": code, "images": fingerprint}
    place = root / plan.evaluated(study)
    partial = place.with_suffix(".partial.json")
    rows = _resume(partial, begun)
    for row in study.rows:
        if row.id not in spec["rows"]:
            continue
        path = find_weights(base_model(row)[0], weights)
        if path is None:
            log(f"{row.id}: left out: no weights of {base_model(row)[0]} in {weights or 'timm'}")
            rows.pop(row.id, None)
            continue
        sha256 = file_digest(path)
        if rows.get(row.id, {}).get("weights_sha256") != sha256:
            model, config = load_model(row, path)
            rows[row.id] = evaluate(model, images, config, device) | {"weights_sha256": sha256}
            write_sealed(partial, begun | {"rows": rows})
        log(f"{row.id}: top-1 {rows[row.id]['top1']:.2f} %")
    if not rows:
        raise HovitError(f"{weights or 'timm'}: no weights of any row of {study.id}; a folder has "
                         "them as MODEL.safetensors")  # fmt: skip
    record = Record(
        kind="evaluation",
        id=study.id,
        scale=plan.scale.id,
        spec=spec,
        spec_hash=digest(spec),
        results={"rows": rows},
        provenance=make_provenance(
            describe_device(device),
            time.monotonic() - begin,
            peak_memory_mb(device),
            code,
            fingerprint,
        ),
    )
    write_record(place, record)
    partial.unlink(missing_ok=True)
    return record


def find_images(folder: Path) -> ImageFolder:
    """ImageNet's validation images, classes numbered as weights have them.

    Raises:
        HovitError: if there are none, or a folder is not named by a class of ImageNet-1k.
    """
    inside = [folder / name for name in ("val", "validation") if (folder / name).is_dir()]
    root = (*inside, folder)[0]
    number = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
    try:
        images = ImageFolder(str(root))
    except OSError as error:
        raise HovitError(
            f"{folder}: no ImageNet in it (val/n01440764/*.JPEG): {one_line(error)}"
        ) from None
    if unknown := [name for name in images.classes if name not in number]:
        raise HovitError(
            f"{root}: {unknown[0]} is no class of ImageNet-1k; its folders are n01440764 and so on"
        )
    images.samples = [(path, number[images.classes[i]]) for path, i in images.samples]
    return images


def _fingerprint(images: ImageFolder) -> dict[str, Any]:
    root = Path(images.root)
    files = [(str(Path(p).relative_to(root)), Path(p).stat().st_size) for p, _ in images.samples]
    return {"images": len(files), "classes": len(images.classes), "sha256": digest(sorted(files))}


def _resume(partial: Path, begun: dict[str, Any]) -> dict[str, Any]:
    saved = read_sealed(partial) if partial.exists() else {}
    rows = saved.get("rows", {})
    return rows if all(saved.get(key) == value for key, value in begun.items()) else {}


def find_weights(name: str, folder: Path | None) -> Path | None:
    """A model's weights, or None if there are none.

    Args:
        name: the model.
        folder: where NAME.safetensors is looked for, by ours and by timm's name of the model; if
            None, timm's own are taken from the hub's cache or the hub.

    Raises:
        HovitError: if the download fails.
    """
    hub = timm.get_pretrained_cfg_value(name, "hf_hub_id")
    if folder is None:
        return download_timm(name) if hub else None
    names = [name, *([hub.rpartition("/")[2].partition(".")[0]] if hub else [])]
    return next((p for n in names if (p := folder / f"{n}.safetensors").exists()), None)


def base_model(row: Row) -> tuple[str, dict[str, Any]]:
    """What a row is a form of, or else its own model, and that model's arguments."""
    args = dict(row.model_args)
    name = str(args.pop("of", row.model))
    return name, {key: value for key, value in args.items() if key not in ("by", "channels_last")}


def load_model(row: Row, path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A row's model with these weights, in evaluation mode, and how it wants its images.

    Raises:
        HovitError: if the weights are not the model's.
    """
    name, args = base_model(row)
    _, size, _ = timm.get_pretrained_cfg_value(name, "input_size") or (3, 224, 224)
    model = create_model(name, 1000, size, **args)
    made = {key for key, _ in model.named_buffers()} - model.state_dict().keys()
    given = {key: value for key, value in load_weights(path).items() if key not in made}
    try:
        model.load_state_dict(given)
    except RuntimeError as error:
        raise HovitError(f"{path}: not the weights of {name}: {one_line(error)}") from None
    config = resolve_data_config(model=model)
    form = row.model_args.get("by", "hovit") if row.model == "deployed" else "nothing"
    return FORMS[str(form)](model.eval()), config


def evaluate(
    model: nn.Module, images: ImageFolder, config: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy in percent, and mean cross-entropy (nats).

    Args:
        model: [B, 3, H, W] -> [B, 1000], in evaluation mode.
        images: as `find_images` gives them.
        config: as timm's `resolve_data_config` gives it.
        device: where.

    Raises:
        HovitError: for an image that cannot be read.
    """
    images.transform = create_transform(**config, is_training=False)
    workers = (os.cpu_count() or 1) if len(images) > BATCH else 0
    loader = DataLoader(images, BATCH, num_workers=workers)
    hits, losses = [], []
    model.to(device)
    try:
        with torch.inference_mode():
            for x, y in loader:
                out, y = model(x.to(device)).float(), y.to(device)
                hits.append((out.topk(5).indices == y[:, None]).cpu())
                losses.append(nn.functional.cross_entropy(out, y, reduction="none").cpu())
    except (OSError, ValueError) as error:
        raise HovitError(f"{images.root}: an image cannot be read: {one_line(error)}") from None
    hit = torch.cat(hits).numpy()
    seen = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    return {
        "top1": float(100 * hit[:, 0].mean()),
        "top5": float(100 * hit.any(1).mean()),
        "loss": float(torch.cat(losses).double().mean()),
        "images": len(hit),
        "seen_as": {
            k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if k in seen
        },
    }
