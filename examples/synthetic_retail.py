"""A generated shop with a known structure, where the Online Retail file is not at hand.

Items form themes. A customer keeps to a few themes and comes back every few weeks, buys some of the same items again
and otherwise chooses among the items of these themes, popular ones more often. So popularity alone ranks badly, and a
model that learns which items go together ranks well, also among items that a customer never bought.
"""

import numpy as np
import pandas as pd

__all__ = ["generate_purchases"]

FIRST_DAY = pd.Timestamp("2010-12-01")
DAYS = 373
THEMES_OF_A_CUSTOMER = 3
BOUGHT_AGAIN = 0.35  # of a basket


def generate_purchases(
    *, customers: int = 600, themes: int = 25, items_per_theme: int = 20, baskets: float = 9.0, seed: int = 0
) -> pd.DataFrame:
    """Return purchases shaped like the real ones: ``customer``, ``invoice``, ``item``, ``time``, over the same year.

    Args:
        customers: Number of customers.
        themes: Number of groups of items that are bought together.
        items_per_theme: Size of a theme; the item of rank r is chosen with a probability that falls as 1 / r.
        baskets: Mean number of baskets of a customer.
        seed: Of the generator.
    """
    rng = np.random.default_rng(seed)
    rank = np.arange(1, items_per_theme + 1)
    chance = (1 / rank) / (1 / rank).sum()
    rows = []
    for customer in range(customers):
        own = rng.choice(themes, THEMES_OF_A_CUSTOMER, replace=False)
        past: list[int] = []
        for day in np.sort(rng.uniform(0, DAYS, 1 + rng.poisson(baskets - 1))):
            basket = _basket(rng, own, past, chance)
            past.extend(basket)
            rows += [(customer, day, item) for item in basket]
    table = pd.DataFrame(rows, columns=["customer", "day", "item"])
    return pd.DataFrame(
        {
            "customer": table["customer"].map("C{:05d}".format),
            "invoice": table.groupby(["day", "customer"]).ngroup().map("I{:06d}".format),
            "item": table["item"].map("{:05d}".format),
            "time": FIRST_DAY + pd.to_timedelta(table["day"], unit="D").dt.floor("min"),
        }
    )


def _basket(rng: np.random.Generator, themes: np.ndarray, past: list[int], chance: np.ndarray) -> list[int]:
    """Return the distinct items of one basket, some of them bought before."""
    size = rng.integers(6, 14)
    again = rng.choice(past, rng.binomial(size, BOUGHT_AGAIN)) if past else np.empty(0, dtype=int)
    wanted = size - len(again)
    chosen = rng.choice(themes, wanted) * len(chance) + rng.choice(len(chance), wanted, p=chance)
    return sorted({*again.tolist(), *chosen.tolist()})
