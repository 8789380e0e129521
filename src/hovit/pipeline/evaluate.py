"""A study's models with given weights on ImageNet's validation images.

timm's own validation: each model sees images as its weights want them (size and crop of the test,
interpolation, mean and deviation: `timm.data.resolve_data_config`), in fp32. A row that is timed in
a deploy form is evaluated in it. Weights are timm's (for EfficientViT the authors'): those of the
row's tag, or timm's default; from a folder of MODEL.safetensors or from the hub.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from ..config.schema import Row
from ..config.tasks import EvaluateTask
from ..models.deployed import DEPLOY_FUNCTIONS
from ..records.record import Record, write_record
from ..training.checkpoint import load_weights
from ..training.pretrained import download_timm
from ..utils.create_model import create_model
from ..utils.device import describe_device, peak_memory_mb
from ..utils.errors import HovitError, one_line
from ..utils.files import digest, file_digest, read_sealed, write_sealed

BATCH = 64


def evaluate_study(
    task: EvaluateTask,
    folder: Path,
    weights: Path | None,
    device: torch.device,
    root: Path = Path(),
    log: Callable[[str], None] = lambda _: None,
) -> Record:
    """Evaluate the rows of a study whose weights are available, and write the record.

    A killed call resumes after the last finished row.

    Args:
        task: which study.
        folder: ImageNet, or its validation images: `val/n01440764/*.JPEG`. A part of them (fewer
            classes, fewer images) is accepted; the record states it.
        weights: a folder of MODEL.safetensors; None: timm's hub.
        device: where.
        root: top folder of the artifact.
        log: called with one line for each row.

    Raises:
        HovitError: if the images are not ImageNet's, weights do not fit their model, or a download
            fails.
    """
    begin = time.monotonic()
    if weights and not weights.is_dir():
        raise HovitError(f"{weights}: a folder of MODEL.safetensors is wanted")
    torch.set_num_threads(task.scale.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    images = find_images(folder)
    fingerprint = _fingerprint(images)
    begun = {"spec_hash": task.spec_hash, "code": task.code, "images": fingerprint}
    partial = root / task.path.with_suffix(".partial.json")
    before, rows = _resume(partial, begun), {}
    for row in (task.study.row(name) for name in task.spec["rows"]):
        path = find_weights(tagged(row), weights)
        if path is None:
            log(f"{row.id}: left out: no weights of {tagged(row)} in {weights or 'timm'}")
            continue
        given = {"weights": tagged(row), "file": path.name, "weights_sha256": file_digest(path)}
        rows[row.id] = before.get(row.id, {})
        if not given.items() <= rows[row.id].items():
            model, config = load_model(row, path)
            rows[row.id] = evaluate(model, images, config, device, task.scale.threads) | given
            write_sealed(partial, begun | {"rows": before | rows})
        log(f"{row.id}: top-1 {rows[row.id]['top1']:.2f} %")
    if not rows:
        log(f"no weights of any row in {weights or 'timm'}: nothing is evaluated")
    seconds = time.monotonic() - begin
    record = task.make_record(
        {"rows": rows}, describe_device(device), seconds, peak_memory_mb(device), fingerprint
    )
    write_record(root / task.path, record)
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
        images = ImageFolder(str(root), loader=read_image)
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
    try:
        files = [
            (str(Path(p).relative_to(root)), Path(p).stat().st_size) for p, _ in images.samples
        ]
    except OSError as error:
        raise HovitError(f"{root}: an image cannot be read: {one_line(error)}") from None
    return {"images": len(files), "classes": len(images.classes), "sha256": digest(sorted(files))}


def _resume(partial: Path, begun: dict[str, Any]) -> dict[str, Any]:
    saved = read_sealed(partial) if partial.exists() else {}
    rows = saved.get("rows", {})
    return rows if all(saved.get(key) == value for key, value in begun.items()) else {}


def tagged(row: Row) -> str:
    """A row's model, with the tag of its weights if the row names one."""
    name, _ = base_model(row)
    return f"{name}.{row.tag}" if row.tag else name


def find_weights(name: str, folder: Path | None) -> Path | None:
    """A model's weights, or None if there are none.

    Args:
        name: the model, with or without a tag.
        folder: where NAME.safetensors is looked for, with the tag and without, by ours and by
            timm's name of the model; if None, timm's own are taken from the hub's cache or the hub.

    Raises:
        HovitError: if the download fails.
    """
    hub = timm.get_pretrained_cfg_value(name, "hf_hub_id") or ""
    if folder is None:
        return download_timm(name) if hub else None
    timms = hub.rpartition("/")[2]
    names = [name, name.partition(".")[0], timms, timms.partition(".")[0]]
    files = [folder / f"{each}.safetensors" for each in names if each]
    return next((path for path in files if path.exists()), None)


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
    described = timm.get_pretrained_cfg(tagged(row))
    assert described is not None
    config = resolve_data_config(pretrained_cfg=described.to_dict(), use_test_size=True)
    model = create_model(name, 1000, config["input_size"][1], **args)
    made = {key for key, _ in model.named_buffers()} - model.state_dict().keys()
    given = {key: value for key, value in load_weights(path).items() if key not in made}
    try:
        model.load_state_dict(given)
    except RuntimeError as error:
        raise HovitError(f"{path}: not the weights of {name}: {one_line(error)}") from None
    form = row.model_args.get("by", "hovit") if row.model == "deployed" else "nothing"
    return DEPLOY_FUNCTIONS[str(form)](model.eval()), config


def read_image(path: str) -> Image.Image:
    """An image in RGB.

    Raises:
        HovitError: naming it, if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises what it will
        raise HovitError(f"{path}: an image cannot be read: {one_line(error)}") from None


def evaluate(
    model: nn.Module,
    images: ImageFolder,
    config: dict[str, Any],
    device: torch.device,
    workers: int = 0,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy in percent, and mean cross-entropy (nats).

    Args:
        model: [B, 3, H, W] -> [B, 1000], in evaluation mode.
        images: as `find_images` gives them.
        config: as timm's `resolve_data_config` gives it.
        device: where.
        workers: processes that read images, if there are more than a batch of them.

    Raises:
        HovitError: for an image that cannot be read, or outputs that are not finite.
    """
    images.transform = create_transform(**config, is_training=False)
    loader = DataLoader(images, BATCH, num_workers=workers if len(images) > BATCH else 0)
    hits, losses = [], []
    model.to(device)
    try:
        with torch.inference_mode():
            for x, y in loader:
                out, y = model(x.to(device)).float(), y.to(device)
                hits.append((out.topk(5).indices == y[:, None]).cpu())
                losses.append(nn.functional.cross_entropy(out, y, reduction="none").cpu())
    except HovitError as error:  # a worker's comes after its traceback
        last = str(error).strip().splitlines()[-1]
        raise HovitError(last.removeprefix("hovit.utils.errors.HovitError: ")) from None
    loss = float(torch.cat(losses).double().mean())
    if not math.isfinite(loss):
        raise HovitError("the model's outputs are not finite: other weights are wanted")
    hit = torch.cat(hits).numpy()
    seen = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    return {
        "top1": float(100 * hit[:, 0].mean()),
        "top5": float(100 * hit.any(1).mean()),
        "loss": loss,
        "images": len(hit),
        "seen_as": {
            k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if k in seen
        },
    }
