"""Evaluation of given weights on ImageNet's validation images.

The protocol is that of timm's validate.py: each model gets images as its weights require (test size
and crop, interpolation, mean and deviation: `timm.data.resolve_data_config`), in fp32. A row that
is timed in a deployed form is evaluated in that form. Weights come from timm (for EfficientViT they
are the authors'): with the tag of the row or timm's default tag, from a folder of MODEL.safetensors
or from the hub.
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from ..config.schema import Row
from ..config.tasks import EvaluateTask
from ..data.decode import open_image, to_rgb
from ..data.listing import list_images
from ..data.loader import usable_workers
from ..models.deployed import DEPLOY_FUNCTIONS
from ..records.record import Record, git_state, read_record, write_record
from ..training.checkpoint import load_weights
from ..training.pretrained import download_timm
from ..utils.create_model import create_model
from ..utils.device import describe_device, peak_memory_mb, set_threads
from ..utils.errors import HovitError, one_line
from ..utils.files import alone, digest, file_digest, read_sealed, write_sealed

BATCH = 64
Rows = dict[str, dict[str, Any]]  # row id -> results
PREPROCESSING = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")


def evaluate_study(
    task: EvaluateTask,
    folder: Path,
    weights: Path | None,
    device: torch.device,
    root: Path = Path(),
    log: Callable[[str], None] = lambda _: None,
) -> Record:
    """Evaluate the rows of a study whose weights are available, and write the record.

    A killed call resumes after the last finished row. A row whose weights are missing keeps its
    result of an earlier call with the same spec, code and images.

    Args:
        task: study to evaluate.
        folder: ImageNet or its validation images: `val/n01440764/*.JPEG`. A subset (fewer classes,
            fewer images) is accepted; the record states it.
        weights: folder of MODEL.safetensors; None: timm's hub.
        device: device to evaluate on.
        root: top folder of the artifact.
        log: called with one line per row.

    Raises:
        HovitError: if the images are not from ImageNet, weights do not fit their model, a
            download fails, or another process evaluates the study.
    """
    with alone(root / task.path.with_suffix("")):
        return _evaluate_study(task, folder, weights, device, root, log)


def _evaluate_study(
    task: EvaluateTask,
    folder: Path,
    weights: Path | None,
    device: torch.device,
    root: Path,
    log: Callable[[str], None],
) -> Record:
    start = time.monotonic()
    git_state()  # the record states the commit at the start
    if weights and not weights.is_dir():
        raise HovitError(f"{weights}: not a folder; give a folder of MODEL.safetensors")
    set_threads(task.scale.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    images = find_images(folder)
    fingerprint = _fingerprint(images)
    partial = root / task.path.with_suffix(".partial.json")
    header = {"spec_hash": task.spec_hash, "code": task.code, "images": fingerprint}
    earlier = _evaluated_before(root / task.path, header)
    saved = _load_partial(partial, header)
    rows: Rows = {}
    for row in (task.study.row(name) for name in task.spec["rows"]):
        path = find_weights(tagged(row), weights)
        if path is None:
            kept = "; its earlier result is kept" if row.id in earlier else ""
            log(f"{row.id}: skipped: no weights of {tagged(row)} in {weights or 'timm'}{kept}")
            rows |= {row.id: earlier[row.id]} if kept else {}
            continue
        rows[row.id] = _evaluate_row(row, path, images, device, task.scale.threads, saved)
        write_sealed(partial, header | {"rows": saved | rows})
        log(f"{row.id}: top-1 {rows[row.id]['top1']:.2f} %")
    if not rows:
        log(f"no weights of any row in {weights or 'timm'}: nothing is evaluated")
    seconds = time.monotonic() - start
    record = task.make_record(
        {"rows": rows}, describe_device(device), seconds, peak_memory_mb(device), fingerprint
    )
    write_record(root / task.path, record)
    partial.unlink(missing_ok=True)
    return record


class ImageNetImages(Dataset[tuple[Tensor, int]]):
    """Validation images with their labels.

    Args:
        root: folder of class folders.
        classes: names of the class folders.
        samples: (path relative to root, label).
        transform: from an RGB image to the input of a model; set by `evaluate`.
    """

    def __init__(self, root: Path, classes: list[str], samples: list[tuple[str, int]]) -> None:
        self.root, self.classes, self.samples = root, classes, samples
        self.transform: Callable[[Image.Image], Tensor] = pil_to_tensor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name, label = self.samples[index]
        return self.transform(read_image(self.root / name)), label


def find_images(folder: Path) -> ImageNetImages:
    """ImageNet's validation images, with classes numbered as in the pretrained weights.

    Raises:
        HovitError: if there are none, or a folder name is not a class of ImageNet-1k.
    """
    inside = [folder / name for name in ("val", "validation") if (folder / name).is_dir()]
    root = (*inside, folder)[0]
    names = sorted(name for name, _ in list_images(root)) if root.is_dir() else []
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    if not classes:
        raise HovitError(f"{folder}: contains no ImageNet (val/n01440764/*.JPEG)")
    number = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
    if unknown := [name for name in classes if name not in number]:
        raise HovitError(
            f"{root}: {unknown[0]} is not a class of ImageNet-1k; its folders are n01440764 etc."
        )
    samples = [(name, number[name.split("/")[0]]) for name in names if "/" in name]
    return ImageNetImages(root, classes, samples)


def _fingerprint(images: ImageNetImages) -> dict[str, Any]:
    """Number of images and classes, and a hash of file names and sizes."""
    try:
        files = sorted((name, (images.root / name).stat().st_size) for name, _ in images.samples)
    except OSError as error:
        raise HovitError(f"{images.root}: an image cannot be read: {one_line(error)}") from None
    return {"images": len(files), "classes": len(images.classes), "sha256": digest(files)}


def _evaluate_row(
    row: Row, path: Path, images: ImageNetImages, device: torch.device, workers: int, saved: Rows
) -> dict[str, Any]:
    """Results of one row, taken from `saved` if it was evaluated with the same weights."""
    source = {"weights": tagged(row), "file": path.name, "weights_sha256": file_digest(path)}
    before = saved.get(row.id, {})
    if source.items() <= before.items():
        return before
    model, config = load_model(row, path)
    return evaluate(model, images, config, device, workers) | source


def _evaluated_before(path: Path, header: dict[str, Any]) -> Rows:
    """Rows of an existing record with the same spec, code and images; none of a damaged record."""
    try:
        record = read_record(path) if path.exists() else None
    except HovitError:
        return {}
    if record is None:
        return {}
    made = record.provenance
    same = {"spec_hash": record.spec_hash, "code": made.code, "images": made.dataset} == header
    return record.results["rows"] if same else {}


def _load_partial(path: Path, header: dict[str, Any]) -> Rows:
    """Rows that an interrupted call finished with the same spec, code and images."""
    saved = read_sealed(path) if path.exists() else {}
    same = all(saved.get(key) == value for key, value in header.items())
    return saved.get("rows", {}) if same else {}


def tagged(row: Row) -> str:
    """Model name of a row, with the tag of its weights if the row has one."""
    name, _ = base_model(row)
    return f"{name}.{row.tag}" if row.tag else name


def find_weights(name: str, folder: Path | None) -> Path | None:
    """Weights of a model, or None if there are none.

    Args:
        name: model name, with or without a tag.
        folder: folder with NAME.safetensors, where NAME is our name or timm's name of the model,
            with or without the tag. None: timm's weights, downloaded unless they are cached.

    Raises:
        HovitError: if timm does not know the tag, or the download fails.
    """
    try:
        hub = timm.get_pretrained_cfg_value(name, "hf_hub_id") or ""
    except RuntimeError as error:  # an unknown tag
        raise HovitError(f"weights {name}: {one_line(error)}") from None
    if folder is None:
        return download_timm(name) if hub else None
    timm_name = hub.rpartition("/")[2]
    names = [name, name.partition(".")[0], timm_name, timm_name.partition(".")[0]]
    files = [folder / f"{each}.safetensors" for each in names if each]
    return next((path for path in files if path.exists()), None)


def base_model(row: Row) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the model that a row deploys, or of the row's own model."""
    args = dict(row.model_args)
    name = str(args.pop("of", row.model))
    return name, {key: value for key, value in args.items() if key not in ("by", "channels_last")}


