import pytest

from lightning_optim.registry import Registry


@pytest.fixture
def registry():
    registry = Registry("shape")

    @registry.register("square", needs=("side",))
    def square(side):
        return side * side

    return registry


def test_a_registered_name_and_a_callable_resolve(registry):
    assert registry.resolve("square")(3) == 9
    assert registry.resolve(abs) is abs
    assert registry["square"].needs == ("side",)
    assert list(registry) == ["square"]
    assert len(registry) == 1


def test_an_unknown_name_lists_the_known_ones(registry):
    with pytest.raises(ValueError, match="unknown shape 'circle'; known: square"):
        registry.resolve("circle")


def test_a_taken_name_raises(registry):
    with pytest.raises(ValueError, match="already registered"):
        registry.register("square")


def test_neither_name_nor_callable_raises(registry):
    with pytest.raises(TypeError, match="registered name"):
        registry.resolve(3)


def test_a_name_with_arguments(registry):
    @registry.register("box", needs=("side",))
    def box(side, *, height=1, depth=1):
        return side * height * depth

    made = registry.resolve({"box": {"height": 2, "depth": 3}})
    assert made(5) == 30
    assert made.needs == ("side",)
    assert registry.resolve({"box": {}})(5) == 5
    with pytest.raises(ValueError, match="shape 'box' has no argument 'side'; known: height, depth"):
        registry.resolve({"box": {"side": 2}})
    with pytest.raises(ValueError, match="shape 'square' has no argument 'height'; known: none"):
        registry.resolve({"square": {"height": 2}})
    with pytest.raises(ValueError, match="unknown shape 'circle'"):
        registry.resolve({"circle": {}})


@pytest.mark.parametrize("wanted", [{}, {"square": 3}, {3: {}}, {"square": {}, "box": {}}], ids=str)
def test_a_mapping_that_is_no_name_with_arguments(registry, wanted):
    with pytest.raises(TypeError, match="a shape with arguments is"):
        registry.resolve(wanted)


def test_arguments_are_tried_at_once():
    registry = Registry("shape", trial=lambda function: function(1))

    @registry.register("box")
    def box(side, *, height=1):
        if height < 0:
            raise ValueError("`height` must not be negative.")
        return side * height

    with pytest.raises(ValueError, match="`height` must not be negative"):
        registry.resolve({"box": {"height": -1}})
