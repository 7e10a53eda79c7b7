"""Is the puppet world calibrated? Every row of its table, measured over seeds.

    python benchmarks/puppet_calibration.py --seeds 0 1 2

The corpus is only worth something if honest small models find in it what they find in
real corpora: words say most, voice and face a little, all together more, and never all.
`tests/test_puppets.py` asserts the same rows with fewer epochs and fixed seeds. The
networks here are deliberately not the library's: the corpus must not depend on them.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from mmsa_lib.corpora import puppets
from mmsa_lib.corpora.schema import Corpus, Receipt, Split

ALL = ("text", "audio", "vision")
DOMINANCE = {"redundancy": 0.5, "informativeness": {"text": 2.0}}


class Data:
    """The three splits of a corpus as padded tensors, scaled like `scale_of`."""

    def __init__(self, corpus: Corpus, scale_of: Corpus | None = None):
        scale_of = scale_of or corpus
        receipt = Receipt(corpus.fingerprint, "calibration", "none", 0.0, 1)
        self.x, self.y, self.e, self.text = {}, {}, {}, {}
        scales = {m: scale_of.train.features[m].moments() for m in scale_of.modalities}
        for name in ("train", "valid", "test"):
            split: Split = corpus[name]
            split = split.unseal(receipt) if split.sealed else split
            batch = split.batch(np.arange(len(split)))
            self.x[name] = {}
            for m in corpus.modalities:
                mean, sd = (torch.from_numpy(v).float() for v in scales[m])
                x = (batch.features[m] - mean) / sd.clamp(min=1e-6)
                mask = batch.mask[m]
                self.x[name][m] = (x * mask[..., None], mask)
            self.y[name] = torch.from_numpy(split.labels["sentiment"])
            self.e[name] = torch.from_numpy(split.labels["emotions"])
            self.text[name] = split.raw_text


# --- frozen features: pooled vectors and word counts into ridge ----------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    keep = mask[..., None].float()
    return (x * keep).sum(1) / keep.sum(1).clamp(min=1)


def pooled(data: Data, split: str, modalities) -> np.ndarray:
    """Mean and standard deviation over time of every channel."""
    parts = []
    for m in modalities:
        x, mask = data.x[split][m]
        mean = masked_mean(x, mask)
        parts += [mean, masked_mean((x - mean[:, None]) ** 2, mask).sqrt()]
    return torch.cat(parts, 1).numpy()


def ridge(train, y_train, test, y_test) -> tuple[float, float]:
    """Pearson r and MAE on test of ridge with generalised cross-validation."""
    y_train, y_test = y_train.numpy().ravel(), y_test.numpy().ravel()
    model = RidgeCV(alphas=np.logspace(-1, 4, 12)).fit(train, y_train)
    p = model.predict(test)
    return float(np.corrcoef(p, y_test)[0, 1]), float(np.abs(p - y_test).mean())


def probe(data: Data, modalities) -> tuple[float, float]:
    return ridge(
        pooled(data, "train", modalities),
        data.y["train"],
        pooled(data, "test", modalities),
        data.y["test"],
    )


def bag_of_words(data: Data) -> tuple[float, float]:
    count = CountVectorizer()
    train = count.fit_transform(data.text["train"]).toarray().astype(float)
    test = count.transform(data.text["test"]).toarray().astype(float)
    return ridge(train, data.y["train"], test, data.y["test"])


# --- small networks -------------------------------------------------------------------


def positions(steps: int, width: int) -> Tensor:
    p = torch.arange(1, steps + 1)[:, None].float()
    w = 10000 ** (-torch.arange(width // 2).float() / (width // 2 - 1))
    return torch.cat([torch.sin(p * w), torch.cos(p * w)], 1)


class Encoder(nn.Module):
    """Pre-norm attention over one modality: (B, T, d) and mask to (B, T, D)."""

    def __init__(self, width_in: int, width: int, layers: int, heads: int = 4):
        super().__init__()
        self.heads, self.width = heads, width
        self.project = nn.Linear(width_in, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.feed = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
            )
            for _ in range(layers)
        )
        self.last = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, T, _ = x.shape
        D, h = self.width, self.heads
        x = self.drop(self.project(x) * D**0.5 + positions(T, D))
        for k in range(len(self.qkv)):
            qkv = self.qkv[k](self.norms[2 * k](x))
            q, key, v = qkv.view(B, T, 3, h, D // h).permute(2, 0, 3, 1, 4)
            a = scaled_dot_product_attention(
                q, key, v, attn_mask=mask[:, None, None, :]
            )
            x = x + self.drop(self.mix[k](a.transpose(1, 2).reshape(B, T, D)))
            x = x + self.drop(self.feed[k](self.norms[2 * k + 1](x)))
        return self.last(x)


class Net(nn.Module):
    """Attention encoders, masked means, and one of three ways to fuse them.

    "late": an MLP on the concatenation. "additive": one MLP per modality, summed.
    "product": an MLP on text plus the element-wise product of all modalities.
    """

    def __init__(self, dims, fusion="late", width=32, layers=2):
        super().__init__()
        self.fusion, D = fusion, width
        self.encoders = nn.ModuleDict(
            {m: Encoder(d, width, layers) for m, d in dims.items()}
        )

        def mlp(n):
            return nn.Sequential(
                nn.Linear(n, n), nn.ReLU(), nn.Dropout(0.1), nn.Linear(n, 1)
            )

        if fusion == "additive":
            self.heads = nn.ModuleDict({m: mlp(D) for m in dims})
        elif fusion == "product":
            self.factors = nn.ModuleDict({m: nn.Linear(D, D) for m in dims})
            self.head = mlp(D)
        else:
            self.head = mlp(D * len(dims))

    def pool(self, x) -> dict[str, Tensor]:
        return {m: masked_mean(e(*x[m]), x[m][1]) for m, e in self.encoders.items()}

    def forward(self, x) -> Tensor:
        z = self.pool(x)
        if self.fusion == "additive":
            return sum(head(z[m]) for m, head in self.heads.items())
        if self.fusion == "product":
            product = torch.ones(())
            for m, factor in self.factors.items():
                product = product * factor(z[m])
            return self.head(next(iter(z.values())) + product)
        return self.head(torch.cat(list(z.values()), 1))


def rows(x, index: Tensor):
    """Some samples, cut to the longest of them."""
    out = {}
    for m, (values, mask) in x.items():
        keep = mask[index]
        steps = int(keep.sum(1).max())
        out[m] = (values[index][:, :steps], keep[:, :steps])
    return out


@torch.no_grad()
def predict(net: nn.Module, x) -> Tensor:
    net.eval()
    x = {m: x[m] for m in net.encoders}
    n = len(next(iter(x.values()))[0])
    return torch.cat([net(rows(x, i)) for i in torch.arange(n).split(200)])


def mae(net: nn.Module, data: Data, split: str = "test") -> float:
    return float((predict(net, data.x[split]) - data.y[split]).abs().mean())


def fit(
    data: Data, modalities=ALL, fusion="late", *, epochs, seed=0, layers=2, batch=32
) -> Net:
    """L1 training with one learning-rate cycle; the best epoch on validation."""
    torch.manual_seed(seed)
    x = {m: data.x["train"][m] for m in modalities}
    y = data.y["train"]
    net = Net({m: v.shape[2] for m, (v, _) in x.items()}, fusion, layers=layers)
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 2e-3, total_steps=epochs * -(-len(y) // batch), pct_start=0.15
    )
    best = (float("inf"), None)
    for _ in range(epochs):
        net.train()
        for i in torch.randperm(len(y)).split(batch):
            loss = (net(rows(x, i)) - y[i]).abs().mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.8)
            optimiser.step()
            schedule.step()
        value = mae(net, data, "valid")
        if value < best[0]:
            best = (value, copy.deepcopy(net.state_dict()))
    net.load_state_dict(best[1])
    return net


def tune_norms(net: Net, data: Data, epochs: int) -> Net:
    """Retrain only the layer norms inside the encoder layers, with labels."""
    net = copy.deepcopy(net).eval()
    norms = [p for e in net.encoders.values() for p in e.norms.parameters()]
    optimiser = torch.optim.Adam(norms, 3e-3)
    torch.manual_seed(0)
    y = data.y["train"]
    for _ in range(epochs):
        net.eval()  # no dropout, as in adaptation
        for i in torch.randperm(len(y)).split(32):
            loss = (net(rows(data.x["train"], i)) - y[i]).abs().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net


def encoder_probe(net: Net, data: Data, m: str) -> float:
    """Test r of ridge on one frozen encoder's pooled output."""
    net.eval()
    with torch.no_grad():
        z = {
            s: masked_mean(net.encoders[m](*data.x[s][m]), data.x[s][m][1]).numpy()
            for s in ("train", "test")
        }
    return ridge(z["train"], data.y["train"], z["test"], data.y["test"])[0]


