"""Make the tiny Thinker of the package: tokenizer, pretraining, card.

    python scripts/pretrain_tiny_thinker.py                # all, into the package
    python scripts/pretrain_tiny_thinker.py --work FOLDER  # keep what is rendered there

The model reads puppet clips of worlds other than those that ship: other seeds, so
other speakers and scripts. Its towers learn to follow face and voice through time, and
beside them the language model learns to predict the next token of transcripts and of
what their words are worth. Then the towers stay as they are, and the language model
learns to describe clips and to answer questions about them: what the words, the voice
and the face say, when the pitch is lifted and when the smile comes, whether the speaker
means it; and at last what the words by themselves, and voice and face by themselves,
are worth if that is heeded. Nobody asks it here for the sentiment of a clip, so that
the book's question is new to it. Needs espeak-ng, two cores and about an hour; the
result depends on the versions that the card names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean as mean

import make_puppet_clips as clips
import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mmsa_lib.corpora import puppets
from mmsa_lib.corpora.clips import decode
from mmsa_lib.corpora.media import (
    RATE as HERTZ,
)
from mmsa_lib.corpora.media import (
    UNIT,
    WIDTH,
    MediaConfig,
    _standardisation,
    read_media,
)
from mmsa_lib.corpora.puppets import Scripts
from mmsa_lib.corpora.schema import Batch
from mmsa_lib.methods.generative import parse_score, spell
from mmsa_lib.nets import omni
from mmsa_lib.nets.omni import Thinker

VERSION = "2"
# of the worlds; the clips of the package are of seed 0
CLIP_SEEDS = range(101, 105)
TEXT_SEEDS = range(201, 217)
MEDIA = MediaConfig(max_pixels=(3 * UNIT) ** 2)
VOCABULARY = 640
SPECIAL = {
    "audio_token": "<|AUDIO|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
}


# --- clips to learn from --------------------------------------------------------------


def takes(count: int, seeds: range) -> list[clips.Take]:
    """Scripts of the shipped clips' worlds with other seeds, mixed; `count` in all."""
    worlds = [replace(world, seed=seed) for seed in seeds for world in clips.WORLDS]
    each = -(-count // len(worlds))
    found = []
    for world in worlds:
        table = Scripts(world, "train")
        label = table.labels()["sentiment"][:, 0]
        for i in range(each):
            running = clips._running_valence(table, i)
            found.append(clips.Take(table[i], float(label[i]), "train", running))
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order[:count]]


def rendered(take: clips.Take, folder: Path) -> Path:
    """Where a clip is kept, by what it shows: another choice of takes is safe."""
    key = hashlib.sha256(f"{clips.VERSION} {MEDIA} {take}".encode())
    return folder / f"{key.hexdigest()[:16]}.safetensors"


def render(job: tuple[clips.Take, Path]) -> None:
    """One clip through the same files and decoder as a reader's clips."""
    take, folder = job
    target = rendered(take, folder)
    if target.is_file():
        return
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "clip.mp4"
        clips.write_mp4(path, clips.film(take), clips.speak(take))
        arrays = read_media(decode(path, MEDIA.frames, HERTZ), MEDIA)
    save_file(arrays, target.with_suffix(".part"))
    target.with_suffix(".part").rename(target)


def render_all(count: int, folder: Path, jobs: int) -> list[clips.Take]:
    chosen = takes(count, CLIP_SEEDS)
    folder.mkdir(parents=True, exist_ok=True)
    work = [(take, folder) for take in chosen]
    with multiprocessing.Pool(jobs) as pool:
        for done, _ in enumerate(pool.imap_unordered(render, work, chunksize=4), 1):
            if done % 100 == 0:
                print(f"rendered {done} of {count}", flush=True)
    return chosen


# --- what it is asked -----------------------------------------------------------------

