"""The page, from made-up records; and in Chromium, by mouse and keyboard, where there is one."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import Formatter

import pytest
from browser import CHROMIUM, Browser
from conftest import ROOT
from markupsafe import escape
from synthetic import GPU, measure_record, train_record, write_all

from hovit.config.plan import Plan, load_plan
from hovit.records.record import read_record, write_record
from hovit.report.claims.check import GROUPS, Verdict, check_all
from hovit.report.order import PAPERS, in_order
from hovit.report.page.write import PAGE, WEB, write_page
from hovit.report.readme import FINDINGS, PICTURE
from hovit.report.results import Results
from hovit.report.sources import Sources, load_sources
from hovit.report.tables.columns import NOTHING, make_table
from hovit.utils.files import write_text

pytestmark = pytest.mark.xdist_group("page")  # the tests share records, page and browser
HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>&amp;`"
EVIDENCE = "results/evidence/test-gpu"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan("smoke", ROOT / "config")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> Path:
    """A whole run at scale smoke and evidence of the larger mini, all of made-up numbers."""
    root = tmp_path_factory.mktemp("made up")
    write_all(plan, root)
    write_all(load_plan("mini", ROOT / "config"), root, EVIDENCE)
    write_page(plan, root)
    return root


def data_of(root: Path) -> dict:
    """What the script of the page reads."""
    text = (root / PAGE).read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def in_paper_order(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return sorted(verdicts, key=lambda verdict: list(PAPERS).index(verdict.paper))


def test_every_claim_table_and_number_is_there(plan: Plan, root: Path) -> None:
    text, data = (root / PAGE).read_text(), data_of(root)
    titles = re.findall(r'<section class="study" id="t-(\w+)">', text)
    assert titles == [study.id for study in in_order(plan.config.studies.values())]
    findings = text[text.index('id="findings"') : text.index('id="claims"')]
    names = {name for text in FINDINGS for _, name, _, _ in Formatter().parse(text) if name}
    assert all(f'"#c/{claim}"' in findings for claim in names)
    assert all(f'href="{link}"' in text for link in ("../README.md", "../paper/paper.pdf"))
    verdicts = in_paper_order(check_all(load_sources(plan, root)))
    assert list(data["claims"]) == [v.id for v in verdicts]
    for name, file in plan.config.claims.items():
        assert all(data["claims"][claim.id]["file"] == name for claim in file.claims)
        assert all(str(escape(entry.says)) in text for entry in file.not_checkable)
    alone = Sources(Results(plan, root), ())
    for study in plan.config.studies.values():
        assert f'id="t-{study.id}"' in text
        own = [key for key in data["values"] if key.startswith(f"{study.id}/")]
        cells = [c for column in make_table(study, alone).columns for c in column.cells]
        run = [key for key in own if key.endswith(("/run", "/reported"))]
        assert len(run) == len([cell for cell in cells if cell != NOTHING])
    states = {key.rsplit("/", 1)[1].split("@")[0] for key in data["values"]}
    assert states == {"reported", "evidence", "run"}
    assert all(name in text for name in plan.config.analyses)


def test_any_number_leads_to_its_record_and_the_command_that_remakes_it(root: Path) -> None:
    data = data_of(root)
    measured = [v for key, v in data["values"].items() if not key.endswith("/reported")]
    traced = [value for value in measured if value["records"]]
    assert len(traced) > 0.95 * len(measured)  # the rest follows from a rule in config/
    for name in {path for value in traced for path in value["records"]}:
        shown = data["records"][name]
        if shown["kind"] == "pack":
            continue
        record = read_record(root / name)
        assert shown["commit"] == record.provenance.commit
        assert shown["spec"] == record.spec
        assert shown["device"] == str(record.provenance.device)
        target = name.replace(EVIDENCE, "results/runs")
        assert f"--force '{target}'" in shown["rerun"]
        assert ("--config scale=mini" in shown["rerun"]) == name.startswith(EVIDENCE)
    value = data["values"]["hovit/hovit/top1/evidence@test-gpu.mini"]
    assert value["n"] == len(value["records"]) == 2
    assert value["spread"] == pytest.approx(0.5**0.5)


def test_the_same_records_give_the_same_bytes(plan: Plan, root: Path) -> None:
    first = (root / PAGE).read_bytes()
    write_page(load_plan("smoke", ROOT / "config"), root)
    assert (root / PAGE).read_bytes() == first


def test_it_loads_nothing(root: Path) -> None:
    text = (root / PAGE).read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href|action|srcset)=["']?(https?:)?//""", text)
    code = "".join(path.read_text() for path in WEB.iterdir())
    assert not re.search(r"fetch\(|XMLHttp|import\(|@import|url\(|https?://(?!www\.w3\.org/2000/svg)",
                         code)  # fmt: skip
    assert "innerHTML" not in code


