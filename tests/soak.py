"""Kills a demo training at random moments, and compares its end with an uninterrupted run: `python tests/soak.py vae`.

Not run by pytest, which holds a small form of it (test_killed_and_resumed_is_bitwise_the_same).
"""
import argparse
import pathlib
import random
import shutil
import signal
import tempfile
import time

import torch
from conftest import TABLE, flags, log_of
from forks import Forked, fork


def same(a, b):
    """Whether two checkpoints hold the same, down to the last bit; the wall time, and what it makes of the log, apart."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("seconds", "config", "log_bytes"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def compare(folder):
    assert log_of(folder / "cut") == log_of(folder / "whole")
    for file in ("last.pt", "best.pt"):
        a, b = (torch.load(folder / run / file, weights_only=True) for run in ("whole", "cut"))
        assert same(a, b), file


def soak(name, kills, steps, folder):
    small = flags(name, f"--max_steps {steps} --eval_every 25 --save_every 7 --log_every 5")
    fork(name, [*small, "--max_steps", 1, "--out", "first"], folder)  # the first start imports torch
    began = time.perf_counter()
    whole = fork(name, [*small, "--out", "whole"], folder)
    assert whole.returncode == 0, whole.stderr
    length, dice, done, starts = time.perf_counter() - began, random.Random(0), 0, 0
    while done < kills:
        starts += 1
        run = Forked(name, [*small, "--out", "cut", "--resume"], folder)
        run.process.join(dice.uniform(0, 1.1 * length))
        run.process.kill()
        if run.wait().returncode == -signal.SIGKILL:
            done += 1
        else:  # it came to its end: a new run is killed
            assert run.returncode == 0, run.stderr
            compare(folder)
            shutil.rmtree(folder / "cut")
    last = fork(name, [*small, "--out", "cut", "--resume"], folder)
    assert last.returncode == 0, last.stderr
    compare(folder)
    print(f"{name}: {done} kills over {starts} starts, every end bitwise the uninterrupted run's", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(TABLE))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    known = parser.parse_args()
    for each in known.names:
        with tempfile.TemporaryDirectory() as scratch:
            soak(each, known.kills, known.steps, pathlib.Path(scratch))
