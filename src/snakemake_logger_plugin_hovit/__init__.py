"""Snakemake's output for people: one progress bar, failures, and where to look at the end.

Chosen by `logger: hovit` in profiles/. On a terminal it is a bar with the number of jobs, the time
left and the jobs under way; in a pipe or a CI log, one short line for each finished job. Dry runs
and `--verbose` print what Snakemake prints itself, and .snakemake/log/ always has all of that.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from snakemake_interface_logger_plugins.base import LogHandlerBase

from hovit.utils.machine import name_user, use_writable_caches

LOG_LINES = 15  # of a failed job
# Messages without an event that say nothing about this workflow.
ROUTINE = (
    "Using workflow specific profile", "Assuming unrestricted shared filesystem", "Using shell",
    "Building DAG of jobs", "Provided ", "Rules claiming more threads", "Job stats",
    "Singularity containers", "Conda environments", "Select jobs to execute", "Execute ",
    "Finished job", "Complete log", "Elapsed time", "host: ", "Removing temporary output",
    "Shutting down, this might take some time", "Exiting because a job execution failed",
)  # fmt: skip
INDEX = Path("results/tables/index.md")
PAGE = Path("results/index.html")
CLAIMS = Path("results/claims.json")


class LogHandler(LogHandlerBase):
    """Prints a run's progress."""

    def __post_init__(self) -> None:
        use_writable_caches()  # Snakemake makes its cache and asks for the user after this
        name_user()
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.plain = bool(self.common_settings.dryrun or self.common_settings.verbose)
        self.jobs: dict[int, str] = {}  # under way: id -> title
        self.begun: dict[int, float] = {}
        self.done = self.total = 0
        self.started = time.monotonic()
        self.failed = False
        self.whole = False  # whether the run makes, or finds made, all tables
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # so that the counts always fit
        self.bar = Progress(
            BarColumn(20), MofNCompleteColumn(), TextColumn("jobs,"),
            TimeRemainingColumn(compact=True), TextColumn("left:"),
            TextColumn("{task.description}", markup=False, table_column=rest),
            console=self.console, transient=True, expand=True,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=None)

    @property
    def writes_to_stream(self) -> bool:
        """Whether it replaces Snakemake's own output."""
        return True

    @property
    def writes_to_file(self) -> bool:
        """Whether it writes a log file."""
        return False

    @property
    def has_filter(self) -> bool:
        """Whether it filters messages; if not, --quiet applies."""
        return False

    @property
    def has_formatter(self) -> bool:
        """Whether it formats messages itself."""
        return False

    @property
    def needs_rulegraph(self) -> bool:
        """Whether it needs the graph of rules."""
        return False

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, or move the bar."""
        try:
            event = getattr(record, "event", None)
            act = getattr(self, f"on_{event}", None)
            if act is not None and not self.plain:
                act(record)
            elif self.plain or record.levelno >= logging.WARNING or not self._is_routine(record):
                self._print(self.format(record))
        except Exception:
            self.handleError(record)

    def _is_routine(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith("Nothing to be done"):
            self.whole = True
        return getattr(record, "event", None) is not None or message.startswith(ROUTINE)

    def _print(self, text: str, style: str | None = None) -> None:
        if text:
            self.console.print(text, style=style, markup=False)

    def on_run_info(self, record: Any) -> None:
        """The jobs of a run, by rule."""
        counts = dict(record.stats)
        self.total = counts.pop("total", 0)
        self.whole = "results/tables" in counts or "all_tables" in counts
        rules = ", ".join(f"{n} {rule}" for rule, n in counts.items())
        self._print(f"{self.total} jobs: {rules}")
        self.bar.update(self.task, total=self.total)
        if self.console.is_terminal:
            self.bar.start()

    def on_job_info(self, record: Any) -> None:
        """A job begins."""
        self.jobs[record.jobid] = title(record.rule_name, dict(record.wildcards))
        self.begun[record.jobid] = time.monotonic()
        self._show()

    def on_job_finished(self, record: Any) -> None:
        """A job has ended well."""
        name = self.jobs.pop(record.job_id, None)
        self.done += 1
        if name and not self.console.is_terminal:
            seconds = time.monotonic() - self.begun[record.job_id]
            self._print(f"[{self.done}/{self.total}] {name}, {seconds:.0f} s")
        self._show()

    def on_job_error(self, record: Any) -> None:
        """A job has failed: what it was, and the last lines of its log."""
        name = self.jobs.pop(record.jobid, record.rule_name)
        self.failed = True
        self._print(f"failed: {name}", "red")
        for log in record.log:
            self._print("\n".join(f"    {line}" for line in last_lines(Path(log))))
            self._print(f"    (all of it: {log})")
        self._show()

    def on_progress(self, record: Any) -> None:
        """Said by the bar and the lines."""

    def on_shellcmd(self, record: Any) -> None:
        """Snakemake's default filter passes it only with --printshellcmds."""
        self._print(str(record.shellcmd or ""))

    def on_workflow_started(self, record: Any) -> None:
        """Versions and folders are in .snakemake/log/."""

    def _show(self) -> None:
        running = "; ".join(self.jobs.values())
        self.bar.update(self.task, completed=self.done, description=running)

    def close(self) -> None:
        """At the end: where to look, and what the run found."""
        if self.console.is_terminal:
            self.bar.stop()
            if self.done:  # the finished bar is gone
                seconds = time.monotonic() - self.started
                self._print(f"{self.done} of {self.total} jobs done in {seconds:.0f} s")
        if not self.plain and not self.failed and self.whole and CLAIMS.exists() and PAGE.exists():
            self._print(f"{PAGE} and {INDEX} show the results")
            self._print(f"claims: {json.loads(CLAIMS.read_text(encoding='utf-8'))['tally']}")
        self.whole, self.done = False, 0  # closed once more at exit
        super().close()


def title(rule: str, wildcards: dict[str, str]) -> str:
    """A job in a few words: `train hovit.pets.deck seed 0`."""
    verb = rule.split("_")[0] if wildcards else rule  # train_and_forget trains
    words = [f"seed {value}" if key == "seed" else value for key, value in wildcards.items()]
    return " ".join([verb, *words])


def last_lines(log: Path) -> list[str]:
    """The last lines of a job's log; none if it left no log."""
    if not log.is_file():
        return []
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
