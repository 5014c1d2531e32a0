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

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def captured(name, flags):
    """The script itself up to its training loop: what its `main` hands to `bench`."""
    module, box = importlib.import_module(name), {}
    module.bench = lambda run, raw, fetch, update, count: box.update(
        run=run, raw=raw, fetch=fetch, update=update, count=count)
    module.main(["bench", *flags])
    return module, box


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


def vae(flags, rounds, steps):
    """A DataLoader of PIL images, transformed one by one in the collate function, `.item()` at every step."""
    from torchvision.transforms import v2
    module, box = captured("vae", flags)
    cfg, device = box["run"].cfg, box["run"].device
    images = module.load_data(cfg)["train"][0]
    to_tensor = v2.Compose([v2.ToPILImage(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    loader = torch.utils.data.DataLoader(images.numpy()[..., None], box["count"], shuffle=True, drop_last=True,
                                         collate_fn=lambda items: torch.stack([to_tensor(i) for i in items]))

    def forever():
        while True:
            yield from loader

    batches = forever()
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


class PlainTransformer(nn.Module):
    """PyTorch's own Transformer with the same sizes, embeddings and positions."""

    def __init__(self, module, vocabulary, d_model, heads, layers, d_ff, dropout):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.net = nn.Transformer(d_model, heads, layers, layers, d_ff, dropout, batch_first=True, norm_first=True)
        self.out = nn.Linear(d_model, vocabulary)
        self.register_buffer("positions", module.sinusoids(1024, d_model))
        self.dropout, self.scale = nn.Dropout(dropout), d_model**0.5

    def forward(self, src, tgt):
        def embed(x):
            return self.dropout(self.embedding(x) * self.scale + self.positions[: x.shape[1]])
        causal = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1], src.device)
        return self.out(self.net(embed(src), embed(tgt), tgt_mask=causal, src_key_padding_mask=src == 0,
                                 tgt_key_padding_mask=tgt == 0, memory_key_padding_mask=src == 0, tgt_is_causal=True))


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
    print(json.dumps({"script": "transformer_mt", **{f"{name} tokens/s": round(rate) for name, rate in rates.items()},
                      **{f"ratio to {name}": round(rates["ours"] / rates[name], 2) for name in list(rates)[1:]},
                      "cached beam search ratio": round(cache, 2), "threads": torch.get_num_threads(),
                      "dtype": cfg.dtype, "size": cfg.size, "vocabulary": vocabulary}))


@torch.no_grad()
def uncached_beam_search(model, src, k, alpha, max_len):
    """The same batched search, each step decoding the whole prefix again. An untrained model seldom ends, so both
    sides go through all positions."""
    memory, mask = model.encode(src)
    memory, mask = memory.repeat_interleave(k, 0), mask.repeat_interleave(k, 0)
    prefix = torch.full((len(src) * k, 1), 1, device=src.device)
    scores = torch.full((len(src), k), -1e9, device=src.device).index_fill(1, torch.tensor(0, device=src.device), 0.0)
    first = torch.arange(len(src), device=src.device)[:, None] * k
    for _ in range(max_len):
        x = model.embed(prefix)
        for layer in model.decoder:
            x = layer(x, mask, memory)
        logits = nn.functional.linear(model.decoder_norm(x[:, -1]), model.embedding.weight)
        log_p = logits.log_softmax(-1).unflatten(0, (-1, k)) + scores[:, :, None]
        scores, place = log_p.flatten(1).topk(k)
        rows = (first + place // log_p.shape[2]).flatten()
        prefix = torch.cat([prefix[rows], (place % log_p.shape[2]).flatten()[:, None]], 1)
    return prefix


def mask(flags, rounds, steps):
    """(a) torchvision's reference loop: the same model, a DataLoader that decodes, flips and jitters image by image,
    `.item()` of the loss at each step; (b) the notebook's: batches of 5, every tensor moved by itself, the cache emptied
    at each step. Compared in images per second; the images of the data set as files, as both loops read them."""
    import copy
    import tempfile
    from PIL import Image
    from torchvision.transforms import v2
    module, box = captured("fasterrcnn_mask", flags)
    cfg, device, folder = box["run"].cfg, box["run"].device, tempfile.TemporaryDirectory()
    items = module.load_data(cfg)["train"]
    for i, item in enumerate(items):
        Image.fromarray(item["image"].permute(1, 2, 0).numpy()).save(f"{folder.name}/{i}.jpg")
    change = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.3)])

    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return len(items)

        def __getitem__(self, i):
            with Image.open(f"{folder.name}/{i}.jpg") as image:
                x = v2.functional.to_dtype(v2.functional.pil_to_tensor(change(image.convert("RGB"))), torch.float, True)
            return x, {"boxes": items[i]["boxes"] * items[i]["scale"], "labels": items[i]["labels"]}

    def forever(size):
        while True:
            yield from torch.utils.data.DataLoader(Files(), size, shuffle=True, drop_last=True,
                                                   collate_fn=lambda batch: tuple(zip(*batch)))
    sides = {"ours": (lambda step: box["update"](step, box["fetch"](step)), box["count"])}
    for name, size in (("reference loop", box["count"]), ("notebook", 5)):
        model, batches = copy.deepcopy(box["raw"]), forever(size)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, momentum=0.9, weight_decay=1e-4)

        def plain(step, model=model, batches=batches, optimizer=optimizer, notebook=name == "notebook"):
            images, targets = next(batches)
            if notebook and device.type == "cuda":
                torch.cuda.empty_cache()
            module.training_mode(model)
            losses = model([x.to(device) for x in images], [{k: v.to(device) for k, v in t.items()} for t in targets])
            loss = sum(losses.values())
            loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sides[name] = plain, size
    seconds = alternate({name: step for name, (step, _) in sides.items()}, rounds, steps, device)
    rates = {name: sides[name][1] / value for name, value in seconds.items()}
    print(json.dumps({"script": "fasterrcnn_mask", **{f"{name} images/s": round(rate, 2) for name, rate in rates.items()},
                      **{f"ratio to {name}": round(rates["ours"] / rates[name], 2) for name in list(rates)[1:]},
                      "threads": torch.get_num_threads(), "dtype": cfg.dtype, "backbone": cfg.backbone}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["vae", "mt", "mask"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    known, rest = parser.parse_known_args()  # the rest are flags of the script
    {"vae": vae, "mt": mt, "mask": mask}[known.name](rest or ["--data", "demo"], known.rounds, known.steps)
