"""The config: what `config/` may say, typed and checked.

Every YAML file is one object, checked against the classes below (`hovit schema` writes them as JSON
Schema for editors). A mistake is one line: file, key path, what is allowed.
"""

from typing import Annotated, Literal

from pydantic import (
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from ..utils.errors import HovitError
from ..utils.strict import InSpec, Strict

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
Text = Annotated[str, Field(min_length=1)]
# A number as the seed prints it. It stays text, so that 84.30 keeps its last digit.
Printed = Annotated[str, Field(pattern=r"^-?[0-9]+(\.[0-9]+)?(–[0-9]+(\.[0-9]+)?)?$")]
Metric = Literal[
    "parameters",  # exact count
    "parameters_m",  # the same in millions, as some seeds print it
    "parameters_unused",  # of them, those that no gradient reaches: dead weights
    "parameters_used",  # the others
    "part_parameters",  # of the submodule that the row names as `part`
    "macs",  # multiply-adds for one image
    "top1",  # test accuracy, percent
    "loss",  # test cross-entropy
    "val_top1",  # best validation accuracy, percent
    "ap",  # COCO's average precision of detections, percent: over IoU 0.50 to 0.95
    "ap50",  # at IoU 0.50
    "ap75",  # at IoU 0.75
    "ap_small",  # of objects of less than 32 x 32 pixels
    "ap_medium",
    "ap_large",  # of more than 96 x 96
    "activations",  # bytes kept for the backward pass, one image
    "latency",  # milliseconds a batch; the deck does not say which batch
    "throughput",  # images a second, at the largest batch measured
    "throughput_cpu",  # the same on a CPU, as others measured it: only ever reported
    "images",
    "images_train",
    "images_val",
    "images_test",
    "gigabytes",
]
Role = Literal[
    "pets", "cifar10", "cifar100", "flowers", "cars", "imagenet", "coco", "pretrain", "upstream"
]
Plain = StrictBool | StrictInt | FiniteFloat | StrictStr
Argument = Plain | tuple[Plain, ...]  # what a model may be told
# What the study, the scale or the row's other keys say to timm.create_model.
TAKEN = {"pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir", "num_classes", "img_size"}
Fraction = Annotated[float, Field(gt=0, lt=1)]


RowRef = Annotated[str, Field(pattern=r"^[a-z0-9_]+/[a-z0-9_.]+$")]  # study/row


class Split(InSpec):
    """Shares of the images, rounded down; the rest is the test split (or, with a test set of its
    own, the validation split). A source with a validation set of its own keeps it: the seed only
    shuffles then."""

    always = frozenset({"train", "val", "seed"})

    train: Annotated[float, Field(gt=0, le=1)]
    val: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _shares(self) -> "Split":
        if self.train + self.val > 1:
            raise ValueError("train and val are more than all of the images")
        return self

    def sizes(self, total: int, has_test: bool = False) -> tuple[int, int, int]:
        """Images for (train, val, test): shares rounded down, the rest to the last split.

        The last split is test, or validation where the source has its own test set. 7,349 images at
        0.7 : 0.15 : 0.15 give 5,144 / 1,102 / 1,103 (the deck prints 5,114 for the first).
        """
        train = int(total * self.train + 1e-9)
        if has_test:
            return train, total - train, 0
        val = int(total * self.val + 1e-9)
        return train, val, total - train - val


class Dataset(InSpec):
    """One set of images: where it comes from and how it is split."""

    always = frozenset(
        {
            "reader",
            "num_classes",
            "files",
            "test_files",
            "classes",
            "images",
            "split",
            "native_size",
        }
    )
    never = frozenset({"id", "title", "about", "stands_for"})

    id: Name
    title: Text
    about: Text
    stands_for: Text | None = None  # the seed's own images, where these are others
    reader: Literal[
        "digits",
        "oxford_iiit_pet",
        "cifar10",
        "cifar100",
        "flowers102",
        "stanford_cars",
        "image_folder",
        "coco",
    ]
    num_classes: Annotated[int, Field(ge=2)]
    # Under the data root: folders or zips, joined; for coco the annotations and the images' folder.
    files: tuple[Text, ...] = ()
    test_files: tuple[Text, ...] = ()  # image_folder and coco: a test set of its own, likewise
    classes: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(gt=0)]] | None = None
    images: Annotated[int, Field(gt=0)] | None = None  # this many, by a seeded draw
    split: Split
    native_size: Annotated[int, Field(gt=0)] | None = None  # pixels a side, where all are alike

    @model_validator(mode="after")
    def _pairs(self) -> "Dataset":
        if self.reader == "coco":
            if len(self.files) != 2 or len(self.test_files) != 2:
                raise ValueError("coco: `files` and `test_files` are each [annotations, images]")
            if self.split.train != 1 or self.classes or self.images:
                raise ValueError("coco: `split: {train: 1}`, without `classes` or `images`")
        return self