# --- the rows of the table ------------------------------------------------------------


def frozen_rows(data: Data) -> dict[str, float]:
    """Pooled probes of each modality and the bag of words: r and MAE on test."""
    text, audio, vision = (probe(data, [m]) for m in ALL)
    words = bag_of_words(data)
    return {
        "text r": text[0],
        "audio r": audio[0],
        "vision r": vision[0],
        "audio+vision r": probe(data, ["audio", "vision"])[0],
        "bag-of-words r": words[0],
        "bag-of-words MAE": words[1],
    }


def fusion_rows(corpus: Corpus, data: Data, *, epochs: int, seed: int = 0):
    """Text alone and attention fusion of all beside their oracles; also the net."""
    text = fit(data, ("text",), epochs=2 * epochs, seed=seed)
    every = fit(data, epochs=epochs, seed=seed)
    return every, {
        "text MAE": mae(text, data),
        "all MAE": mae(every, data),
        "text oracle MAE": _oracle_mae(corpus, data, ("text",)),
        "oracle MAE": _oracle_mae(corpus, data, ALL),
    }


def _oracle_mae(corpus: Corpus, data: Data, modalities) -> float:
    best = puppets.oracle_predictions(corpus, "test", modalities, loss="mae")
    return float(np.abs(best - data.y["test"].numpy()).mean())


