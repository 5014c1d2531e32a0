"""What all five scripts guarantee: the block they share, the command line, errors, folders, portability."""
import ast
import difflib
import importlib
import inspect
import re
import shutil
import signal
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, TABLE, each_script, flags, log_of, python, weights_of
from forks import SMALL_DEMO
from torch._inductor.compile_fx import compile_fx

ALLOWED = {"torch", "torchvision", "torchaudio", "numpy", "sentencepiece", "soundfile", "PIL", "matplotlib"}
POSIX_ONLY = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix"}  # Python on Windows has none of them


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def block(name):
    return re.search(r"# ---- runtime: identical.*# ---- end of runtime ----\n", source(name), re.S)[0]


def imported(name):
    nodes = [n for n in ast.walk(ast.parse(source(name))) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = [name for n in nodes for name in ([n.module] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])]
    return {name.split(".")[0] for name in names}


@each_script
def test_runtime_is_byte_identical(name):
    mine, first = block(name), block(SCRIPTS[0])
    assert mine == first, "\n".join(difflib.unified_diff(first.splitlines(), mine.splitlines(), SCRIPTS[0], name))


def test_what_several_scripts_need_is_identical():
    assert len({inspect.getsource(importlib.import_module(name).find_files) for name in SCRIPTS[:4]}) == 1


@each_script
def test_imports_and_style(name):
    packages = imported(name) - set(sys.stdlib_module_names)
    assert packages <= ALLOWED and not imported(name) & POSIX_ONLY
    declared = set(re.findall(r'"(\w+)(?:>=[\d.]+)?"', re.search(r"# dependencies = (.*)", source(name))[1]))
    assert packages - {"PIL"} == declared, "the script block names what the script imports (Pillow comes with torchvision or matplotlib)"
    assert max(map(len, source(name).splitlines())) <= 110


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
    assert out.startswith("usage: ") and out.count(f"    python {name}.py ") >= 2 and f"[{fields['lr'].default}]" in flat
    for mode in set(module.MODES) - {"train"}:
        assert re.search(rf"^    python {name}\.py {mode}\b", out, re.M), mode
    assert out.rindex("--log_every") < out.rindex("--epochs"), "the flags of all scripts come first"



ALONE = """
import sys, torch, torch._dynamo, torch.utils.data, PIL.Image, matplotlib.figure
for library in ("torchvision", "torchaudio", "soundfile", "sentencepiece"):
    try: __import__(library)
    except ImportError: pass
for library in %r: sys.modules[library] = None  # importing it raises ImportError from here on
import %s as module
%s
for line in sys.argv[1:]:
    module.main(line.split())
"""


@each_script
def test_a_copy_of_the_file_works_alone_and_without_posix(name, tmp_path):
    """It trains, resumes, evaluates and predicts in a folder of any name, with none of the modules that Windows lacks, and
    names the encoding of each text file (if not, Python warns, which here is an error)."""
    folder = tmp_path / "Ein schöner Ort"
    folder.mkdir()
    shutil.copy(ROOT / f"{name}.py", folder)
    TABLE[name].get("input", lambda folder: None)(folder)
    small = " ".join(flags(name, "--eval_every 4 --log_every 2 --max_steps"))
    done = python("-X", "warn_default_encoding", "-W", f"error::EncodingWarning:{name}", "-c", ALONE % (POSIX_ONLY - {"posix"}, name, SMALL_DEMO[name]),
                  f"{small} 4", f"{small} 6 --resume", "eval", TABLE[name]["predict"], cwd=folder)
    assert done.returncode == 0, done.stderr
    last = [line for line in done.stdout.splitlines() if line.startswith("final")]
    form = r"final test (knn|bleu|cer|acc|map50) [-\d.]+.* \| [\d.]+ min"
    assert len(last) == 2 and all(re.fullmatch(form, line) for line in last), last
    run = folder / "out" / f"{name}-demo"
    assert [r["step"] for r in log_of(run) if r["split"] == "train"] == [2, 4, 6]
    assert (folder / TABLE[name]["predicted"]).exists()


