"""A small set in COCO's own format: coloured shapes on noise, with crowds and gaps in the ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from hovit.config.plan import Plan
from hovit.config.runs import Run
from hovit.config.schema import Dataset

CATEGORIES = {2: ("square", "red"), 5: ("disc", "lime"), 9: ("frame", "blue")}  # ids have gaps
TINY = {"embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (1, 1, 2)}


def make_coco(root: Path, images: tuple[int, int] = (24, 12), side: int = 128) -> Dataset:
    """Write train2017 and val2017 under root/coco, and say what they are."""
    for seed, (split, count) in enumerate(zip(("train2017", "val2017"), images, strict=True)):
        make_split(root / "coco", split, count, side, seed)
    return Dataset(
        id="shapes", title="shapes", about="coloured shapes on noise", reader="coco", num_classes=3,
        files=("coco/annotations/instances_train2017.json", "coco/train2017"),
        test_files=("coco/annotations/instances_val2017.json", "coco/val2017"),
        split={"train": 1},
    )  # fmt: skip


def make_split(root: Path, split: str, count: int, side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    listed: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for i in range(count):
        width, height = side, side - 16 * (i % 2)
        image = Image.fromarray(rng.integers(0, 90, (height, width, 3), dtype=np.uint8))
        draw, number = ImageDraw.Draw(image), 100 + 7 * i
        listed.append({"id": number, "file_name": f"{number:012d}.jpg", "width": width,
                       "height": height})  # fmt: skip
        for left in (4, side // 2 + 2):  # one in each half, so that none covers another
            if rng.random() < 0.2:
                continue
            size = int(rng.integers(24, 52))
            x, y = left + int(rng.integers(0, 56 - size)), int(rng.integers(0, height - size))
            category = int(rng.choice(list(CATEGORIES)))
            shape, colour = CATEGORIES[category]
            where = (x, y, x + size - 1, y + size - 1)
            if shape == "disc":
                draw.ellipse(where, fill=colour)
            else:
                draw.rectangle(where, fill=colour if shape == "square" else None, outline=colour,
                               width=6)  # fmt: skip
            found.append({"id": len(found) + 1, "image_id": number, "category_id": category,
                          "bbox": [x, y, size, size], "area": size * size, "iscrowd": 0,
                          "segmentation": [[x, y, x + size, y, x, y + size]]})  # fmt: skip
        image.save(root / split / listed[-1]["file_name"], quality=95)
    crowd = {"bbox": [0, 0, 40, 100], "area": 4000, "iscrowd": 1, "segmentation": {"counts": "0"}}
    found.append(found[-1] | {"id": len(found) + 1} | crowd)
    names = [{"id": id_, "name": name} for id_, (name, _) in CATEGORIES.items()]
    content = {"images": listed, "annotations": found, "categories": names}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def small_detector(plan: Plan, dataset: Dataset, epochs: int = 2, **detection: Any) -> Run:
    """The config's run of EfficientViT-M4 on COCO, shrunken to a second an epoch."""
    run = plan.run("efficientvit_paper_m4-pretrained.coco.detection")
    assert run.recipe.detection is not None
    small = {"long_side": 128, "channels": 32, "milestones": (0.8 * epochs,), "warmup_steps": 5}
    recipe = run.recipe.model_copy(update={
        "epochs": epochs, "batch_size": 8, "lr": 0.003, "image_size": 128,
        "detection": run.recipe.detection.model_copy(update=small | detection),
    })  # fmt: skip
    changes = {"dataset": dataset, "recipe": recipe, "image_size": 128, "model_args": TINY,
               "weights": None}  # fmt: skip
    return Run(**run.model_dump(exclude=set(changes)), **changes)
