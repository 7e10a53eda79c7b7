"""The 7B Thinker at full size in NF4: memory, training steps, latency of both readouts.

THE 7B HAS NOT BEEN MEASURED YET: no GPU was at hand when this was written. What is kept
in results/benchmarks/ under the name omni-tiny comes from the same path with the tiny
configuration on a CPU; it shows that the path runs and says nothing about the 7B.

The weights are random, so nothing is downloaded: time and memory do not depend on their
values. They are drawn and quantised one layer at a time, so that no more than a matrix
is ever held in 16 bits. Adapters, head, readout and written answer are those of
`mmsa_lib.methods`. Clips are noise of a MOSI clip's size: four seconds of
sound, up to 16 frames, twenty words of the puppets. Calls alternate; medians count.

    python benchmarks/omni_7b.py                  # needs a GPU with 24 GB or more
    python benchmarks/omni_7b.py --size tiny      # the same path, CPU, a few minutes
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor, nn

from mmsa_lib import runs
from mmsa_lib.corpora.clips import Media, puppet_clips
from mmsa_lib.corpora.media import RATE, UNIT, MediaConfig, _standardisation, read_media
from mmsa_lib.corpora.schema import Batch
from mmsa_lib.methods import generative, readout
from mmsa_lib.nets import omni
from mmsa_lib.nets.ops import keep_4bit_format

GIB = 2**30
SECONDS, HEIGHT, WIDTH, WORDS = 4.0, 360, 640, 20  # of a clip like MOSI's
PIXELS = {"7b": 128 * UNIT * UNIT, "tiny": (3 * UNIT) ** 2}
CLAIMED = {  # by the paper, on its machine and its clips
    "what": "claimed by arXiv 2606.05713, RTX 5090",
    "given": True,
    "peak_gb": 10.78,
    "read_s_a_sample": 1.14,
    "write_s_a_sample": 1.47,
}

# ---------------------------------------------------------------- the model


def configuration(size: str, tokenizer):
    """Of the published 7B or the tiny Thinker, with the marks of this tokenizer."""
    tiny = omni.tiny_config(tokenizer)
    if size == "tiny":
        return tiny
    config = omni.full_config()
    for name in ("audio", "image", "video"):
        setattr(config, f"{name}_token_index", getattr(tiny, f"{name}_token_index"))
    for name in ("audio_start", "audio_end", "vision_start", "vision_end", "pad"):
        setattr(config, f"{name}_token_id", getattr(tiny, f"{name}_token_id"))
    return config


@torch.no_grad()
def build(config, device: torch.device, compute: str) -> nn.Module:
    """A Thinker with random weights in NF4, as `omni.load` gives it with true ones."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.integrations import replace_with_bnb_linear

    settings, dtype = omni.nf4(compute), omni.DTYPES[compute]
    model = omni.meta_thinker(config)
    replace_with_bnb_linear(model, settings.llm_int8_skip_modules, settings)
    for module in model.modules():
        drawn = set()
        for name, p in list(module.named_parameters(recurse=False)):
            full = torch.empty(p.shape, dtype=dtype, device=device)
            if isinstance(module, Linear4bit) and name == "weight":
                full.normal_(0, p.shape[1] ** -0.5)
                # moving a parameter is what quantises it
                p = Params4bit(full, requires_grad=False, **p.__dict__).to(device)
                drawn.add(name)
            else:
                p = nn.Parameter(full, requires_grad=False)
            setattr(module, name, p)
        lasting = set(module.state_dict(keep_vars=True))
        for name, b in list(module.named_buffers(recurse=False)):
            empty = torch.empty(b.shape, dtype=b.dtype, device=device)
            module.register_buffer(name, empty, persistent=name in lasting)
        if not drawn:
            model._init_weights(module)
        elif module.bias is not None:
            module.bias.zero_()
    keep_4bit_format(model)
    model.is_loaded_in_4bit = True  # peft asks
    return model


def weight_bytes(model: nn.Module) -> int:
    """What the parameters and the constants of their quantisation take."""
    total = 0
    for p in model.parameters():
        total += p.numel() * p.element_size()
        if (state := getattr(p, "quant_state", None)) is not None:
            parts = (state.absmax, state.code, state.state2.absmax, state.state2.code)
            total += sum(x.numel() * x.element_size() for x in parts)
    return total


# ---------------------------------------------------------------- the clips


