"""Importance of blocks, and which of them are removed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim.functional.blocks import BLOCK_CRITERIA, BlockFacts, lowest
from lightning_optim.functional.criteria import parameter_generator


def facts(**more):
    generator = parameter_generator("layers.1")
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    return BlockFacts(
        1, 4, loss=2.0, baseline=1.0, hidden_in=hidden, hidden_out=hidden + 1, generator=generator, **more
    )


def test_the_names():
    assert set(BLOCK_CRITERIA) == {"loss", "influence", "last", "random"}


@pytest.mark.parametrize("name", BLOCK_CRITERIA)
def test_a_criterion_returns_a_finite_number_and_says_what_it_needs(name):
    criterion = BLOCK_CRITERIA[name]
    assert math.isfinite(criterion(facts()))
    if criterion.needs:
        with pytest.raises(ValueError, match=f"the criterion {name} needs the"):
            criterion(BlockFacts(0, 4))


def test_the_loss_rises_by_what_the_block_gave():
    assert BLOCK_CRITERIA["loss"](BlockFacts(0, 4, loss=3.25, baseline=3.5)) == -0.25


def test_influence_is_one_minus_cosine():
    turned = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    before, after = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), turned
    assert BLOCK_CRITERIA["influence"](BlockFacts(0, 4, hidden_in=before, hidden_out=after)) == pytest.approx(1.5)
    scaled = BLOCK_CRITERIA["influence"](BlockFacts(0, 4, hidden_in=before, hidden_out=7 * before))
    assert scaled == pytest.approx(0.0, abs=1e-6)


def test_influence_of_images_is_over_their_channels():
    before = torch.zeros(1, 2, 2, 2)
    before[:, 0] = 1.0
    after = torch.zeros(1, 2, 2, 2)
    after[:, 1] = 5.0
    assert BLOCK_CRITERIA["influence"](BlockFacts(0, 4, hidden_in=before, hidden_out=after, dim=1)) == 1.0


def test_the_last_blocks_leave_first():
    scores = {str(place): BLOCK_CRITERIA["last"](BlockFacts(place, 5)) for place in range(5)}
    assert lowest(scores, {"s": list(scores)}, {"s": 2}, 2) == ["4", "3"]


def test_random_depends_on_name_and_seed_alone():
    def drawn(name, **arguments):
        criterion = BLOCK_CRITERIA.resolve({"random": arguments})
        return criterion(BlockFacts(0, 4, generator=parameter_generator(name)))

    assert drawn("a") == drawn("a") != drawn("b")
    assert drawn("a", seed=1) == drawn("a", seed=1) != drawn("a")


@given(
    scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, math.inf]), min_size=1, max_size=9),
    split=st.integers(0, 9),
    quotas=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    number=st.integers(0, 9),
)
def test_the_lowest_of_each_stack_up_to_its_quota(scores, split, quotas, number):
    named = {f"b{place}": score for place, score in enumerate(scores)}
    names = list(named)
    stacks = {"s": names[:split], "t": names[split:]}
    quota = dict(zip(stacks, quotas, strict=True))
    found = lowest(named, stacks, quota, number)
    assert len(found) == len(set(found)) <= number
    for stack, blocks in stacks.items():
        ours = [block for block in found if block in blocks]
        assert len(ours) <= quota[stack]
        if len(found) < number:  # only a quota or infinity keeps a block
            finite = [block for block in blocks if math.isfinite(named[block])]
            assert len(ours) == min(quota[stack], len(finite))
        rest = [named[block] for block in blocks if block not in ours]
        assert all(named[block] <= min(rest, default=math.inf) for block in ours)
    assert [named[block] for block in found] == sorted(named[block] for block in found)


def test_a_score_that_is_no_number_is_an_error():
    with pytest.raises(ValueError, match="the score of b is nan; a criterion must return a number"):
        lowest({"a": 1.0, "b": math.nan}, {"s": ["a", "b"]}, {"s": 1}, 1)
