"""Masks: exact counts, nesting, every granularity, packing and applying."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from helpers.shards import on_ranks, sharded
from lightning_optim.functional.criteria import CRITERIA, Statistics, parameter_generator, scores_of
from lightning_optim.functional.masks import (
    apply_masks,
    global_masks,
    keep_bits,
    pack_mask,
    parse_granularity,
    sparsity_of,
    unpack_mask,
)
from lightning_optim.functional.thresholds import Shards

INF, NAN = float("inf"), float("nan")
GRANULARITIES = ["weight", "row", "column", "2x3", "4x4", "1x8", "2:4", "1:3", "3:8", "2:4@unfold"]
UNITS = ["row", "column", "2x3", "4x4"]
SPARSITIES = st.floats(0, 0.99)


def some_scores(seed, kinds=None):
    """Two layers of awkward sizes; with ``kinds`` scores take so many values only, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"linear": (5, 7), "conv": (3, 2, 3, 3)}
    if kinds:
        return {name: torch.randint(0, kinds, shape, generator=generator).float() for name, shape in shapes.items()}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def zeros(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


def number(scores):
    return sum(tensor.numel() for tensor in scores.values())


def contained(sparser, denser):
    return all(not (sparser[name] & ~denser[name]).any() for name in denser)


class TestEveryGranularity:
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @settings(deadline=None, derandomize=True, max_examples=20)
    @given(a=SPARSITIES, b=SPARSITIES, kinds=st.sampled_from([None, 1, 2, 5]))
    def test_masks_nest_as_sparsity_grows(self, granularity, a, b, kinds):
        scores = some_scores(1, kinds)
        denser, sparser = (global_masks(scores, s, granularity) for s in sorted((a, b)))
        assert contained(sparser, denser)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @settings(deadline=None, derandomize=True, max_examples=20)
    @given(a=SPARSITIES, b=SPARSITIES)
    def test_what_was_removed_stays_removed(self, granularity, a, b):
        previous = global_masks(some_scores(1), a, granularity)
        masks = global_masks(some_scores(2), b, granularity, previous=previous)
        assert contained(masks, previous)
        if granularity == "weight" and a <= b:
            assert zeros(masks) == zeros(global_masks(some_scores(2), b, granularity))
        if a > b and (zeros(previous) >= b * 89 or ":" in granularity):
            assert all(torch.equal(masks[name], previous[name]) for name in masks)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("kinds", [None, 1])
    def test_sparsity_zero_keeps_all(self, granularity, kinds):
        assert zeros(global_masks(some_scores(1, kinds), 0.0, granularity)) == 0

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_nan_raises_and_names_the_tensor(self, granularity):
        scores = some_scores(1)
        scores["conv"][1, 1, 0, 2] = NAN
        with pytest.raises(ValueError, match="'conv' contain NaN"):
            global_masks(scores, 0.5, granularity)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes_give_the_masks_of_their_values(self, granularity, dtype):
        scores = {name: tensor.to(dtype) for name, tensor in some_scores(3).items()}
        single = {name: tensor.float() for name, tensor in scores.items()}
        for sparsity in (0.25, 0.6):
            masks, expected = (global_masks(s, sparsity, granularity) for s in (scores, single))
            assert all(torch.equal(masks[name], expected[name]) for name in masks)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_lazy_scores_give_the_same_masks(self, granularity):
        weights = {name: tensor - 0.5 for name, tensor in some_scores(3).items()}
        lazy = {name: scores_of(CRITERIA["magnitude"], weight, Statistics()) for name, weight in weights.items()}
        masks = global_masks(lazy, 0.6, granularity)
        expected = global_masks({name: weight.abs() for name, weight in weights.items()}, 0.6, granularity)
        assert all(torch.equal(masks[name], expected[name]) for name in masks)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_memory_formats_do_not_matter_and_masks_are_contiguous(self, granularity):
        scores = {"conv": torch.rand(4, 6, 3, 3)}
        last = {"conv": scores["conv"].to(memory_format=torch.channels_last)}
        previous = global_masks(scores, 0.2, granularity)
        previous_last = {"conv": previous["conv"].to(memory_format=torch.channels_last)}
        mask = global_masks(last, 0.6, granularity, previous=previous_last)["conv"]
        assert mask.is_contiguous()
        assert torch.equal(mask, global_masks(scores, 0.6, granularity, previous=previous)["conv"])

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_nothing_given_is_changed(self, granularity):
        scores, previous = some_scores(1), global_masks(some_scores(2), 0.3, granularity)
        before = copy.deepcopy((scores, previous))
        masks = global_masks(scores, 0.3, granularity, previous=previous)
        for given_, kept in zip((scores, previous), before, strict=True):
            assert all(torch.equal(given_[name], kept[name]) for name in kept)
        assert all(masks[name].data_ptr() != previous[name].data_ptr() for name in masks)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_a_layer_without_a_previous_mask_was_dense(self, granularity):
        scores = some_scores(1)
        previous = {"linear": global_masks(scores, 0.4, granularity)["linear"]}
        full = previous | {"conv": torch.ones(3, 2, 3, 3, dtype=torch.bool)}
        masks, expected = (global_masks(scores, 0.5, granularity, previous=p) for p in (previous, full))
        assert all(torch.equal(masks[name], expected[name]) for name in masks)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("sparsity", [80, -0.1, 1.0, NAN])
    def test_what_is_no_sparsity_is_refused(self, granularity, sparsity):
        with pytest.raises(ValueError, match=r"`sparsity` must be a fraction in \[0, 1\), got .* For 80 % zeros pass"):
            global_masks(some_scores(1), sparsity, granularity)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_its_text_parses_back(self, granularity):
        parsed = parse_granularity(granularity)
        assert str(parsed) == granularity
        assert parse_granularity(str(parsed)) == parsed
        scores = some_scores(1)
        masks, expected = global_masks(scores, 0.5, parsed), global_masks(scores, 0.5, granularity)
        assert all(torch.equal(masks[name], expected[name]) for name in masks)


class TestWeights:
    @settings(deadline=None, derandomize=True)
    @given(k=st.integers(0, 88), kinds=st.sampled_from([None, 1, 2, 3]))
    def test_exactly_k_of_n_go(self, k, kinds):
        scores = some_scores(4, kinds)
        assert zeros(global_masks(scores, k / 89)) == k

    def test_round_half_up(self):
        """Of 10 weights 0.25 is 2.5, so 3; 0.24 is 2.4, so 2."""
        assert zeros(global_masks({"w": torch.rand(10)}, 0.25)) == 3
        assert zeros(global_masks({"w": torch.rand(10)}, 0.24)) == 2

    def test_ties_go_in_order(self):
        masks = global_masks({"a": torch.ones(2, 2), "b": torch.tensor([0.0, 1.0])}, 0.5)
        assert masks["a"].tolist() == [[False, False], [True, True]]
        assert masks["b"].tolist() == [False, True]

    def test_layers_compete_or_do_not(self):
        scores = {"low": torch.tensor([1.0, 2.0]), "high": torch.tensor([3.0, 4.0])}
        assert [m.tolist() for m in global_masks(scores, 0.5).values()] == [[False, False], [True, True]]
        alone = [global_masks({name: tensor}, 0.5)[name].tolist() for name, tensor in scores.items()]
        assert alone == [[False, True], [False, True]]

    def test_minus_infinity_among_the_kept_does_not_push_out_what_was_removed(self):
        scores = {"w": torch.tensor([-INF, 5.0, -INF, 1.0])}
        previous = {"w": torch.tensor([True, False, True, True])}
        masks = global_masks(scores, 0.5, previous=previous)
        assert masks["w"].tolist() == [False, False, True, True]

    def test_infinite_scores_of_removed_weights_stay_removed(self):
        masks = global_masks({"w": torch.tensor([INF, 1.0])}, 0.5, previous={"w": torch.tensor([False, True])})
        assert masks["w"].tolist() == [False, True]

    def test_shards_give_the_masks_of_the_whole(self):
        whole, previous = {"w": torch.rand(10, 3), "v": torch.rand(4)}, {"w": torch.rand(10, 3) > 0.2}
        parts = list(zip(sharded(whole, [0.3]), sharded(previous, [0.3]), strict=True))
        results = on_ranks(parts, lambda part, shards: global_masks(part[0], 0.5, previous=part[1], shards=shards))
        expected = global_masks(whole, 0.5, previous=previous)
        assert all(torch.equal(torch.cat([r[name] for r in results]), expected[name]) for name in whole)


class TestUnits:
    @pytest.mark.parametrize("granularity", UNITS)
    @settings(deadline=None, derandomize=True, max_examples=30)
    @given(sparsity=SPARSITIES, kinds=st.sampled_from([None, 1, 3]))
    def test_zeros_are_within_half_a_unit_of_asked(self, granularity, sparsity, kinds):
        scores = some_scores(5, kinds)
        largest = {"row": 18, "column": 27, "2x3": 6, "4x4": 16}[granularity]
        masks = global_masks(scores, sparsity, granularity)
        assert abs(zeros(masks) - sparsity * number(scores)) <= largest / 2

    def test_rows_by_hand(self):
        """Row means 2, 5 and, of a filter, 1: at a third of 12 weights the filter goes."""
        scores = {"linear": torch.tensor([[1.0, 3.0], [5.0, 5.0]]), "conv": torch.ones(2, 1, 2, 2)}
        scores["conv"][1] = 9.0
        masks = global_masks(scores, 1 / 3, "row")
        assert masks["linear"].all()
        assert masks["conv"].tolist() == [[[[False, False], [False, False]]], [[[True, True], [True, True]]]]
        assert global_masks(scores, 0.5, "row")["linear"].tolist() == [[False, False], [True, True]]

    def test_columns_by_hand(self):
        """Column means 2, 3 and, of input channels, 0.5 and 4."""
        scores = {"linear": torch.tensor([[1.0, 6.0], [3.0, 0.0]]), "conv": torch.full((1, 2, 1, 2), 0.5)}
        scores["conv"][:, 1] = 4.0
        masks = global_masks(scores, 0.5, "column")
        assert masks["linear"].tolist() == [[False, True], [False, True]]
        assert masks["conv"].tolist() == [[[[False, False]], [[True, True]]]]

    def test_blocks_at_ragged_edges_by_hand(self):
        """A 3x5 matrix in 2x2 blocks: the right and bottom ones are smaller, and their mean is of what is there."""
        scores = torch.tensor([[4.0, 4, 2, 2, 1], [4, 4, 2, 2, 1], [3, 3, 5, 5, 6]])
        by_zeros = {
            2: [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
            6: [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]],
            8: [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]],
            12: [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]],
            14: [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]],
        }
        for gone, mask in by_zeros.items():
            assert global_masks({"w": scores}, gone / 15, "2x2")["w"].int().tolist() == mask

    def test_blocks_of_a_convolution_lie_in_its_matrix(self):
        scores = torch.rand(4, 3, 3, 3)
        mask = global_masks({"w": scores}, 0.5, "2x9")["w"]
        matrix = global_masks({"w": scores.flatten(1)}, 0.5, "2x9")["w"]
        assert torch.equal(mask.flatten(1), matrix)
        # A block of 2x9 is here an input channel of two filters.
        assert all(mask[i : i + 2, c].unique().numel() == 1 for i in (0, 2) for c in range(3))

    @pytest.mark.parametrize("granularity", UNITS)
    def test_a_unit_goes_whole(self, granularity):
        masks = global_masks(some_scores(6), 0.5, granularity)
        assert 0 < zeros(masks) < 89
        granules = global_masks({name: m.float() for name, m in masks.items()}, 0.999999, granularity)
        assert zeros(granules) == 89
        again = global_masks({name: m.float() for name, m in masks.items()}, zeros(masks) / 89, granularity)
        assert all(torch.equal(again[name], masks[name]) for name in masks)

    def test_zeros_there_before_count(self):
        """A row that is half gone already brings the number of zeros nearer by its other half only."""
        scores = {"w": torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])}
        previous = {"w": torch.tensor([[False, True], [True, True], [True, True], [True, False]])}
        mask = global_masks(scores, 5 / 8, "row", previous=previous)["w"]
        assert mask.tolist() == [[False, False], [False, False], [True, True], [True, False]]

    def test_ties_between_units_go_in_order(self):
        assert global_masks({"w": torch.ones(4, 2)}, 0.5, "row")["w"][:, 0].tolist() == [False, False, True, True]

    def test_rows_of_a_vector_are_its_weights(self):
        assert global_masks({"b": torch.tensor([2.0, 1.0])}, 0.5, "row")["b"].tolist() == [True, False]

    @pytest.mark.parametrize("granularity", ["column", "4x4", "2:4"])
    def test_a_vector_has_no_columns(self, granularity):
        with pytest.raises(ValueError, match=r"'bias' of shape \(3,\)"):
            global_masks({"bias": torch.ones(3)}, 0.5, granularity)

    @pytest.mark.parametrize("granularity", UNITS)
    def test_shards_are_refused(self, granularity):
        with pytest.raises(ValueError, match=f"'{granularity}' needs whole tensors"):
            global_masks(some_scores(1), 0.5, granularity, shards=Shards(0, 1, lambda counts: counts))