def synergy_rows(corpus_seed: int, *, epochs: int, seed: int = 0) -> dict[str, float]:
    """Sarcasm at .3: text alone, additive fusion, and fusion by a product."""
    corpus = puppets.load(synergy=0.3, seed=corpus_seed)
    data = Data(corpus)
    return {
        "synergy text MAE": mae(fit(data, ("text",), epochs=epochs, seed=seed), data),
        "synergy additive MAE": mae(
            fit(data, fusion="additive", epochs=max(epochs // 2, 4), seed=seed), data
        ),
        "synergy product MAE": mae(
            fit(data, fusion="product", epochs=epochs, seed=seed), data
        ),
        "synergy oracle MAE": _oracle_mae(corpus, data, ALL),
    }


def conflict_rows(
    corpus_seed: int, *, epochs: int = 3, seed: int = 0
) -> dict[str, float]:
    """Mean cosine of the sentiment and emotion gradients on shared features.

    Text and audio share encoders for both tasks; the gradients with respect to the
    pooled features of a batch are compared at every step after the first epoch.
    """
    out = {}
    for name, conflict in (("off", 0.0), ("on", 1.0)):
        data = Data(puppets.load(conflict=conflict, seed=corpus_seed))
        x = {m: data.x["train"][m] for m in ("text", "audio")}
        torch.manual_seed(seed)
        net = Net({m: v.shape[2] for m, (v, _) in x.items()}, layers=1)
        heads = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, k))
            for k in (1, 6)
        )
        optimiser = torch.optim.AdamW(
            [*net.encoders.parameters(), *heads.parameters()], 2e-3
        )
        cosines = []
        for epoch in range(epochs):
            for i in torch.randperm(len(data.y["train"])).split(64):
                z = torch.cat(list(net.pool(rows(x, i)).values()), 1)
                losses = [
                    (head(z) - target[i]).abs().mean()
                    for head, target in zip(
                        heads, (data.y["train"], data.e["train"]), strict=True
                    )
                ]
                g = [
                    torch.autograd.grad(one, z, retain_graph=True)[0].flatten()
                    for one in losses
                ]
                if epoch:
                    cosines.append(float(cosine_similarity(*g, dim=0)))
                optimiser.zero_grad()
                sum(losses).backward()
                optimiser.step()
        out[f"conflict {name} cosine"] = float(np.mean(cosines))
    return out