class Detection(InSpec):
    """What the recipe of an object detector says beside a classifier's."""

    always = frozenset({"long_side", "channels", "milestones", "warmup_steps", "flip"})

    long_side: Annotated[int, Field(ge=32)] = 1333  # pixels, at most; image_size is the short side
    channels: Annotated[int, Field(ge=1)] = 256  # of the pyramid and the heads
    milestones: tuple[Annotated[float, Field(ge=0)], ...] = ()  # epochs; after each, a tenth of lr
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # over which lr rises, linearly
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5  # how often an image is mirrored


class Recipe(InSpec):
    """How a model is trained. Epochs are the seed's; a scale may shrink them."""

    always = frozenset(
        {
            "epochs",
            "batch_size",
            "image_size",
            "optimizer",
            "lr",
            "weight_decay",
            "schedule",
            "warmup_epochs",
            "label_smoothing",
            "clip_norm",
            "augment",
        }
    )
    never = frozenset({"id", "title", "scale_lr"})

    id: Name
    title: Text
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=2)]
    image_size: Annotated[int, Field(ge=32)] = 224
    optimizer: Literal["adam", "adamw", "sgd"]
    lr: Annotated[float, Field(gt=0)]
    scale_lr: bool = False  # in proportion to the batch size, where a scale sets another
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine", "step"] = "constant"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    augment: Literal["none", "crop_flip"] = "none"
    detection: Detection | None = None  # None: of a classifier

    @model_validator(mode="after")
    def _of_one_kind(self) -> "Recipe":
        if (self.schedule == "step") != (self.detection is not None):
            raise ValueError("`schedule: step` and `detection` go together")
        classifiers = (self.warmup_epochs, self.label_smoothing, self.augment != "none")
        if self.detection and any(classifiers):
            raise ValueError("warmup_epochs, label_smoothing and augment are a classifier's")
        return self


class WeightsFrom(Strict):
    """Where pretrained weights come from: a row of this artifact, or timm's hub."""

    row: RowRef | None = None
    timm: Text | None = None

    @model_validator(mode="after")
    def _one(self) -> "WeightsFrom":
        if (self.row is None) == (self.timm is None):
            raise ValueError("give either `row: STUDY/ROW` or `timm: MODEL.TAG`")
        return self


class Limit(InSpec):
    """At most so many images of each split, the first of the seeded permutation."""

    always = frozenset({"train", "val", "test"})

    train: Annotated[int, Field(ge=2)] | None = None
    val: Annotated[int, Field(ge=1)] | None = None
    test: Annotated[int, Field(ge=1)] | None = None


class Latency(Strict):
    """How latency is measured; the rounds go over all models of a table in turn."""

    batches: tuple[Annotated[int, Field(ge=1)], ...] = (1, 32)
    rounds: Annotated[int, Field(ge=3)] = 30
    warmup: Annotated[int, Field(ge=1)] = 3
    threads: Annotated[int, Field(ge=1)] = 2
    image_size: Annotated[int, Field(ge=32)] | None = None  # at most; None: the study's


class OnGpu(Strict):
    """How a study's throughput is measured on a GPU, where its seed does so otherwise than here."""

    batch: Annotated[int, Field(ge=1)]
    precision: Literal["fp16 autocast"]


class ModelStandIn(Strict):
    """A smaller model in the place of a seed's, and the size at which it takes its images."""

    model: Name
    image_size: Annotated[int, Field(ge=32)]