class TestNofM:
    def test_2_of_4_by_hand(self):
        scores = {"w": torch.tensor([[1.0, 4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])}
        expected = {
            0.1: [1, 1, 1, 1, 1, 1, 1, 1],
            0.125: [0, 1, 1, 1, 0, 1, 1, 1],  # 0.5 of a weight rounds up
            0.374: [0, 1, 1, 1, 0, 1, 1, 1],
            0.5: [0, 1, 1, 0, 0, 0, 1, 1],
            0.9: [0, 1, 1, 0, 0, 0, 1, 1],  # never fewer than n
        }
        for sparsity, mask in expected.items():
            assert global_masks(scores, sparsity, "2:4")["w"].int().tolist() == [mask]

    @settings(deadline=None, derandomize=True, max_examples=40)
    @given(m=st.integers(2, 9), n=st.integers(1, 8), width=st.integers(1, 20), kinds=st.integers(1, 9), s=SPARSITIES)
    def test_each_group_keeps_what_a_sort_keeps(self, m, n, width, kinds, s):
        n = min(n, m - 1)
        generator = torch.Generator().manual_seed(width)
        scores = torch.randint(0, kinds, (3, width), generator=generator).float()
        mask = global_masks({"w": scores}, s, f"{n}:{m}")["w"]
        removed = min(int(s * m + 0.5), m - n)
        for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
            for start in range(0, width, m):
                group = row[start : start + m]
                gone = max(removed - (m - len(group)), 0)
                order = sorted(range(len(group)), key=lambda i, group=group: (group[i], i))
                assert sorted(i for i in range(len(group)) if not kept[start + i]) == sorted(order[:gone])

    def test_the_padded_group_keeps_n_or_what_it_has(self):
        mask = global_masks({"w": torch.rand(5, 11)}, 0.5, "2:4")["w"]
        assert mask.view(5, 11)[:, 8:].sum(1).tolist() == [2] * 5
        assert global_masks({"w": torch.rand(5, 9)}, 0.5, "2:4")["w"][:, 8:].all()

    def test_groups_of_a_convolution_run_in_the_order_of_unfold(self):
        """Weights that are applied to the first four entries of an unfolded patch are one group."""
        patch = torch.arange(18.0).view(1, 2, 3, 3)
        columns = torch.nn.functional.unfold(patch, 3).flatten()
        scores = torch.rand(4, 2, 3, 3)
        mask = global_masks({"w": scores}, 0.5, "2:4@unfold")["w"]
        order = columns.long()
        grouped = mask.flatten(1)[:, order][:, :16].reshape(4, 4, 4)
        assert (grouped.sum(2) == 2).all()

    @pytest.mark.parametrize("kernel", [(), (3,), (3, 3), (2, 3, 2)])
    def test_groups_of_a_convolution_run_along_its_input_channels(self, kernel):
        """As sparse tensor-core kernels read it: NHWC, each place of the kernel a matrix ``[out, in]``."""
        scores = torch.rand(5, 8, *kernel)
        mask = global_masks({"w": scores}, 0.5, "2:4")["w"]
        matrices = scores.flatten(2).unbind(-1) if kernel else [scores]
        for place, matrix in enumerate(matrices):
            alone = global_masks({"w": matrix.clone()}, 0.5, "2:4")["w"]
            assert (alone.view(5, 2, 4).sum(2) == 2).all()
            assert torch.equal(mask.flatten(2)[..., place] if kernel else mask, alone)

    def test_a_1x1_convolution_has_one_order(self):
        scores = {"w": torch.rand(6, 8, 1, 1), "v": torch.rand(6, 8)}
        left, right = (global_masks(scores, 0.5, granularity) for granularity in ("2:4", "2:4@unfold"))
        assert all(torch.equal(left[name], right[name]) for name in scores)

    def test_a_number_of_inputs_that_sparse_kernels_do_not_support_is_reported(self):
        assert "3 inputs, no multiple of 4" in str(parse_granularity("2:4").misfit(torch.Size([8, 3, 3, 3])))
        assert parse_granularity("2:4").misfit(torch.Size([8, 4, 3, 3])) is None
        assert parse_granularity("2:4@unfold").misfit(torch.Size([8, 3, 3, 3])) is None
        assert parse_granularity("row").misfit(torch.Size([8, 3])) is None

    def test_what_was_removed_from_a_kernel_counts_in_its_group(self):
        scores = {"w": torch.tensor([[9.0, 8.0, 1.0, 2.0]]).view(1, 4, 1).repeat(1, 1, 2)}
        previous = {"w": torch.tensor([[[False, True], [True, True], [True, True], [True, True]]])}
        mask = global_masks(scores, 0.5, "2:4", previous=previous)["w"]
        assert mask[0].T.int().tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_2_of_4_linear_survives_torchs_semi_structured_format(self, dtype):
        weight = torch.randn(64, 128).to(dtype)
        mask = global_masks({"w": weight.abs()}, 0.5, "2:4")["w"]
        apply_masks([weight], [keep_bits(mask, dtype)])
        sparse, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert sparse.shape == (64, 64)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(sparse, meta), weight)

    def test_scope_does_not_matter(self):
        scores = some_scores(7)
        together = global_masks(scores, 0.5, "2:4")
        for name, tensor in scores.items():
            assert torch.equal(global_masks({name: tensor}, 0.5, "2:4")[name], together[name])

    def test_row_shards_give_the_masks_of_the_whole(self):
        scores = {"w": torch.rand(6, 8)}
        parts = sharded(scores, [0.5])
        results = on_ranks(parts, lambda part, shards: global_masks(part, 0.5, "2:4", shards=shards))
        assert torch.equal(torch.cat([r["w"] for r in results]), global_masks(scores, 0.5, "2:4")["w"])

    def test_what_was_removed_leaves_room_for_fewer(self):
        scores = {"w": torch.tensor([[9.0, 8.0, 1.0, 2.0]])}
        previous = {"w": torch.tensor([[False, True, True, True]])}
        assert global_masks(scores, 0.5, "2:4", previous=previous)["w"].int().tolist() == [[0, 1, 0, 1]]

    def test_many_rows_are_done_in_parts(self, monkeypatch):
        scores = {"w": torch.rand(50, 6)}
        expected = global_masks(scores, 0.5, "2:4")["w"]
        monkeypatch.setattr("lightning_optim.functional.granularity._GROUPED_AT_ONCE", 40)
        assert torch.equal(global_masks(scores, 0.5, "2:4")["w"], expected)

    @pytest.mark.parametrize(
        ("granularity", "final"), [("2:4", 0.5), ("1:4@unfold", 0.75), ("weight", None), ("4x4", None)]
    )
    def test_the_sparsity_that_the_granularity_fixes(self, granularity, final):
        assert parse_granularity(granularity).final_sparsity == final


