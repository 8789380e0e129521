"""DVC around the DAG, on real repositories: the real dvc.yaml and Snakefile, one small study."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from hovit.report.figures.draw import FIGURES
from hovit.utils.dvc_lock import check_stored
from hovit.utils.errors import HovitError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dvc")]  # they share one repository
TRACKED = ("Snakefile", "rules", "dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvc/plots",
           ".dvcignore", ".gitignore", "profiles", "config", "src", "results/evidence",
           "figures/README.md", "figures/thumbnails", "paper/front.png")  # fmt: skip
FIGURE = "training_curves"  # reads the study below alone
STUDY = """
id: hovit
title: "Two rows"
source: {paper: ours, place: "a test"}
columns: [parameters, top1, latency]
rows:
  - {id: levit_deck, label: "LeViT", model: levit_deck, model_args: {depth: [1, 1, 1]}, ours: true}
  - {id: hovit, label: "HoViT", model: hovit, recipe: deck_100, reported: {top1: "27.47"}}
"""
CLAIMS = """
id: tiny
paper: hovit
claims:
  - {id: p, says: "HoViT has 4,937,962 parameters", place: "a test", kind: value,
     of: hovit/hovit/parameters, reported: "4937962"}
"""


def run(root: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command in a repository, as in an activated environment, on two cores."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(root / "src"), **env},
        capture_output=True,
        text=True,
    )


def ok(root: Path, *command: str, **env: str) -> str:
    result = run(root, *command, **env)
    assert result.returncode == 0, f"{command}\n{(result.stdout + result.stderr)[-4000:]}"
    return result.stdout + result.stderr


def git(root: Path, *args: str) -> str:
    return ok(root, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", *args)


def shrink(root: Path) -> None:
    """Leave one study with two rows, one figure, no paper, one claim and a few images."""
    for kind, name, text in (("studies", "hovit", STUDY), ("claims", "tiny", CLAIMS)):
        shutil.rmtree(root / "config" / kind)
        (root / "config" / kind).mkdir()
        (root / f"config/{kind}/{name}.yaml").write_text(text)
    shutil.rmtree(root / "config/analyses")
    (root / "config/analyses").mkdir()
    (root / "config/analyses/README.md").write_text("None.\n")  # git keeps no empty folder
    for name in ("sample", "mini", "proxy"):
        (root / f"config/scales/{name}.yaml").unlink()
    pipeline = (root / "dvc.yaml").read_text()
    others = FIGURES.keys() - {FIGURE}
    edits = {
        "config/scales/smoke.yaml": [
            ("{row: pretraining/resnet50}", "{timm: resnet50.a1_in1k}"),
            *(
                (f"{{row: efficientvit_pretraining/{row}}}", "{timm: resnet50.a1_in1k}")
                for row in ("m5", "mobilenetv3", "vit_small")
            ),
            ("keep_weights: false", "keep_weights: true"),  # bytes for DVC to keep
        ],
        "Snakefile": [("figure=FIGURES, ext", f'figure=["{FIGURE}"], ext')],
        "dvc.yaml": [
            ("--cores all", "--cores 2"),
            (
                pipeline[pipeline.index("  paper:\n") : pipeline.index("  # Snakemake metadata")],
                "",
            ),
            ("      - paper/paper.pdf\n      - results/paper\n", ""),
            *((f"  - figures/{name}.png\n", "") for name in others),
            *(
                (f"      - figures/{name}.{ext}:\n          persist: true\n", "")
                for name in others
                for ext in ("pdf", "png")
            ),
        ],
    }
    for name, replacements in edits.items():
        text = (root / name).read_text()
        for old, new in replacements:
            assert old in text, (name, old)
            text = text.replace(old, new)
        (root / name).write_text(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which `dvc repro` ran once and was pushed to a folder."""
    folder = tmp_path_factory.mktemp("a folder")
    root = folder / "hovit copy"
    root.mkdir()
    for name in TRACKED:
        source, target = ROOT / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    shrink(root)
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "all")
    first = clone(root, folder / "first")
    ok(first, "dvc", "repro")
    git(first, "commit", "-qm", "what dvc repro staged")
    ok(first, "dvc", "remote", "add", "--local", "--default", "store", str(folder / "remote"))
    ok(first, "dvc", "push")
    return first


def clone(source: Path, target: Path) -> Path:
    git(source, "clone", "-q", str(source), str(target))
    return target


def pulled(made: Path, name: str) -> Path:
    """A fresh clone with everything pulled from the remote."""
    root = clone(made, made.parent / name)
    remote = made.parent / "remote"
    ok(root, "dvc", "remote", "add", "--local", "--default", "store", str(remote))
    ok(root, "dvc", "pull")
    return root


