"""The README's figures stand on logs that are in the repository, and its links and commands on things that exist."""
import importlib
import json
import re
import statistics

import pytest
from conftest import ROOT, SCRIPTS

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)\.py` \|.*\]\((docs/results/[\w.-]+)\) \|$", README, re.M)
SEEDS = re.findall(r"^\| `(\w+)\.py` \| (\w+) \| ([\d.]+), ([\d.]+), ([\d.]+) \| ([\d.]+) ± ([\d.]+) \|", README, re.M)


@pytest.mark.parametrize("name, log", ROWS)
def test_figures_of_the_results_table_are_in_their_logs(name, log):
    row = next(line for line in README.splitlines() if log in line and line.startswith(f"| `{name}.py` |"))
    result = row.split(" | ")[2]
    figures = [json.loads(line) for line in (ROOT / log).read_text(encoding="utf-8").splitlines()]
    assert figures[-1]["split"] == "test"
    values = [abs(v) for v in figures[-1].values() if isinstance(v, (int, float))]
    numbers = re.findall(r"\d+\.\d+", result)
    assert numbers
    for number in numbers:
        decimals = len(number.split(".")[1])
        assert any(f"{v:.{decimals}f}" == number for v in values), (number, values)


@pytest.mark.parametrize("name, key, a, b, c, mean, spread", SEEDS)
def test_three_seeds_are_in_their_logs(name, key, a, b, c, mean, spread):
    values = []
    for seed, figure in enumerate((a, b, c)):
        lines = (ROOT / f"docs/results/{name}-demo-seed{seed}.jsonl").read_text(encoding="utf-8").splitlines()
        last = json.loads(lines[-1])
        assert last["split"] == "test"
        values.append(abs(last[key]))
        assert f"{values[-1]:.{len(figure.split('.')[1])}f}" == figure
    for figure, value in ((mean, statistics.fmean(values)), (spread, statistics.stdev(values))):
        assert f"{value:.{len(figure.split('.')[1])}f}" == figure


def test_every_script_has_its_rows():
    assert {name for name, _ in ROWS} == {name for name, *_ in SEEDS} == set(SCRIPTS)


def test_ratios_of_the_speed_table_are_in_their_log():
    log = (ROOT / "docs/results/baselines.jsonl").read_text(encoding="utf-8").splitlines()
    name, seen = "", set()
    for row in re.findall(r"^\| (?:`(\w+)\.py`)? ?\| [^|]+ \| ([\d.]+) \| [\d.]+ \| ([\d.]*) ?\| .*\|$", README, re.M):
        name = row[0] or name
        seen.add(name)
        for keep, ratio in ((False, row[1]), (True, row[2])):
            found = [r for line in log if (r := json.loads(line))["script"] == name and r["keep_memory"] == keep]
            assert not ratio or float(ratio) in found[0].values(), (name, ratio)
    assert seen == set(SCRIPTS)


def test_what_a_step_costs_is_in_its_log():
    log = (ROOT / "docs/results/bench.jsonl").read_text(encoding="utf-8").splitlines()
    rows = re.findall(r"^\| `(\w+)\.py bench .*` \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|", README, re.M)
    assert [(r["script"], *(f"{r[kind]['ms_per_step']:.1f}" for kind in ("eager", "compiled")))
            for r in map(json.loads, log)] == rows and len(rows) == len(SCRIPTS)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.stat().st_size < 300_000 and f"docs/{picture.name}" in README


def test_commands_name_flags_and_modes_that_exist():
    for name, arguments in re.findall(r"(?:python|--nproc_per_node=8) (\w+)\.py((?: [^#\n`]*)?)", README):
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
