"""Config resolved into runs and tasks at one scale.

The Snakefile, `hovit sweep` and the reports read the plan. No torch is needed here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar, cast

from ..records.record import Record
from ..utils.errors import HovitError
from .kinds import ANALYSIS_KINDS
from .load import load_config
from .resolve import Resolver
from .runs import Pack, Run
from .schema import Analysis, Config, Row, Scale, Study, split_ref
from .tasks import AnalyseTask, EvaluateTask, MeasureTask, Task, TrainTask

T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Plan:
    """Config at one scale.

    Args:
        config: everything under `config/`.
        scale: the scale.
        weights_file: argument of `--weights`: weights of ResNet50, or a folder of
            NAME.safetensors. Each replaces the weights of the scale for the model of that name.
    """

    config: Config
    scale: Scale
    weights_file: Path | None = None
    _tasks: dict[object, Task] = field(default_factory=dict, compare=False, repr=False)

    def study(self, study_id: str) -> Study:
        """The study of that id.

        Raises:
            HovitError: if config/studies has none.
        """
        if study_id not in self.config.studies:
            known = ", ".join(self.config.studies)
            raise HovitError(f"no study {study_id!r} in config/studies; there are {known}")
        return self.config.studies[study_id]

    def analysis(self, analysis_id: str) -> Analysis:
        """The analysis of that id.

        Raises:
            HovitError: if config/analyses has none.
        """
        if analysis_id not in self.config.analyses:
            known = ", ".join(self.config.analyses)
            raise HovitError(f"no analysis {analysis_id!r} in config/analyses; there are {known}")
        return self.config.analyses[analysis_id]

    # Runs

    def runs_of(self, study: Study, row: Row) -> list[Run]:
        """The runs of a row, one for each seed; none if the scale has no such dataset."""
        return self._resolver.runs_of(study, row)

    @cached_property
    def _resolver(self) -> Resolver:
        return Resolver(self.config, self.scale, self.weights_file)

    @cached_property
    def runs(self) -> dict[str, dict[int, Run]]:
        """Every run of the scale: id -> seed -> run. Tables that cite the same run share it.

        Raises:
            HovitError: if two rows give the same id to different runs.
        """
        found: dict[str, dict[int, Run]] = {}
        for study in self.config.studies.values():
            for row in study.rows:
                for run in self.runs_of(study, row):
                    other = found.setdefault(run.id, {}).setdefault(run.seed, run)
                    if other.spec_hash != run.spec_hash:
                        raise HovitError(
                            f"config/studies/{study.id}.yaml: row {row.id}: run {run.id} "
                            "conflicts with an earlier row"
                        )
        return found

    @cached_property
    def all_runs(self) -> list[Run]:
        """Every run of the scale, as a list."""
        return [run for seeds in self.runs.values() for run in seeds.values()]

    def run(self, run_id: str, seed: int | None = None) -> Run:
        """The run of that id; its first seed unless one is given.

        Raises:
            HovitError: if no study defines it.
        """
        seeds = self.runs.get(run_id)
        if seeds is None:
            raise HovitError(
                f"no study defines a run {run_id!r} at scale {self.scale.id}; "
                "`hovit list --runs` lists all runs"
            )
        if seed is None:
            seed = next(iter(seeds))
        if seed not in seeds:
            allowed = ", ".join(map(str, seeds))
            raise HovitError(
                f"run {run_id} has no seed {seed} at scale {self.scale.id}, only {allowed}"
            )
        return seeds[seed]

    def upstream(self, run: Run) -> Run | None:
        """The run whose weights this run starts from, if any."""
        if run.weights and run.weights.run:
            return self.run(run.weights.run, run.weights.seed)
        return None

    def needed(self, studies: Iterable[Study]) -> list[Run]:
        """All runs of these studies, upstream runs first."""
        wanted = [r for s in studies for row in s.rows for r in self.runs_of(s, row)]
        first = [self.upstream(run) for run in wanted]
        unique = {(run.id, run.seed): run for run in [*first, *wanted] if run}
        return list(unique.values())

    @cached_property
    def upstreams(self) -> frozenset[str]:
        """Ids of the runs that other runs start from."""
        return frozenset(r.weights.run for r in self.all_runs if r.weights and r.weights.run)

    @cached_property
    def runs_with_kept_weights(self) -> frozenset[str]:
        """Ids of the runs whose weights stay after the run.

        A scale may keep only the weights that other runs or analyses read, and detectors.
        """
        if self.scale.keep_weights:
            return frozenset(self.runs)
        analysed = {
            run.id for a in self.config.analyses.values() for run in self._analysed(a).values()
        }
        detectors = {run.id for run in self.all_runs if run.is_detector}
        return self.upstreams | analysed | detectors

    # Rows and packs

    def rows_run(self, study: Study) -> list[Row]:
        """The rows of a study that are measured at this scale, and trained if the study trains."""
        if study.kind == "models" and not study.trained:
            return list(study.rows)
        return [row for row in study.rows if self.runs_of(study, row)]

    @cached_property
    def packs(self) -> dict[str, Pack]:
        """Every pack of the scale: id -> pack."""
        found = [run.pack for run in self.all_runs]
        for analysis in self.config.analyses.values():
            found += self._analysis_packs(analysis, self._analysed(analysis)).values()
        return {pack.id: pack for pack in found}

    def packs_of(self, role: str | None) -> list[Pack]:
        """The packs of a role's images at this scale."""
        return list({run.pack.id: run.pack for run in self.all_runs if run.role == role}.values())

    # Tasks

    def train_task(self, run: Run) -> TrainTask:
        """The task that trains a run."""
        return self._task("train", run, lambda: TrainTask(run))

    def measure_task(self, study: Study) -> MeasureTask | None:
        """The task that measures a study; None if this scale runs none of its rows.

        A scale that does not check latency does not repeat the measurements of other studies.
        """
        repeated = bool(study.cites) and "latency" not in self.scale.judges
        if repeated or not self.rows_run(study):
            return None
        return self._task("measure", study, lambda: MeasureTask(study, self.scale))

    def evaluate_task(self, study: Study) -> EvaluateTask | None:
        """The task that evaluates given weights; None if the study trains, or has no accuracy."""
        if study.trained or study.cites or "top1" not in study.columns:
            return None
        return self._task("evaluation", study, lambda: EvaluateTask(study, self.scale))

    def analyse_task(self, analysis: Analysis) -> AnalyseTask | None:
        """The task of an analysis; None if this scale has none of its runs."""
        runs = self._analysed(analysis)
        if not runs:
            return None
        packs = self._analysis_packs(analysis, runs)
        images = min(analysis.images, self.scale.analysis_images or analysis.images)
        scaled = analysis.model_copy(update={"images": images})
        return self._task(
            "analysis", analysis, lambda: AnalyseTask(scaled, self.scale, runs, packs)
        )

    def _task(self, kind: str, subject: object, make: Callable[[], T]) -> T:
        """Return one task per subject, so that its spec and hashes are computed once."""
        key = kind, id(subject)  # the task keeps its subject alive
        if key not in self._tasks:
            self._tasks[key] = make()
        return cast(T, self._tasks[key])

    def task_of(self, record: Record) -> Task:
        """The task that a record belongs to.

        Raises:
            HovitError: if config has no such run, study or analysis.
        """
        found: Task | None
        if record.kind == "train":
            seed = record.spec.get("seed")
            return self.train_task(self.run(record.id, seed if isinstance(seed, int) else None))
        if record.kind == "analysis":
            found = self.analyse_task(self.analysis(record.id))
        elif record.kind == "evaluation":
            found = self.evaluate_task(self.study(record.id))
        else:
            found = self.measure_task(self.study(record.id))
        if found is None:
            raise HovitError(
                f"scale {self.scale.id} has nothing to do for {record.kind} {record.id}"
            )
        return found

    def tasks(self, studies: Iterable[Study]) -> list[Task]:
        """Tasks for the tables of these studies: runs (upstream runs first), then measurements."""
        studies = list(studies)
        cited = [self.study(name) for s in studies if not self.measure_task(s) for name in s.cites]
        studies = list({study.id: study for study in [*studies, *cited]}.values())
        trained: list[Task] = [self.train_task(run) for run in self.needed(studies)]
        return trained + [task for study in studies if (task := self.measure_task(study))]

    def _analysed(self, analysis: Analysis) -> dict[str, Run]:
        """The run of each row of an analysis: the one with the first seed."""
        found = {}
        for ref in analysis.of:
            study_id, row_id = ref.split("/")
            study = self.study(study_id)
            if runs := self.runs_of(study, study.row(row_id)):
                found[ref] = runs[0]
        return found

    def _analysis_packs(self, analysis: Analysis, runs: dict[str, Run]) -> dict[str, Pack]:
        """The images of each row: those of the run, or for figures the photographs of the scale."""
        name = self.scale.shown_photographs
        if name is None or not ANALYSIS_KINDS[analysis.kind].shows_images:
            return {ref: run.pack for ref, run in runs.items()}
        photographs = self.config.datasets[name]
        return {ref: Pack(photographs, run.image_size) for ref, run in runs.items()}

    # Claims

    @cached_property
    def claimed(self) -> list[Study]:
        """The studies that claims refer to."""
        return [self.study(name) for name in sorted({split_ref(ref)[1] for ref in self._refs})]

    @cached_property
    def claimed_analyses(self) -> list[str]:
        """The analyses that claims refer to."""
        return sorted({split_ref(ref)[0] for ref in self._refs} - {""})

    @property
    def _refs(self) -> list[str]:
        files = self.config.claims.values()
        both = [ref for file in files for claim in file.claims for ref in (claim.of, claim.to)]
        return [ref for ref in both if ref]


