"""Runs a script's main in a process of its own that starts in a tenth of a second.

A server process imports torch and the other libraries once, and every run is forked from it. Such a process can be killed, sent
signals, limited and made one of several ranks like any other. It writes its output into files, which are read here.
"""
import importlib
import multiprocessing
import os
import pathlib
import re
import socket
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "torch.utils.data", "torchvision.models.detection", "torchaudio",
                               "sentencepiece", "soundfile", "matplotlib.figure", "PIL.Image", "numpy"])

SMALL_DEMO = {  # patches that make the demo set small or random, so that a start is fast
    "vae": "plain = module.demo_images\nmodule.demo_images = lambda count: plain(600)",
    "fasterrcnn_mask": "plain = module.demo_scenes\nmodule.demo_scenes = lambda count: plain(60)",
    "transformer_mt": "plain = module.demo_pairs\nmodule.demo_pairs = lambda count: plain(600)",
    "las_asr": "plain = module.demo_set\nmodule.demo_set = lambda count, *how: plain(60, *how)",
    "convnext_face": "import torch\nmodule.demo_faces = lambda first, people, each, size: (torch.randint(256, (people * each, 3, size, "
                     "size), dtype=torch.uint8, generator=torch.Generator().manual_seed(first)), "
                     "torch.arange(people).repeat_interleave(each))",
}


def run(name, arguments, folder, environment, prepare, stem):
    """What the new process does: `prepare` is code that runs before main, and knows the script as `module`."""
    os.chdir(folder)
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT))
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{stem}.{end}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    module = importlib.import_module(name)
    module.Figure = NoFigure  # pictures take longer than all the rest
    exec(SMALL_DEMO[name], {"module": module})
    exec(prepare, {"module": module})
    module.main(arguments)


class NoFigure:
    """Stands for a Figure, its Axes (always two of them) and what they return; draws nothing."""

    def __init__(self, *args, **how):
        pass

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **how):
        return self

    def __iter__(self):
        return iter((self, self))

    def __getitem__(self, place):
        return self


class Forked:
    """python SCRIPT.py ARGUMENTS in `folder`, running."""
    count = 0

    def __init__(self, name, arguments, folder, environment=None, prepare="", limit=None):
        Forked.count += 1
        self.stem = pathlib.Path(folder, f".forked{os.getpid()}-{Forked.count}")
        if limit is not None:  # no file may grow beyond this many bytes
            prepare += f"\nimport resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
            prepare += "\nimport signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
        words = arguments.split() if isinstance(arguments, str) else [str(a) for a in arguments]
        self.process = SERVER.Process(target=run, args=(name, words, str(folder), environment or {}, prepare, str(self.stem)))
        self.process.start()

    def read(self, end):
        path = self.stem.with_name(f"{self.stem.name}.{end}")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait(self, seconds=120):
        """Waits for the end: self, with returncode, stdout and stderr as subprocess.run has them."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.returncode, self.stdout, self.stderr = self.process.exitcode, self.read("out"), self.read("err")
        return self

    def until(self, step):
        """Waits for a line of training from this step on."""
        deadline = time.monotonic() + 120
        while self.process.is_alive() and time.monotonic() < deadline:
            steps = [int(n.replace(",", "")) for n in re.findall(r"^train +([\d,]+) \|", self.read("out"), re.M)]
            if steps and steps[-1] >= step:
                return True
            time.sleep(0.002)
        return False


def fork(*args, **how):
    """Runs to the end: {returncode, stdout, stderr}."""
    return Forked(*args, **how).wait()


def fork_two(name, arguments, folder, prepare=""):
    """The two ranks of a run, as torchrun would start them, to their ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [Forked(name, arguments, folder, {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}, prepare)
             for rank in range(2)]
    deadline = time.monotonic() + 240
    while all(rank.process.is_alive() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
    if any(rank.process.exitcode for rank in ranks):  # torchrun ends the others when one has failed
        time.sleep(0.5)
        for rank in ranks:
            rank.process.kill()
    return [rank.wait() for rank in ranks]
