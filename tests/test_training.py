"""The loop, the evaluator and the seal."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from torch import nn
from toy import ToyModel, ToyOutput, toy_corpus

from mmsa_lib import training
from mmsa_lib.corpora.schema import Batch
from mmsa_lib.errors import SealedError, TrainingError, UnknownNameError
from mmsa_lib.training import Rule, TrainConfig, evaluate, fit, freeze, select

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


def test_loss_refuses_to_broadcast():
    batch = CORPUS.train.batch([0, 1, 2])
    flat = ToyOutput({"sentiment": torch.zeros(3)})
    with pytest.raises(TrainingError, match="broadcast"):
        training.l1()(flat, batch)
    with pytest.raises(UnknownNameError, match="sentiment"):
        training.l1("sentimant")(flat, batch)


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


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_schedules_lower_the_learning_rate(schedule):
    rates = []
    original = training._optimiser

    def spy(cfg, parameters):
        rates.append(original(cfg, parameters))
        return rates[-1]

    training._optimiser = spy
    try:
        # a tiny rate never improves noticeably: plateau must react
        lr = 0.01 if schedule == "cosine" else 1e-6
        fit(build, CORPUS, config(epochs=14, schedule=schedule, lr=lr, warmup=0.1))
    finally:
        training._optimiser = original
    assert rates[0].param_groups[0]["lr"] <= 0.11 * lr


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

        def epoch_end(self, row):
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
    with pytest.raises(TrainingError, match="epochs"):
        TrainConfig(epochs=0)
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
        file.write(b"half")
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
