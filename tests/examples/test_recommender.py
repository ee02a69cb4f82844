"""Baskets, the tower and the baselines on tables small enough to check by hand; the whole chain on a made-up shop."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import recommender
from chain import at_random, stages
from lightning_optim import Recipe
from lightning_optim.export.session import ExportedModel
from ranking import ranking_metrics
from recommender_baselines import BASELINES, buy_again, popularity
from recommender_data import (
    NextBasket,
    RetailData,
    build_task,
    history_before,
    loader,
    positions,
    relevant_and_seen,
)
from recommender_model import RAGGED, Serving, TwoTower, padded
from synthetic_retail import generate_purchases

EXAMPLES = Path(recommender.__file__).parent

CUT, END = pd.Timestamp("2011-03-01"), pd.Timestamp("2011-04-01")


def table(*baskets):
    """Purchases from (customer, day, items)."""
    rows = [(customer, f"i{n}", item, day) for n, (customer, day, items) in enumerate(baskets) for item in items]
    frame = pd.DataFrame(rows, columns=["customer", "invoice", "item", "time"])
    return frame.assign(time=pd.to_datetime(frame["time"]))


BASKETS = (
    *((f"x{n}", "2011-01-01", "abc") for n in range(4)),  # makes a, b, c known in five invoices
    ("anna", "2011-01-15", "ab"),
    ("anna", "2011-02-24", "a"),
    ("anna", "2011-03-05", "bc"),  # first after the cut
    ("anna", "2011-03-06", "a"),
    ("bert", "2011-02-24", "c"),
    ("bert", "2011-05-01", "a"),  # after the end
    ("new", "2011-03-02", "a"),  # not known before the cut
)


@pytest.fixture
def task():
    return build_task(table(*BASKETS), CUT, END)


def test_history_counts_the_baskets_before_and_discounts_them_by_age():
    bought = np.array([[1, 0], [1, 1], [0, 0]], dtype=np.float32)
    count, recency = history_before(bought, np.array([0.0, 45.0, 90.0]))
    assert count.tolist() == [[0, 0], [1, 0], [2, 1]]
    np.testing.assert_allclose(recency, [[0, 0], [0.5, 0], [0.75, 0.5]])


def test_the_task_asks_known_customers_for_their_first_basket_after_the_cut(task):
    assert task.items == ["a", "b", "c"]
    assert len(task.train) == 7
    assert len(task.evaluation) == 1
    assert task.evaluation.target_item.tolist() == [1, 2]
    assert task.evaluation.item.tolist() == [0, 1]
    assert task.evaluation.log_count.tolist() == pytest.approx([np.log(3), np.log(2)])
    day = 59  # 1 March, from 1 January
    assert task.evaluation.day.tolist() == [day]
    age = np.array([day - 54, day - 14])
    recency = 0.5 ** (age / 45)
    assert task.evaluation.recency.tolist() == pytest.approx([recency.sum(), recency[1]], rel=1e-6)
    assert task.evaluation.earlier.tolist() == [2]


def test_popularity_counts_the_thirty_days_before_and_not_the_day_itself(task):
    assert task.popularity[0].tolist() == [0, 0, 0]
    assert task.popularity[1].tolist() == pytest.approx([np.log(5)] * 3)
    assert task.popularity[14].tolist() == pytest.approx([np.log(5)] * 3)
    assert task.popularity[31].tolist() == pytest.approx([np.log(2), np.log(2), 0])
    assert task.popularity[59].tolist() == pytest.approx([np.log(2), 0, np.log(2)])


def test_what_happens_after_the_cut_changes_nothing_that_is_known_at_the_cut(task):
    later = table(*BASKETS, ("anna", "2011-03-20", "abc"), ("carl", "2011-03-20", "abc"))
    again = build_task(later, CUT, END)
    assert np.array_equal(again.popularity, task.popularity)
    for name, values in vars(task.train).items():
        assert np.array_equal(getattr(again.train, name), values), name
    assert np.array_equal(again.evaluation.item, task.evaluation.item)


def test_flat_positions_follow_the_rows_asked_for():
    where, owner = positions(np.array([0, 2, 2, 5]), np.array([2, 1, 0]))
    assert where.tolist() == [2, 3, 4, 0, 1]
    assert owner.tolist() == [0, 0, 0, 2, 2]


@pytest.fixture(scope="module")
def shop():
    rows = generate_purchases(customers=80, themes=5, items_per_theme=8)
    return build_task(rows, pd.Timestamp("2011-11-09"), pd.Timestamp("2012-01-01"))


def test_a_batch_is_its_examples_one_after_the_other(shop):
    data = NextBasket(shop.evaluation, shop.popularity)
    batch, singles = data.__getitems__([3, 0, 5])["inputs"], [data[row]["inputs"] for row in (3, 0, 5)]
    for name in ("item", "weight", "log_count", "recency", "shown", "popularity", "context"):
        assert torch.equal(batch[name], torch.cat([single[name] for single in singles])), name
    assert batch["starts"].diff().tolist() == [len(single["item"]) for single in singles]
    torch.manual_seed(0)
    tower = TwoTower(len(shop.items), width=4, hidden=(8,)).eval()
    torch.testing.assert_close(tower(**batch), torch.cat([tower(**single) for single in singles]))


def test_augmentation_shows_a_part_of_a_basket_and_asks_for_the_rest(shop):
    data = NextBasket(shop.train, shop.popularity, augment=True, seed=1)
    rows = list(range(0, len(shop.train), 3))
    batch = data.__getitems__(rows)
    inputs, targets = batch["inputs"], batch["targets"]
    owner = torch.repeat_interleave(inputs["starts"].diff())
    split = 0
    for place, row in enumerate(rows):
        shown = inputs["item"][(owner == place) & (inputs["shown"] == 1)].tolist()
        asked = targets["item"][targets["row"] == place].tolist()
        first, last = shop.train.target_starts[row : row + 2]
        assert sorted(shown + asked) == shop.train.target_item[first:last].tolist()
        assert asked
        assert inputs["context"][place, 1] == bool(shown)
        split += bool(shown)
    assert 0.35 < split / len(rows) < 0.65
    length = torch.zeros(len(rows)).index_add(0, owner, inputs["weight"] ** 2)
    assert length[length > 0].tolist() == pytest.approx([1.0] * int((length > 0).sum()), abs=1e-3)


def test_a_loader_repeats_its_batches_for_a_seed(shop):
    def batches(seed):
        return [
            batch["inputs"]["item"]
            for batch in loader(shop.train, shop.popularity, batch_size=32, train=True, seed=seed)
        ]

    assert all(torch.equal(a, b) for a, b in zip(batches(3), batches(3), strict=True))
    assert not all(torch.equal(a[:5], b[:5]) for a, b in zip(batches(3), batches(4), strict=True))


def test_the_loss_is_the_cross_entropy_with_the_basket_as_distribution(shop):
    batch = NextBasket(shop.evaluation, shop.popularity).__getitems__([0, 1, 2])
    torch.manual_seed(0)
    tower = TwoTower(len(shop.items), width=4, hidden=(8,)).eval()
    share = relevant_and_seen(shop.evaluation.select(np.arange(3)), len(shop.items))[0].float()
    share /= share.sum(1, keepdim=True)
    expected = torch.nn.functional.cross_entropy(tower(**batch["inputs"]), share)
    torch.testing.assert_close(tower.training_step(batch, 0), expected)


def test_the_tower_is_its_formula(shop):
    """Scores of one customer, written with dense vectors."""
    inputs = NextBasket(shop.evaluation, shop.popularity)[0]["inputs"]
    torch.manual_seed(0)
    tower = TwoTower(len(shop.items), width=4, hidden=(8,)).eval()
    dense = {name: torch.zeros(len(shop.items)) for name in ("weight", "log_count", "recency")}
    for name, values in dense.items():
        values[inputs["item"]] = inputs[name]
    bag = dense["weight"] @ tower.history.weight
    latent = tower.norm(tower.mlp(bag) + bag)
    counted, recent, popular = inputs["context"][0] @ tower.terms
    expected = tower.item.weight @ latent + tower.item.bias + popular * inputs["popularity"][0]
    expected += counted * dense["log_count"] + recent * dense["recency"]
    torch.testing.assert_close(tower(**inputs)[0], expected)


def test_the_deployed_tower_scores_like_the_trained_one_whatever_the_padding(shop):
    data = NextBasket(shop.train, shop.popularity, augment=True, seed=1)  # with items that are in the basket already
    inputs = data.__getitems__(list(range(0, len(shop.train), 5)))["inputs"]
    torch.manual_seed(0)
    tower = TwoTower(len(shop.items), width=4, hidden=(8,)).eval()
    filled = padded(inputs)
    assert len(set(inputs["starts"].diff().tolist())) > 2
    torch.testing.assert_close(Serving(tower).eval()(**filled), tower(**inputs))
    longer = {name: torch.nn.functional.pad(filled[name], (0, 3)) for name in RAGGED}
    torch.testing.assert_close(Serving(tower).eval()(**(filled | longer)), tower(**inputs))
    assert sum(p.numel() for p in Serving(tower).parameters()) == sum(p.numel() for p in tower.parameters()) - 9


def test_a_deployed_tower_without_history_ranks_by_what_it_knows_of_all(task):
    inputs = NextBasket(task.evaluation, task.popularity)[0]["inputs"]
    empty = {name: inputs[name][:0] for name in RAGGED} | {"starts": torch.tensor([0, 0])}
    tower = TwoTower(3, width=4, hidden=(8,)).eval()
    torch.testing.assert_close(Serving(tower).eval()(**padded(inputs | empty)), tower(**(inputs | empty)))


def test_an_item_in_the_basket_is_not_recommended_again(shop):
    inputs = NextBasket(shop.evaluation, shop.popularity)[0]["inputs"]
    tower = TwoTower(len(shop.items), width=4, hidden=(8,)).eval()
    shown = {**inputs, "shown": torch.ones_like(inputs["shown"])}
    difference = tower(**inputs)[0] - tower(**shown)[0]
    assert difference[inputs["item"]].tolist() == pytest.approx([20.0] * len(inputs["item"]), abs=1e-4)


def test_buying_again_ranks_by_own_count_and_then_by_popularity(task):
    (scores,) = buy_again(task)
    assert scores.tolist() == pytest.approx([2 + 0.5, 1, 0.5])  # a twice, b once; a and c popular in the last 30 days
    assert popularity(task)[0].tolist() == pytest.approx([np.log(2), 0, np.log(2)])


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_every_baseline_scores_every_item_for_every_customer(shop, name):
    scores = BASELINES[name](shop)
    assert scores.shape == (len(shop.evaluation), len(shop.items))
    assert np.isfinite(scores).all()


def test_items_bought_together_lift_each_other(shop):
    """Knowing which items go together ranks a customer's new items above what is popular."""
    relevant, seen = relevant_and_seen(shop.evaluation, len(shop.items))
    new = {
        name: ranking_metrics(torch.from_numpy(BASELINES[name](shop)), relevant, seen, k=5)["new_recall"]
        for name in ("popularity, last 30 days", "item-kNN", "EASE")
    }
    assert new["item-kNN"] > 2 * new["popularity, last 30 days"]
    assert new["EASE"] > 2 * new["popularity, last 30 days"]


