"""Two processes train and evaluate as one does, and a worker that dies is replaced."""
import re
import signal

import pytest
import torch
from conftest import ROOT, SCRIPTS, TABLE, each_script, flags, log_of, python, weights_of
from forks import fork, fork_two

DIES = """
import os, pathlib, signal
plain = module.Run.step_done
def step_done(run, *args):
    if run.step == 5 and module.RANK == 1 and not pathlib.Path("killed").exists():
        pathlib.Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(run, *args)
module.Run.step_done = step_done
"""


@each_script
def test_two_processes_equal_one(name, tmp_path):
    """10 steps on 1 and on 2 gloo ranks give the same weights, where no process draws samples of its own; a worker that is
    killed, after which both start again, changes nothing."""
    patch = TABLE[name].get("patch", "")
    quiet = flags(name, f"{TABLE[name]['noise_off']} --dtype float32 --max_steps 10 --eval_every 5 --save_every 2 --log_every 1")
    done = fork(name, [*quiet, "--out", "one"], tmp_path, prepare=patch)
    assert done.returncode == 0, done.stderr
    first, second = fork_two(name, [*quiet, "--out", "two"], tmp_path, patch)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert (first.stdout + second.stdout).count("final test") == 1
    one, two = (weights_of(tmp_path / run / "last.pt") for run in ("one", "two"))
    equal = TABLE[name].get("ranks_equal_one", True)
    assert one.keys() == two.keys()
    assert not equal or max((one[k].float() - two[k].float()).abs().max().item() for k in one) < 1e-5
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        if equal and a["split"] != "test":  # the same losses, and the same validation figures
            assert a.keys() == b.keys() and a["split"] == b["split"]
            for key in set(a) - {"split"}:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-4), (key, a, b)
    first, second = fork_two(name, [*quiet, "--out", "three", "--resume"], tmp_path, patch + DIES)
    assert second.returncode == -signal.SIGKILL and first.returncode != 0 and (tmp_path / "killed").exists()
    assert torch.load(tmp_path / "three" / "last.pt", weights_only=True)["step"] == 5
    first, second = fork_two(name, [*quiet, "--out", "three", "--resume"], tmp_path, patch)
    assert first.returncode == second.returncode == 0 and "from step 5" in first.stdout, first.stderr + second.stderr
    three = weights_of(tmp_path / "three" / "last.pt")
    assert all(torch.equal(two[k], three[k]) for k in two)


@pytest.mark.parametrize("name, sizes", [("transformer_mt", "--max_len 100 --batch_size 1400"),
                                         ("las_asr", "--speller 256 --batch_size 6000")])
def test_two_processes_compile_one_graph(name, sizes, tmp_path):
    """For batches of all lengths: DDP's own parts of the graph would be compiled for each length, up to a limit."""
    patch = """
import torch
def backend(graph, inputs):
    print("one graph")
    return graph.forward
plain = torch.compile
torch.compile = lambda part, **how: plain(part, **how | {"backend": backend})
"""
    small = flags(name, f"--max_steps 5 {sizes} --out run")
    small[small.index("off")] = "on"
    for done in fork_two(name, small, tmp_path, patch):
        assert done.returncode == 0 and done.stdout.count("one graph") == 1, done.stdout + done.stderr


def test_torchrun_restarts_workers(tmp_path):
    """With the README's command: without that variable the workers would find the addresses of those before."""
    name = SCRIPTS[0]
    program = tmp_path / "dies.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport {name} as module\n{DIES}\nmodule.main(sys.argv[1:])")
    small = flags(name, "--max_steps 10 --save_every 2 --log_every 1 --out run --resume")
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=2", program, *small, cwd=tmp_path,
                  env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    assert done.returncode == 0 and (tmp_path / "killed").exists() and "final test" in done.stdout, done.stderr
    assert done.stdout.count("from step 0") == done.stdout.count("from step 4") == 1
    assert [r["step"] for r in log_of(tmp_path / "run") if r["split"] == "train"] == list(range(1, 11))


@each_script
def test_evaluation_is_the_same_on_two_processes(name, tmp_path):
    done = fork(name, flags(name, "--max_steps 6 --eval_every 6"), tmp_path)
    assert done.returncode == 0, done.stderr
    one = fork(name, "eval --device cpu --save one", tmp_path)
    two, other = fork_two(name, "eval --device cpu --save two", tmp_path)
    assert one.returncode == two.returncode == other.returncode == 0 and not other.stdout, two.stderr + other.stderr
    one, two = (re.sub(r"/s [\d.,]+", "/s", done.stdout).replace("processes: 2", "processes: 1") for done in (one, two))  # but for the speed
    assert one.replace("one/", "two/") == two