@pytest.fixture(scope="module")
def pulled_clone(made: Path) -> Path:
    """A clone with everything pulled; each test that changes it restores it."""
    return pulled(made, "pulled")


def assert_at_rest(root: Path) -> None:
    """DVC, Snakemake and git have nothing to do."""
    assert "Nothing to be done" in ok(root, "snakemake", "--cores", "2", "results/tables")
    assert "Data and pipelines are up to date" in ok(root, "dvc", "repro")
    assert git(root, "status", "--porcelain") == ""


def flip(path: Path, keep_time: bool = False) -> None:
    """Flip one byte in the middle of a file."""
    stat = path.stat()
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(stat.st_size // 2)
        byte = file.read(1)
        file.seek(stat.st_size // 2)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(stat.st_mode)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_repro_on_a_fresh_clone_makes_the_tables_and_then_rests(made: Path) -> None:
    assert "27.47" in (made / "results/tables/hovit.md").read_text()
    record = json.loads(next(made.glob("results/runs/smoke/hovit*/seed0/record.json")).read_text())
    assert record["provenance"]["dirty"] is False
    assert "Data and pipelines are up to date" in ok(made, "dvc", "repro")
    assert_at_rest(made)


def test_after_a_push_and_a_pull_nothing_is_made_again(pulled_clone: Path, made: Path) -> None:
    assert_at_rest(pulled_clone)
    for name in (f"{FIGURE}.pdf", f"{FIGURE}.png", "README.md"):  # DVC's files, and git's
        files = [root / "figures" / name for root in (pulled_clone, made)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert "files match dvc.lock" in ok(pulled_clone, sys.executable, "-m", "hovit", "verify")


@pytest.mark.exhaustive
def test_after_five_pulls_of_five_nothing_is_made_again(made: Path) -> None:
    for i in range(5):
        root = pulled(made, f"pulled {i}")
        assert_at_rest(root)
        assert "files match dvc.lock" in ok(root, sys.executable, "-m", "hovit", "verify")


def test_metrics_and_plots_show_the_runs(made: Path) -> None:
    shown = ok(made, "dvc", "metrics", "show")
    assert all(word in shown for word in ("top1", "loss", "reproduced", "hovit.pets.deck_100"))
    plots = ok(made, "dvc", "plots", "show", "--out", "../plots", "--json")
    spec = json.loads(plots)["data"]["val_top1"][0]["content"]
    assert len({point["run"] for point in spec["data"]["values"]}) == 2
    assert spec["encoding"]["color"]["field"] == "run"
    ok(made, "dvc", "plots", "show", "--out", "../plots")
    assert "val_top1" in (made.parent / "plots/index.html").read_text()


def test_a_flipped_byte_is_found_and_named_and_restored(pulled_clone: Path) -> None:
    root = pulled_clone
    weights = next(root.glob("results/runs/smoke/hovit*/seed0/weights.safetensors"))
    name = weights.relative_to(root).as_posix()
    flip(weights)
    assert f"modified: {name}" in ok(root, "dvc", "data", "status", "--granular")
    ok(root, "dvc", "checkout", "--force", "results/runs/smoke")

    md5s = {p.read_bytes(): p for p in (root / ".dvc/cache/files/md5").glob("*/*")}
    cached = md5s[weights.read_bytes()]
    for victim in (weights, cached):  # what DVC believes unchanged: same size, same time
        flip(victim, keep_time=True)
        found = run(root, sys.executable, "-m", "hovit", "verify")
        assert found.returncode == 1
        assert f"{victim.relative_to(root)}: differs from dvc.lock" in found.stderr
        assert name in found.stderr
        assert "error: 1 files" in found.stderr
        victim.unlink()
        ok(root, "dvc", "pull")
        assert "files match dvc.lock" in ok(root, sys.executable, "-m", "hovit", "verify")
    assert_at_rest(root)


def test_an_s3_remote_takes_and_gives_everything(made: Path, monkeypatch) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(key, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("NO_PROXY", host)
        url = f"http://{host}:{port}"
        request = urllib.request.Request(f"{url}/hovit", method="PUT")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()
        target = clone(made, made.parent / "from s3")
        for root in (made, target):
            ok(root, "dvc", "remote", "add", "--local", "s3", "s3://hovit/dvc")
            ok(root, "dvc", "remote", "modify", "--local", "s3", "endpointurl", url)
        assert "pushed" in ok(made, "dvc", "push", "--remote", "s3")
        assert "up to date" in ok(made, "dvc", "push", "--remote", "s3")
        ok(target, "dvc", "pull", "--remote", "s3")
        assert "files match dvc.lock" in ok(target, sys.executable, "-m", "hovit", "verify")
        assert "Data and pipelines are up to date" in ok(target, "dvc", "repro")
    finally:
        server.stop()


def heed_interrupts() -> None:
    """Processes that a shell starts in the background ignore SIGINT, and so do their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_repro(root: Path) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(root / "src")}
    return subprocess.Popen(
        ["dvc", "repro"], cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
        preexec_fn=heed_interrupts,
    )  # fmt: skip


def test_a_changed_recipe_trains_only_its_runs_even_if_interrupted(made: Path) -> None:
    root = pulled(made, "changed")
    recipe = root / "config/recipes/deck_100.yaml"
    lr = yaml.safe_load(recipe.read_text())["lr"]
    recipe.write_text(recipe.read_text().replace(f"lr: {lr}", "lr: 0.01"))
    params = json.loads(run(root, "dvc", "params", "diff", "--json").stdout)
    assert list(params) == ["config/recipes/deck_100.yaml"]
    assert params["config/recipes/deck_100.yaml"]["lr"].items() >= {"old": lr, "new": 0.01}.items()

    process = start_repro(root)
    while not [*root.glob("logs/train/*/*/*.log")]:
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)  # the import of torch alone takes longer, so training has not ended
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    interrupted = process.communicate(timeout=60)[0]
    assert process.returncode != 0

    first, second = start_repro(root), start_repro(root)  # DVC may refuse one of the two
    said = {process.communicate()[0]: process.returncode for process in (first, second)}
    assert sorted(said.values())[0] == 0, said
    for text, code in said.items():
        assert code == 0 or "lock" in text.lower() or "is busy" in text.lower(), text
    done = "".join(said) + ok(root, "dvc", "repro")
    assert done.count("] train ") == 1
    assert "] train hovit.pets.deck_100 seed 0, " in done
    all_done = interrupted + done
    assert all_done.count("] train ") == all_done.count("] train hovit.pets.deck_100 seed 0, ")
    assert not any(f"] {name} " in all_done for name in ("data", "measure"))

    changed = json.loads(run(root, "dvc", "metrics", "diff", "--json").stdout)
    assert list(changed) == ["results/metrics/smoke/hovit.pets.deck_100.seed0.json"]
    assert "loss" in next(iter(changed.values()))
    git(root, "commit", "-qam", "the new lock")
    assert_at_rest(root)


def test_the_environment_need_not_be_activated(made: Path) -> None:
    (made / ".venv").symlink_to(sys.prefix)
    done = ok(made, ".venv/bin/dvc", "repro", "--force", "--single-item", "provenance",
              PATH="/usr/bin:/bin")  # fmt: skip
    assert "Nothing to be done" in done


def test_results_that_are_there_already_are_taken_over(pulled_clone: Path) -> None:
    """`dvc repro` after `make tables` makes nothing again."""
    root = pulled_clone
    (root / "dvc.lock").unlink()
    done = ok(root, "dvc", "repro")
    assert done.count("Nothing to be done") == 4
    assert git(root, "status", "--porcelain") == ""


def test_dvc_is_quiet_and_its_stages_are_whole() -> None:
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    outs = [out for stage in pipeline["stages"].values() for out in stage["outs"]]
    assert all(next(iter(out.values())) == {"persist": True} for out in outs)
    plots = {plot for plot in pipeline["plots"] if isinstance(plot, str)}
    assert plots == {f"figures/{figure}.png" for figure in FIGURES}
    drawn = {path for out in outs for path in out if path.startswith("figures/")}
    assert drawn == {f"figures/{figure}.{ext}" for figure in FIGURES for ext in ("pdf", "png")}
    params = {next(iter(param)) for param in pipeline["stages"]["runs"]["params"]}
    recipes = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("config/recipes/*.yaml")}
    assert params == recipes | {"config/scales/${scale}.yaml"}
    for option in ("core.analytics", "core.check_update"):
        assert ok(ROOT, "dvc", "config", option).strip() == "false"


@pytest.mark.parametrize("text", [None, "stages: 3", "[", "stages: {a: {outs: [1]}}"])
def test_verify_without_a_readable_lock_says_so(tmp_path: Path, text: str | None) -> None:
    if text:
        (tmp_path / "dvc.lock").write_text(text)
    with pytest.raises(HovitError, match=r"dvc\.lock"):
        check_stored(tmp_path)


@pytest.mark.parametrize("md5", ["12345", "null", "[a]", "../../etc", "'12345'", "2026-01-01"])
def test_a_lock_whose_md5_is_none_is_one_line(tmp_path: Path, md5: str) -> None:
    out = f"    outs:\n    - path: figures\n      md5: {md5}\n"
    (tmp_path / "dvc.lock").write_text(f"stages:\n  tables:\n    cmd: make\n{out}")
    with pytest.raises(
        HovitError, match=r"dvc\.lock: figures: md5: .* is not an md5 of 32 hex digits"
    ):
        check_stored(tmp_path)
