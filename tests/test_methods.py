"""One contract for all methods: this suite runs over the registry.

What is special about a method is tested in the file of its name; what every method must
do is tested here, once, on models that are as small as they can be. A method that joins
``METHODS`` is tested from then on.
"""

from dataclasses import fields, is_dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from toy import toy_corpus

from mmsa_lib.corpora.schema import Batch
from mmsa_lib.errors import ConfigError, CorpusError, TrainingError, UnknownNameError
from mmsa_lib.methods.registry import KINDS, METHODS, Method, method
from mmsa_lib.nets import FusionConfig, LateFusion, MiddleFusion, count_parameters, omni
from mmsa_lib.nets.trained import load, save, trained_parameters
from mmsa_lib.tasks import SENTIMENT
from mmsa_lib.training import TrainConfig, fit

WIDTHS = {"text": 6, "audio": 4, "vision": 5, "pose": 3, "gaze": 2, "hands": 4}
WIDTHS["heart"] = 3
FUSED = [name for name, m in METHODS.items() if m.base == "fusion"]
MOST = {"fusion": 7, "thinker": 3}  # modalities
LACKING = {"fusion": ("text", "audio"), "thinker": ("audio", "vision")}
every = pytest.mark.parametrize("name", METHODS)
# what is said of feature sequences; a Thinker's clips are tested in test_omni.py
fused = pytest.mark.parametrize("name", FUSED)


@cache
def corpus_of(M=3, n=(16, 8, 8)):
    return toy_corpus(n, widths=dict(list(WIDTHS.items())[:M]))


class Case:
    """A method on a small model: what is trained, with which rules, on what."""

    label = "sentiment"
    loss = staticmethod(SENTIMENT.objective)

    def __init__(self, name: str, M: int = 3):
        self.method, self.corpus, self.rules = method(name), corpus_of(M), []
        torch.manual_seed(0)
        shape = FusionConfig(self.corpus.dims, width=8, layers=3, heads=2)
        config, kind = self.method.config(), self.method.kind
        if kind == "attach":
            self.base = LateFusion(shape)
            self.build = lambda: self.method.attach(self.base, config)
        elif kind == "build":
            self.build = lambda: self.method.build(
                self.corpus.dims, [SENTIMENT], config
            )
        elif kind == "rule":
            self.build = lambda: MiddleFusion(shape)
            self.rules = [self.method.rule(config, SENTIMENT)]
        else:
            pytest.fail(f"say here how a method that does {kind!r} is tested")

    def fit(self, corpus=None, **changes):
        usual = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "device": "cpu"}
        plan = TrainConfig(**usual | {"optimiser": "adamw", "clip": 1.0} | changes)
        corpus = corpus or self.corpus
        return fit(self.build, corpus, plan, loss=self.loss, rules=self.rules)

    def step(self, model: nn.Module, batch: Batch, dtype=None) -> dict[str, float]:
        """Forward, rules, backward, one optimiser step: gradient sizes by name."""
        trained = trained_parameters(model)
        optimiser = torch.optim.SGD(trained.values(), 0.1)
        optimiser.zero_grad()
        for rule in self.rules:
            batch = rule.batch(batch, 0)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            output = model(batch)
            loss = self.loss(output, batch)
            for rule in self.rules:
                loss = rule.loss(output, batch, loss)
        loss.backward()
        for rule in self.rules:
            rule.after_backward(model)
        optimiser.step()
        none = torch.zeros(())
        return {
            n: float((none if p.grad is None else p.grad).abs().sum())
            for n, p in trained.items()
        }

    def started(self, seed: int = 0) -> nn.Module:
        """A built model with its rules set up, in training mode."""
        torch.manual_seed(seed)
        model = self.build().train()
        for rule in self.rules:
            rule.setup(model, torch.device("cpu"))
        return model


class ThinkerCase(Case):
    """A method on a small Thinker and six clips, with the first M of three modalities.

    backbone   the Thinker's folder
    corpus     the clips
    """

    def __init__(self, name: str, M: int, backbone, corpus):
        self.method, self.corpus, self.rules = method(name), corpus, []
        labels = corpus.train.labels["sentiment"]
        self.loss = self.method.loss(labels)
        config = replace(self.method.config(), lora_dropout=0.0, dropout=0.0)

        def build():
            body = omni.load(backbone, device="cpu", modalities=omni.MODALITIES[:M])
            return self.method.attach(body, config, labels)

        self.build = build