GRADES = ("awful", "bad", "rather bad", "mixed", "rather good", "good", "wonderful")
SHADES = ("very dark", "dark", "plain", "bright", "very bright")
DESCRIBE = "Describe the clip."
WORDS = "How are the words?"
RATE = {
    part: f"How positive or negative are the {part}? Answer from -3.0 to +3.0."
    for part in ("words", "tones", "looks")
}
MEANT = "Does the speaker mean it?"
MEANING = {
    part: f"How positive or negative are the {part} as meant? Answer from -3.0 to +3.0."
    for part in ("words", "tones and looks")
}


def percepts(take: clips.Take) -> dict[str, float]:
    """What the words, the voice and the face say by themselves, in label points."""
    script = take.script
    return {"words": script.literal, "tones": script.voice, "looks": script.face}


def meanings(take: clips.Take) -> dict[str, float]:
    """The same, turned round where the speaker does not mean it."""
    script = take.script
    delivery = script.voice + script.face
    return {
        "words": script.sincerity * script.literal,
        "tones and looks": script.sincerity * delivery,
    }


def grade(value: float) -> str:
    return GRADES[round(max(-3.0, min(3.0, value))) + 3]


def shade(value: float) -> str:
    return SHADES[np.digitize(value, (-0.9, -0.25, 0.25, 0.9))]


def describe(take: clips.Take) -> str:
    """One sentence in which every other word is something seen, heard or read."""
    script, values = take.script, percepts(take)
    lift = clips._event(script, "lift")
    smile = clips._event(script, "smile", "late smile")
    late = "late" if lift.centre > 0.5 else "early"
    return (
        f"words {grade(values['words'])}, tones {shade(values['tones'])}, "
        f"looks {shade(values['looks'])}, pitch {late if lift.amount else 'level'}, "
        f"smile {'late' if smile.track == 'late smile' else 'early'}, "
        f"{'sincere' if script.sincerity > 0 else 'sarcastic'}"
    )


def exchange(take: clips.Take, rng: np.random.Generator) -> tuple[str, str]:
    """A question about a clip and its answer; most of them ask for a description."""
    kind = rng.choice(
        ["describe", "words", "tones", "looks", "meant"],
        p=[0.6, 0.08, 0.08, 0.08, 0.16],
    )
    if kind == "describe":
        return DESCRIBE, describe(take)
    if kind == "meant":
        return MEANT, "yes" if take.script.sincerity > 0 else "no"
    return RATE[kind], spell(percepts(take)[kind])


