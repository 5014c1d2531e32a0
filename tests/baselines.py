"""The straightforward loop that each script's training step is compared with: `python tests/baselines.py vae`.

Both sides run in this process on the same data, in turns, a round each; the median over the rounds of each side's
time per step and their ratio are printed as one JSON line. Not run by pytest: a time is no test.
"""
import argparse
import importlib
import json
import pathlib
import statistics
import sys
import time

import torch
import torch.nn as nn
from peers import Embedded, NotebookLAS, PlainTransformer

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Captured(Exception):
    pass


def captured(name, flags):
    """The script itself up to its training loop: (module, what `main` has in its variables there)."""
    module, box = importlib.import_module(name), {}

    def start(run, total):
        box.update(sys._getframe(1).f_locals)
        raise Captured
    plain, module.Run.start = module.Run.start, start
    try:
        module.main(flags)
    except Captured:
        return module, box
    finally:
        module.Run.start = plain


def alternate(sides, rounds, steps, device):
    """{side: median seconds per step}; sides is {name: f(step)}. Each side warms up for three steps."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times, step = {name: [] for name in sides}, 0
    for round_number in range(-1, rounds):
        for name, one_step in sides.items():
            start = time.perf_counter()
            for _ in range(steps if round_number >= 0 else 3):
                step += 1
                one_step(step)
            wait()
            if round_number >= 0:
                times[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(values) for name, values in times.items()}


def report(name, seconds, ours, **more):
    line = {"script": name, **{f"{side} ms": round(1e3 * s, 2) for side, s in seconds.items()},
            **{f"ratio to {side}": round(s / seconds[ours], 2) for side, s in seconds.items() if side != ours}}
    print(json.dumps(line | {"threads": torch.get_num_threads()} | more))


def report_rates(name, rates, unit, **more):
    """The same for {side: items per second}, the first side being ours."""
    first, *others = rates
    line = {"script": name, **{f"{side} {unit}": round(rate, 2) for side, rate in rates.items()},
            **{f"ratio to {side}": round(rates[first] / rates[side], 2) for side in others}}
    print(json.dumps(line | {"threads": torch.get_num_threads()} | more))


def forever(loader):
    while True:
        yield from loader


def vae(flags, rounds, steps):
    """A DataLoader of PIL images, transformed one by one in the collate function, `.item()` at every step."""
    from torchvision.transforms import v2
    module, box = captured("vae", flags)
    cfg, device = box["run"].cfg, box["run"].device
    images = module.load_data(cfg)["train"][0]
    to_tensor = v2.Compose([v2.ToPILImage(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    loader = torch.utils.data.DataLoader(images.numpy()[..., None], box["count"], shuffle=True, drop_last=True,
                                         collate_fn=lambda items: torch.stack([to_tensor(i) for i in items]))
    batches = forever(loader)
    model = module.VAE(cfg.latent_dim, (cfg.width, 2 * cfg.width, 4 * cfg.width), cfg.image_size, cfg.hidden).to(device)
    optimizer, history = torch.optim.Adam(model.parameters(), 1e-3), []

    def plain(step):
        x = torch.bernoulli(next(batches).to(device))
        logits, mu, logvar = model(x)
        error = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        loss = error + module.kl_divergence(mu, logvar).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())

    seconds = alternate({"ours": lambda step: box["update"](step, box["fetch"](step)), "plain loop": plain},
                        rounds, steps, device)
    report("vae", seconds, "ours", dtype=cfg.dtype, images_per_second=round(box["count"] / seconds["ours"]))


def mt(flags, rounds, steps):
    """(a) nn.Transformer in a plain loop on the same batches; (b) the notebook's loop: 32 sentences padded to the
    corpus's longest, dense masks, label smoothing by a KL divergence from the whole target distribution. Compared in
    real target tokens per second. Then beam search with the cache and without."""
    module, box = captured("transformer_mt", flags)
    cfg, device, fetch = box["run"].cfg, box["run"].device, box["fetch"]
    size, vocabulary = module.SIZES[cfg.size], box["raw"].embedding.num_embeddings
    plain, notebook = (PlainTransformer(module, vocabulary, *size, cfg.dropout).to(device) for _ in range(2))
    optimizers = {net: torch.optim.Adam(net.parameters(), 1e-4) for net in (plain, notebook)}
    criterion = nn.CrossEntropyLoss(ignore_index=0, label_smoothing=cfg.label_smoothing)
    tokens, cursor = {"ours": 0, "nn.Transformer": 0, "notebook": 0}, {"left": []}

    def ours(step):
        batch = fetch(step)
        tokens["ours"] += int((batch[1] != 0).sum())
        box["update"](step, batch)

    def finish(net, loss):
        optimizers[net].zero_grad()
        loss.backward()
        optimizers[net].step()
        return loss.item()

    def plain_step(step):
        src, tgt, _ = fetch(step)
        tokens["nn.Transformer"] += int((tgt != 0).sum())
        logits = plain(src, nn.functional.pad(tgt, (1, -1), value=1))
        finish(plain, criterion(logits.flatten(0, 1), tgt.flatten()))

    def notebook_step(step):
        if not cursor["left"]:
            src, tgt, _ = fetch(step)
            src, tgt = (nn.functional.pad(x, (0, max(0, 72 - x.shape[1])))[:, :72] for x in (src, tgt))
            cursor["left"] = list(zip(src.split(32), tgt.split(32)))
        src, tgt = cursor["left"].pop()
        tokens["notebook"] += int((tgt != 0).sum())
        logits = notebook(src, nn.functional.pad(tgt, (1, -1), value=1)).log_softmax(-1)
        wanted = torch.full_like(logits, cfg.label_smoothing / (vocabulary - 2))
        wanted.scatter_(2, tgt[:, :, None], 1 - cfg.label_smoothing)
        wanted[tgt == 0] = 0
        finish(notebook, nn.functional.kl_div(logits, wanted, reduction="sum") / (tgt != 0).sum())

    sides = {"ours": ours, "nn.Transformer": plain_step, "notebook": notebook_step}
    for name, one_step in sides.items():  # warm-up
        one_step(1)
    for name in tokens:
        tokens[name] = 0
    rates = {name: [] for name in sides}
    for number in range(rounds):
        for name, one_step in sides.items():
            start, before = time.perf_counter(), tokens[name]
            for step in range(steps):
                one_step(2 + number * steps + step)
            if device.type == "cuda":
                torch.cuda.synchronize()
            rates[name].append((tokens[name] - before) / (time.perf_counter() - start))
    rates = {name: statistics.median(values) for name, values in rates.items()}

    model, src = box["raw"].eval(), fetch(3)[0][:32]
    seconds = {"cached": [], "uncached": []}
    for _ in range(3):
        for name, search in (("cached", module.beam_search), ("uncached", uncached_beam_search)):
            start = time.perf_counter()
            search(model, src, 5, 1.0, 30)
            seconds[name].append(time.perf_counter() - start)
    cache = statistics.median(seconds["uncached"]) / statistics.median(seconds["cached"])
    report_rates("transformer_mt", rates, "tokens/s", **{"cached beam search ratio": round(cache, 2)}, dtype=cfg.dtype,
                 size=cfg.size, vocabulary=vocabulary)


@torch.no_grad()
def uncached_beam_search(model, src, k, alpha, max_len):
    """The same batched search, each step decoding the whole prefix again. An untrained model seldom ends, so both
    sides go through all positions."""
    memory, mask = model.encode(src)
    memory, mask = [kv.repeat_interleave(k, 1) for kv in memory], mask.repeat_interleave(k, 0)
    prefix = torch.full((len(src) * k, 1), 1, device=src.device)
    scores = torch.full((len(src), k), -1e9, device=src.device).index_fill(1, torch.tensor(0, device=src.device), 0.0)
    first = torch.arange(len(src), device=src.device)[:, None] * k
    for _ in range(max_len):
        logits = model.decode(prefix, memory, mask)[0][:, -1]
        log_p = logits.log_softmax(-1).unflatten(0, (-1, k)) + scores[:, :, None]
        scores, place = log_p.flatten(1).topk(k)
        rows = (first + place // log_p.shape[2]).flatten()
        prefix = torch.cat([prefix[rows], (place % log_p.shape[2]).flatten()[:, None]], 1)
    return prefix


def las(flags, rounds, steps):
    """The notebook's loop on the same batch, 16 x 300 frames x 30 characters (a GPU: 96 x 1,000 x 180), ours with the
    paper's pyramid of three at the same width, its CTC loss included, and a speller of at least as many weights."""
    import las_asr as module
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (b, frames, u), f, v = ((96, 1000, 180) if device.type == "cuda" else (16, 300, 30)), 15, 31
    torch.manual_seed(0)
    x, targets = torch.randn(b, frames, f, device=device), torch.randint(3, v, (b, u), device=device)
    lengths = torch.linspace(frames * 0.8, frames, b).long()
    ours, notebook = module.LAS(f, v, 512, 3, 640, 0.0).to(device), NotebookLAS(f, v).to(device)
    own, far = (list(net.parameters()) for net in (ours, notebook))
    optimizers = torch.optim.AdamW(own, 1e-4, fused=True), torch.optim.Adam(far, 1e-4)
    if device.type == "cuda":
        ours.step = torch.compile(ours.step, dynamic=True)
    cfg = module.Config(device=device.type, dtype="float32" if "float32" in flags else "auto")
    on_device = lengths.to(device)
    module.pick_device(cfg)
    dtype = cfg.dtype

    def our_step(step):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits, _, ctc = ours(x, on_device, targets)
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) + nn.functional.ctc_loss(
            ctc.float().log_softmax(-1).transpose(0, 1), targets, on_device // 8, torch.full_like(on_device, u),
            zero_infinity=True)
        optimizers[0].zero_grad(set_to_none=True)
        loss.backward()
        optimizers[0].step()

    def notebook_step(step):
        loss = nn.functional.cross_entropy(notebook(x, lengths, targets).flatten(0, 1), targets.flatten())
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        loss.item()

    seconds = alternate({"ours": our_step, "notebook": notebook_step}, rounds, steps, device)
    counts = [sum(p.numel() for p in side) for side in (own, far)]
    report("las_asr", seconds, "ours", dtype=dtype, weights_ours=counts[0], weights_notebook=counts[1])


