"""The loop, the evaluator and the seal."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy import ToyModel, ToyOutput, toy_corpus

from mmsa_lib.corpora.schema import Batch, Ragged, Split
from mmsa_lib.errors import ConfigError, SealedError, TrainingError, UnknownNameError
from mmsa_lib.nets.trained import (
    freeze,
    load_trained,
    trained_state,
    weights_sha256,
)
from mmsa_lib.tasks import SENTIMENT, sentiment
from mmsa_lib.training import (
    EpochBatches,
    Rule,
    TrainConfig,
    evaluate,
    fit,
    loop,
    seed_everything,
    select,
)

CORPUS = toy_corpus()


def build():
    return ToyModel(CORPUS.dims)


def config(**changes):
    defaults = {"epochs": 4, "batch_size": 16, "lr": 0.01, "device": "cpu"}
    return TrainConfig(**(defaults | changes))


def test_training_learns_and_freezes_the_best_validation_epoch():
    frozen = fit(build, CORPUS, config(epochs=40))
    valid = [row["valid"] for row in frozen.history]
    assert min(valid) < 0.6 * valid[0]
    assert frozen.best_epoch == int(np.argmin(valid))
    assert frozen.receipt.value == min(valid)
    # the frozen weights are those of the best epoch, not of the last
    predictions = evaluate(frozen, CORPUS, "valid")
    mae = np.abs(predictions.truth - predictions.prediction).mean()
    assert mae == pytest.approx(min(valid), abs=1e-6)


def test_same_seed_same_weights_other_seed_other_weights():
    hashes = [fit(build, CORPUS, config(seed=s)).receipt.artefact for s in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_test_labels_are_sealed_until_frozen():
    with pytest.raises(SealedError, match=r"training\.fit"):
        _ = CORPUS.test.labels
    assert CORPUS.test.batch([0, 1]).labels == {}
    with pytest.raises(SealedError, match="Frozen"):
        evaluate(build(), CORPUS)
    frozen = fit(build, CORPUS, config(epochs=1))
    assert evaluate(frozen, CORPUS).truth.shape == (16,)
    with pytest.raises(SealedError):  # the corpus itself stays sealed
        _ = CORPUS.test.labels


def test_weights_changed_after_freezing_are_refused():
    frozen = fit(build, CORPUS, config(epochs=1))
    with torch.no_grad():
        frozen.module.regressor.bias += 1e-3
    with pytest.raises(SealedError, match="weights changed"):
        evaluate(frozen, CORPUS)


def test_select_takes_the_lowest_validation_mae():
    def constant(value):
        return lambda split: np.full((len(split), 1), value)

    candidates = {str(v): constant(v) for v in (-2.0, 0.0, 2.0)}
    frozen = select(candidates, CORPUS)
    truth = CORPUS.valid.labels["sentiment"]
    assert frozen.chosen == min(
        candidates, key=lambda v: np.abs(float(v) - truth).mean()
    )
    assert evaluate(frozen, CORPUS).prediction.shape == (16,)
    with pytest.raises(TrainingError, match="labels are"):
        select({"flat": lambda split: np.zeros(len(split))}, CORPUS)
    with pytest.raises(TrainingError, match="no candidate"):
        select({}, CORPUS)


WRONG = {"nan": np.nan, "infinity": np.inf, "minus infinity": -np.inf}


def spoilt(value, where):
    """A predictor, good on every split but one, where one value is none."""

    def predict(split):
        found = np.zeros((len(split), 1))
        if split.name == where:
            found[0] = value
        return found

    return predict


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("place", [0, 1])
def test_select_names_the_candidate_that_predicts_no_number(kind, place):
    candidates = [("spoilt", spoilt(WRONG[kind], "valid")), ("good", spoilt(0, ""))]
    ordered = dict(candidates if place == 0 else candidates[::-1])
    with pytest.raises(TrainingError, match="'spoilt' gives 1 of 16 validation"):
        select(ordered, CORPUS)


@pytest.mark.parametrize("kind", WRONG)
def test_evaluate_names_who_predicts_no_number(kind):
    frozen = select({"late": spoilt(WRONG[kind], "test")}, CORPUS)
    assert evaluate(frozen, CORPUS, "valid").prediction.shape == (16,)
    with pytest.raises(TrainingError, match="'late' gives 1 of 16 test predictions"):
        evaluate(frozen, CORPUS)
    frozen = fit(build, CORPUS, config(epochs=1))
    frozen.predict = lambda split, label: spoilt(WRONG[kind], "test")(split)
    with pytest.raises(TrainingError, match="the trained model gives 1 of 16 test"):
        evaluate(frozen, CORPUS)
    frozen.predict = lambda split, label: np.zeros((3, 1))
    with pytest.raises(TrainingError, match=r"shape \(3, 1\) for 16 samples of 'test'"):
        evaluate(frozen, CORPUS)


@pytest.mark.parametrize("metric", ["corr", "mae"])
def test_an_undefined_metric_is_never_preferred(metric):
    task = replace(SENTIMENT, metric=metric)
    truth = CORPUS.valid.labels["sentiment"]
    good = truth + np.linspace(0, 1, len(truth))[:, None]
    candidates = {"flat": lambda s: np.zeros((len(s), 1)), "good": lambda s: good}
    for ordered in (candidates, dict(reversed(candidates.items()))):
        assert select(ordered, CORPUS, task).chosen == "good"


def test_a_split_without_samples_is_named():
    for name in ("train", "valid"):
        splits = CORPUS.splits | {name: CORPUS[name].select(np.array([], int))}
        lacking = replace(CORPUS, splits=splits)
        with pytest.raises(TrainingError, match=f"the {name} split of toy has no"):
            fit(build, lacking, config(epochs=1))
    with pytest.raises(TrainingError, match="the valid split of toy has no samples"):
        select({"zero": spoilt(0, "")}, lacking)


def test_loss_refuses_to_broadcast():
    batch = CORPUS.train.batch([0, 1, 2])
    flat = ToyOutput({"sentiment": torch.zeros(3)})
    with pytest.raises(TrainingError, match="broadcast"):
        SENTIMENT.objective(flat, batch)
    with pytest.raises(UnknownNameError, match="sentiment"):
        sentiment("sentimant").objective(flat, batch)


def test_accumulation_equals_a_larger_batch():
    # equal-sized batches and no dropout: the mean of two means is the mean
    def plain():
        return ToyModel(CORPUS.dims, dropout=0.0)

    big = fit(plain, CORPUS, config(batch_size=16, optimiser="sgd", clip=None))
    small = fit(
        plain,
        CORPUS,
        config(batch_size=8, accumulate=2, optimiser="sgd", clip=None),
    )
    for a, b in zip(big.module.parameters(), small.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_early_stopping_waits_exactly_patience_epochs():
    frozen = fit(build, CORPUS, config(epochs=30, lr=0.5, patience=2, seed=3))
    assert len(frozen.history) == frozen.best_epoch + 3
    assert len(frozen.history) < 30


def test_gradients_are_clipped_to_the_norm():
    norms = []

    class Watch(Rule):
        def after_step(self, model):
            grads = [p.grad.norm() for p in model.parameters()]
            norms.append(float(torch.stack(grads).norm()))

    fit(build, CORPUS, config(epochs=1, clip=0.01), rules=[Watch()])
    assert len(norms) == 3
    assert all(n == pytest.approx(0.01, rel=1e-3) for n in norms)


@pytest.fixture
def optimisers(monkeypatch):
    """The optimisers that `fit` makes."""
    made, original = [], loop._optimiser

    def spy(config, parameters):
        made.append(original(config, parameters))
        return made[-1]

    monkeypatch.setattr(loop, "_optimiser", spy)
    return made


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_schedules_lower_the_learning_rate(schedule, optimisers):
    # a tiny rate never improves noticeably: plateau must react
    lr = 0.01 if schedule == "cosine" else 1e-6
    fit(build, CORPUS, config(epochs=14, schedule=schedule, lr=lr, warmup=0.1))
    assert optimisers[0].param_groups[0]["lr"] <= 0.11 * lr


def test_rules_see_loss_gradients_and_keep_state():
    class Scale(Rule):
        def __init__(self):
            self.calls = []

        def setup(self, model, device):
            self.calls.append("setup")

        def loss(self, output, batch, loss):
            return loss + 0.0 * output.predictions["sentiment"].sum()

        def after_backward(self, model):
            for p in model.inputs["audio"].parameters():
                p.grad.zero_()

        def epoch_end(self, model, row):
            row["rule"] = 1.0

    before = None

    def remember():
        nonlocal before
        model = build()
        before = model.inputs["audio"].weight.detach().clone()
        return model

    rule = Scale()
    frozen = fit(remember, CORPUS, config(optimiser="sgd"), rules=[rule])
    torch.testing.assert_close(frozen.module.inputs["audio"].weight.detach(), before)
    assert rule.calls == ["setup"]
    assert all(row["rule"] == 1.0 for row in frozen.history)


def test_frozen_modules_stay_in_eval_mode_and_unchanged():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = freeze(ToyModel(CORPUS.dims, dropout=0.5))
            self.backbone.regressor = nn.Linear(16, 1)  # attached later: trained
            self.modes = set()

        def forward(self, batch):
            self.modes.add(self.backbone.drop.training)
            return self.backbone(batch)

    frozen = fit(Adapted, CORPUS, config())
    assert frozen.module.modes == {False}
    fresh = fit(Adapted, CORPUS, config(epochs=1, lr=1e-9)).module
    torch.testing.assert_close(
        frozen.module.backbone.inputs["text"].weight,
        fresh.backbone.inputs["text"].weight,
        rtol=0,
        atol=0,
    )
    assert frozen.trainable == 17
    assert frozen.total > 17


class Mixed(ToyModel):
    """Frozen parts with an adapter inside, and statistics that training moves."""

    def __init__(self):
        super().__init__(CORPUS.dims)
        self.backbone = freeze(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)))
        self.backbone.adapter = nn.Linear(16, 16, bias=False)  # attached later
        self.norm = nn.BatchNorm1d(16).requires_grad_(False)  # not marked by freeze
        self.norm.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.regressor.bias.requires_grad_(False)
        self.inputs.requires_grad_(False)

    def forward(self, batch):
        parts = [
            self.inputs[m](x).mul(batch.mask[m][..., None]).sum(1)
            for m, x in batch.features.items()
        ]
        z = self.norm(torch.cat(parts, -1))
        return ToyOutput({"sentiment": self.regressor(self.backbone(z))})


KEPT = {
    "backbone.adapter.weight",
    "regressor.weight",
    "norm.running_mean",
    "norm.running_var",
    "norm.num_batches_tracked",
}


def test_only_what_training_changes_is_kept_and_saved(tmp_path):
    assert trained_state(Mixed()).keys() == KEPT
    assert trained_state(build()).keys() == build().state_dict().keys()
    kept, cfg = str(tmp_path / "state"), config(epochs=9, lr=0.3, seed=1)
    frozen = fit(Mixed, CORPUS, replace(cfg, checkpoint=kept))
    assert frozen.best_epoch < 8  # else the last epoch's statistics would do
    predictions = evaluate(frozen, CORPUS, "valid")
    mae = np.abs(predictions.truth - predictions.prediction).mean()
    assert mae == pytest.approx(frozen.receipt.value, abs=1e-6)
    body = torch.load(tmp_path / "state" / "state.pt", weights_only=True)
    assert body["model"].keys() == body["best"].keys() == KEPT

    state = load_file(frozen.save(tmp_path / "model.safetensors"))
    assert state.keys() == KEPT
    seed_everything(cfg.seed)
    fresh = Mixed()
    load_trained(fresh, state)
    assert weights_sha256(fresh) == frozen.receipt.artefact
    before = fresh.norm.running_mean.clone()
    state["norm.running_mean"] = before + 1
    with pytest.raises(ConfigError, match=r"model: unexpected head\.weight"):
        load_trained(fresh, state | {"head.weight": torch.zeros(1)})
    del state["regressor.weight"]
    with pytest.raises(ConfigError, match=r"missing regressor\.weight\."):
        load_trained(fresh, state)
    torch.testing.assert_close(fresh.norm.running_mean, before)  # nothing half done


def test_a_checkpoint_of_another_frozen_part_is_refused(tmp_path):
    class Wide(nn.Module):
        def __init__(self, width, frozen=True):
            super().__init__()
            self.unused = nn.Linear(2, width)
            if frozen:
                freeze(self.unused)
            self.model = build()

        def forward(self, batch):
            return self.model(batch)

    cfg = config(epochs=1, checkpoint=str(tmp_path))
    fit(lambda: Wide(3), CORPUS, cfg)
    fit(lambda: Wide(3), CORPUS, replace(cfg, eval_batch_size=3))
    for other in (lambda: Wide(4), lambda: Wide(3, frozen=False)):
        with pytest.raises(TrainingError, match="another run"):
            fit(other, CORPUS, cfg)


class _Killed(Exception):
    pass


class Kill(Rule):
    """Ends the run after so many steps, as a lost machine would."""

    def __init__(self, after):
        self.left = after

    def after_step(self, model):
        self.left -= 1
        if self.left == 0:
            raise _Killed


def test_four_bit_weights_stay_out_of_checkpoints_and_resume_exactly(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(6, 64)
            layers = {
                name: bnb.nn.Linear4bit(
                    64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
                for name in ("first", "second")
            }
            body = freeze(nn.Sequential(nn.ModuleDict(layers)).to("cpu"))
            lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["first", "second"])
            self.body = get_peft_model(body, lora)
            self.regressor = nn.Linear(64, 1)
            freeze(self.embed)

        def forward(self, batch):
            first, second = self.body.base_model.model[0].values()
            z = self.embed(batch.features["text"]).mean(1)
            z = torch.relu(second(torch.relu(first(z))))
            return ToyOutput({"sentiment": self.regressor(z)})

    cfg = config(epochs=3, lr=1e-2, checkpoint_steps=2)
    whole = fit(Quantised, CORPUS, cfg)
    trained = trained_state(whole.module)
    assert len(trained) == 2 * 2 + 2
    assert all("lora" in n or n.startswith("regressor") for n in trained)
    start = trained_state(Quantised())
    # no gradient is lost behind quantised weights, before or after an evaluation
    later = fit(Quantised, CORPUS, replace(cfg, epochs=1)).module
    for name, tensor in trained_state(later).items():
        assert not torch.equal(tensor, trained[name]), name
        assert not torch.equal(tensor, start[name]), name

    there = replace(cfg, checkpoint=str(tmp_path))
    with pytest.raises(_Killed):
        fit(Quantised, CORPUS, there, rules=[Kill(6)])  # after 2 and 4 of 3 an epoch
    body = torch.load(tmp_path / "state.pt", weights_only=True)
    assert body["epoch"] == 1 and body["batches_done"] == 2
    assert body["model"].keys() == body["best"].keys() == trained.keys()
    resumed = fit(Quantised, CORPUS, there, rules=[Kill(0)])
    assert len(resumed.history) == 3
    assert resumed.receipt == whole.receipt


def test_groups_have_their_own_rate_and_schedules_scale_it(optimisers):
    rates = {"inputs": 0.02, "inputs.audio": 0.0}
    model = fit(build, CORPUS, config(group_lr=rates, epochs=2)).module
    (optimiser,) = optimisers
    of = {id(p): g["lr"] for g in optimiser.param_groups for p in g["params"]}
    found = {name: of[id(p)] for name, p in model.named_parameters()}
    assert len(of) == len(found) == 6
    for name, rate in found.items():
        text = {"inputs.text": 0.02, "inputs.audio": 0.0}
        assert rate == text.get(name.rpartition(".")[0], 0.01), name
    seed_everything(0)
    start = build()
    for m, moves in (("audio", False), ("text", True)):
        same = torch.equal(start.inputs[m].weight, model.inputs[m].weight)
        assert same is not moves

    for schedule in ("cosine", "plateau"):
        rates = {"regressor": 1e-6}
        cfg = config(group_lr=rates, epochs=14, lr=5e-7, schedule=schedule)
        fit(build, CORPUS, cfg)
        rest, regressor = (g["lr"] for g in optimisers[-1].param_groups)
        assert regressor == pytest.approx(2 * rest)
        assert rest <= 5.5e-8
    with pytest.raises(UnknownNameError, match=r"regresor.*mean 'regressor'"):
        fit(build, CORPUS, config(group_lr={"regresor": 1.0}))
    with pytest.raises(UnknownNameError, match=r"norm"):  # there, but not trained
        fit(Mixed, CORPUS, config(group_lr={"norm": 1.0}))


def test_evaluation_has_its_own_batch_size():
    sizes = {True: set(), False: set()}

    class Watch(ToyModel):
        def forward(self, batch):
            sizes[self.training].add(len(batch))
            return super().forward(batch)

    whole = fit(build, CORPUS, config(epochs=2))
    frozen = fit(
        lambda: Watch(CORPUS.dims), CORPUS, config(epochs=2, eval_batch_size=5)
    )
    predictions = [evaluate(f, CORPUS).prediction for f in (whole, frozen)]
    np.testing.assert_allclose(*predictions, atol=1e-6)
    assert sizes == {True: {16}, False: {5, 1}}
    for a, b in zip(whole.history, frozen.history, strict=True):
        assert a["valid"] == pytest.approx(b["valid"], abs=1e-6)


# ------------------------------------------------------------- order of samples


def _padding(split, batches):
    """Share of padded steps in all batches of an epoch."""
    masks = [m for rows in batches for m in split.batch(rows).mask.values()]
    return 1 - sum(float(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def test_length_of_a_sample_counts_all_modalities():
    lengths = CORPUS.train.lengths
    assert lengths.dtype == np.int64 and lengths.shape == (48,)
    batch = CORPUS.train.batch([7])
    assert lengths[7] == sum(int(mask.sum()) for mask in batch.mask.values())


def test_buckets_pad_less_and_take_every_sample_once():
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(t, 2)) for t in rng.integers(1, 60, 203)]
    split = Split(
        "train",
        [str(i) for i in range(203)],
        {"text": Ragged.from_list(rows)},
        {"sentiment": np.zeros(203)},
    )

    def epoch(number, lengths=split.lengths, skip=0, **place):
        batches = EpochBatches(203, 16, 5, lengths, **place)
        batches.epoch, batches.skip = number, skip
        made = list(batches)
        assert len(made) == len(batches)
        return made

    first, second = epoch(0), epoch(1)
    for batches in (first, second):
        assert sorted(i for b in batches for i in b) == list(range(203))
        assert {len(b) for b in batches} == {15, 16}
        assert _padding(split, batches) < 0.5 * _padding(split, epoch(0, None))
        means = [split.lengths[b].mean() for b in batches]
        assert np.any(np.diff(means) > 0) and np.any(np.diff(means) < 0)
    assert first == epoch(0) and epoch(0, skip=4) == first[4:]
    assert {frozenset(b) for b in first}.isdisjoint(frozenset(b) for b in second)
    shares = [epoch(0, rank=r, world=3) for r in range(3)]
    together = [b for step in zip(*shares, strict=True) for b in step]
    assert together[: len(first)] == first
    assert len(together) == 15  # 13 batches: two are given again, without weight


def test_bucketed_training_uses_the_buckets():
    seen = []

    class Watch(Rule):
        def loss(self, output, batch, loss):
            seen.append(batch.ids)
            return loss

    frozen = fit(build, CORPUS, config(epochs=2, bucketed=True), rules=[Watch()])
    wanted = EpochBatches(48, 16, 0, CORPUS.train.lengths)
    first = list(wanted)
    wanted.epoch = 1
    rows = [[f"train-{i}" for i in b] for b in first + list(wanted)]
    assert seen == rows
    assert frozen.receipt != fit(build, CORPUS, config(epochs=2)).receipt


def test_nan_input_is_named_with_batch_and_id():
    class Poison(ToyModel):
        def forward(self, batch: Batch):
            for i, name in enumerate(batch.ids):
                if name == "train-5":
                    batch.features["audio"][i, 0, 0] = float("nan")
            return super().forward(batch)

    with pytest.raises(TrainingError) as error:
        fit(lambda: Poison(CORPUS.dims), CORPUS, config())
    text = str(error.value)
    assert "batch " in text
    assert "features of 'audio' are not finite in train-5;" in text


def test_infinite_gradient_is_named():
    class Root(ToyModel):
        def forward(self, batch):
            out = super().forward(batch)
            zero = (self.regressor.weight * 0).sum()
            out.predictions["sentiment"] = out.predictions["sentiment"] + zero.sqrt()
            return out

    with pytest.raises(TrainingError, match="gradient is NaN"):
        fit(lambda: Root(CORPUS.dims), CORPUS, config())


def test_bfloat16_trains():
    frozen = fit(build, CORPUS, config(precision="bf16", epochs=30))
    assert frozen.history[-1]["valid"] < frozen.history[0]["valid"]
    assert next(frozen.module.parameters()).dtype == torch.float32


def test_bad_configuration_is_refused():
    with pytest.raises(UnknownNameError, match="adam, adamw, sgd"):
        TrainConfig(optimiser="adan")
    for name in ("gpu", "GPU", "0", "cuda:", "cuda:one", ""):
        with pytest.raises(UnknownNameError, match="A GPU is called cuda"):
            TrainConfig(device=name)
    with pytest.raises(TrainingError, match="CUDA_VISIBLE_DEVICES"):
        TrainConfig(device="cuda:1")
    with pytest.raises(TrainingError, match="epochs"):
        TrainConfig(epochs=0)
    with pytest.raises(TrainingError, match="eval_batch_size"):
        TrainConfig(eval_batch_size=0)
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="no GPU"):
            TrainConfig(device="cuda")
    with pytest.raises(TrainingError, match="no parameter"):
        fit(lambda: freeze(build()), CORPUS, config())


# ------------------------------------------------------------- checkpoints


def test_checkpoint_of_another_run_is_refused(tmp_path):
    fit(build, CORPUS, config(epochs=1, checkpoint=str(tmp_path)))
    with pytest.raises(TrainingError, match="another run"):
        fit(build, CORPUS, config(epochs=1, lr=0.5, checkpoint=str(tmp_path)))
    (tmp_path / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match="cannot be read"):
        fit(build, CORPUS, config(epochs=1, checkpoint=str(tmp_path)))


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    fit(build, CORPUS, config(epochs=2, checkpoint=str(tmp_path)))
    good = (tmp_path / "state.pt").read_bytes()

    def full(body, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "keep").write_text("x")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match="previous checkpoint is untouched"):
        fit(build, CORPUS, config(epochs=1, checkpoint=str(tmp_path / "other")))
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["keep"]
    assert (tmp_path / "state.pt").read_bytes() == good


SCRIPT = textwrap.dedent(
    """
    import sys, time
    from toy import ToyModel, toy_corpus
    from mmsa_lib.training import Rule, TrainConfig, fit

    class Count(Rule):
        steps = 0
        def after_step(self, model):
            self.steps += 1
            print("step", self.steps, flush=True)
            time.sleep(float(sys.argv[2]))
        def state_dict(self):
            return {"steps": self.steps}
        def load_state_dict(self, state):
            self.steps = state["steps"]

    corpus = toy_corpus()
    config = TrainConfig(epochs=5, batch_size=8, lr=0.01, device="cpu", seed=7,
                         schedule="cosine", checkpoint=sys.argv[1], accumulate=2,
                         checkpoint_steps=2)
    rule = Count()
    frozen = fit(lambda: ToyModel(corpus.dims), corpus, config, rules=[rule])
    print("done", frozen.receipt.artefact, rule.steps,
          [row["train"] for row in frozen.history], flush=True)
    """
)


def _run(folder, delay, kill_after=None):
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()]),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(delay)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    lines = []
    for line in process.stdout:
        lines.append(line.split())
        if kill_after is not None and line.startswith(f"step {kill_after}\n"):
            time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            break
    process.wait(60)
    if kill_after is None:
        assert process.returncode == 0, process.stderr.read()
    return lines


def test_a_killed_run_resumes_exactly(tmp_path):
    whole = _run(tmp_path / "whole", 0)[-1]
    assert whole[0] == "done"
    assert whole[2] == "15"  # 6 batches an epoch, two a step
    _run(tmp_path / "killed", 0.02, kill_after=7)
    resumed = _run(tmp_path / "killed", 0)
    # it went on from a checkpoint inside the third epoch and did not start again
    assert int(resumed[0][1]) > 3
    assert resumed[-1] == whole
    json.dumps(whole)


# ------------------------------------------------------------- several processes


class Partial(ToyModel):
    """Has a part that no batch uses, as an absent modality's encoder."""

    def __init__(self, dims):
        super().__init__(dims)
        self.absent = nn.Linear(3, 3)


