from lightning_optim.tables import by_reason, by_stack


def test_equal_rows_of_a_stack_are_one():
    rows = [(f"model.layers.{block}.{leaf}", "Linear") for block in range(30) for leaf in ("up", "down")]
    rows.insert(0, ("model.table", "Embedding"))
    assert by_stack(rows) == [
        ("model.table", "Embedding"),
        ("model.layers.0-29.up", "Linear"),
        ("model.layers.0-29.down", "Linear"),
    ]


def test_a_block_that_differs_has_a_row_of_its_own():
    rows = [(f"blocks.{block}", "4" if block == 3 else "8") for block in range(8)]
    assert by_stack(rows) == [("blocks.0-2", "8"), ("blocks.3", "4"), ("blocks.4-7", "8")]


def test_experts_of_blocks_are_gathered_over_both_numbers():
    rows = [(f"layers.{block}.experts.{expert}.up", "8") for block in range(4) for expert in range(3)]
    assert by_stack(rows) == [("layers.0-3.experts.0-2.up", "8")]


def test_names_of_the_same_block_in_other_cells_count_as_equal():
    rows = [(f"h.{block}.up", f"h.{block}.gate, h.{block}.down") for block in range(11)]
    assert by_stack(rows) == [("h.0-10.up", "h.0-10.gate, h.0-10.down")]
    rows = [(f"h.{block}.up", f"h.{block + 1}.down") for block in range(4)]  # another block's
    assert by_stack(rows) == rows


def test_two_equal_rows_stay_two():
    assert by_stack([("net.0", "8"), ("net.1", "8")]) == [("net.0", "8"), ("net.1", "8")]
    assert by_stack([]) == []


def test_reasons_gather_stacks_too():
    left_out = {f"blocks.{block}.norm": "a norm" for block in range(12)} | {"norm": "a norm"}
    assert by_reason(left_out) == [("blocks.0-11.norm, norm", "a norm")]
