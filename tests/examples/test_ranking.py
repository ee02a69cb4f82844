"""Metrics against hand arithmetic and torchmetrics."""

import doctest
import math

import pytest
import torch
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_normalized_dcg, retrieval_recall

import ranking
from ranking import hit_rate, hits_at_k, ndcg, ranking_metrics, recall

SCORES = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5]])
RELEVANT = torch.tensor([[True, False, True, True, False], [True, False, False, False, False]])


def test_by_hand_at_two():
    """First query: best two are items 0 and 1, one of them relevant. Second: items 4 and 3, none relevant."""
    hits = hits_at_k(SCORES, RELEVANT, k=2)
    assert hits.tolist() == [[True, False], [False, False]]
    assert recall(hits, RELEVANT.sum(1)).tolist() == [0.5, 0.0]  # two places for three relevant items
    assert ndcg(hits, RELEVANT.sum(1)).tolist() == pytest.approx([1 / (1 + 1 / math.log2(3)), 0.0])
    assert hit_rate(hits).tolist() == [1.0, 0.0]


def test_new_items_by_hand():
    """Item 0 was seen by the first customer: items 1, 2 remain in the list, 2 and 3 are asked. The second asks none."""
    seen = torch.tensor([[True, False, False, False, False], [True, False, False, False, False]])
    found = ranking_metrics(SCORES, RELEVANT, seen, k=2)
    assert found["recall"] == pytest.approx(0.25)
    assert found["new_recall"] == pytest.approx(0.5)
    assert found["new_ndcg"] == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    assert found["new_hit_rate"] == 1.0


def test_equal_to_torchmetrics_where_the_definition_is_the_same():
    scores = torch.randn(40, 200)
    relevant = torch.rand(40, 200) < torch.rand(40, 1).clamp(0.01, 0.4)
    relevant[:, 0] = True
    hits, wanted = hits_at_k(scores, relevant, k=20), relevant.sum(1)
    pairs = list(zip(scores, relevant, strict=True))
    torch.testing.assert_close(ndcg(hits, wanted), torch.stack([retrieval_normalized_dcg(*p, top_k=20) for p in pairs]))
    torch.testing.assert_close(hit_rate(hits), torch.stack([retrieval_hit_rate(*p, top_k=20) for p in pairs]))
    theirs = torch.stack([retrieval_recall(*p, top_k=20) for p in pairs])
    few = wanted <= 20
    assert few.any()
    assert (~few).any()
    torch.testing.assert_close(recall(hits, wanted)[few], theirs[few])


def test_the_best_ranking_scores_one():
    scores, seen = RELEVANT.float(), torch.zeros_like(RELEVANT)
    assert ranking_metrics(scores, RELEVANT, seen, k=3) == pytest.approx(
        dict.fromkeys(("recall", "ndcg", "hit_rate", "new_recall", "new_ndcg", "new_hit_rate"), 1.0)
    )


def test_the_doctests_hold():
    assert doctest.testmod(ranking).failed == 0