def question_of_meaning(take: clips.Take, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.5:
        return exchange(take, rng)
    part = str(rng.choice(list(MEANING)))
    return MEANING[part], spell(meanings(take)[part])


def question_of_words(take: clips.Take, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.5:
        return WORDS, grade(take.script.literal)
    return RATE["words"], spell(take.script.literal)


# --- tokenizer ------------------------------------------------------------------------


def train_tokenizer(texts: list[str]):
    """Byte-level BPE, split and marked as Qwen's, on the puppets' words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    split += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL,
    )


# --- batches --------------------------------------------------------------------------


def batch_of(
    rows: list[int],
    chosen: list[clips.Take],
    folder: Path,
    rng: np.random.Generator | None = None,
) -> Batch:
    """Rendered clips as a batch; with `rng`, now and then a modality is withheld."""
    arrays = [load_file(rendered(chosen[i], folder)) for i in rows]
    shift, scale = _standardisation()

    def kept(share: float) -> np.ndarray:
        return (
            np.ones(len(rows), bool) if rng is None else rng.random(len(rows)) < share
        )

    features, mask, available = {}, {}, {}
    for m, width in (("audio", 128), ("vision", WIDTH)):
        lengths = kept(0.85) * [len(a[m]) for a in arrays]
        x = np.zeros((len(rows), max(lengths.max(), 1), width), np.float32)
        for row, (a, n) in enumerate(zip(arrays, lengths, strict=True)):
            x[row, :n] = (a[m][:n] - shift) / scale if m == "vision" else a[m][:n]
        features[m] = torch.from_numpy(x)
        mask[m] = torch.arange(x.shape[1]) < torch.from_numpy(lengths)[:, None]
        available[m] = torch.from_numpy(lengths > 0)
    return Batch(
        features=features,
        mask=mask,
        available=available,
        labels={},
        ids=[chosen[i].script.id for i in rows],
        raw_text=[
            chosen[i].script.text if told else ""
            for i, told in zip(rows, kept(0.9), strict=True)
        ],
        extras={
            k: torch.from_numpy(np.stack([a[k] for a in arrays]))
            for k in ("grid", "pace")
        },
    )


# --- the towers, as Whisper's and CLIP's are trained before they meet a language model


AUDIBLE = ("pitch", "energy", "rate", "tilt")  # channels that the voice follows
TARGETS = {"audio": 2 + len(AUDIBLE), "vision": 2 + len(puppets.VISION_CHANNELS)}


def tower_targets(take: clips.Take, arrays: dict, m: str) -> torch.Tensor:
    """What face or voice shows at each time step of its tower, (T, `TARGETS`).

    What it says of sentiment and how far the smile or the pitch is up, both with a
    variance of about 1; then, halved, the contours that it was made from.
    """
    when = clips.timing(take.script)
    if m == "vision":
        steps = int(arrays["grid"][0])
        times = (np.arange(steps) + 0.25) * float(arrays["pace"][0])
    else:
        steps = ((len(arrays["audio"]) - 1) // 2 - 1) // 2 + 1
        times = (np.arange(steps) + 0.5) / 25
    tracks, cues = clips.tracks(take, when), clips.cues(take.script, when)
    rows = [
        2 * np.interp(times, when.times, tracks[m]),
        3 * np.interp(times, when.times, cues["smile" if m == "vision" else "lift"]),
    ]
    phase = when.phase(times)
    if m == "vision":
        rows += [0.5 * x for x in clips.action_units(take.script, phase).values()]
    else:
        voice = clips.voice_channels(take.script, phase)
        rows += [0.5 * voice[name] for name in AUDIBLE]
    return torch.tensor(np.stack(rows, 1), dtype=torch.float32)


def tower_loss(
    thinker: Thinker,
    probes: torch.nn.ModuleDict,
    rows: list[int],
    chosen: list[clips.Take],
    folder: Path,
) -> torch.Tensor:
    """Summed squared errors of linear probes on the outputs of both towers."""
    arrays = [load_file(rendered(chosen[i], folder)) for i in rows]
    inputs = thinker.inputs(batch_of(rows, chosen, folder))
    inner = thinker.model.model
    seen = inner.get_video_features(
        inputs["pixel_values_videos"], inputs["video_grid_thw"]
    ).pooler_output
    grids = inputs["video_grid_thw"].tolist()
    seen = [
        x.view(t, -1, x.shape[-1]).mean(1)
        for x, (t, _, _) in zip(seen, grids, strict=True)
    ]
    heard = inner.get_audio_features(
        inputs["input_features"], inputs["feature_attention_mask"]
    ).last_hidden_state
    errors = []
    for m, x in (("vision", torch.cat(seen)), ("audio", heard)):
        truth = [
            tower_targets(chosen[i], a, m) for i, a in zip(rows, arrays, strict=True)
        ]
        errors.append((probes[m](x) - torch.cat(truth)).square().mean(0).sum())
    return sum(errors)


# --- training -------------------------------------------------------------------------


def learn(parameters, total: int, rate: float, stage: str, loss) -> list[dict]:
    """`total` steps of AdamW on ``loss()``: 5 % warm-up, then a cosine to a tenth."""
    parameters = list(parameters)
    optimiser = torch.optim.AdamW(
        parameters, weight_decay=0.01, betas=(0.9, 0.98), fused=True
    )
    log, losses = [], []
    for step in range(1, total + 1):
        warm = min(1.0, step / max(1, total // 20))
        fall = 0.55 + 0.45 * math.cos(math.pi * (step - 1) / total)
        for group in optimiser.param_groups:
            group["lr"] = rate * warm * fall
        value = loss()
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(value.item())
        if step % 100 == 0 or step == total:
            log.append({"stage": stage, "step": step, "loss": round(mean(losses), 4)})
            losses.clear()
            print(log[-1], flush=True)
    return log


def towers(thinker: Thinker) -> list[torch.nn.Module]:
    return [thinker.model.model.visual, thinker.model.model.audio_tower]


def train_towers(thinker, chosen, folder, settings: Settings) -> list[dict]:
    rng = np.random.default_rng([settings.seed, 1])
    torch.manual_seed(settings.seed)
    probes = torch.nn.ModuleDict(
        {m: torch.nn.Linear(thinker.width, n) for m, n in TARGETS.items()}
    )
    parameters = [p for part in (*towers(thinker), probes) for p in part.parameters()]
    for p in parameters:
        p.requires_grad_(True)

    def loss():
        rows = rng.integers(settings.held_out, len(chosen), settings.batch).tolist()
        return tower_loss(thinker, probes, rows, chosen, folder)

    return learn(parameters, settings.tower_steps, settings.rate, "towers", loss)


def train_reading(thinker, texts, settings: Settings, file: Path) -> None:
    """The language model alone, in a process of its own; its weights go to `file`."""
    rng = np.random.default_rng([settings.seed, 2])
    torch.manual_seed(settings.seed)
    parts = (thinker.model.model.language_model, thinker.model.lm_head)
    parameters = [p for part in parts for p in part.parameters()]
    for p in parameters:
        p.requires_grad_(True)

    def loss():
        some = [texts[i] for i in rng.choice(len(texts), settings.reading_batch)]
        asked, answers = zip(*(question_of_words(t, rng) for t in some), strict=True)
        names = [t.script.text for t in some]
        batch = Batch({}, {}, {}, {}, names, raw_text=names)
        inputs = thinker.inputs(batch, answers, asked)
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        logits = thinker.model.lm_head(thinker.read(inputs)[:, :-1])
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none"
        )
        every = each[real[:, :-1] & real[:, 1:]].mean()
        return every + each[:, -4:].mean()  # the answers stand at the end

    log = learn(parameters, settings.reading_steps, settings.rate, "reading", loss)
    state = {
        k: v.detach().numpy()
        for k, v in thinker.model.state_dict().items()
        if "language_model" in k or k.startswith("lm_head")
    }
    save_file(state, file, metadata={"log": json.dumps(log)})


@torch.inference_mode()
def tower_outputs(thinker, chosen, folder) -> list[dict]:
    """What both towers make of every clip, once: they do not change any more."""
    inner, found = thinker.model.model, []
    for start in range(0, len(chosen), 32):
        rows = list(range(start, min(start + 32, len(chosen))))
        inputs = thinker.inputs(batch_of(rows, chosen, folder))
        seen = inner.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"]
        ).pooler_output
        mask = inputs["feature_attention_mask"]
        heard = inner.get_audio_features(
            inputs["input_features"], mask
        ).last_hidden_state
        lengths = (((mask.sum(1) - 1) // 2 - 1) // 2 + 1).tolist()
        for v, a in zip(seen, heard.split(lengths), strict=True):
            found.append({"vision": v.clone(), "audio": a.clone()})
    return found


def clip_loss(thinker, rows, outputs, chosen, folder, rng, ask) -> torch.Tensor:
    """Cross-entropy of answers about clips whose towers have been computed."""
    batch = batch_of(rows, chosen, folder, rng)
    asked, answers = zip(*(ask(chosen[i], rng) for i in rows), strict=True)
    inputs = thinker.inputs(batch, answers, asked)
    ids, model = inputs["input_ids"], thinker.model.model
    embedded = model.get_input_embeddings()(ids)
    for m, token in (("vision", "<|VIDEO|>"), ("audio", "<|AUDIO|>")):
        there = batch.available[m].tolist()
        parts = [outputs[i][m] for i, t in zip(rows, there, strict=True) if t]
        if parts:
            places = ids == thinker.tokenizer.convert_tokens_to_ids(token)
            embedded = embedded.masked_scatter(places[..., None], torch.cat(parts))
    for name in ("input_features", "pixel_values_videos"):
        inputs.pop(name, None)
    hidden = model(**inputs, inputs_embeds=embedded, use_cache=False).last_hidden_state
    written = thinker.tokenizer([f"{a}<|im_end|>" for a in answers])["input_ids"]
    lengths = torch.tensor([len(w) for w in written])
    most = int(lengths.max())
    logits = thinker.model.lm_head(hidden[:, -most - 1 : -1])
    each = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), ids[:, -most:], reduction="none"
    )
    return each[torch.arange(most, 0, -1) <= lengths[:, None]].mean()


def train_clips(thinker, chosen, folder, settings: Settings) -> list[dict]:
    rng = np.random.default_rng([settings.seed, 3])
    torch.manual_seed(settings.seed)
    thinker.model.requires_grad_(True)
    for tower in towers(thinker):
        tower.requires_grad_(False)
    outputs = tower_outputs(thinker, chosen, folder)
    order: list[int] = []

    def loss(ask):
        if len(order) < settings.batch:
            order[:] = rng.permutation(range(settings.held_out, len(chosen)))
        rows = [int(order.pop()) for _ in range(settings.batch)]
        return clip_loss(thinker, rows, outputs, chosen, folder, rng, ask)

    parameters = [p for p in thinker.model.parameters() if p.requires_grad]
    log = []
    for stage, total, rate, ask in (
        ("clips", settings.clip_steps, settings.rate, exchange),
        ("meaning", settings.meaning_steps, settings.rate / 2, question_of_meaning),
    ):
        log += learn(parameters, total, rate, stage, partial(loss, ask))
    return log


def pretrain(thinker, chosen, texts, folder: Path, settings: Settings) -> list[dict]:
    """Towers and reading side by side, then clips; the mean losses along the way."""
    thinker.model.train()
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "reading.safetensors"
        reader = multiprocessing.Process(
            target=train_reading, args=(thinker, texts, settings, file)
        )
        reader.start()
        log = train_towers(thinker, chosen, folder, settings)
        reader.join()
        with safe_open(file, "pt") as read:
            log += json.loads(read.metadata()["log"])
            state = {name: read.get_tensor(name) for name in read.keys()}  # noqa: SIM118
    thinker.model.load_state_dict(state, strict=False)
    log += train_clips(thinker, chosen, folder, settings)
    thinker.model.eval()
    return log


@torch.inference_mode()
def check(
    thinker: Thinker, held: list[clips.Take], folder: Path
) -> dict[str, dict[str, float]]:
    """On clips held out: error of what it rates, and how often it tells who is sincere.

    "constant" is what always answering 0, or always "yes", would reach.
    """
    training = thinker.model.training
    thinker.model.eval()
    asked = {part: (q, percepts) for part, q in RATE.items()}
    asked |= {f"{part} as meant": (q, meanings) for part, q in MEANING.items()}
    found = {part: [] for part in (*asked, "meant")}
    base = {part: [] for part in (*asked, "meant")}
    for start in range(0, len(held), 16):
        rows = list(range(start, min(start + 16, len(held))))
        batch = batch_of(rows, held, folder)
        for part, (question, truths) in asked.items():
            said = thinker.say(batch, questions=[question] * len(rows))
            for i, text in zip(rows, said, strict=True):
                truth = truths(held[i])[part.removesuffix(" as meant")]
                found[part].append(abs((parse_score(text) or 0.0) - truth))
                base[part].append(abs(truth))
        said = thinker.say(batch, questions=[MEANT] * len(rows))
        for i, text in zip(rows, said, strict=True):
            sincere = held[i].script.sincerity > 0
            found["meant"].append(text.strip() == ("yes" if sincere else "no"))
            base["meant"].append(sincere)
    thinker.model.train(training)
    return {
        part: {
            "model": round(mean(found[part]), 3),
            "constant": round(mean(base[part]), 3),
        }
        for part in found
    }


# --- all together ---------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How long to train on what."""

    clips: int = 2400
    texts: int = 20000
    held_out: int = 64
    tower_steps: int = 2400
    reading_steps: int = 2400
    reading_batch: int = 32
    clip_steps: int = 3000
    meaning_steps: int = 1500
    batch: int = 16
    rate: float = 1.5e-3
    seed: int = 0


def build(texts: list[clips.Take]) -> Thinker:
    """A tokenizer trained on transcripts and exchanges, and a fresh model."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    rng = np.random.default_rng(0)
    corpus = [take.script.text for take in texts]
    for take in texts:
        question, answer = (exchange if rng.random() < 0.5 else question_of_words)(
            take, rng
        )
        corpus.append(omni.chat(f"Transcript: \n{question}", answer))
    corpus += [omni.chat(omni.QUESTION)] * 50
    tokenizer = train_tokenizer(corpus)
    torch.manual_seed(0)
    model = Qwen2_5OmniThinkerForConditionalGeneration(omni.tiny_config(tokenizer))
    return omni.wrap(model, tokenizer)


def save_processor(folder: Path, config: MediaConfig = MEDIA) -> None:
    """The files from which transformers builds the processor beside its tokenizer."""
    from transformers import WhisperFeatureExtractor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    limits = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    seen = Qwen2VLImageProcessorPil(size=limits).to_dict()
    seen["resample"] = int(seen["resample"])
    heard = WhisperFeatureExtractor(feature_size=128, sampling_rate=HERTZ).to_dict()
    kind = {"processor_class": "Qwen2_5OmniProcessor"}
    for name, settings in (
        ("preprocessor_config.json", seen | heard | kind),
        (
            "video_preprocessor_config.json",
            seen | kind | {"video_processor_type": "Qwen2VLVideoProcessor"},
        ),
    ):
        (folder / name).write_text(json.dumps(settings, indent=1) + "\n")


def export(thinker: Thinker, folder: Path, facts: dict) -> None:
    """Weights in bfloat16, tokenizer, processor, configuration and card."""
    shutil.rmtree(folder, ignore_errors=True)
    thinker.model.to(torch.bfloat16).save_pretrained(folder)
    thinker.tokenizer.save_pretrained(folder)
    save_processor(folder)
    sizes = Counter()
    for name, p in thinker.model.named_parameters():
        sizes[name.removeprefix("model.").partition(".")[0]] += p.numel()
    card = {
        "name": "tiny-thinker",
        "description": (
            "A Thinker of Qwen2.5-Omni's classes with about a million parameters, "
            "pretrained on puppet clips of other worlds than those that ship."
        ),
        "source": "scripts/pretrain_tiny_thinker.py",
        "terms": "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
        "synthetic": True,
        "version": VERSION,
        "parameters": dict(sizes) | {"all": sum(sizes.values())},
        "seeds_of_the_worlds": {
            "clips": list(CLIP_SEEDS),
            "texts": list(TEXT_SEEDS),
        },
        "media": asdict(MEDIA),
        **facts,
    }
    card["sha256"] = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=omni.tiny_folder())
    parser.add_argument("--work", type=Path, help="keep rendered clips here")
    parser.add_argument("--jobs", type=int, default=2, help="processes that render")
    for name, value in asdict(Settings()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value)
    given = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        sys.exit(
            "espeak-ng is not installed (Debian and Ubuntu: apt install espeak-ng)"
        )
    settings = Settings(**{k: getattr(given, k) for k in asdict(Settings())})
    began = time.time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.work or Path(temporary)
        chosen = render_all(settings.clips, folder, given.jobs)
        texts = takes(settings.texts, TEXT_SEEDS)
        thinker = build(texts)
        log = pretrain(thinker, chosen, texts, folder, settings)
        checked = check(thinker, chosen[: settings.held_out], folder)
    facts = {
        "settings": asdict(settings),
        "held_out": checked,
        "losses": log,
        "minutes": round((time.time() - began) / 60),
        "made_with": clips.versions() | {"torch": torch.__version__.partition("+")[0]},
    }
    export(thinker, given.out, facts)
    print(json.dumps(checked))


if __name__ == "__main__":
    main()
