"""What a recommender must beat: four rankings that need no net. Each returns scores ``[customers, items]``."""

import numpy as np
import scipy.sparse as sparse

from recommender_data import Examples, Task

__all__ = ["BASELINES", "buy_again", "ease", "item_knn", "popularity"]


def popularity(task: Task) -> np.ndarray:
    """Score an item by its baskets in the last 30 days; the same for every customer."""
    return task.popularity[task.evaluation.day.astype(np.int64)]


def buy_again(task: Task) -> np.ndarray:
    """Score an item by the customer's own baskets with it; ties, and what was never bought, by popularity."""
    popular = np.expm1(popularity(task))
    return np.expm1(_history(task, task.evaluation.log_count).toarray()) + 0.5 * popular / popular.max()


def item_knn(task: Task, *, neighbours: int = 100, shrink: float = 10.0) -> np.ndarray:
    """Score an item by its likeness to what the customer bought lately: cosine over baskets, shrunk for rare items."""
    together = _together(task)
    baskets = np.diag(together)
    likeness = together / (np.sqrt(np.outer(baskets, baskets)) + shrink)
    np.fill_diagonal(likeness, 0)
    kept = min(neighbours, len(task.items))
    nearest = np.partition(likeness, -kept, axis=1)[:, [-kept]]
    likeness[likeness < nearest] = 0
    return _history(task, np.minimum(task.evaluation.recency, 1)) @ likeness


def ease(task: Task, *, penalty: float = 200.0) -> np.ndarray:
    """Score an item by a linear model of every item by all others, in closed form.

    References:
        Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data".
    """
    gram = _together(task) + penalty * np.eye(len(task.items), dtype=np.float32)
    inverse = np.linalg.inv(gram)
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return _history(task, task.evaluation.recency) @ weights


BASELINES = {
    "popularity, last 30 days": popularity,
    "buy it again": buy_again,
    "item-kNN": item_knn,
    "EASE": ease,
}


def _together(task: Task) -> np.ndarray:
    """Count the training baskets with both items, ``[items, items]``."""
    train = task.train
    ones = np.ones(len(train.target_item), dtype=np.float32)
    baskets = sparse.csr_matrix((ones, train.target_item, train.target_starts), shape=(len(train), len(task.items)))
    return (baskets.T @ baskets).toarray()


def _history(task: Task, values: np.ndarray) -> sparse.csr_matrix:
    """Arrange one value per history entry as ``[customers, items]``."""
    examples: Examples = task.evaluation
    return sparse.csr_matrix((values, examples.item, examples.starts), shape=(len(examples), len(task.items)))