def load_model(row: Row, path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Model of a row with these weights, in evaluation mode, and its preprocessing.

    Raises:
        HovitError: if the weights belong to another model.
    """
    name, args = base_model(row)
    pretrained_cfg = timm.get_pretrained_cfg(tagged(row))
    assert pretrained_cfg is not None
    config = resolve_data_config(pretrained_cfg=pretrained_cfg.to_dict(), use_test_size=True)
    model = create_model(name, 1000, config["input_size"][1], **args)
    # Older files also hold buffers that the model computes itself.
    computed = {key for key, _ in model.named_buffers()} - model.state_dict().keys()
    given = {key: value for key, value in load_weights(path).items() if key not in computed}
    try:
        model.load_state_dict(given)
    except RuntimeError as error:
        raise HovitError(f"{path}: not the weights of {name}: {one_line(error)}") from None
    form = row.model_args.get("by", "hovit") if row.model == "deployed" else "nothing"
    return DEPLOY_FUNCTIONS[str(form)](model.eval()), config


def read_image(path: Path) -> Image.Image:
    """Decode an image to RGB, without EXIF orientation, as timm's validation does.

    Raises:
        HovitError: naming the file, if it cannot be read.
    """
    try:
        with open_image(path) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow raises errors of many types on broken files
        raise HovitError(f"{path}: an image cannot be read: {one_line(error)}") from None


def evaluate(
    model: nn.Module,
    images: ImageNetImages,
    config: dict[str, Any],
    device: torch.device,
    workers: int = 0,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy in percent, and mean cross-entropy in nats.

    Args:
        model: [B, 3, H, W] -> [B, 1000], in evaluation mode.
        images: result of `find_images`.
        config: result of timm's `resolve_data_config`.
        device: device to evaluate on.
        workers: processes that decode images, if there is more than one batch.

    Raises:
        HovitError: for an image that cannot be read, or outputs that are not finite.
    """
    images.transform = create_transform(**config, is_training=False)
    batch_bytes = BATCH * math.prod(config["input_size"]) * 4  # float32
    workers = usable_workers(workers, batch_bytes) if len(images) > BATCH else 0
    loader = DataLoader(images, BATCH, num_workers=workers)
    hits, losses = predict(model, loader, device)
    loss = float(losses.double().mean())
    if not math.isfinite(loss):
        raise HovitError("the outputs of the model are not finite; use other weights")
    seen_as = {key: config[key] for key in PREPROCESSING if key in config}
    return {
        "top1": float(100 * hits[:, 0].numpy().mean()),
        "top5": float(100 * hits.any(1).numpy().mean()),
        "loss": loss,
        "images": len(hits),
        "seen_as": {k: list(v) if isinstance(v, tuple) else v for k, v in seen_as.items()},
    }


@torch.inference_mode()
def predict(
    model: nn.Module, loader: DataLoader[Any], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Run a model over a loader.

    Returns:
        bool [N, 5]: whether each of the five best classes is the label; float [N]: cross-entropy.

    Raises:
        HovitError: for an image that cannot be read.
    """
    hits, losses = [], []
    model.to(device)
    try:
        for x, y in loader:
            out, y = model(x.to(device)).float(), y.to(device)
            hits.append((out.topk(5).indices == y[:, None]).cpu())
            losses.append(nn.functional.cross_entropy(out, y, reduction="none").cpu())
    except HovitError as error:  # raised in a worker, its message follows a traceback
        last = str(error).strip().splitlines()[-1]
        raise HovitError(last.removeprefix("hovit.utils.errors.HovitError: ")) from None
    return torch.cat(hits), torch.cat(losses)
