"""README and docs: their figures are in docs/results.jsonl and in the logs, their links and commands exist."""
import importlib
import json
import re

import pytest
from conftest import ROOT, SCRIPTS

RESULTS = [json.loads(line) for line in (ROOT / "docs/results.jsonl").read_text(encoding="utf-8").splitlines()]
RUNS = [r for r in RESULTS if r["kind"] == "run"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {name: (ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in [*SCRIPTS, "speed"]}
TEXTS = {"README": README, "data/README": (ROOT / "data/README.md").read_text(encoding="utf-8"),
         **{f"docs/{name}": text for name, text in PAGES.items()}}
HEADINGS = ["What it learns", "Commands", "Data", "Results", "Options worth knowing", "Your own data", "Known limits"]


def of(kind, script):
    return [r for r in RESULTS if r["kind"] == kind and r["script"] == script]


def written(value, numbers):
    """Whether one of the numbers, as they are written, is the value, rounded to as many decimals."""
    return any(f"{abs(value):.{len(number.partition('.')[2])}f}" == number for number in numbers)


def table(text, first):
    """The rows, lists of cells, of the table whose head begins with the cell `first`."""
    body = re.search(rf"^\| {re.escape(first)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)[1]
    return [[cell.strip().replace("\0", "\\|") for cell in line.replace("\\|", "\0").strip("|").split("|")]
            for line in body.splitlines()]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['script']}: {run['what']}")
def test_figures_are_in_their_log(run):
    last = json.loads((ROOT / run["log"]).read_text(encoding="utf-8").splitlines()[-1])
    assert last["split"] == "test" and run["figures"]
    for key, value in run["figures"].items():
        assert round(last[key], len(str(value).partition(".")[2])) == value, key


@pytest.mark.parametrize("name", SCRIPTS)
def test_results_of_a_page(name):
    """A row shows all figures, the command, the commit and the time of the runs whose logs it links, and no other figure."""
    rows = table(PAGES[name], "what")
    for what, figures, time, commit, command, links in rows:
        runs = [r for r in of("run", name) if r["log"].removeprefix("docs/") in re.findall(r"\]\((.*?)\)", links)]
        numbers, values = re.findall(r"\d+\.\d+", figures), [v for r in runs for v in r["figures"].values()]
        assert runs and len(numbers) == len(values) and all(written(v, numbers) for v in values), what
        minutes = [r["minutes"] for r in runs if r["minutes"]]
        shown = [float(t) for t in re.findall(r"([\d.]+)(?= to| min)", time)]
        assert shown == sorted({min(minutes), max(minutes)} if minutes else [])
        for r in runs:
            assert r["commit"] == commit and r["hardware"] in time
            assert r["command"] == command.strip("`").replace("SEED", r["what"][-1])
    assert sum(row[-1].count("](") for row in rows) == len(of("run", name))


def test_results_of_the_readme():
    rows = table(README, "script")
    assert {row[0].split("`")[1] for row in rows} == {f"{name}.py" for name in SCRIPTS}
    for script, _, result, _, time in rows:
        runs = of("run", script.split("`")[1].removesuffix(".py"))
        for number in re.findall(r"\d+\.\d+", result):
            assert any(written(v, [number]) for r in runs for v in r["figures"].values()), number
        assert float(time.removesuffix(" min")) in [r["minutes"] for r in runs]


def test_results_of_the_speed_page():
    ratios = [(peer, float(ratio), command.strip("`")) for _, peer, ratio, command in table(PAGES["speed"], "script")]
    assert ratios == [(r["peer"], r["ratio"], r["command"]) for r in RESULTS if r["kind"] == "ratio"]
    rows = table(PAGES["speed"], "command")
    for (command, *cells), step in zip(rows, [r for r in RESULTS if r["kind"] == "step"], strict=True):
        two = of("processes", step["script"])[0]["ratio"]
        assert command.strip("`") == step["command"]
        assert cells == [f"{step['a second']:,} {step['unit']}", f"{step['ms']} ms", f"{step['data percent']} %",
                         f"{step['ms compiled']} ms", f"{step['seconds to compile']} s", f"{two:.2f}"]
    kept = [r for r in RESULTS if r["kind"] == "glibc"]
    assert re.findall(r"\b1\.\d\d\b", PAGES["speed"].split("## Memory")[1]) == [f"{r['ratio']:.2f}" for r in kept]


def test_searches_of_the_speech_page():
    for name, *cells in table(PAGES["las_asr"], "search"):
        rows = [r for r in of("search", "las_asr") if r["search"] == name]
        assert cells == [f"CER {r['cer']:.2f}, WER {r['wer']:.2f}" for r in rows] and len(rows) == 2


def test_sizes_and_headings():
    assert len(README.splitlines()) <= 160
    for name in SCRIPTS:
        assert re.findall("^## (.*)", PAGES[name], re.M) == HEADINGS and len(PAGES[name].splitlines()) <= 80, name
    lines = [(ROOT / f"{name}.py").read_text(encoding="utf-8").count("\n") for name in SCRIPTS]
    block = re.search("# ---- runtime: .*# ---- end of runtime ----\n", (ROOT / "vae.py").read_text(encoding="utf-8"), re.S)[0]
    told = re.search(r"has ([\d,]+) to ([\d,]+) lines, of which (\d+)", " ".join(README.split())).groups()
    assert [int(n.replace(",", "")) for n in told] == [min(lines), max(lines), block.count("\n")]


def test_links_lead_somewhere():
    pictures = set()
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            path = (ROOT / f"{name}.md").parent / target
            assert path.exists(), (name, target)
            pictures |= {path.name} if path.suffix == ".png" else set()
    assert pictures == {picture.name for picture in (ROOT / "docs").glob("*.png")}
    assert all(picture.stat().st_size < 300_000 for picture in (ROOT / "docs").glob("*.png"))


def test_commands_name_flags_and_modes_that_exist():
    found = re.findall(r"(?:python|--nproc_per_node=\d) (\w+)\.py((?: [^#\n`|<]*)?)", "\n".join(TEXTS.values()))
    assert {name for name, _ in found} >= set(SCRIPTS)
    for name, arguments in found:
        if name in SCRIPTS:
            module, words = importlib.import_module(name), arguments.split()
            for flag in re.findall(r"--(\w+)", arguments):
                assert flag in module.Config.__dataclass_fields__, (name, flag)
            assert not words or words[0].startswith("-") or words[0] in module.MODES, (name, words)


def test_nothing_is_left_to_fill_in():
    for path in [ROOT / "README.md", *(ROOT / f"{name}.py" for name in SCRIPTS), *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"[A-Z]+_GO_HERE|\b[A-Z]+[0-9]*_(ROWS|TEXT|SPEED|ELBO|IWAE|GAP|KNN|RESULT|TIME)\b|TODO"
                             r"|\b(ROWS|RATIOS|STEPS|GLIBC|MEMORY)\b", path.read_text(encoding="utf-8")), path
