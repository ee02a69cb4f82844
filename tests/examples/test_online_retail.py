"""Finding, reading and cleaning the transactions."""

import pandas as pd
import pytest
import torch

from online_retail import COLUMNS, find_file, merge_repeats, purchases, read_transactions
from recommender_baselines import buy_again, ease, item_knn, popularity
from recommender_data import TEST, VALIDATION, build_task, relevant_and_seen

from ranking import ranking_metrics  # isort: skip


def transactions(**columns):
    """One good row, or several that differ in the given columns."""
    good = {
        "InvoiceNo": "536365",
        "StockCode": "85123A",
        "Quantity": 6,
        "InvoiceDate": "2010-12-01 08:26",
        "UnitPrice": 2.55,
        "CustomerID": "17850",
    }
    rows = max((len(values) for values in columns.values()), default=1)
    return pd.DataFrame({name: columns.get(name, [value] * rows) for name, value in good.items()})


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("InvoiceNo", "C536365"),  # cancelled
        ("StockCode", "POST"),  # postage
        ("StockCode", "gift_0001_20"),  # voucher
        ("StockCode", "DCGS0003"),
        ("Quantity", 0),
        ("Quantity", -6),
        ("UnitPrice", 0.0),
        ("UnitPrice", -11062.06),  # bad debt
        ("CustomerID", None),
    ],
)
def test_a_row_that_is_no_purchase_is_left_out(column, value):
    good = transactions()[column][0]
    kept = purchases(transactions(**{column: [good, value]}))
    assert len(kept) == 1


def test_codes_are_compared_in_upper_case_and_repeats_in_an_invoice_are_merged():
    rows = purchases(transactions(StockCode=["85123A", "85123a ", "22423"]))
    assert rows["item"].tolist() == ["85123A", "85123A", "22423"]
    assert merge_repeats(rows)["item"].tolist() == ["85123A", "22423"]


def test_the_same_item_in_two_invoices_is_kept_twice():
    assert len(merge_repeats(purchases(transactions(InvoiceNo=["536365", "536366"])))) == 2


@pytest.mark.parametrize("name", ["online_retail.csv", "online_retail.csv.gz", "Online Retail.xlsx"])
def test_each_format_gives_the_same_table(tmp_path, name):
    rows = transactions(CustomerID=["17850", None], InvoiceNo=["536365", "C536366"])
    rows = rows.assign(Description="£5 NOTE", Country="United Kingdom")
    if name.endswith("xlsx"):  # the publisher's sheet holds numbers, not text
        rows = rows.assign(CustomerID=[17850.0, None], InvoiceNo=[536365, "C536366"])
        rows.assign(InvoiceDate=pd.to_datetime(rows["InvoiceDate"])).to_excel(tmp_path / name, index=False)
    else:
        rows.to_csv(tmp_path / name, index=False)
    read = read_transactions(find_file(tmp_path))
    assert read["CustomerID"].tolist()[:1] == ["17850"]
    assert read["CustomerID"].isna().tolist() == [False, True]
    assert read["InvoiceNo"].tolist() == ["536365", "C536366"]
    assert read["InvoiceDate"][0] == pd.Timestamp("2010-12-01 08:26")
    assert read["Quantity"].tolist() == [6, 6]


def test_a_latin_1_copy_with_decimal_customers_is_read(tmp_path):
    rows = transactions(CustomerID=["17850.0"]).assign(Description="£5 NOTE")
    rows.to_csv(tmp_path / "copy.csv", index=False, encoding="latin-1")
    assert read_transactions(tmp_path / "copy.csv")["CustomerID"].tolist() == ["17850"]


def test_a_missing_file_says_where_the_publisher_offers_it(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no Online Retail file at .*10\.24432/C5BW33.*--synthetic"):
        find_file(tmp_path / "absent.csv")
    with pytest.raises(FileNotFoundError, match=r"holds no Online Retail file .*online_retail\.csv\.gz.*C5BW33"):
        find_file(tmp_path)
    monkeypatch.setenv("LIGHTNING_OPTIM_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        find_file()


def test_the_folder_in_the_environment_is_used_and_a_path_wins_over_it(tmp_path, monkeypatch):
    for folder in ("named", "given"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "online_retail.csv").touch()
    monkeypatch.setenv("LIGHTNING_OPTIM_DATA", str(tmp_path / "named"))
    assert find_file() == tmp_path / "named" / "online_retail.csv"
    assert find_file(tmp_path / "given") == tmp_path / "given" / "online_retail.csv"


def test_another_table_is_refused(tmp_path):
    second = {"InvoiceNo": "Invoice", "UnitPrice": "Price", "CustomerID": "Customer ID"}
    transactions().rename(columns=second).to_csv(tmp_path / "online_retail_II.csv", index=False)
    with pytest.raises(ValueError, match=r"lacks the column\(s\) InvoiceNo, UnitPrice, CustomerID and has Invoice,"):
        read_transactions(tmp_path / "online_retail_II.csv")


# The real file.


@pytest.fixture(scope="module")
def real(retail_file):
    return read_transactions(retail_file)


@pytest.fixture(scope="module")
def bought(real):
    return purchases(real)


def test_the_real_file_has_the_published_size(real):
    assert len(real) == 541_909
    assert list(real.columns) == list(COLUMNS)
    assert real["CustomerID"].nunique() == 4_372
    assert real["CustomerID"].isna().sum() == 135_080


def test_cleaning_the_real_file_keeps_what_was_counted(bought):
    assert len(bought) == 396_337
    assert bought["customer"].nunique() == 4_334
    assert bought["item"].nunique() == 3_659
    assert bought["invoice"].nunique() == 18_402
    assert len(bought) - len(merge_repeats(bought)) == 10_011


def test_the_real_cuts_have_the_counted_customers_and_items(bought):
    validation = build_task(merge_repeats(bought), *VALIDATION)
    # 1,093 were counted once; two more have two invoices in one minute, of which the lower number is taken here.
    assert (len(validation.items), len(validation.evaluation)) == (2_994, 1_095)


@pytest.mark.slow
def test_baselines_on_the_real_file_agree_with_an_independent_measurement(bought):
    """Recall and NDCG at 20 on the test customers, for all and for new items, from another implementation."""
    task = build_task(merge_repeats(bought), *TEST)
    assert (len(task.items), len(task.evaluation), len(task.train)) == (3_100, 1_393, 15_608)
    relevant, seen = relevant_and_seen(task.evaluation, len(task.items))
    assert relevant.sum(1).double().mean().item() == pytest.approx(22.98, abs=0.01)
    expected = {
        popularity: (0.128, 0.117, 0.094, 0.076),
        buy_again: (0.331, 0.310, 0.094, 0.076),
        item_knn: (0.203, 0.184, 0.096, 0.078),
        ease: (0.257, 0.236, 0.119, 0.090),
    }
    for baseline, numbers in expected.items():
        found = ranking_metrics(torch.from_numpy(baseline(task)), relevant, seen)
        names = ("recall", "ndcg", "new_recall", "new_ndcg")
        assert [found[name] for name in names] == pytest.approx(numbers, abs=0.004), baseline.__name__
