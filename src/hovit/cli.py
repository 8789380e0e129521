"""Command line: `hovit COMMAND`, or `python -m hovit COMMAND` without installation.

Each command imports its modules when it runs: `hovit --help` reads no config, and only commands
that train or measure import torch.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .utils.errors import HovitError
from .utils.files import write_json
from .utils.machine import name_user, use_writable_caches

if TYPE_CHECKING:
    from .config.plan import Plan
    from .config.runs import Run
    from .training.trainer import Options

app = typer.Typer(
    help="Reproduce three papers on fast vision transformers: train, measure and report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ScaleOption = Annotated[str, typer.Option(help="Name of a scale in config/scales.")]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        envvar="HOVIT_WEIGHTS",
        help="Pretrained ResNet50 as .safetensors, or a folder of MODEL.safetensors or "
        "MODEL.TAG.safetensors; replaces the weights that the scale names.",
    ),
]
DataRoot = Annotated[
    Path,
    typer.Option(envvar="HOVIT_DATA", help="Folder with downloads and archives."),
]


def _check_accelerator(accelerator: str) -> str:
    if accelerator not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"{accelerator!r} is not one of auto, cpu and cuda")
    return accelerator


Accelerator = Annotated[str, typer.Option(help="auto, cpu or cuda.", callback=_check_accelerator)]
Compile = Annotated[bool, typer.Option(help="Compile the model with torch.compile.")]


class Only(StrEnum):
    """Value of `--only`."""

    train = "train"
    measure = "measure"


def load_plan(scale: str = "smoke", weights_file: Path | None = None) -> "Plan":
    """Load the config in this folder as a plan; import `hovit.config` only on this call."""
    from .config.plan import load_plan

    return load_plan(scale, weights_file=weights_file)


def main() -> None:
    """Run the command line. A HovitError becomes one line on stderr and exit code 1."""
    use_writable_caches()
    name_user()
    try:
        app()
    except HovitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@app.command("list")
def list_(
    scale: ScaleOption = "smoke",
    runs: Annotated[
        bool, typer.Option("--runs", help="Also list every run and the tables that cite it.")
    ] = False,
) -> None:
    """List the studies and analyses; with --runs, also every run of a scale."""
    from .report.listing import count_runs, list_analyses, list_runs, list_studies

    plan = load_plan(scale)
    parts = [list_studies(plan), list_analyses(plan)]
    print(*parts, list_runs(plan) if runs else count_runs(plan), sep="\n\n")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A study, an analysis or a run.")],
    scale: ScaleOption = "smoke",
) -> None:
    """Show what a study, an analysis or a run does, and estimate its cost on this machine."""
    plan = load_plan(scale)
    if name not in {*plan.config.studies, *plan.config.analyses, *plan.runs}:
        from .report.listing import unknown_name

        raise unknown_name(plan, name)
    import hovit.models  # noqa: F401 (registers)

    from .pipeline.show import show_analysis, show_run, show_study

    if name in plan.config.studies:
        print(show_study(plan, plan.study(name)))
    elif name in plan.config.analyses:
        print(show_analysis(plan, plan.analysis(name)))
    else:
        print(show_run(plan, plan.run(name)))


@app.command()
def estimate(
    scale: ScaleOption = "proxy",
    write: Annotated[bool, typer.Option("--write", help="Write the table to ARTIFACT.md.")] = False,
) -> None:
    """Estimate the training time of the main studies on one GPU, from the time of one step."""
    import hovit.models  # noqa: F401 (registers)

    from .pipeline.estimate import estimate_table, write_artifact

    plan = load_plan(scale)
    if write:
        write_artifact(plan)
    print(estimate_table(plan), end="")


@app.command()
def explain(
    name: Annotated[str, typer.Argument(help="A study or an analysis.")],
    row: Annotated[str, typer.Argument(help="A row; for an analysis, STUDY/ROW.")] = "",
    column: Annotated[str, typer.Argument(help="A metric; for an analysis, a number.")] = "",
    scale: ScaleOption = "smoke",
    weights: WeightsOption = None,
) -> None:
    """Trace a table cell or an analysis to its record, spec, commit and command."""
    from .report.explain import explain as explain_cell

    print(explain_cell(load_plan(scale, weights_file=weights), name, row, column))


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="A pack, DATASET-SIZEpx (see `hovit list --runs`).")],
    data_root: DataRoot = Path("data"),
) -> None:
    """Decode and split a dataset once, under data/packed; COCO and ImageNet are only checked."""
    from .config.plan import all_packs
    from .pipeline.train import prepare_pack

    packs = all_packs()
    if name not in packs:
        raise HovitError(f"no scale uses a pack {name!r}; the packs are {', '.join(packs)}")
    meta = prepare_pack(packs[name], data_root)
    counts = " / ".join(f"{n:,}" for n in meta["images"].values())
    print(f"{name}: {counts} images (train / val / test), fingerprint {meta['fingerprint'][:12]}")


@app.command()
def train(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run (see `hovit list --runs`).")],
    seed: Annotated[
        int | None, typer.Option(help="Random seed; default: the first seed of the scale.")
    ] = None,
    scale: ScaleOption = "smoke",
    weights: WeightsOption = None,
    accelerator: Accelerator = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    compile: Compile = False,
) -> None:
    """Train one run, or resume it. Training is data-parallel under torchrun."""
    plan = load_plan(scale, weights_file=weights)
    run = plan.run(run_id, seed)
    import hovit.models  # noqa: F401 (registers)

    from .pipeline.train import format_results, train_run
    from .training.trainer import make_fabric
    from .utils.device import keep_freed_memory, set_threads

    # Steps on a CPU get faster (bench/allocator.py). `hovit sweep` does not keep freed memory,
    # because the same process also measures.
    keep_freed_memory()
    set_threads(threads or plan.scale.threads)
    fabric = make_fabric(run.precision, accelerator=accelerator)
    with _watching(run, quiet=not fabric.is_global_zero) as options:
        options.weights_file, options.compile = weights, compile
        record = train_run(run, fabric, options=options)
    if fabric.is_global_zero:
        print(f"{run.id} seed {run.seed}: {format_results(record.results)}")


@contextmanager
def _watching(run: "Run", quiet: bool = False) -> "Iterator[Options]":
    """Yield options that show progress: a bar on a terminal, otherwise one line per epoch."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .pipeline.train import format_epoch
    from .training.trainer import Options

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[last]}"), console=console,
                   disable=quiet or not console.is_terminal)  # fmt: skip
    task = bar.add_task(f"{run.model} seed {run.seed}", total=None, last="")

    def on_step(epoch: int, step: int, steps: int) -> None:
        bar.update(task, completed=epoch * steps + step, total=run.recipe.epochs * steps)

    def on_epoch(entry: dict[str, float]) -> None:
        last = format_epoch(entry)
        bar.update(task, last=last)
        if bar.disable and not quiet:
            print(
                f"epoch {entry['epoch']}/{run.recipe.epochs}: {last}", file=sys.stderr, flush=True
            )

    with bar:
        yield Options(on_step=on_step, on_epoch=on_epoch)


