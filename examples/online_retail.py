"""The Online Retail transactions: finds and reads the file, and keeps real purchases.

The data set (every transaction of a British online gift shop, 2010-12-01 to 2011-12-09) belongs to its publisher and
is no part of this repository. Chen, Sain, Guo 2012, "Data mining for the online retail industry",
doi:10.1057/dbm.2012.17.
"""

import os
from pathlib import Path

import pandas as pd

__all__ = ["find_file", "merge_repeats", "purchases", "read_transactions"]

COLUMNS = {
    "InvoiceNo": str,
    "StockCode": str,
    "Quantity": "int64",
    "InvoiceDate": str,
    "UnitPrice": "float64",
    "CustomerID": str,
}
FILE_NAMES = ("online_retail.csv.gz", "online_retail.csv", "Online Retail.xlsx", "online_retail.xlsx")
REPOSITORY = Path(__file__).resolve().parents[1]
PRODUCT_CODE = r"\d{5}[A-Z]{0,2}"  # everything else is postage, fees, discounts, vouchers and the like
WHERE_TO_GET_IT = (
    "Its publisher offers it as UCI dataset 352, doi:10.24432/C5BW33 "
    "(https://archive.ics.uci.edu/dataset/352/online+retail): unpack 'Online Retail.xlsx' and pass --data PATH, "
    "or put it into the folder named by $LIGHTNING_OPTIM_DATA. "
    "Without the file, --synthetic runs the same job on a generated catalogue."
)


def find_file(path: str | Path | None = None) -> Path:
    """Return the transactions file.

    Args:
        path: The file, or a folder that holds it under one of ``FILE_NAMES``. ``None`` is the folder named by the
            environment variable ``LIGHTNING_OPTIM_DATA``, else ``../shared/data`` beside the repository.

    Raises:
        FileNotFoundError: If there is no such file; says where its publisher offers it.
    """
    place = Path(path or os.environ.get("LIGHTNING_OPTIM_DATA") or REPOSITORY.parent / "shared" / "data")
    candidates = [place / name for name in FILE_NAMES] if place.is_dir() else [place]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if place.is_dir():
        missing = f"the folder {place} holds no Online Retail file (looked for {', '.join(FILE_NAMES)})."
    else:
        missing = f"there is no Online Retail file at {place}."
    raise FileNotFoundError(f"{missing} {WHERE_TO_GET_IT}")


def read_transactions(path: str | Path) -> pd.DataFrame:
    """Read the publisher's ``.xlsx`` (most of a minute), or the same table as ``.csv`` or ``.csv.gz`` (seconds).

    Returns:
        One row per line of an invoice, with the columns of ``COLUMNS``; identifiers are text, ``InvoiceDate`` a
        timestamp, ``CustomerID`` missing where the file has none.

    Raises:
        ValueError: If the file has other columns.
    """
    path = Path(path)
    is_excel = path.suffix.lower() == ".xlsx"
    _check_columns(path, pd.read_excel(path, nrows=0) if is_excel else pd.read_csv(path, nrows=0))
    # Descriptions are not read, so an encoding other than UTF-8 (some CSV copies are Latin-1) does no harm.
    options = {} if is_excel else {"encoding_errors": "replace"}
    read = pd.read_excel if is_excel else pd.read_csv
    rows = read(path, usecols=list(COLUMNS), dtype=COLUMNS, **options)
    rows["InvoiceDate"] = pd.to_datetime(rows["InvoiceDate"])
    rows["CustomerID"] = rows["CustomerID"].str.removesuffix(".0")
    return rows


def _check_columns(path: Path, head: pd.DataFrame) -> None:
    missing = [name for name in COLUMNS if name not in head.columns]
    if missing:
        raise ValueError(
            f"{path} is not the Online Retail table: it lacks the column(s) {', '.join(missing)} and has "
            f"{', '.join(map(str, head.columns))}. ('Online Retail II' is another data set.) {WHERE_TO_GET_IT}"
        )


def purchases(transactions: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows in which a known customer bought a product.

    Left out: cancelled and bad-debt invoices, rows without customer, rows whose code is no product, and rows with a
    quantity or price that is not positive.

    Returns:
        Columns ``customer``, ``invoice``, ``item``, ``time``; one row per line of an invoice.
    """
    codes = transactions["StockCode"].str.strip().str.upper()
    kept = (
        ~transactions["InvoiceNo"].str.startswith("C")
        & codes.str.fullmatch(PRODUCT_CODE)
        & transactions["CustomerID"].notna()
        & (transactions["Quantity"] > 0)
        & (transactions["UnitPrice"] > 0)
    )
    columns = {"CustomerID": "customer", "InvoiceNo": "invoice", "StockCode": "item", "InvoiceDate": "time"}
    rows = transactions.assign(StockCode=codes)[kept].rename(columns=columns)
    return rows[list(columns.values())].reset_index(drop=True)


def merge_repeats(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep one row for each item of an invoice."""
    return rows.drop_duplicates(["invoice", "item"], ignore_index=True)