@pytest.mark.parametrize(
    "text", ["2:5:1", "foo", "", "2:", "4x", "-1x4", "2.5:4", "Weight", "weights", "2:4 ", "2:4@", "2:4@channels"]
)
def test_a_granularity_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="`granularity` must be 'weight', 'row', 'column', 'RxC' such as"):
        parse_granularity(text)


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "0:0"])
def test_n_must_be_less_than_m(text):
    with pytest.raises(ValueError, match=f"1 <= n < m, got '{text}'"):
        parse_granularity(text)


@pytest.mark.parametrize("text", ["0x4", "4x0"])
def test_a_block_must_have_a_size(text):
    with pytest.raises(ValueError, match=f"at least one row and one column, got '{text}'"):
        parse_granularity(text)


def test_previous_masks_must_fit():
    for mask in (torch.ones(3, 2, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"previous mask of 'w' must be bool of the shape \(2, 3\)"):
            global_masks({"w": torch.ones(2, 3)}, 0.5, previous={"w": mask})


def test_integer_scores_raise():
    with pytest.raises(TypeError, match="'w' must be floating point"):
        global_masks({"w": torch.ones(2, 3, dtype=torch.int32)}, 0.5)


def test_no_scores_raise():
    with pytest.raises(ValueError, match="no scores"):
        global_masks({}, 0.5)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_reaches_the_sparsity(name):
    weights = {"a": torch.randn(6, 8), "b": torch.randn(4, 6)}
    scores = {}
    for key, weight in weights.items():
        inputs = torch.rand(weight.shape[1])
        stats = Statistics(gradient=weight, input_norm=inputs, generator=parameter_generator(key))
        scores[key] = scores_of(CRITERIA[name], weight, stats)
    assert zeros(global_masks(scores, 0.75)) == 54


class TestPacking:
    @pytest.mark.parametrize("length", range(18))
    def test_every_length_comes_back(self, length):
        mask = torch.rand(length) < 0.5
        packed = pack_mask(mask)
        assert packed.dtype == torch.uint8
        assert packed.shape == (-(-length // 8),)
        assert torch.equal(unpack_mask(packed, mask.shape), mask)

    def test_shapes_and_memory_formats_come_back(self):
        mask = (torch.rand(3, 5, 2, 2) < 0.5).to(memory_format=torch.channels_last)
        assert torch.equal(unpack_mask(pack_mask(mask), (3, 5, 2, 2)), mask)
        scalar = torch.tensor(True)
        assert torch.equal(unpack_mask(pack_mask(scalar), ()), scalar)

    def test_the_first_weight_is_the_lowest_bit(self):
        mask = torch.tensor([True, False, False, True] + [False] * 4 + [True])
        assert pack_mask(mask).tolist() == [9, 1]

    def test_an_unpacked_mask_can_be_written(self):
        mask = unpack_mask(pack_mask(torch.ones(9, dtype=torch.bool)), (3, 3))
        mask[0] = False
        assert mask.sum() == 6

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match=r"shape \(4, 5\) is packed in 3 bytes"):
            unpack_mask(torch.zeros(2, dtype=torch.uint8), (4, 5))
        with pytest.raises(TypeError, match="must be bool"):
            pack_mask(torch.ones(3))


class TestApplying:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_removed_weights_become_zero_whatever_they_were(self, dtype):
        weight = torch.tensor([1.5, -2.0, NAN, INF, -INF, -0.0, NAN, -3.0], dtype=dtype)
        mask = torch.tensor([True, True, False, False, False, False, False, False])
        apply_masks([weight], [keep_bits(mask, dtype)])
        assert weight.tolist() == [1.5, -2.0, 0, 0, 0, 0, 0, 0]
        assert not weight.signbit()[2:].any()

    def test_kept_weights_keep_every_bit(self):
        bits = torch.randint(-(2**31), 2**31, (1000,), dtype=torch.int64).to(torch.int32)
        weight = bits.view(torch.float32).clone()
        apply_masks([weight], [keep_bits(torch.ones(1000, dtype=torch.bool), torch.float32)])
        assert torch.equal(weight.view(torch.int32), bits)

    @pytest.mark.parametrize("make", [lambda w: w.to(memory_format=torch.channels_last), lambda w: w.transpose(0, 1)])
    def test_memory_formats(self, make):
        weight = make(torch.randn(4, 4, 3, 3))
        mask = torch.rand(weight.shape) < 0.5
        expected = torch.where(mask, weight, 0.0)
        strides = weight.stride()
        apply_masks([weight], [keep_bits(mask, weight.dtype)])
        assert torch.equal(weight, expected)
        assert weight.stride() == strides

    def test_autograd_and_the_optimizer_go_on(self):
        layer = torch.nn.Linear(6, 4)
        mask = torch.rand(4, 6) < 0.5
        keep = keep_bits(mask, layer.weight.dtype)
        optimizer = torch.optim.Adam(layer.parameters())
        parameter = layer.weight
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(8, 6)).square().sum().backward()
            optimizer.step()
            apply_masks([layer.weight], [keep])
            assert layer.weight is parameter
            assert layer.weight.requires_grad
            assert layer.weight.is_leaf
            assert not layer.weight[~mask].any()
            assert layer.weight[mask].all()

    def test_changing_a_weight_that_a_graph_still_needs_is_noticed(self):
        """Autograd's own check works: the change counts as one."""
        weight = torch.randn(3, 3, requires_grad=True)
        result = (weight * weight).sum()
        apply_masks([weight], [keep_bits(torch.ones(3, 3, dtype=torch.bool), weight.dtype)])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_keep_bits_are_all_ones_or_none(self, dtype):
        keep = keep_bits(torch.tensor([True, False]), dtype)
        assert keep.itemsize == dtype.itemsize
        assert keep.tolist() == [-1, 0]

    def test_keep_bits_rejects_other_tensors_than_masks_and_float_dtypes(self):
        with pytest.raises(TypeError, match="must be bool"):
            keep_bits(torch.ones(3), torch.float32)
        for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn):
            with pytest.raises(TypeError, match="masks apply to float16"):
                keep_bits(torch.ones(3, dtype=torch.bool), dtype)

    def test_every_weight_needs_its_mask(self):
        with pytest.raises(ValueError, match="argument 2 is shorter"):
            apply_masks([torch.ones(2)], [])


def test_sparsity_of_all_masks_together():
    masks = [torch.tensor([True, False]), torch.tensor([True] * 6)]
    with pytest.warns(FutureWarning, match="removed in 0.4"):
        assert sparsity_of(masks) == 0.125
    with pytest.warns(FutureWarning, match="removed in 0.4"):
        assert sparsity_of([]) == 0.0