@app.command()
def measure(
    study: str,
    scale: ScaleOption = "smoke",
    accelerator: Accelerator = "auto",
) -> None:
    """Count the parameters and multiply-adds of a study and time its models."""
    plan = load_plan(scale)
    task = plan.measure_task(plan.study(study))
    if task is None:
        raise HovitError(f"{study}: scale {scale} runs none of its rows, so nothing is measured")
    import hovit.models  # noqa: F401 (registers)

    from .pipeline.measure import measure_study
    from .utils.device import pick_device

    record = measure_study(task, pick_device(accelerator))
    print(f"{study}: {len(record.results['rows'])} rows on {record.provenance.device}")


@app.command()
def evaluate(
    study: str,
    images: Annotated[
        Path,
        typer.Argument(
            envvar="HOVIT_IMAGENET", help="Folder of ImageNet, with val/n01440764/*.JPEG."
        ),
    ],
    scale: ScaleOption = "smoke",
    weights: WeightsOption = None,
    accelerator: Accelerator = "auto",
) -> None:
    """Evaluate pretrained weights on the ImageNet validation set, for a study without training."""
    plan = load_plan(scale)
    task = plan.evaluate_task(plan.study(study))
    if task is None:
        raise HovitError(f"{study}: only a study with `trained: false` and `top1` can be evaluated")
    import hovit.models  # noqa: F401 (registers)

    from .pipeline.evaluate import evaluate_study
    from .utils.device import pick_device

    record = evaluate_study(
        task, images, weights, pick_device(accelerator), log=lambda line: print(line)
    )
    print(f"{study}: {len(record.results['rows'])} models on {record.provenance.device}")


