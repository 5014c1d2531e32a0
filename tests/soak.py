"""Kills a demo training at random moments, and compares its end with an uninterrupted run: `python tests/soak.py vae`.

Not run by pytest, which holds a small form of it (test_killed_and_resumed_is_bitwise_the_same).
"""
import argparse
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import torch
from conftest import ROOT, TABLE, flags, log_of, python


def same(a, b):
    """Whether two checkpoints hold the same, down to the last bit; the wall time, and what it makes of the log, apart."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("seconds", "config", "log_bytes"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def soak(name, kills, steps, folder):
    small = flags(name, f"--max_steps {steps} --eval_every 25 --save_every 7 --log_every 5")
    began = time.perf_counter()
    whole = python(ROOT / f"{name}.py", *small, "--out", "whole", cwd=folder)
    assert whole.returncode == 0, whole.stderr
    length, dice, done, runs = time.perf_counter() - began, random.Random(0), 0, 0
    while done < kills:
        runs += 1
        process = subprocess.Popen([sys.executable, ROOT / f"{name}.py", *small, "--out", "cut", "--resume"],
                                   cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(dice.uniform(0, 1.1 * length))
        except subprocess.TimeoutExpired:
            process.kill()
            done += process.wait() == -signal.SIGKILL
        else:  # it came to its end: a new run is killed
            assert process.returncode == 0
            compare(folder)
            if done < kills:
                subprocess.run(["rm", "-rf", folder / "cut"], check=True)
    last = python(ROOT / f"{name}.py", *small, "--out", "cut", "--resume", cwd=folder)
    assert last.returncode == 0, last.stderr
    compare(folder)
    print(f"{name}: {done} kills over {runs} starts, every end bitwise the uninterrupted run's", flush=True)


def compare(folder):
    assert log_of(folder / "cut") == log_of(folder / "whole")
    for file in ("last.pt", "best.pt"):
        a, b = (torch.load(folder / run / file, weights_only=True) for run in ("whole", "cut"))
        assert same(a, b), file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(TABLE))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    known = parser.parse_args()
    for each in known.names or TABLE:
        with tempfile.TemporaryDirectory() as scratch:
            soak(each, known.kills, known.steps, pathlib.Path(scratch))