def face(flags, rounds, steps):
    """ConvNeXt-Tiny at 112 pixels: (a) timm's and torchvision's networks in the script's own loop, in both memory
    formats; (b) the notebook's loop: transforms image by image, float32, two backward passes with retain_graph
    for cross-entropy and center loss, empty_cache at every step."""
    from torchvision.transforms import v2
    import torchvision
    flags = ["--size", "tiny", "--stem_stride", "4", "--image_size", "112", "--batch_size", "16", "--ema", "0",
             *flags]
    module, box = captured("convnext_face", flags)
    cfg, device, plain_build = box["run"].cfg, box["run"].device, module.build
    sides = {"ours": box}
    for kind in ("timm", "torchvision"):
        for layout in ("channels_last", "contiguous_format"):
            module.build = lambda cfg, classes, device: Embedded(kind, layout, len(classes), cfg).to(device)
            sides[f"{kind} {layout}"] = captured("convnext_face", flags)[1]
    module.build = plain_build
    images, labels = module.load_data(cfg)["train"]
    transform = v2.Compose([v2.ToPILImage(), v2.RandomHorizontalFlip(), v2.RandomAffine(15, (0.06, 0.06), (0.85, 1.15)),
                            v2.ColorJitter(0.3, 0.3, 0.3), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize(module.MEAN, module.STD), v2.RandomErasing(0.3)])
    loader = torch.utils.data.DataLoader(
        list(zip(images, labels)), box["count"], shuffle=True, drop_last=True,
        collate_fn=lambda items: (torch.stack([transform(x) for x, _ in items]), torch.stack([y for _, y in items])))
    batches, classes = forever(loader), int(labels.max()) + 1
    net = torchvision.models.convnext_tiny(num_classes=classes, stochastic_depth_prob=cfg.drop_path).to(device)
    centers = nn.Parameter(torch.randn(classes, 768, device=device))
    first, second = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05), torch.optim.SGD([centers], 0.5)

    def notebook(step):
        x, y = (part.to(device) for part in next(batches))
        f = net.classifier[:2](net.avgpool(net.features(x)))
        entropy = nn.functional.cross_entropy(net.classifier[2](f), y)
        center = 0.003 * ((f - centers[y]) ** 2).sum() / 2 / len(y)
        first.zero_grad()
        second.zero_grad()
        entropy.backward(retain_graph=True)
        center.backward()
        first.step()
        second.step()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        entropy.item()

    steps_of = {name: (lambda step, side=side: side["update"](step, side["fetch"](step))) for name, side in sides.items()}
    seconds = alternate(steps_of | {"notebook": notebook}, rounds, steps, device)
    start = time.perf_counter()
    for step in range(20):
        box["fetch"](step + 1)
    share = (time.perf_counter() - start) / 20 / seconds["ours"]
    best = min(s for name, s in seconds.items() if name not in ("ours", "notebook"))
    report("convnext_face", seconds, "ours", **{"ratio to the faster library": round(best / seconds["ours"], 3)},
           data_share=round(share, 4), dtype=cfg.dtype)


