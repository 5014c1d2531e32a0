"""The CUDA paths, without a GPU: with CUDA tensors that have a shape, a type and a device, but no content. The last test needs one.

A tensor on another device than the rest, a type that autocast on CUDA does not allow, and in a training step whatever makes the
CPU wait for the GPU, raise an error. cuDNN's LSTM and the CTC loss are replaced; of the detector, whose boxes depend on content,
the batch and the backbone are run.
"""
import importlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from baselines import captured
from conftest import ROOT, SCRIPTS, TABLE, each_script, log_of, python
from forks import SMALL_DEMO
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # by deepcopy
CUDA = torch.device("cuda", 0)


class NoContent(TorchFunctionMode):
    """Makes a function without content if one of its arguments is, or is the GPU; the others work as ever."""

    def __init__(self):
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        arguments = tree_leaves((args, kwargs))
        if any(isinstance(a, FakeTensor) or isinstance(a, torch.device) and a.type == "cuda" for a in arguments):
            with self.mode:
                return function(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def move(module, function, recurse=True):
    """nn.Module._apply, which would swap the parameters in place: tensors without content cannot be."""
    for child in module.children():
        child._apply(function)
    for key, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[key] = nn.Parameter(function(parameter), parameter.requires_grad)
    for key, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[key] = function(buffer)
    return module


def lstm(self, x, state=None):
    assert x.dtype == torch.float32 and x.device == self.weight_ih_l0.device and not torch.is_autocast_enabled("cuda")
    return x.new_zeros(*x.shape[:2], self.hidden_size) + self.weight_ih_l0.sum(), None


def ctc_loss(log_p, targets, frames, sizes, *_, **__):
    assert log_p.device == targets.device == CUDA and frames.device.type == sizes.device.type == "cpu"  # its lengths are read
    return log_p.sum()


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """gpu(script, flags) -> (module, the variables of its main, with the model on the GPU)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, "_apply", move)
    monkeypatch.setattr(nn.LSTM, "forward", lstm)
    monkeypatch.setattr(F, "ctc_loss", ctc_loss)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # asked by autocast
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)

    def start(name, more):
        module = importlib.import_module(name)
        small = dict(vars(module))
        exec(SMALL_DEMO[name], {"module": module})
        for key, value in small.items():
            changed, vars(module)[key] = vars(module)[key], value
            monkeypatch.setattr(module, key, changed)
        monkeypatch.setattr(module, "pick_device", lambda cfg: vars(cfg).update(dtype="bfloat16") or CUDA)
        return captured(name, f"--data demo --compile off {TABLE[name]['tiny']} {more}".split())

    with NoContent():
        yield start


@pytest.mark.parametrize("name, more", [
    *((name, "") for name in SCRIPTS), ("vae", "--likelihood gaussian"), ("convnext_face", "--size micro"),  # with Muon
    ("convnext_face", "--loss arcface"), ("las_asr", "--teacher 0.5"), ("transformer_mt", "--rdrop 5")])
def test_a_training_step(name, more, gpu, monkeypatch):
    _, box = gpu(name, more)
    model = box["raw"]

    def backward(loss):
        assert loss.dtype == torch.float32 and loss.requires_grad
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    for step in (1, 2):
        batch = box["fetch"](step)
        if name == "fasterrcnn_mask":
            images, targets = map(list, batch)
            assert all(part.device == CUDA for part in tree_leaves([images, targets]))
            losses = model.backbone(torch.stack(images))
        else:
            losses = box["update"](step, batch)
        assert losses and all(loss.device == CUDA and loss.dtype == torch.float32 for loss in losses.values())


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "fasterrcnn_mask"])
def test_evaluation(name, gpu, monkeypatch):
    module, box = gpu(name, "")
    for read in ("tolist", "item"):  # zeros stand for what is read
        monkeypatch.setattr(torch.Tensor, read, lambda x, plain=getattr(torch.Tensor, read): plain(
            torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) else x))
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: torch.cartesian_prod(torch.arange(len(x)), torch.tensor([0])))
    data, model = box["data"], box.get("average", box["raw"])
    if name == "vae":
        module.iwae_gap(model, box["cfg"], box["val"], CUDA)
        module.class_means(model, data, CUDA)
        figures, _ = module.evaluate(model, box["cfg"], box["val"], CUDA)
        assert set(figures) == {"elbo", "reconstruction", "kl"}
    elif name == "convnext_face":
        z, classes = module.embed(model, data["val"][0], CUDA)
        assert len(z) == len(classes) == len(data["val"][0]) and z.device.type == "cpu"
    elif name == "las_asr":
        assert len(module.decode(model, box["cfg"], data["val"], CUDA, 4)) == len(data["val"].texts)
    else:
        ids = module.encode_text(box["sp"], data["val"][0], 20)
        assert len(module.translate(model, box["sp"], ids, box["cfg"], CUDA, 5)) == len(ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@each_script
def test_a_real_gpu(name, tmp_path):
    """Trains with compilation, resumes, tests and predicts."""
    TABLE[name].get("input", lambda folder: None)(tmp_path)
    train = f"--data demo --device cuda --compile on --eval_every 4 --log_every 1 {TABLE[name]['tiny']}"
    for arguments in (f"{train} --max_steps 4", f"{train} --max_steps 8 --resume", "eval --device cuda",
                      f"{TABLE[name]['predict']} --device cuda"):
        done = python(ROOT / f"{name}.py", *arguments.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    steps = [record["step"] for record in log_of(tmp_path / "out" / f"{name}-demo") if record["split"] == "train"]
    assert steps == list(range(1, 9)) and (tmp_path / TABLE[name]["predicted"]).exists()
