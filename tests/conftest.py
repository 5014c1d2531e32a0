"""What all tests share: the scripts, their smallest settings, and ways to run them."""
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from forks import SMALL_DEMO

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def a_sound(folder):
    """a.wav, a second of noise."""
    import numpy as np
    import soundfile
    soundfile.write(folder / "a.wav", np.random.default_rng(0).normal(size=16000) * 0.1, 16000)


# Per script: flags that make its demo tiny; flags and a patch that take all noise out of its training; a prediction,
# and what makes its input.
TABLE = {
    "vae": {
        "tiny": "--width 4 --hidden 16 --iwae_n 4 --iwae_k 10",
        "noise_off": "--likelihood gaussian",
        "patch": "module.reparameterize = lambda mu, logvar: mu",
        "predict": "sample --n 9 --save pictures",
        "predicted": "pictures/samples.png",
        "shape_flag": "--latent_dim 3",
        "init_flag": "--latent_dim 3",
    },
    "fasterrcnn_mask": {
        "tiny": "--image_size 32 --batch_size 2 --warmup 10",
        "noise_off": "--augment 0",
        "ranks_equal_one": False,  # each process draws the anchors and boxes that it learns from
        "predict": "detect out/fasterrcnn_mask-demo/examples.png --save pictures",
        "predicted": "pictures/examples-boxes.png",
        "shape_flag": "--backbone resnet50",
    },
    "transformer_mt": {
        "tiny": "--vocab_size 120 --batch_size 400 --beam_size 2 --max_len 20",
        "noise_off": "--dropout 0 --lr 1e-3",  # with 2e-3 a ReLU that is almost 0 switches by rounding, which Adam scales up
        "predict": "eval --save pictures",
        "predicted": "pictures/test.hyp.txt",
        "shape_flag": "--size base",
    },
    "las_asr": {
        "tiny": "--hidden 8 --speller 8 --batch_size 20000",
        "noise_off": "--dropout 0 --specaugment 0 --teacher 1",
        "input": a_sound,
        "predict": "transcribe a.wav --save texts",
        "predicted": "texts/transcripts.tsv",
        "shape_flag": "--hidden 9",
        "init_flag": "--hidden 9",
    },
    "convnext_face": {
        "tiny": "--image_size 16 --batch_size 16",
        "noise_off": "--drop_path 0 --augment 0",
        "predict": "eval --save pictures",
        "predicted": "pictures/roc.png",
        "shape_flag": "--stem_stride 4",
    },
}
NAMES = ["vae", "convnext_face", "fasterrcnn_mask", "las_asr", "transformer_mt"]
SCRIPTS = [name for name in NAMES if (ROOT / f"{name}.py").exists()]
each_script = pytest.mark.parametrize("name", SCRIPTS)


def litter(folder, name):
    """What operating systems leave in a folder of files called `name`: none of it is data."""
    for path in (f"__MACOSX/._{name}", f"._{name}", ".DS_Store", "Thumbs.db", "desktop.ini", f".cache/{name}"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(b"no data")


def flags(name, more=""):
    return f"--data demo --device cpu --compile off --epochs 100 {TABLE[name]['tiny']} {more}".split()


def python(*args, cwd, **how):
    """Starts Python, which takes seconds: for what a forked process (forks.py) cannot show."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    how["env"] = environment | how.get("env", {})
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, text=True, capture_output=True, timeout=300, **how)


def log_of(folder):
    """The records of a run's log, without the speeds."""
    lines = (pathlib.Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("/s")} for line in lines]


def weights_of(path):
    import torch
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """call(script, "eval --n 3") runs main in this process, in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    small = []

    def run(name, arguments):
        module, status = importlib.import_module(name), 0
        if module not in small:
            for function in re.findall(r"module\.(\w+) =", SMALL_DEMO[name]):
                monkeypatch.setattr(module, function, getattr(module, function))  # so that it is restored
            exec(SMALL_DEMO[name], {"module": module})
            small.append(module)
        try:
            module.main(arguments.split() if isinstance(arguments, str) else arguments)
        except SystemExit as e:
            status = e.code or 0
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def refuses(call):
    """Asserts that a call ends with status 2 and one `error:` line that holds all the given words; returns the line."""
    def check(name, arguments, *words):
        status, _, err = call(name, arguments)
        lines = [line for line in err.splitlines() if line.startswith("error:") or ": error:" in line]  # argparse's
        assert status == 2 and len(lines) == 1 and "Traceback" not in err, err
        for word in words:
            assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
        return lines[0]
    return check