@app.command()
def analyse(
    analysis: str,
    scale: ScaleOption = "smoke",
    weights: WeightsOption = None,
    accelerator: Accelerator = "auto",
) -> None:
    """Compute an analysis of trained models and write its record."""
    plan = load_plan(scale, weights_file=weights)
    task = plan.analyse_task(plan.analysis(analysis))
    if task is None:
        raise HovitError(f"{analysis}: scale {scale} has none of the runs that it analyses")
    import hovit.models  # noqa: F401 (registers)

    from .pipeline.analyse import analyse as run_analysis
    from .utils.device import pick_device

    record = run_analysis(task, pick_device(accelerator))
    print(f"{analysis}: {len(record.results['rows'])} models on {record.provenance.device}")


@app.command()
def sweep(
    study: Annotated[list[str], typer.Option(help="A study; repeat the option for more.")],
    budget: Annotated[str, typer.Option(help="Time limit, such as 90s, 9m or 1.5h.")],
    scale: ScaleOption = "smoke",
    data_root: DataRoot = Path("data"),
    weights: WeightsOption = None,
    accelerator: Accelerator = "auto",
    compile: Compile = False,
    jobs: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of processes that share the device. With more than one, a run starts only "
            "if it can finish in time.",
        ),
    ] = 1,
    priority: Annotated[
        bool,
        typer.Option(
            "--priority", help="Keep the order of studies; run the first seed of every row first."
        ),
    ] = False,
    only: Annotated[Only | None, typer.Option(help="Only train, or only measure.")] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Write records, histories and predictions to this .tgz during the run."),
    ] = None,
    states: Annotated[
        bool, typer.Option("--states", help="Also export checkpoints of unfinished runs.")
    ] = False,
    max_size: Annotated[
        str | None, typer.Option(help="Size limit of the export, such as 60M.")
    ] = None,
) -> None:
    """Run studies within a time budget, without Snakemake. Run it again to resume."""
    began = time.monotonic()
    from .pipeline.export import Export, parse_size
    from .pipeline.sweep import all_tasks, parse_budget
    from .pipeline.sweep import sweep as sweep_studies

    seconds = parse_budget(budget)
    if seconds < 30:
        raise HovitError(
            f"--budget {budget}: must be at least 30s (10s are reserved for a clean stop)"
        )
    if (states or max_size) and export is None:
        raise HovitError("--states and --max-size need --export FILE.tgz")
    plan = load_plan(scale, weights_file=weights)
    studies = [plan.study(name) for name in study]
    # Writing the last checkpoints and the last export takes time too.
    reserve = max(10.0, 0.05 * seconds)
    exporting = None
    if export:
        exporting = Export(
            export,
            all_tasks(plan, studies),
            states=states,
            max_size=parse_size(max_size) if max_size else None,
            upstreams=plan.upstreams,
        )
    todo = sweep_studies(
        plan,
        studies,
        data_root=data_root,
        deadline=began + seconds - reserve,
        stop=began + seconds - 0.4 * reserve,
        accelerator=accelerator,
        compile=compile,
        jobs=jobs,
        priority=priority,
        only=only.value if only else None,
        export=exporting,
        log=lambda line: print(line, flush=True),
    )
    _tell_rest(todo)


def _tell_rest(todo: list[str]) -> None:
    """Print what a sweep has left to do.

    Raises:
        HovitError: if a task failed.
    """
    failed = [job for job in todo if job.endswith("(failed)")]
    if failed:
        raise HovitError(f"{len(failed)} failed: {', '.join(failed)}; {len(todo)} tasks remain")
    if todo:
        print(f"budget spent; {len(todo)} tasks remain: run the same command to resume {todo[0]}")
    else:
        print("all done")


@app.command()
def kit(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    study: Annotated[list[str], typer.Option(help="A study; repeat the option for more.")],
    scale: ScaleOption = "proxy",
    data_root: DataRoot = Path("data"),
    python: Annotated[
        str | None, typer.Option(help="Python version of the other machine, such as 3.12.")
    ] = None,
    package: Annotated[
        list[str] | None,
        typer.Option(help="A package that the other machine lacks; repeat the option for more."),
    ] = None,
) -> None:
    """Write a folder that runs studies on a GPU machine without network (`make gpu-kit`)."""
    import hovit.models  # noqa: F401 (registers)

    from .pipeline.kit import make_kit

    plan = load_plan(scale)
    studies = [plan.study(name) for name in study]
    make_kit(
        out, plan, studies, data_root=data_root, python=python, packages=package or [],
        log=lambda line: print(line, flush=True),
    )  # fmt: skip


@app.command()
def table(study: str, scale: ScaleOption = "smoke", weights: WeightsOption = None) -> None:
    """Write the table of a study under results/tables, as CSV, Markdown and LaTeX."""
    from .report.tables.write import write_table

    plan = load_plan(scale, weights_file=weights)
    write_table(plan, plan.study(study))