def test_without_any_record_it_still_says_what_the_seeds_reported(
    plan: Plan, tmp_path: Path
) -> None:
    write_page(plan, tmp_path)
    data = data_of(tmp_path)
    assert data["records"] == {}
    assert data["values"]["hovit/hovit/top1/reported"]["text"] == "27.47"
    assert data["claims"]["parameters-hovit"]["verdict"] == "not measured"


def test_a_record_or_a_table_that_is_refused_is_named(
    plan: Plan, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "results", tmp_path / "results")
    path = tmp_path / plan.run("hovit.pets.deck").folder / "record.json"
    write_text(path, path.read_text()[:100])
    two = measure_record(plan, "depth")
    two.results["rows"]["l_blocks_222"]["device"] = GPU.model_dump()
    write_record(tmp_path / plan.measure_task(plan.study("depth")).path, two)
    write_page(plan, tmp_path)
    text = (tmp_path / PAGE).read_text()
    assert re.search(r"hovit\.pets\.deck/seed0/record\.json: not readable as JSON", text)
    assert re.search(r"The table is refused: .*depth\.json: latency of .*Test CPU.*Test GPU", text)
    assert "hovit/hovit/top1/run" not in data_of(tmp_path)["values"]
    assert "depth/levit_deck/parameters/run" not in data_of(tmp_path)["values"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, plan: Plan, root: Path) -> Path:
    """The same with a record whose device, results and versions are markup."""
    top = tmp_path_factory.mktemp("hostile")
    shutil.copytree(root / "results", top / "results")
    run = plan.run("hovit.pets.deck")
    record = train_record(run, 50.0)
    device = record.provenance.device.model_copy(update={"name": HOSTILE})
    made = record.provenance.model_copy(update={"device": device, "versions": {HOSTILE: HOSTILE}})
    record = record.model_copy(update={"provenance": made})
    record.results[HOSTILE] = HOSTILE
    write_record(top / run.folder / "record.json", record)
    write_page(plan, top)
    return top


def test_a_string_of_a_record_is_never_markup(hostile: Path) -> None:
    text = (hostile / PAGE).read_text()
    assert "<img" not in text
    assert text.count("</script>") == 2  # the data's and the script's own
    name = "results/runs/smoke/hovit.pets.deck/seed0/record.json"
    assert data_of(hostile)["records"][name]["results"][HOSTILE] == HOSTILE


# ---- In a browser

needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def tab(browser: Browser, root: Path) -> Iterator[Browser]:
    """The page, freshly opened; in the end it must have asked for nothing else, nor complained."""
    browser.requests.clear()
    browser.open(root / PAGE)
    browser.js("localStorage.clear()")
    browser.js(OPEN_GROUPS)
    yield browser
    assert set(browser.requests) <= {(root / PAGE).as_uri()}
    assert browser.errors == []


OPEN_GROUPS = "document.querySelectorAll('details.group').forEach(d => { d.open = true })"


def shown_claims(tab: Browser) -> list[str]:
    code = "[...document.querySelectorAll('.claims tbody tr')].filter(r => r.offsetParent)"
    return tab.js(f"{code}.map(r => r.dataset.verdict)")


@needs_chromium
def test_claims_are_filtered(tab: Browser, plan: Plan, root: Path) -> None:
    found = in_paper_order(check_all(load_sources(plan, root)))
    verdicts = [v.verdict for group in GROUPS for v in found if v.group == group]
    assert shown_claims(tab) == verdicts
    tab.click('#filters input[value="reproduced"]')
    assert shown_claims(tab) == [v for v in verdicts if v != "reproduced"]
    tab.click('#filters [name="text"]')
    tab.write("launcher")
    found = tab.js("[...document.querySelectorAll('.claims tbody tr')]"
                   ".filter(r => r.offsetParent).map(r => r.textContent)")  # fmt: skip
    assert 0 < len(found) < len(verdicts)
    assert all("launcher" in text.lower() for text in found)
    assert tab.js("document.querySelector('#shown').textContent").startswith(f"{len(found)} of")


