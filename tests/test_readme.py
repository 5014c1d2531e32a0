"""The README's figures stand on logs that are in the repository, and its links and commands on things that exist."""
import collections
import importlib
import json
import re
import statistics

import pytest
from conftest import ROOT, SCRIPTS

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)\.py` \|.*\]\((docs/results/[\w.-]+)\) \|$", README, re.M)
SEEDS = re.findall(r"^\| `(\w+)\.py` \| (\w+) \| ([\d.]+), ([\d.]+), ([\d.]+) \| ([\d.]+) ± ([\d.]+) \|", README, re.M)
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.stem in SCRIPTS]


def records(log):
    return [json.loads(line) for line in (ROOT / log).read_text(encoding="utf-8").splitlines()]


def holds(log, result):
    """Whether each figure of a table's cell is one of the log's test figures."""
    last = records(log)[-1]
    assert last["split"] == "test"
    values = [abs(v) for v in last.values() if isinstance(v, (int, float))]
    numbers = re.findall(r"\d+\.\d+", result)
    assert numbers
    for number in numbers:
        decimals = len(number.split(".")[1])
        assert any(f"{v:.{decimals}f}" == number for v in values), (number, values)


@pytest.mark.parametrize("name, log", ROWS)
def test_figures_of_the_results_table_are_in_their_logs(name, log):
    row = next(line for line in README.splitlines() if log in line and line.startswith(f"| `{name}.py` |"))
    holds(log, row.split(" | ")[2])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_of_a_scripts_page_are_in_their_logs(page):
    """The rows of its table of results: | what | figures | ... | [log](results/NAME.jsonl) |"""
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|.*\[log\]\(([\w./-]+)\) \|$", page.read_text(encoding="utf-8"), re.M)
    assert rows and len(page.read_text(encoding="utf-8").splitlines()) <= 80
    for result, log in rows:
        holds(f"docs/{log}", result)


@pytest.mark.parametrize("name, key, a, b, c, mean, spread", SEEDS)
def test_three_seeds_are_in_their_logs(name, key, a, b, c, mean, spread):
    values = []
    for seed, figure in enumerate((a, b, c)):
        last = records(f"docs/results/{name}-demo-seed{seed}.jsonl")[-1]
        assert last["split"] == "test"
        values.append(abs(last[key]))
        assert f"{values[-1]:.{len(figure.split('.')[1])}f}" == figure
    for figure, value in ((mean, statistics.fmean(values)), (spread, statistics.stdev(values))):
        assert f"{value:.{len(figure.split('.')[1])}f}" == figure


def test_every_script_has_its_rows():
    assert {name for name, _ in ROWS} == {name for name, *_ in SEEDS} == set(SCRIPTS)


def test_ratios_of_the_speed_table_are_in_their_log():
    log, name, seen = collections.defaultdict(set), "", set()
    for r in records("docs/results/baselines.jsonl"):
        log[r["script"]] |= {v for k, v in r.items() if "ratio" in k}
    for script, ratio in re.findall(r"^\| (?:`(\w+)\.py`)? ?\| [^|]+ \| ([\d.]+) \| [\d.]+ \| .*\|$", README, re.M):
        name = script or name
        seen.add(name)
        assert float(ratio) in log[name], (name, ratio)
    assert seen == set(SCRIPTS)


def test_what_a_step_costs_is_in_its_log():
    rows = re.findall(r"^\| `(\w+)\.py bench .*` \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|", README, re.M)
    log = {(r["script"], r["compile"]): f"{r['ms_per_step']:.1f}" for r in records("docs/results/bench.jsonl")}
    assert {name for name, *_ in rows} == set(SCRIPTS)
    for name, *figures in rows:
        assert figures == [log[name, "off"], log[name, "on"]]


def test_one_and_two_processes_are_in_their_log():
    text = (ROOT / "docs/SPEED.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)\.py` \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) s \| (\d+) s \|$", text, re.M)
    log = {(r["script"], r["processes"]): r for r in records("docs/results/scale.jsonl")}
    assert {name for name, *_ in rows} == set(SCRIPTS)
    for name, steps, *figures in rows:
        one, two = log[name, 1], log[name, 2]
        assert int(steps) == one["step"] == two["step"]
        assert figures == [f"{one['loss']:.3f}", f"{two['loss']:.3f}", f"{two['items/s'] / one['items/s']:.2f}",
                           f"{one['seconds']:.0f}", f"{two['seconds']:.0f}"]


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *PAGES):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), target
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.stat().st_size < 300_000 and f"docs/{picture.name}" in README


def test_commands_name_flags_and_modes_that_exist():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *PAGES))
    for name, arguments in re.findall(r"(?:python|--nproc_per_node=8) (\w+)\.py((?: [^#\n`]*)?)", text):
        if name in SCRIPTS:
            module = importlib.import_module(name)
            for flag in re.findall(r"--(\w+)", arguments):
                assert flag in module.Config.__dataclass_fields__, (name, flag)
            words = arguments.split()
            assert not words or words[0].startswith("-") or words[0] in module.MODES, (name, words)


def test_nothing_is_left_to_fill_in():
    for path in [ROOT / "README.md", *(ROOT / f"{name}.py" for name in SCRIPTS), *(ROOT / "docs").glob("*.md")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"[A-Z]+_GO_HERE|\b[A-Z]+[0-9]*_(ROWS|TEXT|SPEED|ELBO|IWAE|GAP|KNN|RESULT|TIME)\b|TODO", text), path
