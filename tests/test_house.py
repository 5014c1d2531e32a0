"""What all five scripts promise alike. A script joins by its name and its line in conftest.TABLE."""
import ast
import difflib
import importlib
import inspect
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SCRIPTS, TABLE, flags, log_of, python, torchrun, weights_of

ALLOWED = {"torch", "torchvision", "torchaudio", "numpy", "sentencepiece", "soundfile", "PIL", "matplotlib"}
each_script = pytest.mark.parametrize("name", SCRIPTS)


def runtime_of(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    return re.search(r"# ---- runtime: identical.*# ---- end of runtime ----\n", text, re.S)[0]


@each_script
def test_runtime_is_byte_identical(name):
    mine, first = runtime_of(name), runtime_of(SCRIPTS[0])
    assert mine == first, "\n".join(difflib.unified_diff(first.splitlines(), mine.splitlines(), SCRIPTS[0], name))


@each_script
def test_imports_and_style(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    roots = {(n.names[0].name if isinstance(n, ast.Import) else n.module).split(".")[0] for n in nodes}
    assert roots - set(sys.stdlib_module_names) <= ALLOWED
    declared = set(re.findall(r'"(\w+)[="]', re.search(r"# dependencies = (.*)", text)[1]))
    needed = {"pillow" if r == "PIL" else r for r in roots - set(sys.stdlib_module_names)}
    assert needed - {"pillow"} == declared, "the script block names what the script imports (Pillow comes with torchvision)"
    assert max(map(len, text.splitlines())) <= 110


@each_script
def test_help_describes_every_field(name, call):
    status, out, _ = call(name, "--help")
    module = sys.modules[name]
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.+)$", inspect.getsource(module.Config), re.M))
    fields = module.Config.__dataclass_fields__
    assert status == 0 and len(fields) <= 30 and set(comments) == set(fields)
    flat = " ".join(out.split())
    for field, text in comments.items():
        assert f"--{field}" in flat and " ".join(text.split()) in flat, field
    for mode in module.MODES:
        assert mode in flat


@each_script
def test_alone_in_an_empty_folder(name, tmp_path):
    """The file by itself trains on its demo, resumes, evaluates and predicts."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    small = flags(name, "--eval_every 4 --log_every 2")
    for arguments in (["--max_steps", "4"], ["--max_steps", "6", "--resume"]):
        done = python(f"{name}.py", *small, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        last = done.stdout.splitlines()[-1]
        assert re.fullmatch(r"final test (knn|bleu|cer|acc|map50) [-\d.]+.* \| [\d.]+ min \| [\d.]+ GB", last), last
    folder = tmp_path / "out" / f"{name}-demo"
    assert [r["step"] for r in log_of(folder) if r["split"] == "train"] == [2, 4, 6]
    assert (folder / "curves.png").stat().st_size > 1000
    TABLE[name].get("input", lambda folder: None)(tmp_path)
    for arguments in ("eval", TABLE[name]["predict"]):
        done = python(f"{name}.py", *arguments.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / TABLE[name]["predicted"]).exists()


@each_script
def test_killed_and_resumed_is_bitwise_the_same(name, tmp_path):
    small = flags(name, "--max_steps 60 --eval_every 25 --save_every 7 --log_every 5")
    whole = python(ROOT / f"{name}.py", *small, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    killed = 0
    for attempt, step in enumerate((10, 30, 48)):
        process = subprocess.Popen([sys.executable, ROOT / f"{name}.py", *small, "--out", "cut", "--resume"], cwd=tmp_path,
                                   stdout=subprocess.PIPE, text=True)
        for line in process.stdout:  # killed as soon as it has come past the step
            if (found := re.match(r"train +(\d+) ", line)) and int(found[1]) >= step:
                time.sleep(0.002 * attempt)
                process.kill()
                killed += 1
                break
        process.wait()
    assert killed == 3 and process.returncode == -signal.SIGKILL
    done = python(ROOT / f"{name}.py", *small, "--out", "cut", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    for file in ("last.pt", "best.pt"):
        a, b = weights_of(tmp_path / "whole" / file), weights_of(tmp_path / "cut" / file)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file
        assert not any(k.startswith(("_orig_mod", "module")) for k in a)


@each_script
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_continue(name, number, tmp_path):
    small = [*flags(name, "--eval_every 10000 --save_every 10000 --log_every 1"), "--out", "my runs/it's one"]
    process = subprocess.Popen([sys.executable, ROOT / f"{name}.py", *small], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("train"):
            process.send_signal(number)
            time.sleep(0.01)
            process.send_signal(number)  # torchrun's copy of a signal to the whole group
            break
    out, err = process.communicate()
    assert process.returncode == 0 and "--resume" in out, err
    command = re.search(rf"python {name}\.py (.*--resume)", out)[1]
    step = torch.load(tmp_path / "my runs" / "it's one" / "last.pt", weights_only=True)["step"]
    done = python(ROOT / f"{name}.py", *shlex.split(command), "--max_steps", step + 2, cwd=tmp_path)
    assert done.returncode == 0 and "final test" in done.stdout, done.stderr


def driver(name, folder):
    """A program that trains without noise, so that one process and two can be compared."""
    path = folder / "driver.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport {name}\n{TABLE[name]['patch']}\n"
                    f"{name}.main(sys.argv[1:])\n")
    return path


@each_script
def test_two_processes_equal_one(name, tmp_path):
    """10 steps on 1 and on 2 gloo ranks give the same weights, where no process draws samples of its own; two workers
    killed on the way change nothing."""
    program = driver(name, tmp_path)
    quiet = flags(name, f"{TABLE[name]['noise_off']} --dtype float32 --max_steps 10 --eval_every 5 --save_every 2 --log_every 1")
    done = python(program, *quiet, "--out", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = python(*torchrun(program), *quiet, "--out", "two", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("final test") == 1, done.stderr
    one, two = (weights_of(tmp_path / run / "last.pt") for run in ("one", "two"))
    equal = TABLE[name].get("ranks_equal_one", True)
    assert one.keys() == two.keys()
    assert not equal or max((one[k].float() - two[k].float()).abs().max().item() for k in one) < 1e-5
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        if equal and a["split"] != "test":  # the same losses, and the same validation figures
            assert a.keys() == b.keys() and a["split"] == b["split"]
            for key in set(a) - {"split"}:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-4), (key, a, b)

    dies = tmp_path / "dies.py"  # rank 1 is killed at its first start after 5 steps
    dies.write_text(program.read_text().replace(f"{name}.main(", f"""
import os, pathlib, signal
plain = {name}.Run.step_done
def step_done(run, *args):
    if run.step == 5 and {name}.RANK == 1 and not pathlib.Path("killed").exists():
        pathlib.Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(run, *args)
{name}.Run.step_done = step_done
{name}.main("""))
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=2", dies, *quiet,
                  "--out", "three", "--resume", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "killed").exists(), done.stderr
    three = weights_of(tmp_path / "three" / "last.pt")
    assert all(torch.equal(two[k], three[k]) for k in two)


@each_script
def test_evaluation_is_the_same_on_two_processes(name, tmp_path):
    done = python(ROOT / f"{name}.py", *flags(name, "--max_steps 6 --eval_every 6"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one = python(ROOT / f"{name}.py", "eval", "--device", "cpu", "--save", "one", cwd=tmp_path)
    two = python(*torchrun(ROOT / f"{name}.py"), "eval", "--device", "cpu", "--save", "two", cwd=tmp_path)
    assert one.returncode == two.returncode == 0, two.stderr
    one, two = (re.sub(r"/s [\d.]+", "/s", done.stdout) for done in (one, two))  # but for the speed
    assert one.replace("one/", "two/") == two


@each_script
def test_a_full_disk_loses_nothing(name, tmp_path):
    small = flags(name, "--eval_every 2 --log_every 1")
    done = python(ROOT / f"{name}.py", *small, "--max_steps", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / f"{name}-demo"
    before = {f: (folder / f).read_bytes() for f in ("last.pt", "best.pt")}
    done = python(ROOT / f"{name}.py", *small, "--max_steps", "8", "--resume", cwd=tmp_path,
                  limit=min(map(len, before.values())) // 2048)
    assert done.returncode == 2 and done.stderr.startswith("error:") and "Traceback" not in done.stderr, done.stderr
    assert "cannot save" in done.stderr and before == {f: (folder / f).read_bytes() for f in before}
    assert not list(folder.glob("*.part"))
    done = python(ROOT / f"{name}.py", *small, "--max_steps", "8", "--resume", cwd=tmp_path)
    assert done.returncode == 0 and torch.load(folder / "last.pt", weights_only=True)["step"] == 8, done.stderr


@each_script
def test_bad_input_is_one_line(name, tmp_path, refuses, call, monkeypatch):
    small = " ".join(flags(name, "--max_steps 1"))
    (tmp_path / "file").write_text("not a checkpoint")
    torch.save({"script": "other", "model": {}}, tmp_path / "other.pt")
    refuses(name, "--epoch 3", "--epoch")  # no abbreviations
    refuses(name, "--lr much", "--lr")
    refuses(name, "--lr nan", "--lr")
    refuses(name, "--batch_size 0", "--batch_size")
    refuses(name, "--batch-size -3", "--batch_size")
    refuses(name, f"--seed {2**63}", "--seed")
    refuses(name, "--device tpu", "tpu")
    refuses(name, "dance", "dance", "train")
    refuses(name, "bench extra", "extra")
    refuses(name, "--data no/such/place", "no/such/place")
    refuses(name, "eval", "best.pt", "train first")
    refuses(name, "eval --ckpt file", "file", "not a readable checkpoint")
    refuses(name, "eval --ckpt other.pt", "other.pt", "other.py")
    refuses(name, f"{small} --init other.pt", "other.pt")
    refuses(name, f"{small} --out file/run", "file")
    if not torch.cuda.is_available():
        refuses(name, f"{small} --device cuda", "cuda")
    assert call(name, f"{small} --out run")[0] == 0
    refuses(name, f"{small} --out run --resume {TABLE[name]['shape_flag']}", *TABLE[name]["shape_flag"].split())
    refuses(name, f"{small} --out run --resume --lr 0.5", "--lr", "start anew")
    with (tmp_path / "run" / "log.jsonl").open("a") as f:
        f.write('{"step": 1, "spl')  # cut short by a full disk
    assert call(name, f"{small} --out run --resume --data auto --dtype auto")[0] == 0
    assert "spl" not in (tmp_path / "run" / "log.jsonl").read_text().replace("split", "")
    refuses(name, "eval --ckpt run/last.pt --device cpu", "last.pt", "best.pt")
    assert call(name, "eval --ckpt run/best.pt --device cpu --data auto")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[name], "load_data", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("DefaultCPUAllocator: no")))
        refuses(name, "eval --ckpt run/best.pt --device cpu", "--batch_size")
    refuses(name, f"eval --ckpt run/best.pt {TABLE[name]['shape_flag']}", TABLE[name]["shape_flag"].split()[0])
    data = (tmp_path / "run" / "last.pt").read_bytes()
    (tmp_path / "run" / "last.pt").write_bytes(data[: len(data) // 2])
    refuses(name, f"{small} --out run --resume", "last.pt", "not a readable checkpoint")


@each_script
@pytest.mark.parametrize("schedule", [30, 60, 180, 4000])
def test_a_short_run_reaches_its_learning_rate(name, schedule):
    module = importlib.import_module(name)
    cfg = module.Config()
    rates = [module.learning_rate(cfg, step, schedule) for step in range(1, schedule + 1)]
    assert 0.7 * cfg.lr < max(rates) <= cfg.lr * 1.0001 and rates[0] < 0.2 * cfg.lr and rates[-1] < 0.2 * cfg.lr


@each_script
def test_runs_never_share_a_folder(name, tmp_path, call):
    small = " ".join(flags(name, "--max_steps 1"))
    assert call(name, small)[0] == 0
    before = (tmp_path / "out" / f"{name}-demo" / "last.pt").read_bytes()
    status, out, _ = call(name, small)
    assert status == 0 and f"out/{name}-demo-2" in out
    assert (tmp_path / "out" / f"{name}-demo" / "last.pt").read_bytes() == before
    pick = importlib.import_module(name).Run.pick_folder
    assert pick(None, tmp_path / "r", {}) != pick(None, tmp_path / "r", {})  # of two that begin at the same time
    status, out, _ = call(name, small.replace("--max_steps 1", "--max_steps 2") + " --resume")  # the newest of them
    assert status == 0 and f"out/{name}-demo-2 continued" in out


def test_a_run_that_ended_before_its_first_line_gives_its_folder_back(tmp_path):
    (tmp_path / "photos").write_bytes(b"no archive")
    for _ in range(2):
        done = python(ROOT / f"{SCRIPTS[0]}.py", "--data", "photos", "--device", "cpu", cwd=tmp_path)
        assert done.returncode == 2 and "run: out/" in done.stdout and "taken" not in done.stdout
        assert done.stderr.startswith("error: ") and not [*tmp_path.rglob("log.jsonl")]


@each_script
def test_init_starts_from_the_weights_given(name, tmp_path, call):
    small = " ".join(flags(name))
    assert call(name, f"{small} --max_steps 3 --out first")[0] == 0
    assert call(name, f"{small} --max_steps 1 --out second --init first/best.pt --lr 0")[0] == 0
    first, second = weights_of(tmp_path / "first" / "best.pt"), weights_of(tmp_path / "second" / "last.pt")
    assert all(torch.equal(first[k], second[k]) for k in first)
    if "init_flag" in TABLE[name]:  # heads of another size are replaced
        status, out, _ = call(name, f"{small} --max_steps 1 --out third --init first/best.pt {TABLE[name]['init_flag']}")
        assert status == 0 and "not taken from" in out


@each_script
@pytest.mark.parametrize("what", ["step_done", "save"])
def test_a_loss_or_weight_that_is_not_finite_ends_the_run(name, what, tmp_path, refuses, monkeypatch):
    module = __import__(name)
    plain = getattr(module.Run, what)

    def poisoned_loss(run, losses, *args):
        if run.step == 4:
            losses = {k: v * float("nan") for k, v in losses.items()}
        return plain(run, losses, *args)

    def poisoned_weights(run, file, **state):
        if run.step == 6:
            next(iter(state["model"].values()))[..., -1] = float("inf")
        return plain(run, file, **state)
    monkeypatch.setattr(module.Run, what, poisoned_loss if what == "step_done" else poisoned_weights)
    words = ("step 5", "nan") if what == "step_done" else ("step 6", "is not finite")
    refuses(name, " ".join(flags(name, "--max_steps 9 --save_every 3 --log_every 100 --out run")), *words)
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert last["step"] == 3 and all(v.isfinite().all() for v in last["model"].values())


@each_script
def test_bench_prints_one_json_line(name, tmp_path, call, monkeypatch):
    """Compiled in earnest for the first script alone: it takes half a minute, and says nothing of the task."""
    if name != SCRIPTS[0] or shutil.which("g++") is None:
        monkeypatch.setattr(torch, "compile", lambda function, **how: function)
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: None)
    status, out, _ = call(name, f"bench {' '.join(flags(name))}")
    figures = json.loads(out.splitlines()[-1])
    assert status == 0 and figures["eager"]["items/s"] > 0 and 0 <= figures["compiled"]["data_share"] <= 1
    assert not list(tmp_path.glob("out/*"))


@each_script
def test_a_checkpoint_of_another_version_still_loads(name):
    module = importlib.import_module(name)
    assert module.merge({"config": {"lr": 0.5, "gone": 1}}, {"seed": 3}, "best.pt", set()) == module.Config(lr=0.5, seed=3)