@needs_chromium
def test_groups_are_collapsed_until_they_are_needed(browser: Browser, root: Path) -> None:
    open_groups = "[...document.querySelectorAll('details.group[open]')].length"
    browser.open(root / PAGE)
    assert browser.js("document.querySelectorAll('details.group').length") >= 6
    assert browser.js(open_groups) == 0
    browser.click('.toc a[href="#t-skipvit"]')
    browser.wait("document.querySelector('#tables-skipvit').open")
    assert browser.js(open_groups) == 1
    browser.wait("Math.abs(document.querySelector('#t-skipvit').getBoundingClientRect().y) < 200")
    browser.click('#filters input[value="reproduced"]')
    browser.wait(f"{open_groups} === 1 + document.querySelectorAll('#claims .group').length")


@needs_chromium
@pytest.mark.parametrize("width", [400, 1280])
def test_the_contents_list_does_not_overlap(browser: Browser, root: Path, width: int) -> None:
    browser.open(root / PAGE, width, 800)
    boxes = browser.js(
        "[...document.querySelectorAll('.toc li, .toc h3')].map(e => {"
        "const range = document.createRange(); range.selectNodeContents(e);"
        "const b = range.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; })"
    )
    assert len(boxes) > 30
    for i, (left, top, right, bottom) in enumerate(boxes):
        for x0, y0, x1, y1 in boxes[i + 1 :]:
            assert x1 <= left or right <= x0 or y1 <= top + 1 or bottom <= y0 + 1


@needs_chromium
def test_the_page_of_the_committed_evidence_opens(browser: Browser, tmp_path: Path) -> None:
    """Real records hold shapes that made-up ones lack; the picture of README stands on top."""
    shutil.copytree(ROOT / "results/evidence", tmp_path / "results/evidence")
    (tmp_path / "paper").mkdir()
    shutil.copy(ROOT / PICTURE, tmp_path / PICTURE)
    write_page(load_plan("smoke", ROOT / "config"), tmp_path)
    browser.errors.clear()
    browser.open(tmp_path / PAGE)
    assert browser.errors == []
    assert browser.js("document.querySelector('.front img').naturalWidth") > 500
    assert browser.js("document.querySelectorAll('.analysis .maps figure').length") > 10
    # The plot: choose images, find a model, read its points and the table of points.
    choose_images(browser, "Tiny-ImageNet-37 (stands in for Oxford-IIIT Pet)")
    every = browser.js("document.querySelectorAll('#scatter a').length")
    browser.click('#axes [name="text"]')
    browser.write("HoViT")
    browser.wait(f"document.querySelectorAll('#scatter a').length < {every}")
    points = browser.js(
        "[...document.querySelectorAll('#scatter a')].map(a => a.getAttribute('aria-label'))"
    )
    assert points
    assert all("hovit" in point.lower() for point in points)
    browser.click("#plot details summary")
    rows = browser.js("[...document.querySelectorAll('#points tbody tr')].map(r => r.innerText)")
    assert len(rows) == len(points)
    # Differences have a minus sign, which is no hyphen.
    head = "[...document.querySelectorAll('#t-launcher_imagenet thead th')]"
    column = browser.js(f"{head}.findIndex(th => th.textContent.includes('baseline, points'))")
    browser.js(f"{head}[{column}].querySelector('button').click()")
    cells = browser.js(
        "[...document.querySelectorAll('#t-launcher_imagenet tbody tr')]"
        f".map(r => r.cells[{column}].textContent.trim())"
    )
    found = filter(None, (re.match(r"[\u2212\d.]+", cell) for cell in cells))
    differences = [float(each.group().replace("\u2212", "-")) for each in found]
    assert differences == sorted(differences)
    assert differences[0] < 0 < len(differences) - 1


COLUMN = "[...document.querySelectorAll('#t-hovit tbody tr')].map(r => r.cells[{}].textContent)"