def make_batch(size: int, frames: int, pixels: int, seed: int = 0) -> Batch:
    """Noise through the same preprocessing as a reader's clips."""
    rng = np.random.default_rng(seed)
    config = MediaConfig(frames=frames, max_pixels=pixels)
    words = " ".join(c.text for c in puppet_clips()).split()
    shift, scale = _standardisation()
    rows = []
    for _ in range(size):
        shown = rng.integers(0, 256, (frames, HEIGHT, WIDTH, 3), dtype=np.uint8)
        times = np.linspace(0, SECONDS, frames, endpoint=False)
        heard = rng.normal(0, 0.1, int(SECONDS * RATE)).astype(np.float32)
        rows.append(read_media(Media(shown, times, heard, RATE, SECONDS), config))
    arrays = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    arrays["vision"] = (arrays["vision"].astype(np.float32) - shift) / scale
    features = {m: torch.from_numpy(arrays[m]) for m in ("audio", "vision")}
    return Batch(
        features=features,
        mask={m: torch.ones(x.shape[:2], dtype=bool) for m, x in features.items()},
        available={m: torch.ones(size, dtype=bool) for m in features},
        labels={"sentiment": torch.from_numpy(rng.uniform(-3, 3, (size, 1))).float()},
        ids=[str(i) for i in range(size)],
        raw_text=[" ".join(rng.choice(words, WORDS)) for _ in range(size)],
        extras={k: torch.from_numpy(arrays[k]) for k in ("grid", "pace")},
    )


# ---------------------------------------------------------------- what is measured


class Bench:
    """One adapted Thinker, read by the head or made to write, trained either way."""

    def __init__(self, thinker: omni.Thinker, labels):
        self.device = thinker.device
        self.reader = readout.discriminative(thinker, None, labels).to(self.device)
        # the twin shares backbone and adapters: nothing is held twice
        self.writer = generative.Generative(thinker, None, labels).to(self.device)
        self.losses: dict[str, tuple[nn.Module, Callable[..., Tensor]]] = {
            "read": (self.reader, readout.standardised_loss(labels)),
            "write": (self.writer, generative.token_loss),
        }
        trained = [p for p in self.reader.parameters() if p.requires_grad]
        self.trained = trained
        self.optimiser = torch.optim.AdamW(trained, 2e-4, fused=True)
        answer = thinker.tokenizer(f"{generative.spell(1.6)}<|im_end|>")["input_ids"]
        self.answer = len(answer)

    def checkpointing(self, on: bool) -> None:
        base = self.reader.body.base
        if on:
            settings = {"use_reentrant": False}
            base.activation_checkpointing_enable(
                activation_checkpointing_kwargs=settings
            )
        else:
            base.activation_checkpointing_disable()

    @torch.inference_mode()
    def answers(self, how: str, batch: Batch) -> None:
        """One answer a sample: a score, or as many tokens as a score is written in."""
        self.reader.eval()
        if how == "read":
            self.reader(batch).predictions["sentiment"].tolist()
        else:
            self.writer.body.say(batch, most=self.answer)

    def step(self, how: str, batch: Batch) -> None:
        """Forward, backward, clipping and AdamW on the adapters."""
        model, loss = self.losses[how]
        model.train()
        self.optimiser.zero_grad()
        loss(model(batch), batch).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()

    def timed(self, call: Callable[[], None]) -> tuple[float, float | None]:
        """Seconds (of the CPU where there is no GPU) and peak GiB of the GPU."""
        if self.device.type != "cuda":
            start = time.process_time()
            call()
            return time.process_time() - start, None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return seconds, torch.cuda.max_memory_allocated() / GIB

    def compare(self, call: Callable[[str, Batch], None], batch: Batch, repeats: int):
        """Both readouts in turns, one round to warm up -> the row's numbers."""
        times: dict[str, list[float]] = {"read": [], "write": []}
        peaks: dict[str, float | None] = {}
        row: dict = {}
        for number, how in product(range(repeats + 1), times):
            if f"{how}_failed" in row:
                continue
            try:
                seconds, peak = self.timed(partial(call, how, batch))
            except torch.OutOfMemoryError:
                row[f"{how}_failed"] = "out of memory"
                self.optimiser.zero_grad()
                torch.cuda.empty_cache()
                continue
            if number:
                times[how].append(seconds)
                peaks[how] = peak
        for how, values in times.items():
            if f"{how}_failed" in row:
                continue
            middle = statistics.median(values)
            row[f"{how}_s_median"] = round(middle, 4)
            row[f"{how}_s_min"] = round(min(values), 4)
            row[f"{how}_s_a_sample"] = round(middle / len(batch), 4)
            peak = peaks[how]
            row[f"{how}_peak_gib"] = None if peak is None else round(peak, 3)
            row[f"{how}_peak_gb"] = None if peak is None else round(peak * GIB / 1e9, 3)
        if all(f"{how}_s_median" in row for how in times):
            medians = (statistics.median(times[how]) for how in ("write", "read"))
            row["write_over_read"] = round(next(medians) / next(medians), 3)
        return row