@each_script
def test_main_leaves_the_process_as_it_was(name, call):
    """As in a notebook: Ctrl-C works as before."""
    assert call(name, flags(name, "--max_steps 1 --out run"))[0] == 0
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert call(name, flags(name, "--max_steps 2 --out run --resume"))[0] == 0
    assert [(r["step"], r["split"]) for r in log_of("run")] == [
        (1, "train"), (1, "val"), (2, "train"), (2, "val"), (2, "test")]


@each_script
def test_bad_input_is_one_line(name, tmp_path, refuses, call):
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
    refuses(name, "eval extra", "extra")
    refuses(name, "--data no/such/place", "no/such/place")
    assert not (tmp_path / "out").exists()
    refuses(name, "eval", "best.pt", "train first")
    refuses(name, ["eval", "--ckpt", ""], "best.pt", "train first")
    refuses(name, "eval --ckpt file", "file", f"no checkpoint of {name}.py")
    refuses(name, "eval --ckpt other.pt", "other.pt", "other.py")
    refuses(name, f"{small} --init other.pt", "other.pt")
    refuses(name, f"{small} --out file/run", "file")
    if not torch.cuda.is_available():
        refuses(name, f"{small} --device cuda", "cuda")
    assert call(name, f"{small} --out run")[0] == 0
    refuses(name, f"{small} --out run --resume {TABLE[name]['shape_flag']}", *TABLE[name]["shape_flag"].split())
    refuses(name, f"{small} --out run --resume --lr 0.5", "--lr", "start a new run")
    with (tmp_path / "run" / "log.jsonl").open("a") as f:
        f.write('{"step": 1, "spl')  # cut short by a full disk
    assert call(name, f"{small} --out run --resume --data auto --dtype auto")[0] == 0
    assert "spl" not in (tmp_path / "run" / "log.jsonl").read_text().replace("split", "")
    refuses(name, "eval --ckpt run/last.pt --device cpu", "last.pt", "best.pt")
    assert call(name, "eval --ckpt run/best.pt --device cpu --data auto")[0] == 0
    refuses(name, f"eval --ckpt run/best.pt {TABLE[name]['shape_flag']}", TABLE[name]["shape_flag"].split()[0])
    data = (tmp_path / "run" / "last.pt").read_bytes()
    (tmp_path / "run" / "last.pt").write_bytes(data[: len(data) // 2])
    refuses(name, f"{small} --out run --resume", "last.pt", f"no checkpoint of {name}.py")


def test_an_error_does_not_wait_for_the_other_processes(monkeypatch):
    """NCCL's end is a collective: a process that fails alone would wait ten minutes for the others, and they for it."""
    module, ended = importlib.import_module(SCRIPTS[0]), []
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "destroy_process_group", lambda: ended.append(True))
    with module.one_line_errors():
        pass
    for error in (module.UserError, RuntimeError, KeyboardInterrupt):
        with pytest.raises((SystemExit, RuntimeError, KeyboardInterrupt)), module.one_line_errors():
            raise error
    assert ended == [True]
    monkeypatch.setattr(module, "WORLD", 2)
    monkeypatch.setattr(module.os, "_exit", ended.append)
    with module.one_line_errors():
        raise module.UserError
    assert ended == [True, 2]


def test_cuda_out_of_memory_is_one_line(refuses, monkeypatch):
    def load_data(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 TiB")
    importlib.import_module(SCRIPTS[0])
    monkeypatch.setattr(sys.modules[SCRIPTS[0]], "load_data", load_data)
    refuses(SCRIPTS[0], "--data demo --device cpu", "--batch_size", "CUDA out of memory. Tried")


@each_script
def test_a_folder_that_holds_a_run_is_never_overwritten(name, tmp_path, call, refuses):
    small = " ".join(flags(name, "--max_steps 1"))
    run = tmp_path / "out" / f"{name}-demo"
    run.mkdir(parents=True)
    (run / "log.jsonl").write_text('{"step": 9, "split": "train"}\n')  # of a run that failed before its first checkpoint
    assert call(name, small)[0] == 0
    assert [r["step"] for r in log_of(run)] == [1, 1, 1]
    before = {path: path.read_bytes() for path in run.iterdir()}
    refuses(name, small, f"out/{name}-demo", "--resume", "--out")
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert call(name, f"{small} --out other")[0] == 0 and (tmp_path / "other" / "last.pt").exists()


def test_a_run_that_fails_early_does_not_block_the_next_one(tmp_path, refuses, call):
    (tmp_path / "photos").write_bytes(b"no archive")
    for _ in range(2):
        refuses(SCRIPTS[0], "--data photos --device cpu", "--data photos: no such folder")
    assert call(SCRIPTS[0], f"{' '.join(flags(SCRIPTS[0]))} --max_steps 1 --out out/{SCRIPTS[0]}-photos")[0] == 0


@each_script
def test_init_starts_from_the_weights_given(name, tmp_path, call):
    small = " ".join(flags(name))
    assert call(name, f"{small} --max_steps 2 --out first")[0] == 0
    assert call(name, f"{small} --max_steps 1 --out second --init first/best.pt --lr 0")[0] == 0
    first, second = weights_of(tmp_path / "first" / "best.pt"), weights_of(tmp_path / "second" / "last.pt")
    assert all(torch.equal(first[k], second[k]) for k in first)
    if "init_flag" in TABLE[name]:  # heads of another size are replaced
        status, out, _ = call(name, f"{small} --max_steps 1 --out third --init first/best.pt {TABLE[name]['init_flag']}")
        assert status == 0 and (taken := re.search(r"init: (\d+) of (\d+) tensors", out)) and taken[1] != taken[2]


@each_script
@pytest.mark.parametrize("schedule", [30, 60, 180, 4000])
def test_a_short_run_reaches_its_learning_rate(name, schedule):
    module = importlib.import_module(name)
    cfg = module.Config()
    rates = [module.learning_rate(cfg, step, schedule) for step in range(1, schedule + 1)]
    assert 0.7 * cfg.lr < max(rates) <= cfg.lr * 1.0001 and rates[0] < 0.2 * cfg.lr and rates[-1] < 0.2 * cfg.lr


@each_script
def test_the_training_step_is_compiled_once(name, tmp_path, call, monkeypatch):
    """One graph serves all steps. Validation, test and pictures, whose sizes and mode are others, compile none: on a GPU that
    takes minutes. Compiled in earnest for the first script alone: it takes half a minute, and says nothing of the task."""
    graphs, plain = [], torch.compile
    real = name == SCRIPTS[0] and shutil.which("g++")

    def backend(graph, inputs):
        graphs.append(graph)
        return compile_fx(graph, inputs) if real else graph.forward
    monkeypatch.setattr(torch, "compile", lambda part, **how: plain(part, **how | {"backend": backend}))
    small = " ".join(flags(name, "--max_steps 4 --eval_every 2 --log_every 1 --out run")).replace("--compile off", "--compile on")
    status, out, err = call(name, small)
    torch._dynamo.reset()
    assert status == 0 and len(graphs) == 1 and "compiling" in out, err
    assert not any("_orig_mod" in key for key in weights_of(tmp_path / "run" / "last.pt"))


@each_script
def test_a_checkpoint_of_another_version_still_loads(name):
    module = importlib.import_module(name)
    assert module.merge_config({"config": {"lr": 0.5, "gone": 1}}, {"seed": 3}, "best.pt", set()) == module.Config(lr=0.5, seed=3)


@pytest.mark.parametrize("name", SCRIPTS[:4])
def test_what_operating_systems_leave_behind_is_not_data(name, tmp_path):
    for path in ("a.txt", "b/c.txt", ".hidden/d.txt", "__MACOSX/._a.txt", "b/._c.txt", "Thumbs.db", "b/desktop.ini", ".DS_Store"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    module = importlib.import_module(name)
    assert module.find_files(tmp_path, "**/*.*") == [tmp_path / "a.txt", tmp_path / "b" / "c.txt"]
    assert module.find_files(tmp_path, "*") == [tmp_path / "a.txt", tmp_path / "b"]