def mask(flags, rounds, steps):
    """(a) torchvision's reference loop: the same model in float32, a DataLoader that decodes, flips and jitters image by
    image, `.item()` of the loss at each step; (b) the notebook's: batches of 5, every tensor moved by itself, the cache
    emptied at each step. Compared in images per second; the images of the data set as files, as both loops read them.
    Then coco_map against pycocotools, on the same detections of the same test images, without reading files."""
    import contextlib
    import copy
    import io
    import tempfile
    from PIL import Image
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from torchvision.transforms import v2
    module, box = captured("fasterrcnn_mask", flags)
    cfg, device, folder = box["run"].cfg, box["run"].device, tempfile.TemporaryDirectory()
    data = module.load_data(cfg)
    items = data["train"]
    for i, item in enumerate(items):
        Image.fromarray(item["image"].permute(1, 2, 0).numpy()).save(f"{folder.name}/{i}.jpg")
    change = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.3)])

    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return len(items)

        def __getitem__(self, i):
            with Image.open(f"{folder.name}/{i}.jpg") as image:
                x = v2.functional.to_dtype(v2.functional.pil_to_tensor(change(image.convert("RGB"))), torch.float, True)
            return x, {"boxes": items[i]["boxes"], "labels": items[i]["labels"]}

    def batches_of(size):
        return forever(torch.utils.data.DataLoader(Files(), size, shuffle=True, drop_last=True,
                                                   collate_fn=lambda batch: tuple(zip(*batch))))
    sides = {"ours": (lambda step: box["update"](step, box["fetch"](step)), box["count"])}
    for name, size in (("reference loop", box["count"]), ("notebook", 5)):
        model, batches = copy.deepcopy(box["raw"]), batches_of(size)
        model.backbone.bfloat16 = False
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, momentum=0.9, weight_decay=1e-4)

        def plain(step, model=model, batches=batches, optimizer=optimizer, notebook=name == "notebook"):
            images, targets = next(batches)
            if notebook and device.type == "cuda":
                torch.cuda.empty_cache()
            model.train()
            for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm2d)):
                norm.eval()
            losses = model([x.to(device) for x in images], [{k: v.to(device) for k, v in t.items()} for t in targets])
            loss = sum(losses.values())
            loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sides[name] = plain, size
    seconds = alternate({name: step for name, (step, _) in sides.items()}, rounds, steps, device)
    rates = {name: sides[name][1] / value for name, value in seconds.items()}
    report_rates("fasterrcnn_mask", rates, "images/s", dtype=cfg.dtype, backbone=cfg.backbone)
    found = []
    for item in items:
        count = len(item["labels"])
        rows = torch.arange(100 if count else 0) % max(1, count)
        found.append({"boxes": item["boxes"][rows] + torch.randn(len(rows), 4), "labels": item["labels"][rows],
                      "scores": torch.rand(len(rows))})
    module.write_coco(pathlib.Path(folder.name), items, found, data["classes"])

    def pycocotools(_):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(f"{folder.name}/truth.json")
            run = COCOeval(truth, truth.loadRes(f"{folder.name}/detections.json"), "bbox")
            run.evaluate()
            run.accumulate()
            run.summarize()
    seconds = alternate({"coco_map": lambda _: module.coco_map(found, items), "pycocotools": pycocotools}, 3, 1, device)
    report("fasterrcnn_mask", seconds, "coco_map", images=len(items))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    sides = {"vae": vae, "mt": mt, "las": las, "face": face, "mask": mask}
    parser.add_argument("name", choices=sides)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    known, rest = parser.parse_known_args()  # the rest are flags of the script
    sides[known.name](rest or ["--data", "demo"], known.rounds, known.steps)