@needs_chromium
def test_tables_are_sorted_by_number_and_back(tab: Browser) -> None:
    before = tab.js(COLUMN.format(1))
    for direction in ("ascending", "descending", None):
        tab.click("#t-hovit thead th:nth-child(2) button")
        assert (
            tab.js("document.querySelector('#t-hovit thead th:nth-child(2)').ariaSort") == direction
        )
        cells = tab.js(COLUMN.format(1))
        numbers = [int(cell.replace(",", "")) for cell in cells if cell != NOTHING]
        if direction:
            assert numbers == sorted(numbers, reverse=direction == "descending")
            assert cells[len(numbers) :] == [NOTHING] * (len(cells) - len(numbers))
        else:
            assert cells == before


@needs_chromium
def test_a_click_on_a_number_tells_where_it_is_from(tab: Browser, plan: Plan, root: Path) -> None:
    tab.click('#t-hovit a[href$="hovit/hovit/top1/run"]')
    tab.wait("document.querySelector('#detail').open")
    text = tab.js("document.querySelector('#detail').innerText")
    run = plan.run("hovit.pets.deck")
    record = read_record(root / run.folder / "record.json")
    for fact in (str(run.folder / "record.json"), record.spec_hash, record.provenance.commit,
                 f"snakemake --cores all --force '{run.folder / 'record.json'}'", "27.47",
                 "Test CPU, 2 threads", "1 random seed", "smoke", "digits"):  # fmt: skip
        assert fact in text
    href = tab.js("document.querySelector('#detail .record a').getAttribute('href')")
    assert (root / PAGE.parent / href).is_file()
    tab.click("#detail .close")
    assert not tab.js("document.querySelector('#detail').open")


@needs_chromium
def test_every_number_claim_and_record_opens(tab: Browser) -> None:
    tab.js("followed = seen = 0; for (const a of document.querySelectorAll('main a[href]')) {"
           "if (!/^#[vcr]\\//.test(a.getAttribute('href'))) continue;"
           "if (seen++ % 9) continue;"
           "history.replaceState(null, '', a.getAttribute('href'));"
           "dispatchEvent(new HashChangeEvent('hashchange'));"
           "const d = document.querySelector('#detail');"
           "if (!d.open || !d.querySelector('dl') || /undefined|NaN|object/.test("
           "[...d.querySelectorAll('dd, h2, .big')].map(e => e.textContent).join())) throw a.href;"
           "followed += 1; }")  # fmt: skip
    assert tab.js("followed") > 150


@needs_chromium
def test_columns_of_a_source_are_hidden(tab: Browser) -> None:
    count = "[...document.querySelectorAll('td.evidence')].filter(e => e.offsetParent).length"
    points = "document.querySelectorAll('#scatter .dot.evidence').length"
    choose_images(tab, "Tiny-ImageNet-37 (stands in for Oxford-IIIT Pet)")
    assert tab.js(count) > 0
    assert tab.js(points) > 0
    tab.click("#show-evidence")
    assert tab.js(count) == tab.js(points) == 0


def choose_images(tab: Browser, name: str) -> None:
    """Choose the images of the plot."""
    tab.js(f"document.querySelector('#axes [name=task]').value = {json.dumps(name)};"
           "document.querySelector('#axes [name=task]')"
           ".dispatchEvent(new Event('input', {bubbles: true}))")  # fmt: skip


@needs_chromium
def test_stand_in_accuracies_never_share_a_plot_with_reported_ones(tab: Browser) -> None:
    names = tab.js("[...document.querySelectorAll('#axes [name=task] option')].map(o => o.value)")
    assert {"Oxford-IIIT Pet", "Tiny-ImageNet-37 (stands in for Oxford-IIIT Pet)"} <= {*names}
    for name in names:
        choose_images(tab, name)
        dots = tab.js("[...document.querySelectorAll('#scatter .dot')].map(d => d.classList[1])")
        assert ("reported" in dots) <= ("stands in" not in name)


