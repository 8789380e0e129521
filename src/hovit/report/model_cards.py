"""The tables of the model cards: parameters, multiply-adds, and accuracy in committed results."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.runs import Run
from ..utils.files import write_text
from ..utils.generated import around
from .readme import COMMAND
from .sources import Sources

CARDS = Path("src/hovit/models/README.md")
# Module of `hovit.models` -> models of timm in the same table.
BASELINES = {"levit_deck": ("levit_256",)}
# The table with a row for each attention form, and the modules whose models take a form.
FORMS, TAKE_FORMS = "swin", ("swin", "levit_deck", "launcher")

HEADER = "| model | parameters | multiply-adds | top-1 in % | seeds | trained and tested on |"
Models = Mapping[str, Sequence[str]]
Describe = Callable[[str, dict[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Trained:
    """A classifier with committed results.

    Args:
        run: the run, with one of its random seeds.
        scale: name of the scale.
        top1: test top-1 in per cent, for each random seed.
    """

    run: Run
    scale: str
    top1: tuple[float, ...]

    @property
    def images(self) -> str:
        """Data set, image size, scale, and what was not trained from scratch."""
        pretrained = ", pretrained" * (self.run.weights is not None)
        frozen = ", frozen front" * self.run.recipe.frozen_front
        start = f"{self.run.dataset.title}, {self.run.image_size} px, `{self.scale}`"
        return start + pretrained + frozen


@dataclass(frozen=True)
class Row:
    """A row of a card.

    Args:
        label: Markdown.
        model: registered name.
        args: arguments of the model; None for a row of several variants.
        results: what committed results say of it.
    """

    label: str
    model: str
    args: dict[str, Any] | None
    results: tuple[Trained, ...]


def trained_runs(sources: Sources) -> list[Trained]:
    """Every classifier with committed results, the largest scale first."""
    found: dict[tuple[Path, str], Trained] = {}
    for results in sources.evidence:
        for study in results.plan.config.studies.values():
            for row in study.rows:
                records = results.trained(study, row)
                top1 = tuple(r.results["top1"] for _, r in records if "top1" in r.results)
                if top1:
                    run = records[0][0]
                    trained = Trained(run, results.plan.scale.id, top1)
                    found.setdefault((results.folder, run.id), trained)
    return list(found.values())


def card_rows(module: str, models: Models, trained: Sequence[Trained]) -> list[Row]:
    """The rows of one card: each model, and its variants with committed results.

    Variants share a row, except that `FORMS` has a row for each attention form.

    Args:
        module: module of `hovit.models`.
        models: module -> its registered models.
        trained: the classifiers with committed results.
    """
    take_forms = [name for each in TAKE_FORMS for name in models.get(each, ())]
    forms = [t for t in trained if t.run.model in take_forms and "attention" in t.run.model_args]
    rows = []
    for name in (*models[module], *BASELINES.get(module, ())):
        own = [t for t in trained if t.run.model == name and t not in forms]
        plain = tuple(t for t in own if not t.run.model_args)
        rows.append(Row(f"`{name}`", name, {}, plain))
        if others := tuple(t for t in own if t.run.model_args):
            args = others[0].run.model_args if len(_distinct_args(others)) == 1 else None
            rows.append(Row(_variants(others), name, args, others))
    if module == FORMS:
        for name in take_forms:
            own = [t for t in forms if t.run.model == name]
            for args in _distinct_args(own):
                alike = tuple(t for t in own if t.run.model_args == args)
                rows.append(Row(_variants(alike), name, args, alike))
    return rows


def _distinct_args(trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """The arguments of the model, each set once; runs with the same ones differ in training."""
    found: list[dict[str, Any]] = []
    for each in trained:
        if each.run.model_args not in found:
            found.append(each.run.model_args)
    return found


def _variants(trained: Sequence[Trained]) -> str:
    """Label of one variant with its arguments, or of several with the names of the arguments."""
    name, variants = trained[0].run.model, _distinct_args(trained)
    if len(variants) == 1:
        args = ", ".join(f"{key}={value!r}" for key, value in variants[0].items())
        return f"`{name}` with `{args}`".replace("'", '"')
    keys = dict.fromkeys(f"`{key}`" for args in variants for key in args)
    return f"`{name}` with {_listed(list(keys))} ({len(variants)} variants)"


def card_table(rows: Sequence[Row], describe: Describe) -> str:
    """The table of a card, and the input of its models, as Markdown.

    Args:
        rows: see `card_rows`.
        describe: `hovit.pipeline.describe_models.describe_model`.
    """
    lines = [HEADER, "| :-- | --: | --: | --: | --: | :-- |"]
    inputs: dict[str, list[str]] = {}
    for row in rows:
        facts = {} if row.args is None else describe(row.model, row.args)
        if "input_size" in facts and not row.args:
            inputs.setdefault(_input(facts), []).append(row.label)
        results = list(_by_images(row.results)) or [("none", "", "")]
        cells = ["<br>".join(column) for column in zip(*results, strict=True)]
        lines.append(f"| {' | '.join([row.label, *_counts(facts), *cells])} |")
    texts = [
        f"Input{f' of {_listed(names)}' * (len(inputs) > 1)}: {text}."
        for text, names in inputs.items()
    ]
    return "\n".join(["", *lines, "", *([" ".join(texts), ""] if texts else [])])


def _counts(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Parameters and multiply-adds; empty without counts."""
    if not facts:
        return "", ""
    unused = facts["parameters_unused"]
    note = f" ({unused / 1e6:.2f} M unused)" if unused else ""
    return f"{facts['parameters'] / 1e6:.2f} M{note}", f"{facts['macs'] / 1e6:,.0f} M"


def _by_images(trained: Sequence[Trained]) -> Iterator[tuple[str, str, str]]:
    """Top-1, number of random seeds, and images, for each set of test images."""
    for images in dict.fromkeys(each.images for each in trained):
        alike = [each.top1 for each in trained if each.images == images]
        means = [statistics.fmean(top1) for top1 in alike]
        text = f"{min(means):.1f}"
        if len(alike) > 1:
            text += f"–{max(means):.1f}"
        elif len(alike[0]) > 1:
            text += f" ± {statistics.stdev(alike[0]):.1f}"
        seeds = sorted({len(top1) for top1 in alike})
        yield text, " or ".join(map(str, seeds)), images


def _input(facts: Mapping[str, Any]) -> str:
    mean, std = (", ".join(f"{value:g}" for value in facts[key]) for key in ("mean", "std"))
    size = " × ".join(map(str, facts["input_size"]))
    return f"{size}, mean ({mean}), standard deviation ({std})"


def _listed(names: Sequence[str]) -> str:
    """`a`; `a and b`; `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def write_cards(sources: Sources, models: Models, describe: Describe, root: Path = Path()) -> None:
    """Write the tables of the model cards between their marks.

    Args:
        sources: the committed evidence; this run is not used.
        models: module of `hovit.models` -> its registered models.
        describe: `hovit.pipeline.describe_models.describe_model`.
        root: top folder of the artifact.

    Raises:
        HovitError: if a module has no card. The message has the two lines that the file needs.
    """
    text = (root / CARDS).read_text(encoding="utf-8")
    for module in models:
        around(text, module, COMMAND, root / CARDS)  # before anything is computed
    trained = trained_runs(sources)
    for module in models:
        before, after = around(text, module, COMMAND, root / CARDS)
        text = before + card_table(card_rows(module, models, trained), describe) + after
    write_text(root / CARDS, text)
