"""Times a script's training step: `python tests/bench.py vae --data fashionmnist --compile on`.

Prints one JSON line: the median time of a step, the share of it until the model is called (the batch), items a second,
and the time of the first step, which compiles. Not run by pytest: a time is no test.
"""
import json
import statistics
import sys
import time

import torch
from baselines import captured


def main(name, *flags):
    module, box = captured(name, list(flags))
    cfg, device, count = box["run"].cfg, box["run"].device, box["count"]
    wait, times = getattr(torch, device.type).synchronize, []
    first = 1 if name != "las_asr" else len(box["cuts"]) + 1  # its first epoch goes from short to long
    for step in range(first, first + 30):  # ten warm up
        start = time.perf_counter()
        batch = box["fetch"](step)
        wait()
        fetched = time.perf_counter()
        box["update"](step, batch)
        wait()
        times.append((time.perf_counter() - start, fetched - start))
    seconds, data = (statistics.median(column) for column in zip(*times[10:]))
    print(json.dumps({"script": name, "data": cfg.data, "device": str(device), "processes": module.WORLD, "dtype": cfg.dtype,
                      "compile": cfg.compile, "ms_per_step": round(1e3 * seconds, 3),
                      f"{module.UNIT}/s": round(count / seconds, 1), "data_share": round(data / seconds, 4),
                      "first_step_seconds": round(times[0][0], 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