@needs_chromium
def test_the_plot_follows_its_axes_and_its_points_open(tab: Browser) -> None:
    choose_images(
        tab,
        "digits (scikit-learn; stands in for Oxford-IIIT Pet, CIFAR-10, CIFAR-100 and ImageNet)",
    )
    choices = tab.js("[...document.querySelectorAll('#axes [name=x] option')].map(o => o.value)")
    assert {"parameters||", "latency_32:ratio||", "latency_8|run|Test CPU, 2 threads"} <= {*choices}
    for choice in choices:
        tab.js(f"document.querySelector('#axes [name=x]').value = {json.dumps(choice)};"
               "document.querySelector('#axes').dispatchEvent(new Event('input'))")  # fmt: skip
        dots = tab.js("[...document.querySelectorAll('#scatter .dot')].map(d => d.classList[1])")
        assert dots
        _, whose, _ = choice.split("|")
        assert not whose or set(dots) == {whose}  # a clock's numbers are one device's
        assert "NaN" not in tab.js("document.querySelector('#scatter').innerHTML")
    tab.js("document.querySelector('#scatter a').focus()")
    tab.press("Enter")
    tab.wait("document.querySelector('#detail').open")


@needs_chromium
def test_training_curves_are_drawn_when_asked_for(tab: Browser) -> None:
    lines = "document.querySelectorAll('#t-hovit .curves svg .line').length"
    assert tab.js(lines) == 0
    tab.click("#t-hovit .curves summary")
    tab.wait(f"{lines} > 0")
    before = tab.js(lines)
    tab.click("#t-hovit .curves .key input")
    assert tab.js(lines) == before - 1


@needs_chromium
def test_dark_and_light(tab: Browser) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = tab.js(paper)
    tab.click("#theme")
    assert tab.js("document.documentElement.dataset.theme") == "dark"
    assert tab.js(paper) != light
    tab.send("Page.reload")
    tab.wait("document.readyState === 'complete' && document.querySelector('#scatter svg')")
    assert tab.js("document.documentElement.dataset.theme") == "dark"
    tab.click("#theme")
    assert tab.js(paper) == light


@needs_chromium
def test_by_keyboard_alone(tab: Browser) -> None:
    tab.press("Tab")
    assert tab.js("document.activeElement.className") == "skip"
    tab.js("document.querySelector('#t-hovit .wide').focus()")
    at = "document.activeElement.getAttribute('href')"
    while not str(tab.js(at)).startswith("#v/"):
        tab.press("Tab")
    first = tab.js(at)
    assert first.startswith("#v/hovit/levit_deck/")
    tab.press("ArrowRight")
    assert tab.js(at) != first
    tab.press("ArrowLeft")
    assert tab.js(at) == first
    tab.press("ArrowDown")
    assert "/levit_deck/" not in tab.js(at)
    here = tab.js(at)
    tab.press("Enter")
    tab.wait("document.querySelector('#detail').open")
    tab.press("Escape")
    tab.wait("!document.querySelector('#detail').open")
    assert tab.js(at) == here  # the focus is back where it was
    tab.press("Tab")
    assert tab.js("document.activeElement.tagName") == "SUMMARY"  # one stop a table


@needs_chromium
@pytest.mark.parametrize("width", [320, 400, 1280])
def test_nothing_is_wider_than_the_window(tab: Browser, root: Path, width: int) -> None:
    tab.open(root / PAGE, width, 800)
    tab.js("document.querySelectorAll('details').forEach(d => { d.open = true })")
    tab.wait("document.querySelector('#t-hovit .curves svg')")
    assert tab.js("document.documentElement.scrollWidth") <= width
    tab.click('#t-hovit a[href$="hovit/levit_deck/top1/reported"]')
    tab.wait("document.querySelector('#detail').open")
    assert tab.js("document.querySelector('#detail').scrollWidth") <= width


@needs_chromium
def test_it_prints(tab: Browser, tmp_path: Path) -> None:
    tab.resize(1032)  # A4 landscape less its margins
    tab.send("Emulation.setEmulatedMedia", media="print")
    assert tab.js("document.documentElement.scrollWidth") <= 1032
    tab.send("Emulation.setEmulatedMedia", media="")
    tab.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"


@needs_chromium
def test_a_hostile_record_breaks_nothing(browser: Browser, hostile: Path) -> None:
    browser.open(hostile / PAGE)
    browser.js(OPEN_GROUPS)
    browser.click('#t-hovit a[href$="hovit/hovit/top1/run"]')
    browser.wait("document.querySelector('#detail').open")
    assert HOSTILE in browser.js("document.querySelector('#detail').textContent")
    assert browser.js("typeof window.broken") == "undefined"
    assert browser.js("document.querySelectorAll('img, script').length") == 2
    assert browser.errors == []
