"""What the profiles make of the DAG's jobs, asked of Snakemake itself."""

import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

CARD = 78000


def planned(*args: str) -> list[dict[str, str]]:
    """Every job of a dry run: its rule and its resources."""
    command = [sys.executable, "-m", "snakemake", "-n", "--forceall", "--cores", "4",
               "results/tables/hovit.md", *args]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    jobs = []
    for block in re.split(r"\n(?=(?:local)?rule )", done.stdout + done.stderr):
        if name := re.match(r"(?:local)?rule (\w+):", block):
            line = re.search(r"resources: (.*)", block)
            pairs = re.findall(r"(\w+)=([^,\n]+)", line[1]) if line else []
            jobs.append({"rule": name[1], **dict(pairs)})
    return jobs


def profile(name: str) -> dict:
    return yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text())


@pytest.mark.slow
def test_a_card_takes_several_trainings_or_one_measurement():
    limit = dict(entry.split("=") for entry in profile("gpu")["resources"])
    assert int(limit["gpu_mb"]) == CARD
    jobs = planned("--workflow-profile", "profiles/gpu", "--config", "scale=proxy")
    claims = {job["rule"]: int(job["gpu_mb"]) for job in jobs if "gpu_mb" in job}
    assert claims["train"] * 2 <= CARD  # two at once, at least
    assert claims["measure"] == CARD  # beside nothing
    assert {"train", "measure"} <= {job["rule"] for job in jobs}
    assert all("gpu_mb" not in job for job in jobs if job["rule"] in ("table", "data"))


@pytest.mark.slow
def test_slurm_jobs_ask_for_memory_time_and_a_card():
    jobs = planned("--workflow-profile", "profiles/slurm", "--config", "scale=proxy")
    by_rule = {job["rule"]: job for job in jobs}
    assert by_rule["train"]["gpu"] == "1"
    assert by_rule["train"]["mem_mb"] == "6000"
    assert by_rule["train"]["runtime"] == "720"
    assert "--exclusive" in by_rule["measure"]["slurm_extra"]
    assert by_rule["table"]["runtime"] == "30"
    assert "gpu" not in by_rule["table"]
    trained = {(job["rule"], i) for i, job in enumerate(jobs) if job["rule"] == "train"}
    assert len(trained) == 19  # one job a run: six rows and the pretraining, three seeds or one