def domain_rows(corpus: Corpus, source: Net, *, epochs: int) -> dict[str, float]:
    """A model of domain A on B, and after its layer norms were retrained on B.

    "control" is domain B without any shift: other utterances, other speakers.
    """
    config = puppets.PuppetConfig.from_card(corpus.card)
    out = {}
    for name, parts in (("control", ()), ("target", puppets.DOMAIN_PARTS)):
        other = puppets.load(domain="B", domain_parts=parts, seed=config.seed)
        data = Data(other, scale_of=corpus)
        out[f"domain {name} MAE"] = mae(source, data)
        if parts:
            out["domain norms MAE"] = mae(tune_norms(source, data, epochs), data)
    return out


def dominance_rows(
    corpus_seed: int, *, epochs: int, seed: int = 0, modalities=("audio", "vision")
) -> dict[str, float]:
    """Encoders trained alone and in a joint model that text dominates, probed alone."""
    data = Data(puppets.load(seed=corpus_seed, **DOMINANCE))
    joint = fit(data, ("text", *modalities), epochs=epochs, seed=seed)
    out = {}
    for m in modalities:
        alone = fit(data, (m,), epochs=epochs, seed=seed)
        out[f"dominance {m} alone r"] = encoder_probe(alone, data, m)
        out[f"dominance {m} joint r"] = encoder_probe(joint, data, m)
    return out


def measure(corpus_seed: int, seed: int = 0) -> dict[str, float]:
    """All rows of the table for one draw of the world."""
    corpus = puppets.load(seed=corpus_seed)
    data = Data(corpus)
    net, fusion = fusion_rows(corpus, data, epochs=12, seed=seed)
    return {
        **frozen_rows(data),
        **fusion,
        **synergy_rows(corpus_seed, epochs=15, seed=seed),
        **conflict_rows(corpus_seed, seed=seed),
        **domain_rows(corpus, net, epochs=8),
        **dominance_rows(corpus_seed, epochs=8, seed=seed),
    }


def verdicts(v: dict[str, float]) -> dict[str, bool]:
    """Each line of the calibration table: does it hold?"""
    return {
        "text pooled r in .60 to .75": 0.60 <= v["text r"] <= 0.75,
        "audio pooled r in .20 to .40": 0.20 <= v["audio r"] <= 0.40,
        "vision pooled r in .20 to .40": 0.20 <= v["vision r"] <= 0.40,
        "audio+vision above either by .05 r": v["audio+vision r"]
        >= max(v["audio r"], v["vision r"]) + 0.05,
        "all below text by .10 MAE": v["all MAE"] <= v["text MAE"] - 0.10,
        "all above its oracle by .05 MAE": v["all MAE"] >= v["oracle MAE"] + 0.05,
        "bag of words behind order-aware text by .05 MAE": v["bag-of-words MAE"]
        >= v["text MAE"] + 0.05,
        "synergy: additive within .15 MAE of text": abs(
            v["synergy additive MAE"] - v["synergy text MAE"]
        )
        <= 0.15,
        "synergy: product gains .10 MAE": v["synergy product MAE"]
        <= v["synergy additive MAE"] - 0.10,
        "conflict on: cosine negative": v["conflict on cosine"] < 0,
        "conflict off: cosine positive": v["conflict off cosine"] > 0,
        "domain shift costs .15 MAE": v["domain target MAE"]
        >= v["domain control MAE"] + 0.15,
        "layer norms recover half": v["domain target MAE"] - v["domain norms MAE"]
        >= 0.5 * (v["domain target MAE"] - v["domain control MAE"]),
        **{
            f"dominance: joint {m} encoder worse": v[f"dominance {m} joint r"]
            <= v[f"dominance {m} alone r"] - 0.05
            for m in ("audio", "vision")
            if f"dominance {m} joint r" in v
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured = []
    for seed in args.seeds:
        values = measure(seed)
        held = verdicts(values)
        measured.append({"what": f"corpus seed {seed}", **values})
        for name, value in values.items():
            print(f"seed {seed}  {name:28s} {value:7.3f}", flush=True)
        for name, ok in held.items():
            print(f"seed {seed}  {'holds' if ok else 'FAILS'}  {name}", flush=True)
    if not args.dry:
        from mmsa_lib import runs

        settings = {
            "corpus": "puppets",
            "version": puppets.PUPPET_VERSION,
            "compared": "small attention nets, ridge on pooled features, oracles",
            "corpus_seeds": args.seeds,
        }
        print(
            runs.save_benchmark(
                "puppet-calibration", measured, settings=settings, out=args.out
            )
        )


if __name__ == "__main__":
    main()