class Scale(Strict):
    """On what and how much."""

    id: Name
    title: Text
    rank: Annotated[int, Field(ge=0)]  # the larger, the more its evidence counts
    datasets: dict[Role, Name]
    photographs: Name | None = None  # whose test images pictures show; None: a run's own
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    image_size: Annotated[int, Field(ge=32)] | None = None  # at most; None: the recipe's
    epoch_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    limit: Limit = Limit()
    models: dict[Name, ModelStandIn] = {}  # the seed's -> what is trained and timed in its place
    epochs: dict[Name, Annotated[int, Field(ge=1)]] = {}  # recipe -> instead of by the factor
    batch_sizes: dict[Name, Annotated[int, Field(ge=2)]] = {}  # recipe -> instead of its own
    lrs: dict[Name, Annotated[float, Field(gt=0)]] = {}  # recipe -> instead of its own, as scaled
    weights: dict[Name, WeightsFrom]  # pretrained model -> where from
    keep_weights: bool = True  # or, of classifiers, only those that runs or analyses read
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    threads: Annotated[int, Field(ge=1)] = 1  # CPU threads of one training run
    memory_mb: Annotated[int, Field(ge=500)] = 3000  # of one training run
    gpu_memory_mb: Annotated[int, Field(ge=500)] = 12000  # likewise, of a card (profiles/gpu)
    latency: Latency
    analysis_images: Annotated[int, Field(ge=1)] | None = None  # at most; None: the analysis's
    # Which of the inexact metrics claims may judge here: smoke can judge none of them.
    judges: frozenset[Literal["top1", "val_top1", "loss", "latency"]]

    def model_of(self, row: "Row") -> str:
        """The model that is trained and timed for a row: the row's own, or its stand-in."""
        stand_in = self.models.get(str(row.model))
        return stand_in.model if stand_in else str(row.model)

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is given twice")
        return seeds


class Source(Strict):
    """Where in the seeds something stands."""

    seed: Literal["hovit", "skipvit", "efficientvit", "ours"]
    place: Text


class Row(Strict):
    """One row of a table: a run (model x dataset x recipe), and what the seed reported for it."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$")]
    label: Text
    model: Name | None = None
    model_args: dict[str, Argument] = {}
    pretrained: Name | None = None  # the model, or the ResNet50 inside it, starts from these
    tag: Name | None = None  # timm's, of the weights that are evaluated; None: timm's default
    recipe: Name | None = None  # None: the study's
    dataset: Role | None = None  # None: the study's; in a `data` study: of which the row tells
    image_size: Annotated[int, Field(ge=32)] | None = None  # None: the study's
    total: Annotated[int, Field(gt=0)] | None = None  # so many images, split by the rule of
    rule: Name | None = None  # this dataset, without any data
    part: Text | None = None  # submodule whose parameters are counted apart
    baseline: str | None = None  # the row that its latency is compared with
    reported: dict[Metric, Printed] = {}
    ours: bool = False  # the seed has no such row
    reported_only: bool = False  # the seed's numbers alone; nothing is run for it
    note: str = ""

    @field_validator("model_args")
    @classmethod
    def _own(cls, args: dict[str, Argument]) -> dict[str, Argument]:
        if taken := sorted(TAKEN & set(args)):
            raise ValueError(f"{taken[0]} is not the row's to say")
        return args


class Study(Strict):
    """One table of the seeds."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    title: Text
    source: Source
    kind: Literal["models", "data"] = "models"
    trained: bool = True  # else its models are only measured
    # What is timed: a pass, one in ONNX Runtime (always on the CPU), a pass and the gradients by
    # inputs and parameters, or a whole training step.
    workload: Literal["inference", "onnx", "gradients", "training"] = "inference"
    batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None
    threads: Annotated[int, Field(ge=1)] | None = None  # of the CPU, timed; None: the scale's
    keep_memory: bool = True  # what a pass frees the next finds again; else glibc's default
    on_gpu: OnGpu | None = None  # None: as on a CPU
    dataset: Role = "pets"
    recipe: Name = "deck"
    num_classes: Annotated[int, Field(ge=2)] = 37  # at which parameters and multiply-adds count
    # Likewise; latency at this or less. None: what is measured takes no images.
    image_size: Annotated[int, Field(ge=32)] | None = 224
    columns: Annotated[tuple[Metric, ...], Field(min_length=1)]
    notes: tuple[Text, ...] = ()
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _throughput_on_gpu(self) -> "Study":
        fits = "throughput" in self.columns and "latency" not in self.columns
        if self.on_gpu and not (fits and self.workload == "inference"):
            raise ValueError("`on_gpu` belongs to a study of inference with `throughput` alone")
        return self

    def row(self, row_id: str) -> Row:
        """The row of that id.

        Raises:
            HovitError: if there is none.
        """
        for row in self.rows:
            if row.id == row_id:
                return row
        raise HovitError(
            f"study {self.id} has no row {row_id!r}; it has {', '.join(r.id for r in self.rows)}"
        )


