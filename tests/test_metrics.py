"""The score as a metric of torchmetrics, and metrics of torchmetrics in the score."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MultilabelAccuracy

from helpers.ranks import run_ranks
from lightning_optim import PerformanceScore
from lightning_optim.functional.score import Terms, performance_score
from lightning_optim.metrics import PerformanceScoreMetric

WORKER = Path(__file__).parent / "metrics_worker.py"
WEIGHTS = {"size": 1.0, "train_time": 2.0, "inference_time": 3.0, "accuracy": 4.0}


def test_the_metric_is_the_formula_over_means():
    metric = PerformanceScoreMetric(WEIGHTS, {"size": 10, "train_time": 2, "inference_time": 4})
    metric.update(size=5, train_time=1.0, inference_time=2.0, accuracy=0.8)
    metric.update(inference_time=4.0, accuracy=torch.tensor([0.9, 0.7, 0.8]))
    expected = performance_score(Terms(0.5, 0.5, 0.75, 1 - 0.8), WEIGHTS)
    assert float(metric.compute()) == pytest.approx(expected)


def test_it_behaves_as_a_metric():
    metric = PerformanceScoreMetric()
    metric.update(size=1, inference_time=1, accuracy=1)
    other = metric.clone()
    metric.reset()
    metric.update(size=1)
    assert torch.isnan(metric.compute()), "a term with weight was not given"
    metric.reset()
    assert float(other.compute()) == pytest.approx(1.0)
    collection = MetricCollection({"P": other, "sizes": PerformanceScoreMetric({"size": 1})})
    collection.update(size=3, inference_time=1, accuracy=1)
    assert float(collection.compute()["sizes"]) == 3
    assert float(collection.compute()["P"]) == pytest.approx(0.4 * 2 + 0.6)
    assert metric.higher_is_better is False
    first = metric(size=1, inference_time=1, accuracy=0.5)
    assert float(first) == pytest.approx(1.05)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": {"speed": 1}}, ValueError, "`weights` has no 'speed'"),
        ({"reference": {"accuracy": 1}}, ValueError, "`reference` has no 'accuracy'"),
        ({"reference": {"size": 0}}, ValueError, "positive numbers"),
        ({"reference": 3}, TypeError, "`reference` must be a mapping"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        PerformanceScoreMetric(**arguments)


def test_terms_out_of_range():
    metric = PerformanceScoreMetric()
    with pytest.raises(ValueError, match=r"`accuracy` must be in \[0, 1\], got 93"):
        metric.update(accuracy=93)
    with pytest.raises(ValueError, match="`size` must be at least 0"):
        metric.update(size=-1)


# A metric in PerformanceScore.


class Task(pl.LightningModule):
    """Logs the metric in validation, as modules do that use torchmetrics."""

    def __init__(self, metric, loss, outputs, *, forward=True, squeeze=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs))
        self.metric, self.loss, self._forward, self._squeeze = metric, loss, forward, squeeze

    def forward(self, x):
        return self.net(x)

    def _call(self, x):
        return self(x) if self._forward else self.net(x)

    def training_step(self, batch, batch_idx):
        outputs = self._call(batch[0])
        return self.loss(outputs.squeeze(-1) if self._squeeze else outputs, batch[1])

    def validation_step(self, batch, batch_idx):
        outputs = self._call(batch[0])
        labels = batch[1].long() if "torchmetrics.classification" in type(self.metric).__module__ else batch[1]
        self.metric.update(outputs.squeeze(-1) if self._squeeze else outputs, labels)
        self.log("val_metric", self.metric)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def binary_loss(outputs, labels):
    return F.binary_cross_entropy_with_logits(outputs, labels.float())


X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
CASES = {
    "multi-class": (lambda: MulticlassAccuracy(3, average="micro"), F.cross_entropy, 3, X[:, :3].argmax(1), {}),
    "binary": (BinaryAccuracy, binary_loss, 1, (X[:, 0] > 0).float(), {"squeeze": True}),
    "multi-label": (lambda: MultilabelAccuracy(4), binary_loss, 4, (X[:, :4] > 0).float(), {}),
    "regression": (MeanSquaredError, F.mse_loss, 1, X[:, 0] / 4, {"squeeze": True}),
}


def fitted(case, accuracy, *, forward=True, labels=None, **options):
    make, loss, outputs, own, more = CASES[case]
    torch.manual_seed(1)
    module = Task(make(), loss, outputs, forward=forward, **more)
    rows = TensorDataset(X, own if labels is None else labels)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    weights = {"size": 1, "accuracy": 1}
    score = PerformanceScore(accuracy, weights=weights, mode="min" if case == "regression" else "max")
    words = {**dict.fromkeys(quiet, False), "accelerator": "cpu", "max_epochs": 2, **options}
    trainer = pl.Trainer(callbacks=[score], **words)
    trainer.fit(module, DataLoader(rows, 16), DataLoader(rows, 16))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("forward", [True, False], ids=["self", "self.net"])
@pytest.mark.parametrize("case", CASES)
def test_a_metric_gives_the_numbers_of_the_name_that_a_module_logs(case, forward):
    by_name = fitted(case, "val_metric", forward=forward)
    by_metric = fitted(case, CASES[case][0](), forward=forward)
    assert by_metric == by_name
    value = by_name["val_metric"]
    assert by_name["P/error"] == pytest.approx(value if case == "regression" else 1 - value)
    assert 0 < value < 1


@pytest.mark.distributed
def test_ranks_agree(tmp_path):
    run_ranks(WORKER, tmp_path)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["metric"] == found[0]["name"]
    assert found[0]["P"] == pytest.approx(0.4 * 1.25 + 0.6 * 0.75 + 0.1 * 0.25), "the mean of both ranks"


def test_what_does_not_fit_is_one_sentence():
    with pytest.raises(MisconfigurationException, match=r"outputs \[16, 3\] \(float32\) and labels \[16\]") as caught:
        fitted("multi-class", MultilabelAccuracy(4))
    assert "\n" not in str(caught.value)
    with pytest.raises(MisconfigurationException, match="must give one number"):
        fitted("multi-class", MulticlassAccuracy(3, average=None))
    with pytest.raises(ValueError, match=r"lower values of MeanSquaredError are better\. Pass mode='min'"):
        PerformanceScore(MeanSquaredError())
    with pytest.raises(ValueError, match=r"higher values of BinaryAccuracy are better\. Pass mode='max'"):
        PerformanceScore(BinaryAccuracy(), mode="min")
    with pytest.raises(TypeError, match=r"a logged metric or a torchmetrics\.Metric, got 3"):
        PerformanceScore(3)


def test_a_step_that_never_calls_the_model():
    class Silent(Task):
        def validation_step(self, batch, batch_idx):
            self.log("val_metric", 1.0)

    module = Silent(MulticlassAccuracy(3), F.cross_entropy, 3)
    rows = DataLoader(TensorDataset(X, CASES["multi-class"][3]), 16)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(callbacks=[PerformanceScore(MulticlassAccuracy(3))], max_epochs=1, accelerator="cpu", **quiet)
    with pytest.raises(MisconfigurationException, match="validation_step never called the model"):
        trainer.fit(module, rows, rows)
    assert not any(layer._forward_hooks for layer in module.modules())