@pytest.fixture
def case(request):
    """(method, M) -> its case; a Thinker is made for the methods that ask for one."""

    def make(name: str, M: int = 3) -> Case:
        if method(name).base == "fusion":
            return Case(name, M)
        backbone, corpus = map(request.getfixturevalue, ("backbone", "corpus"))
        return ThinkerCase(name, M, backbone, corpus)

    return make


def batch_of(corpus, rows=None) -> Batch:
    """Those rows of the training split; eight of them, or all where there are fewer."""
    rows = range(min(8, len(corpus.train))) if rows is None else rows
    return corpus.train.batch(list(rows))


@torch.no_grad()
def predict(model, batch) -> torch.Tensor:
    """One row for each sample: the score, or what writing the label costs."""
    output = model.eval()(batch)
    if "sentiment" in output.predictions:
        return output.predictions["sentiment"]
    return output.tokens[:, None]


def stirred(model) -> nn.Module:
    """The model with trained weights moved, so that nothing starts at a zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trained_parameters(model).values():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


# ---------------------------------------------------------------- the entry


@pytest.mark.parametrize("name", METHODS)
def test_the_entry_is_whole(name):
    entry = method(name)
    assert entry.name == name and entry.title
    assert is_dataclass(entry.config)
    defaults = {f.name: getattr(entry.config(), f.name) for f in fields(entry.config)}
    assert defaults["mode"] == "paper"
    with pytest.raises(UnknownNameError, match="paper"):
        replace(entry.config(), mode="papre")
    module = __import__(entry.config.__module__, fromlist=["x"])
    assert module.__doc__, "a method's file says what it does and where it is from"


def test_unknown_and_unclear_methods_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'wander'"):
        method("wonder")
    with pytest.raises(ConfigError, match=f"exactly one of {', '.join(KINDS)}"):
        Method("both", "Both", dict, attach=print, rule=print)
    with pytest.raises(ConfigError, match="exactly one"):
        Method("none", "None", dict)


# ---------------------------------------------------------------- any corpus, any batch


@pytest.mark.parametrize(
    "name, M", [(n, M) for n, m in METHODS.items() for M in range(1, 1 + MOST[m.base])]
)
def test_one_to_seven_modalities(name, M, case):
    made = case(name, M)
    model, batch = made.started(), batch_of(made.corpus)
    assert made.step(model, batch)
    found = predict(model, batch)
    assert found.shape == (len(batch), 1) and torch.isfinite(found).all()


@every
def test_a_batch_of_one_is_a_row_of_a_larger_one(name, case):
    """So padding never changes a result: alone, a sample has less of it."""
    made = case(name)
    model = stirred(made.started())
    together = predict(model, batch_of(made.corpus))
    for i in range(len(together)):
        alone = predict(model, batch_of(made.corpus, [i]))
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


@every
def test_what_stands_in_padding_is_never_read(name, case):
    made = case(name)
    model = stirred(made.started())
    batch = batch_of(made.corpus)
    noisy = {
        m: torch.where(batch.mask[m][..., None], x, 1e3 * torch.randn_like(x))
        for m, x in batch.features.items()
    }
    expected = predict(model, batch)
    found = predict(model, replace(batch, features=noisy))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def without(batch: Batch, m: str, rows: torch.Tensor) -> Batch:
    """The batch in which some samples lack modality m."""
    available = batch.available | {m: batch.available[m] & ~rows}
    mask = batch.mask | {m: batch.mask[m] & ~rows[:, None]}
    return replace(batch, available=available, mask=mask)


@pytest.mark.parametrize(
    "name, m", [(n, m) for n, e in METHODS.items() for m in LACKING[e.base]]
)
def test_an_absent_modality_says_nothing(name, m, case):
    made = case(name)
    model = stirred(made.started())
    batch = batch_of(made.corpus)
    rows = torch.arange(len(batch)) < 3
    part = without(batch, m, rows)
    other = dict(part.features)
    other[m] = torch.where(rows[:, None, None], 7.0, other[m])
    expected = predict(model, part)
    found = predict(model, replace(part, features=other))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    whole = predict(model, batch)  # the others are not touched
    torch.testing.assert_close(found[3:], whole[3:], atol=1e-5, rtol=1e-5)


@every
def test_a_modality_that_a_whole_batch_lacks(name, case):
    made = case(name)
    model = made.started()
    batch = batch_of(made.corpus)
    gone = without(batch, "audio", torch.ones(len(batch), dtype=torch.bool))
    grown = made.step(model, gone)
    assert all(np.isfinite(v) for v in grown.values())
    assert torch.isfinite(predict(model, gone)).all()


@fused
def test_samples_without_any_modality_are_named(name, case):
    made = case(name)
    batch = batch_of(made.corpus)
    rows = torch.arange(8) == 2
    for m in made.corpus.modalities:
        batch = without(batch, m, rows)
    with pytest.raises(CorpusError, match=f"every modality.*{batch.ids[2]}"):
        predict(made.started(), batch)


@fused
def test_wrong_inputs_are_explained(name, case):
    made = case(name)
    model, batch = made.started(), batch_of(made.corpus)
    lacking = {m: x for m, x in batch.features.items() if m != "vision"}
    with pytest.raises(UnknownNameError, match="'vision'"):
        predict(model, replace(batch, features=lacking))
    wide = batch.features | {"audio": torch.zeros(8, 3, 9)}
    mask = batch.mask | {"audio": torch.ones(8, 3, dtype=torch.bool)}
    with pytest.raises(CorpusError, match=r"'audio'.*9.*4"):
        predict(model, replace(batch, features=wide, mask=mask))


@fused
def test_nan_features_are_named(name, case):
    corpus = toy_corpus((16, 8, 8), widths=dict(list(WIDTHS.items())[:3]))
    ragged = corpus.train.features["audio"]
    ragged.values[ragged.starts[3]] = np.nan
    made = case(name)
    with pytest.raises(TrainingError, match=r"'audio' are not finite in .*train-3"):
        made.fit(corpus)


# ---------------------------------------------------------------- training


@every
def test_gradient_reaches_every_trained_parameter(name, case):
    """At once, or after one step where something starts at zero on purpose."""
    made = case(name)
    model = made.started()
    batch = batch_of(made.corpus, range(min(16, len(made.corpus.train))))
    reached: dict[str, float] = {}
    for _ in range(3):
        for n, size in made.step(model, batch).items():
            reached[n] = max(size, reached.get(n, 0.0))
    assert all(v > 0 for v in reached.values()), reached


@every
def test_overfits_a_handful(name, case):
    made = case(name)
    few = made.corpus.train.select(range(min(8, len(made.corpus.train))))
    splits = made.corpus.splits | {"train": few, "valid": few._with(name="valid")}
    small = replace(made.corpus, splits=splits)
    start = float((few.labels["sentiment"] ** 2).mean() ** 0.5)
    frozen = made.fit(small, epochs=40, lr=2e-2)
    assert min(row["train"] for row in frozen.history) < 0.5 * start


@every
def test_a_seed_decides_everything(name, case):
    one, same, other = (case(name).fit(seed=s).receipt.artefact for s in (1, 1, 2))
    assert one == same != other


@every
def test_nothing_stays_on_a_frozen_model(name, case):
    frozen = case(name).fit()
    hooks = [
        hook
        for part in frozen.module.modules()
        for hook in (*part._forward_hooks, *part._forward_pre_hooks)
    ]
    assert not hooks


@every
def test_bfloat16(name, case):
    made = case(name)
    model = made.started()
    grown = made.step(model, batch_of(made.corpus), dtype=torch.bfloat16)
    assert all(np.isfinite(v) for v in grown.values())
    full = predict(model, batch_of(made.corpus))
    half = predict(model.bfloat16(), batch_of(made.corpus))
    torch.testing.assert_close(half.float(), full, atol=0.15, rtol=0.1)


@every
def test_saves_only_what_was_trained_and_loads_it(name, case, tmp_path):
    made = case(name)
    frozen = made.fit()
    batch = batch_of(made.corpus)
    path = save(frozen.module, tmp_path / "deep" / "weights.safetensors")
    trainable, total = count_parameters(frozen.module)
    assert (trainable, total) == (frozen.trainable, frozen.total)
    torch.manual_seed(9)
    fresh = load(made.build(), path)
    assert torch.equal(predict(fresh, batch), predict(frozen.module, batch))
    if made.method.kind == "attach":
        assert trainable < total
        assert path.stat().st_size < 4 * total


@fused
def test_weights_of_another_model_are_refused(name, case, tmp_path):
    path = save(case(name).started(), tmp_path / "weights.safetensors")
    other = case(name, 2)
    with pytest.raises(ConfigError, match="not the trained weights of this model"):
        load(other.build(), path)
