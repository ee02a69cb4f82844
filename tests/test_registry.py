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