def rows_of(bench: Bench, frames: int, size: int, args) -> list[dict]:
    """Answers, then training steps without and with checkpointing, of one batch."""
    batch = make_batch(size, frames, args.pixels).to(bench.device)
    thinker = bench.reader.body
    about = {
        "frames": frames,
        "batch": size,
        "tokens": {m: max(n) for m, n in omni.count_tokens(thinker, batch).items()},
    }
    rows = [
        {"what": "answers", **about} | bench.compare(bench.answers, batch, args.repeats)
    ]
    for on in (False, True):
        bench.checkpointing(on)
        found = bench.compare(bench.step, batch, args.repeats)
        rows.append({"what": "training step", "checkpointing": on, **about} | found)
    bench.checkpointing(False)
    return rows


def measure(args) -> list[dict]:
    from transformers import AutoTokenizer

    device = omni.pick_device("cuda" if args.size == "7b" else "cpu")
    compute = "bfloat16" if args.size == "7b" else "float32"
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, local_files_only=True)
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = build(configuration(args.size, tokenizer), device, compute)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    shapes = {n: p.shape for n, p in omni.meta_thinker(model.config).named_parameters()}
    parameters = sum(shape.numel() for shape in shapes.values())
    weights = {
        "what": "weights",
        "parameters": parameters,
        "gib": round(weight_bytes(model) / GIB, 4),
        "gib_by_arithmetic": round(omni.nf4_bytes(shapes) / GIB, 4),
        "peak_gib_while_built": None if peak is None else round(peak / GIB, 3),
    }
    thinker = omni.wrap(model, tokenizer)
    bench = Bench(thinker, np.random.default_rng(0).uniform(-3, 3, 100))
    adapters = sum(
        p.numel() for n, p in bench.reader.named_parameters() if ".lora_" in n
    )
    weights["lora_parameters"] = adapters
    weights["lora_percent"] = round(100 * adapters / (parameters + adapters), 4)
    weights["answer_tokens"] = bench.answer
    rows = [weights, CLAIMED]
    show(weights)
    for frames, size in product(args.frames, args.batch):
        for row in rows_of(bench, frames, size, args):
            show(row)
            rows.append(row)
    return rows


def show(row: dict) -> None:
    print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=PIXELS, default="7b")
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pixels", type=int, help="of a frame at most")
    parser.add_argument(
        "--tokenizer", type=Path, default=omni.tiny_folder(), help="folder"
    )
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    args = parser.parse_args(argv)
    args.pixels = args.pixels or PIXELS[args.size]
    if args.size == "7b" and not torch.cuda.is_available():
        parser.error("the 7B needs a GPU and none is visible; try --size tiny")
    torch.set_num_threads(1)
    rows = measure(args)
    if args.dry:
        return
    settings = {
        "size": args.size,
        "repeats": args.repeats,
        "clip": f"noise: {SECONDS:g} s of sound at {RATE} Hz, frames of {WIDTH} x "
        f"{HEIGHT} resized to at most {args.pixels} pixels, {WORDS} words of puppets",
        "weights": "random, NF4 with double quantisation, LM head and embeddings as "
        "they are; LoRA of rank 32 on the seven suffixes, in float32",
        "tokenizer": "the tiny Thinker's: prompts are cut into its tokens",
        "read": "one forward pass, head on the last hidden state; no logits",
        "write": "greedy, with a cache, as many tokens as a score is written in; in "
        "training, cross-entropy of the written label",
        "training step": "forward, backward, clipping, fused AdamW",
        "time": "median of calls that alternate, after one round to warm up; seconds "
        + ("of the clock" if args.size == "7b" else "of the CPU (process_time)"),
        "peak": "highest memory allocated on the GPU during a call, all included",
        "synthetic": True,
    }
    name = f"omni-{args.size}"
    print(runs.save_benchmark(name, rows, settings=settings, out=args.out))


if __name__ == "__main__":
    main()