def uneven_runs(accumulate, folder):
    """Train a few ways on 37 samples: batches of 8 end uneven on two processes."""
    corpus = toy_corpus(n=(37, 16, 16))
    base = config(batch_size=8, seed=2, accumulate=accumulate, schedule="cosine")
    runs = {
        "plain": base,
        "twice": replace(base, accumulate=2 * accumulate, optimiser="adamw"),
        "bucketed": replace(base, bucketed=True, group_lr={"regressor": 0.05}),
    }
    made = {
        name: fit(lambda: Partial(corpus.dims), corpus, c) for name, c in runs.items()
    }
    kept = replace(base, checkpoint=str(folder), checkpoint_steps=1)
    if folder.name == "many":
        with pytest.raises(_Killed):
            fit(lambda: Partial(corpus.dims), corpus, kept, rules=[Kill(5)])
    made["resumed"] = fit(lambda: Partial(corpus.dims), corpus, kept, rules=[Kill(0)])
    return {
        name: {
            "train": [row["train"] for row in frozen.history],
            "valid": [row["valid"] for row in frozen.history],
            "weights": torch.cat([p.flatten() for p in frozen.module.parameters()])
            .detach()
            .tolist(),
        }
        for name, frozen in made.items()
    }


PARALLEL = textwrap.dedent(
    """
    import json, os, sys
    from pathlib import Path
    import torch.distributed
    from test_training import uneven_runs

    folder = Path(sys.argv[1])
    made = uneven_runs(1, folder / "many")
    assert torch.distributed.get_world_size() == 2
    rank = os.environ["RANK"]
    (folder / f"{rank}.json").write_text(json.dumps(made))
    torch.distributed.destroy_process_group()
    """
)


def test_two_processes_equal_one_with_twice_the_accumulation(tmp_path):
    (tmp_path / "parallel.py").write_text(PARALLEL)
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path / "parallel.py"), str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = uneven_runs(2, tmp_path / "one")
    many = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01"]
    assert many[0] == many[1]
    assert many[0]["resumed"] == many[0]["plain"]
    for name, run in one.items():
        for key, values in run.items():
            found = many[0][name][key]
            np.testing.assert_allclose(found, values, atol=1e-6, rtol=0, err_msg=name)
    # another number of processes has its batches elsewhere: not to be continued
    with pytest.raises(TrainingError, match="another run"):
        uneven_runs(1, tmp_path / "many")