class Analysis(Strict):
    """Something computed from trained models, for a figure."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    title: Text
    source: Source
    kind: Literal[
        "attention_maps", "head_similarity", "kept_patches", "runtime_breakdown", "taylor_pruning"
    ]
    of: Annotated[tuple[RowRef, ...], Field(min_length=1)]  # each row's run of the first seed
    images: Annotated[int, Field(ge=1)] = 1  # drawn from a split
    args: dict[str, Plain] = {}
    published: dict[Text, tuple[FiniteFloat, ...]] = {}  # beside which a figure shows ours


# STUDY/ROW/METRIC, or ANALYSIS:STUDY/ROW/NAME for a number that an analysis found
Ref = Annotated[str, Field(pattern=r"^([a-z0-9_]+:)?[a-z0-9_]+/[a-z0-9_.]+/[a-z0-9_]+$")]


def split_ref(ref: str) -> tuple[str, str, str, str]:
    """(analysis or nothing, study, row, metric) of what a claim points at."""
    analysis_id, _, rest = ref.rpartition(":")
    study_id, row_id, metric = rest.split("/")
    return analysis_id, study_id, row_id, metric


class Claim(Strict):
    """One sentence of a seed as a check over records.

    kind `value`: of = reported; `ratio`: of / to = reported; `reduction`: 100 (1 - of / to) percent
    = reported; `difference`: of - to = reported; `less` and `greater`: of against to; `keeps`: of
    is at least to, less `tolerance`. A reported number is met within `tolerance`; unless told,
    within one unit of its last decimal, and whole numbers exactly.

    Args:
        device: where a time must have been taken to judge a sentence that names its device.
    """

    id: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    says: Text
    place: Text
    kind: Literal["value", "ratio", "reduction", "difference", "less", "greater", "keeps"]
    of: Ref
    to: Ref | None = None
    reported: Printed | None = None
    tolerance: Annotated[float, Field(ge=0)] | None = None
    device: Literal["cpu", "cuda"] | None = None
    note: str = ""

    @model_validator(mode="after")
    def _whole(self) -> "Claim":
        if (self.kind == "value") != (self.to is None):
            raise ValueError("`to` belongs to every kind but `value`")
        if (self.kind in ("less", "greater", "keeps")) != (self.reported is None):
            raise ValueError("`reported` belongs to value, ratio, reduction and difference")
        return self

    @model_validator(mode="after")
    def _times(self) -> "Claim":
        timed = self.of.rpartition("/")[2].startswith(("latency", "throughput"))
        if timed and (
            self.kind in ("value", "difference") or (self.kind == "keeps" and self.tolerance)
        ):
            raise ValueError("a time is judged by ratio or rank alone: the device is another")
        if self.device and not timed:
            raise ValueError("`device` belongs to what is timed")
        return self


class NotChecked(Strict):
    """A sentence or number of a seed that no record here can judge.

    reason `data`: it needs images or a training that no scale has; `hardware`: it is of a device
    that is not here; `unsaid`: the seed does not say what was done or meant; `undone`: it could be
    checked, but no study does; `setting`: it says how something is built or trained, which
    configuration and tests hold; `others`: it is about others' work; `opinion`: a judgement, an
    explanation or a wish.
    """

    says: Text
    place: Text
    reason: Literal["data", "hardware", "unsaid", "undone", "setting", "others", "opinion"]
    why: Text


class Claims(Strict):
    """The claims of one seed, and what in it cannot be checked here."""

    id: Name
    seed: Literal["hovit", "skipvit", "efficientvit"]
    claims: tuple[Claim, ...]
    not_checkable: tuple[NotChecked, ...] = ()


KINDS: dict[str, type[Strict]] = {
    "datasets": Dataset,
    "recipes": Recipe,
    "scales": Scale,
    "studies": Study,
    "claims": Claims,
    "analyses": Analysis,
}


class Config(Strict):
    """Everything under `config/`, with the references between its files checked."""

    datasets: dict[str, Dataset]
    recipes: dict[str, Recipe]
    scales: dict[str, Scale]
    studies: dict[str, Study]
    claims: dict[str, Claims]
    analyses: dict[str, Analysis]
