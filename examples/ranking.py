"""Ranking metrics over a whole catalogue, for all items and for the items that are new to the customer.

Hit rate and NDCG are defined as in torchmetrics, which goes query by query and so takes two seconds where these take
milliseconds; a test compares them. Recall is not: torchmetrics divides by the number of relevant items, so that a
customer with 100 of them could reach 0.2 at best in a list of 20; here it is divided by what the list can hold.
"""

import torch
from torch import Tensor

__all__ = ["hit_rate", "hits_at_k", "ndcg", "ranking_metrics", "recall"]


def hits_at_k(scores: Tensor, relevant: Tensor, k: int = 20) -> Tensor:
    """Return whether each of the k best items is relevant, best first.

    Args:
        scores: ``[queries, items]``.
        relevant: Bool ``[queries, items]``.
        k: Length of the list.

    Returns:
        Bool ``[queries, k]``.
    """
    return relevant.gather(1, scores.topk(k, dim=1).indices)


def recall(hits: Tensor, relevant_items: Tensor) -> Tensor:
    """Share of the relevant items that stand in the list, of at most as many as it can hold.

    Args:
        hits: Bool ``[queries, k]``.
        relevant_items: Number of relevant items, ``[queries]``, at least 1.

    Returns:
        ``[queries]``, in [0, 1].

    Example:
        >>> recall(torch.tensor([[True, False]]), torch.tensor([3]))  # one of two places is right
        tensor([0.5000])
    """
    return hits.sum(1) / relevant_items.clamp(max=hits.shape[1])


def ndcg(hits: Tensor, relevant_items: Tensor) -> Tensor:
    """Normalised discounted cumulative gain: a hit in place p counts 1 / log2(p + 1), over the best that is possible.

    Args:
        hits: Bool ``[queries, k]``.
        relevant_items: Number of relevant items, ``[queries]``, at least 1.

    Returns:
        ``[queries]``, in [0, 1].
    """
    places = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    gain = 1 / torch.log2(places + 1)
    best = gain.cumsum(0)[relevant_items.clamp(max=hits.shape[1]) - 1]
    return (hits * gain).sum(1) / best


def hit_rate(hits: Tensor) -> Tensor:
    """Return 1 for a list with at least one hit, ``[queries]``."""
    return hits.any(1).float()


def ranking_metrics(scores: Tensor, relevant: Tensor, seen: Tensor, k: int = 20) -> dict[str, float]:
    """Mean recall, NDCG and hit rate at k, for all items and for new items.

    Args:
        scores: ``[queries, items]``.
        relevant: Bool ``[queries, items]``; every query has a relevant item.
        seen: Bool ``[queries, items]``: bought before. For the new items these are taken out of the list and out of
            the relevant items; a query that then asks for nothing is left out.
        k: Length of the list.

    Returns:
        ``recall``, ``ndcg``, ``hit_rate`` and the same with ``new_`` before them.
    """
    new = relevant & ~seen
    asks = new.any(1)
    of_all = _means(scores, relevant, k)
    of_new = _means(scores.masked_fill(seen, -torch.inf)[asks], new[asks], k)
    return {**of_all, **{f"new_{name}": value for name, value in of_new.items()}}


def _means(scores: Tensor, relevant: Tensor, k: int) -> dict[str, float]:
    hits, relevant_items = hits_at_k(scores, relevant, k), relevant.sum(1)
    return {
        "recall": recall(hits, relevant_items).mean().item(),
        "ndcg": ndcg(hits, relevant_items).mean().item(),
        "hit_rate": hit_rate(hits).mean().item(),
    }