def load_plan(
    scale: str = "smoke", root: Path = Path("config"), weights_file: str | Path | None = None
) -> Plan:
    """Read `config/` and resolve it at `scale`.

    Raises:
        HovitError: for a mistake in `config/`, an unknown scale, or unreadable weights.
    """
    config = load_config(root)
    if scale not in config.scales:
        known = ", ".join(config.scales)
        raise HovitError(f"no scale {scale!r} in {root}/scales; there are {known}")
    path = Path(weights_file) if weights_file else None
    if path is not None and path.suffix != ".safetensors" and not path.is_dir():
        raise HovitError(
            f"{path}: weights must be a .safetensors file, or a folder of them (pickles are not "
            "opened)"
        )
    if path is not None and path.is_dir() and not any(path.glob("*.safetensors")):
        raise HovitError(f"{path}: has no .safetensors file, but weights are read from it")
    plan = Plan(config, config.scales[scale], path)
    plan.runs  # noqa: B018 (resolves and checks every run now)
    return plan


def all_packs(root: Path = Path("config")) -> dict[str, Pack]:
    """The packs of every scale: id -> pack."""
    config = load_config(root)
    plans = [Plan(config, scale) for scale in config.scales.values()]
    return {pack.id: pack for plan in plans for pack in plan.packs.values()}
