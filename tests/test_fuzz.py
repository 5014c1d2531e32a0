"""Every parser meets damaged files: it reads them or refuses them with its own error, and never with another.

FUZZ=10000 python -m pytest tests/test_fuzz.py runs the long form."""
import importlib
import io
import os
import random

import numpy as np
import pytest
import soundfile
import torch
from conftest import SCRIPTS
from PIL import Image

ROUNDS = int(os.environ.get("FUZZ", 300))


def mutated(data, dice):
    """`data` with up to 8 bytes changed, added or taken out, or cut short."""
    data = bytearray(data)
    for _ in range(dice.randrange(1, 9)):
        place = dice.randrange(len(data))
        match dice.randrange(4):
            case 0 | 1:
                data[place] = dice.randrange(256)
            case 2:
                data.insert(place, dice.choice(b"\0\t\n<>&,.-9e \xff\xb2"))
            case 3:
                del data[place]
    return bytes(data[: dice.randrange(1, len(data))] if dice.random() < 0.1 else data)


def written(write, *args, **how):
    """The bytes that write(file, ...) makes."""
    file = io.BytesIO()
    write(file, *args, **how)
    return file.getvalue()


def image(vae, folder):
    data = written(Image.fromarray(np.arange(80, dtype=np.uint8).reshape(8, 10)).save, format="PNG")
    return "a.png", data, lambda path: vae.read_images(folder, 8)


def tsv(las, folder):
    return "my.tsv", "a.wav\tIT'S A WORD\nb.wav\tÜBER\n".encode(), las.read_list


def letters(las, folder):
    (folder / "mfcc").mkdir(exist_ok=True)
    (folder / "mfcc" / "u.npy").touch()
    (folder / "transcript" / "raw").mkdir(parents=True, exist_ok=True)
    data = written(np.save, np.array(["<sos>", *"WORDS", "<eos>"]))
    return "transcript/raw/u.npy", data, lambda path: las.read_hw4p2(folder)


def features(las, folder):
    data = written(np.save, np.random.default_rng(0).normal(size=(20, 5)).astype("float32"))
    return "u.npy", data, lambda path: las.extract([(path, "WORD")], "train")


def sound(las, folder):
    data = written(soundfile.write, np.random.default_rng(0).normal(size=3000) * 0.1, 16000, format="WAV")
    return "u.wav", data, lambda path: las.extract([(path, "WORD")], "train")


def voc(mask, folder):
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40.5</ymax></bndbox>"
    data = ("<annotation><size><width>50</width><height>60</height><depth>3</depth></size>"
            f"<object><name>with_mask</name>{box}</object><object><name>without_mask</name>{box}</object></annotation>")
    return "a.xml", data.encode(), mask.read_voc


def pairs(face, folder):
    return "pairs.txt", b"2\nAnn_A 1 2\nBob 1 3\nAnn_A 1 Bob 2\nBob 2 Cid 4\n", lambda path: face.read_pairs(path, folder)


def identities(face, folder):
    files = [folder / f"{i}.jpg" for i in range(4)]
    return "ids.csv", b"id,label\n0,n001\n1,n002\n2,n001\n3,n003\n", lambda path: face.read_identities(path, files)


def checkpoint(module, folder):
    path = folder / "whole.pt"
    torch.save({"script": module.SCRIPT, "model": {"w": torch.arange(6.0)}, "step": 3, "config": {"lr": 0.1}, "best": 1.0}, path)
    return "a.pt", path.read_bytes(), module.load_checkpoint


CASES = [("vae", image), ("las_asr", tsv), ("las_asr", letters), ("las_asr", features), ("las_asr", sound),
         ("fasterrcnn_mask", voc), ("convnext_face", pairs), ("convnext_face", identities), ("vae", checkpoint)]


@pytest.mark.parametrize("name, case", [c for c in CASES if c[0] in SCRIPTS], ids=lambda c: getattr(c, "__name__", c))
def test_damaged_files_end_in_the_scripts_own_error(name, case, tmp_path, monkeypatch):
    module, dice = importlib.import_module(name), random.Random(0)
    monkeypatch.setattr(module, "say", lambda *args, **how: None)
    file, data, read = case(module, tmp_path)
    (tmp_path / file).write_bytes(data)
    read(tmp_path / file)  # as it stands, it is read
    refused = 0
    for _ in range(ROUNDS):
        (tmp_path / file).write_bytes(mutated(data, dice))
        try:
            read(tmp_path / file)
        except module.UserError as e:
            refused += 1
            assert str(tmp_path) in str(e) or file.split("/")[-1] in str(e)
    assert refused > ROUNDS // 20
