"""A run can be killed, be interrupted or run out of disk space at any moment: what is saved is whole, resuming is exact."""
import importlib
import os
import re
import signal
import time

import pytest
import torch
from conftest import SCRIPTS, each_script, flags, log_of, weights_of
from forks import Forked, fork


def resumed_from(done):
    return int(re.search(r"^run: .*, from step ([\d,]+)$", done.stdout, re.M)[1].replace(",", ""))


@each_script
def test_killed_and_resumed_is_bitwise_the_same(name, tmp_path):
    small = flags(name, "--max_steps 30 --eval_every 12 --save_every 4 --log_every 2")
    whole = fork(name, [*small, "--out", "whole"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    saved = 0
    for attempt, step in enumerate((6, 14, 24)):
        process = Forked(name, [*small, "--out", "cut", "--resume"], tmp_path)
        assert process.until(step)
        time.sleep(0.002 * attempt)
        process.process.kill()
        assert process.wait().returncode == -signal.SIGKILL and resumed_from(process) == saved
        saved = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["step"]
        assert saved >= (step - 1) // 4 * 4
    done = fork(name, [*small, "--out", "cut", "--resume"], tmp_path)
    assert done.returncode == 0 and resumed_from(done) == saved > 12, done.stderr
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    for file in ("last.pt", "best.pt"):
        a, b = weights_of(tmp_path / "whole" / file), weights_of(tmp_path / "cut" / file)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file
        assert not any(k.startswith(("_orig_mod", "module")) for k in a)


@each_script
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_continue(name, number, tmp_path):
    small = [*flags(name, "--eval_every 10000 --save_every 10000 --log_every 1"), "--out", "my runs/it's one"]
    process = Forked(name, small, tmp_path)
    assert process.until(1)
    for _ in range(2):  # the second as torchrun's copy of a signal to the whole group
        os.kill(process.process.pid, number)
        time.sleep(0.01)
    done = process.wait()
    assert done.returncode == 0 and "repeat the command with --resume" in done.stdout, done.stderr
    step = torch.load(tmp_path / "my runs" / "it's one" / "last.pt", weights_only=True)["step"]
    done = fork(name, [*small, "--resume", "--max_steps", step + 2], tmp_path)
    assert done.returncode == 0 and resumed_from(done) == step > 0 and "final test" in done.stdout, done.stderr


@each_script
def test_a_full_disk_loses_nothing(name, tmp_path):
    small = flags(name, "--eval_every 2 --log_every 1")
    done = fork(name, [*small, "--max_steps", "2"], tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / f"{name}-demo"
    before = {f: (folder / f).read_bytes() for f in ("last.pt", "best.pt")}
    done = fork(name, [*small, "--max_steps", "4", "--resume"], tmp_path, limit=min(map(len, before.values())) // 2)
    assert done.returncode == 2 and done.stderr.startswith("error:") and "Traceback" not in done.stderr, done.stderr
    assert before == {f: (folder / f).read_bytes() for f in before}
    done = fork(name, [*small, "--max_steps", "4", "--resume"], tmp_path)
    assert done.returncode == 0 and torch.load(folder / "last.pt", weights_only=True)["step"] == 4, done.stderr


@each_script
@pytest.mark.parametrize("what", ["step_done", "save"])
def test_a_loss_or_weight_that_is_not_finite_ends_the_run(name, what, tmp_path, refuses, monkeypatch):
    module = importlib.import_module(name)
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
    words = ("step 6", "loss is not finite") if what == "step_done" else ("step 6", "is not finite")
    refuses(name, " ".join(flags(name, "--max_steps 9 --save_every 3 --log_every 100 --out run")), *words)
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert last["step"] == 3 and all(v.isfinite().all() for v in last["model"].values())


def test_a_signal_in_the_last_test_ends_it_at_once(tmp_path):
    """All is saved then; the patch makes that test last for a minute."""
    slow = "import time\nmodule.score = lambda *args: (print('scoring', flush=True), time.sleep(60))"
    process = Forked(SCRIPTS[0], flags(SCRIPTS[0], "--max_steps 2 --out run"), tmp_path, prepare=slow)
    while "scoring" not in process.read("out"):
        assert process.process.is_alive()
        time.sleep(0.01)
    os.kill(process.process.pid, signal.SIGINT)
    done = process.wait()
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 2