@app.command()
def index(scale: ScaleOption = "smoke") -> None:
    """Write the list of tables, results/tables/index.md."""
    from .report.tables.write import write_index

    write_index(load_plan(scale))


@app.command()
def figure(name: str, scale: ScaleOption = "smoke", weights: WeightsOption = None) -> None:
    """Draw a figure under figures/, as PDF and PNG."""
    from .report.figures.draw import draw

    draw(load_plan(scale, weights_file=weights), name)


@app.command()
def page(scale: ScaleOption = "smoke", weights: WeightsOption = None) -> None:
    """Write results/index.html: every claim, table, curve and record on one page."""
    from .report.page.write import write_page

    write_page(load_plan(scale, weights_file=weights))


@app.command()
def claims(
    scale: ScaleOption = "smoke",
    weights: WeightsOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fail if a verdict differs from results/verdicts.json.")
    ] = False,
    accept: Annotated[
        bool, typer.Option("--accept", help="Accept the verdicts: write results/verdicts.json.")
    ] = False,
) -> None:
    """Check the claims of the papers against records; write results/claims.json and .md."""
    from .report.claims import check as checks
    from .report.claims.write import write_claims

    plan = load_plan(scale, weights_file=weights)
    print(write_claims(plan))
    if accept:
        checks.accept(plan)
    if check and (differences := checks.check_accepted(plan)):
        for line in differences:
            print(line, file=sys.stderr)
        raise HovitError(
            f"{len(differences)} verdicts or reported numbers differ from {checks.ACCEPTED}; "
            "if this is intended, run `hovit claims --accept`"
        )


@app.command()
def readme() -> None:
    """Write the generated parts of READMEs, ARTIFACT and model cards, from committed records."""
    from .pipeline.describe_models import describe_model, registered_models
    from .report.model_cards import write_cards
    from .report.readme import write_readme
    from .report.sources import load_sources

    plan = load_plan()
    write_readme(plan)
    write_cards(load_sources(plan), registered_models(), describe_model)


@app.command()
def paper(scale: ScaleOption = "smoke", weights: WeightsOption = None) -> None:
    """Write the numbers of the paper to results/paper and compile paper/paper.pdf."""
    from .report.paper.write import write_paper

    write_paper(load_plan(scale, weights_file=weights))


@app.command()
def report(scale: ScaleOption = "smoke", weights: WeightsOption = None) -> None:
    """Write all tables, figures, claims, the page and the paper from the existing records."""
    from .report.everything import write_everything

    write_everything(load_plan(scale, weights_file=weights), log=print)


@app.command()
def metrics(scale: ScaleOption = "smoke", weights: WeightsOption = None) -> None:
    """Write the files for `dvc metrics` and `dvc plots` under results/metrics."""
    from .report.metrics import write_metrics

    write_metrics(load_plan(scale, weights_file=weights))


@app.command()
def verify() -> None:
    """Verify every file in dvc.lock, here and in DVC's cache; fail if one differs."""
    from .utils.dvc_lock import check_stored

    count, problems = check_stored()
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise HovitError(
            f"{len(problems)} files are missing or changed: "
            "delete the changed ones, then run `dvc pull`; run `dvc repro` if you changed them"
        )
    print(f"{count} files match dvc.lock, here and in DVC's cache")


evidence = typer.Typer(help="Add and verify records from other machines.")
app.add_typer(evidence, name="evidence")


@evidence.command("add")
def evidence_add(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="results/runs of another machine, or a file from `hovit sweep --export`."
        ),
    ],
) -> None:
    """Verify finished records and copy them to results/evidence/DEVICE/."""
    from .config.load import load_config
    from .pipeline.evidence import add

    taken = add(load_config(), sources)
    for path in taken:
        print(path)
    print(f"{len(taken)} records added")


@evidence.command("verify")
def evidence_verify() -> None:
    """Verify every record under results/evidence; fail if one does not verify."""
    from .config.load import load_config
    from .pipeline.evidence import CODE, complete_history, verify

    count, problems = verify(load_config())
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise HovitError(f"{len(problems)} of {count} records of evidence do not verify")
    note = f"; without the git history, their code was checked against {CODE}"
    print(f"{count} records of evidence verify" + note * (not complete_history(Path())))


@app.command()
def schema() -> None:
    """Write the JSON Schemas of config files and records, and the list of models."""
    from .config.schema import KINDS
    from .pipeline.list_models import write_models
    from .records.record import Record

    for kind, model in (KINDS | {"record": Record}).items():
        write_json(Path(f"config/schema/{kind}.schema.json"), model.model_json_schema())
    write_models()
