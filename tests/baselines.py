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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["vae"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    known, rest = parser.parse_known_args()  # the rest are flags of the script
    {"vae": vae}[known.name](rest or ["--data", "demo"], known.rounds, known.steps)