def test_the_generated_shop_repeats_for_a_seed_and_has_its_structure():
    rows = generate_purchases(customers=50, seed=3)
    pd.testing.assert_frame_equal(rows, generate_purchases(customers=50, seed=3))
    assert not rows.equals(generate_purchases(customers=50, seed=4))
    assert not rows.duplicated(["invoice", "item"]).any()
    themes = (rows["item"].astype(int) // 20).groupby(rows["customer"]).nunique()
    assert themes.max() == 3
    assert rows.duplicated(["customer", "item"]).mean() > 0.35  # bought again


# The recipe's stages.


def test_every_stage_has_one_technique_more_in_the_windows_of_the_whole():
    recipe = Recipe.load("recommender")
    found = stages(recipe)
    assert list(found) == ["distilled", "+ channels", "+ weights", "+ int8"]
    assert [len(part.stages) for part in found.values()] == [0, 1, 2, 3]
    assert found["+ int8"] == recipe
    for part in found.values():
        assert part.distillation == recipe.distillation
        for technique in part.stages:
            assert getattr(part, technique) == getattr(recipe, technique)


def test_the_control_draws_channels_and_weights_by_lot_and_changes_nothing_else():
    recipe = Recipe.load("recommender")
    control = at_random(recipe)
    assert control.channel_pruning == {**recipe.channel_pruning, "criterion": "random"}
    assert control.weight_pruning == {**recipe.weight_pruning, "criterion": "random"}
    assert (control.quantization, control.distillation) == (recipe.quantization, recipe.distillation)
    assert at_random(Recipe(quantization=True)) == Recipe(quantization=True)


# The job.


@pytest.fixture(scope="module")
def shop_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    return recommender.main(["--synthetic", "--report", str(folder)]), folder


@pytest.mark.slow
def test_every_stage_is_in_the_table_with_its_controls_and_what_needs_no_net(shop_report):
    report, folder = shop_report
    kinds = {row["name"]: row["kind"] for row in report.rows}
    assert [name for name, kind in kinds.items() if kind == "compressed"] == [
        "distilled",
        "+ channels",
        "+ weights",
        "+ int8",
    ]
    controls = ["small, from scratch", "the same, drawn at random", "its shape, from scratch"]
    assert [name for name, kind in kinds.items() if kind == "control"] == controls
    assert [name for name, kind in kinds.items() if kind == "baseline"] == list(BASELINES)
    assert kinds["large"] == "dense"
    for name in ("report.html", "report.md", "report.json", "recommender.onnx"):
        assert (folder / name).stat().st_size > 1000
    assert all(f"| {name} |" in (folder / "report.md").read_text(encoding="utf-8") for name in kinds)


@pytest.mark.slow
def test_every_technique_takes_from_the_model_what_its_name_says(shop_report):
    report, _ = shop_report
    large, scratch, taught, channels, weights, integers = report.rows[:6]
    width, hidden = 96, 128
    items = (scratch["parameters"] - 2 * width * hidden - hidden - 3 * width) // (2 * width + 1)

    def parameters(width, hidden):  # tables, biases of the items, two matrices with their biases, the norm
        return 2 * width * items + items + 2 * width * hidden + hidden + width + 2 * width

    assert taught["parameters"] == scratch["parameters"] == parameters(width, hidden) < 0.1 * large["parameters"]
    for row in (channels, weights, integers):
        assert row["parameters"] == parameters(width // 2, hidden // 2)
    selected = 2 * (width // 2) * (items + hidden // 2)
    for row in (weights, integers):
        assert row["nonzero"] == pytest.approx(channels["parameters"] - selected / 2, abs=hidden)
    assert channels["nonzero"] > 0.99 * channels["parameters"]
    assert large["onnx_bytes"] > taught["onnx_bytes"] > channels["onnx_bytes"] == weights["onnx_bytes"]
    assert integers["onnx_bytes"] < 0.4 * weights["onnx_bytes"]
    assert weights["bytes"] < 0.7 * channels["bytes"]
    assert integers["bits"] < 0.3 * integers["parameters"]
    assert [row["integer_kernels"] for row in (large, weights, integers)] == [0, 0, 3]
    assert integers["kernels"] == 4  # float: the factors of the added terms
    assert all(row["onnx_agreement"] >= 0.99 for row in report.rows[:8])
    assert report["its shape, from scratch"]["parameters"] == integers["parameters"]


@pytest.mark.slow
def test_the_chain_keeps_what_was_learned_and_a_choice_by_lot_does_not(shop_report):
    report, _ = shop_report
    popular, deployed = report["popularity, last 30 days"], report["+ int8"]
    for row in report.rows[:6]:
        assert row["recall"] > 2 * popular["recall"]
        assert row["new_recall"] > 5 * popular["new_recall"]
    assert deployed["recall"] > report["large"]["recall"] - 0.02
    assert deployed["new_recall"] == pytest.approx(report["+ weights"]["new_recall"], abs=0.03)
    assert deployed["new_recall"] > report["the same, drawn at random"]["new_recall"] + 0.05
    assert deployed["P"] < 0.5 * report["large"]["P"]


@pytest.mark.slow
def test_the_deployed_file_ranks_as_its_row_says(shop_report):
    report, folder = shop_report
    found = recommender.judge(ExportedModel(folder / "recommender.onnx"), RetailData(synthetic=True).task)
    for metric in ("recall", "ndcg", "new_recall", "new_ndcg"):
        assert found[metric] == pytest.approx(report["+ int8"][metric], abs=0.005)


@pytest.mark.slow
def test_rows_without_a_net_are_the_baselines(shop_report):
    report, _ = shop_report
    task = RetailData(synthetic=True).task
    relevant, seen = relevant_and_seen(task.evaluation, len(task.items))
    expected = ranking_metrics(torch.from_numpy(BASELINES["buy it again"](task)), relevant, seen)
    assert {name: report["buy it again"][name] for name in expected} == pytest.approx(expected)


def test_a_run_repeats_bit_for_bit(monkeypatch):
    monkeypatch.setitem(recommender.TRAINER, "max_epochs", 1)
    data, recipe = RetailData(synthetic=True), Recipe.load("recommender")
    teacher = recommender.fit(recommender.SMALL, data)
    first, second = (recommender.fit(recommender.SMALL, data, recipe, teacher).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert first["mlp.0.weight"].shape == (64, 48)


@pytest.mark.parametrize(
    ("file", "part", "tower"),
    [
        ("recommender_teacher.yaml", "model", recommender.LARGE),
        ("recommender.yaml", "teacher", recommender.LARGE),
        ("recommender.yaml", "model", recommender.SMALL),
    ],
)
def test_the_yaml_files_say_what_the_script_does(file, part, tower):
    words = yaml.safe_load((EXAMPLES / file).read_text(encoding="utf-8"))
    given = words[part]["init_args"]
    assert (given["width"], tuple(given["hidden"]), given["learning_rate"]) == (
        tower.width,
        tower.hidden,
        tower.learning_rate,
    )
    trainer = {name: value for name, value in words["trainer"].items() if name not in ("callbacks", "default_root_dir")}
    assert trainer == {name: value for name, value in recommender.TRAINER.items() if name != "enable_checkpointing"}
    assert words.get("recipe", recommender.RECIPE) == recommender.RECIPE


def test_an_unknown_cut_is_refused():
    with pytest.raises(ValueError, match="`cut` must be one of validation, test, got 'train'"):
        RetailData(cut="train")


@pytest.mark.slow
def test_the_job_runs_on_some_customers_of_the_real_file_with_two_seeds(retail_file, tmp_path):
    report = recommender.main(["--fast", "--seeds", "2", "--data", str(retail_file), "--report", str(tmp_path)])
    popular, deployed = report["popularity, last 30 days"], report["+ int8"]
    assert report.seeds == 2
    assert deployed["recall"] > 2 * popular["recall"]
    assert deployed["recall"] > 0.95 * report["large"]["recall"]
    assert 0 < deployed["recall_std"] < 0.02
    assert report["large"]["onnx_bytes"] > 25 * deployed["onnx_bytes"]


@pytest.mark.slow
def test_the_validation_cut_is_a_month_earlier(retail_file):
    choosing, testing = (RetailData(str(retail_file), cut=cut, customers=300).task for cut in ("validation", "test"))
    assert len(choosing.train) < len(testing.train)


def test_a_missing_file_ends_in_one_sentence(monkeypatch, tmp_path):
    words = ["recommender.py", "--data", str(tmp_path / "absent.csv"), "--report", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"^error: there is no Online Retail file at .*doi:10\.24432/C5BW33.*--synth"):
        runpy.run_path(recommender.__file__, run_name="__main__")


def test_data_and_synthetic_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        recommender.main(["--synthetic", "--data", "x.csv"])
    assert "exclude each other" in capsys.readouterr().err
