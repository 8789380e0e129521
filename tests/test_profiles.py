"""Resources and concurrency of Snakemake jobs under each profile."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from hovit.config.plan import load_plan

CARD = 78000
# Replaces the commands of hovit: a job that writes its files and logs which jobs ran meanwhile.
# A training waits until two have met, each seeing the other, so the speed of the machine does not
# matter.
STAND_IN = """
import os, re, sys, time
from pathlib import Path

rule, name = sys.argv[1:3]
card = Path("card")
me = card / f"{rule} {name} {os.getpid()}"
me.touch()
present, last = set(), time.monotonic() + (60 if rule == "train" else 0.5)
while time.monotonic() < last:
    present |= set(os.listdir(card))
    if rule == "train" and sum(each.startswith("train ") for each in present) > 1:
        (Path("met") / me.name).touch()
    if rule == "train" and len(os.listdir("met")) > 1:
        break
    time.sleep(0.05)
with open("company.txt", "a") as file:
    file.write(f"{rule}:{','.join(sorted(p.split()[0] for p in present - {me.name}))}\\n")
for path in os.environ["MAKES"].split():
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("made up")
me.unlink()
"""


def snakemake(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--cores", "8", *args]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def planned(*args: str) -> list[dict[str, str]]:
    """Every job of a dry run, with its rule and resources."""
    done = snakemake(ROOT, "-n", "--forceall", "results/tables/hovit.md", *args)
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


@pytest.mark.parametrize("name", ["default", "gpu", "slurm"])
def test_profiles_name_rules_of_the_snakefile(name: str) -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    rules = set(re.findall(r"^rule (\w+):", text, re.M)) | set(re.findall(r" as (\w+) with:", text))
    entries = profile(name).get("set-resources", [])
    assert {entry.split(":")[0] for entry in entries} <= rules


@pytest.mark.slow
def test_a_gpu_runs_several_trainings_or_one_measurement() -> None:
    limit = dict(entry.split("=") for entry in profile("gpu")["resources"])
    assert int(limit["gpu_mb"]) == CARD
    jobs = planned("--workflow-profile", "profiles/gpu", "--config", "scale=proxy")
    claims = {job["rule"]: int(job["gpu_mb"]) for job in jobs if "gpu_mb" in job}
    assert claims["train"] * 2 <= CARD  # at least two at once
    assert claims["measure"] == CARD  # nothing else
    assert {"train", "measure"} <= {job["rule"] for job in jobs}
    assert all("gpu_mb" not in job for job in jobs if job["rule"] in ("table", "data"))


@pytest.mark.slow
def test_trainings_share_the_gpu_and_a_measurement_runs_alone(tmp_path: Path) -> None:
    """With jobs that only write their files: which jobs Snakemake runs at the same time."""
    for name in ("profiles", "config", "rules"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "Snakefile", tmp_path)
    # Threads would also keep a measurement alone; here only GPU memory must.
    for path in (tmp_path / "rules").glob("*.smk"):
        text = re.sub(r"    threads: .*\n", "    threads: 1\n", path.read_text())
        text = re.sub(r'"python -m hovit', r'"MAKES=\'{output}\' python stand_in.py', text)
        path.write_text(text)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    for name in ("card", "met"):
        (tmp_path / name).mkdir()
    done = snakemake(tmp_path, "results/tables/hovit.md", "results/tables/conv_shrink.md",
                     "--workflow-profile", "profiles/gpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    company = [line.split(":") for line in (tmp_path / "company.txt").read_text().splitlines()]
    assert sum("train" in others.split(",") for rule, others in company if rule == "train") >= 2
    alone = [others for rule, others in company if rule == "measure"]
    assert len(alone) == 2
    assert not any({"train", "measure"} & set(others.split(",")) for others in alone)
    assert not any("measure" in others for rule, others in company if rule == "train")


@pytest.mark.slow
def test_slurm_jobs_request_memory_time_and_a_gpu() -> None:
    jobs = planned("--workflow-profile", "profiles/slurm", "--config", "scale=proxy")
    by_rule = {job["rule"]: job for job in jobs}
    assert by_rule["train"]["gpu"] == "1"
    assert by_rule["train"]["mem_mb"] == "6000"
    assert by_rule["train"]["runtime"] == "720"
    assert "--exclusive" in by_rule["measure"]["slurm_extra"]
    assert by_rule["table"]["runtime"] == "30"
    assert "gpu" not in by_rule["table"]
    trained = {(job["rule"], i) for i, job in enumerate(jobs) if job["rule"] == "train"}
    plan = load_plan("proxy", ROOT / "config")
    runs = plan.needed([plan.study("hovit")])
    assert len(trained) == len(runs) > len(plan.study("hovit").rows)  # one job a run


@pytest.mark.slow
@pytest.mark.parametrize("text", ["README.md", "profiles/slurm/config.yaml"])
def test_setting_account_and_partition_keeps_the_defaults(text: str) -> None:
    """On the command line, --default-resources replaces that of the profile: repeat all values."""
    said = re.search(r"--default-resources ((?: ?\w+=\w+)+)", (ROOT / text).read_text())
    assert said
    given = dict(pair.split("=") for pair in said[1].split())
    defaults = dict(entry.split("=") for entry in profile("slurm")["default-resources"])
    assert given == {"slurm_account": "A", "slurm_partition": "P"} | defaults
