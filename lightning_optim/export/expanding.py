"""Products of stored integers and their scales, which engines compute once, when they load a file.

The exporter computes products of small constants itself, and would write floats in place of the integers. So it sees an
operator that it does not know; when it is done, a Cast and a Mul take its place.
"""

from typing import Any

from lightning_optim.export.packed import schema

__all__ = ["translation", "write_out"]

_DOMAIN, _NAME = "lightning_optim", "Expand"
_SCALES = ["tensor(float)", "tensor(float16)"]


def translation() -> Any:
    """Return what the custom operator is until the exporter is done."""
    from onnxscript import values

    constraints = [("T1", ["tensor(float)"], ""), ("T2", ["tensor(int8)"], ""), ("T3", _SCALES, "")]
    definition = schema(_NAME, _DOMAIN, {"integers": "T2", "scale": "T3"}, constraints)
    operator = values.Op(values.Opset(_DOMAIN, 1), _NAME, definition)

    def expand(integers: Any, scale: Any) -> Any:
        return operator(integers, scale)

    return expand


def write_out(model: Any) -> None:
    """Replace the operators of :func:`translation` in an ``onnx_ir.Model``, in place."""
    import onnx_ir
    from onnx_ir import DataType, Node

    def reshaped(scale: Any, dimensions: int) -> Any:
        """Return a constant with as many dimensions as the integers; one that is there already (a table's) is used."""
        array = scale.const_value.numpy()
        array = array.reshape(*array.shape, *[1] * (dimensions - array.ndim))
        for value in model.graph.initializers.values():
            held = value.const_value
            alike = held is not None and held.dtype == scale.const_value.dtype and tuple(held.shape) == array.shape
            if alike and (held.numpy() == array).all():
                return value
        name = f"{scale.name}_of_{dimensions}"
        model.graph.register_initializer(
            onnx_ir.Value(
                name=name,
                const_value=onnx_ir.Tensor(array, name=name),
                shape=onnx_ir.Shape(array.shape),
                type=onnx_ir.TensorType(scale.const_value.dtype),
            )
        )
        return model.graph.initializers[name]

    def as_float(value: Any, before: Any) -> Any:
        dtype = value.dtype if value.const_value is None else value.const_value.dtype
        if dtype == DataType.FLOAT:
            return value
        cast = Node("", "Cast", [value], [onnx_ir.AttrInt64("to", DataType.FLOAT)])
        before.graph.insert_before(before, cast)
        return cast.outputs[0]

    for node in [node for node in model.graph.all_nodes() if node.domain == _DOMAIN]:
        integers, scale = node.inputs[0], reshaped(node.inputs[1], len(node.inputs[0].shape))
        product = Node("", "Mul", [as_float(integers, node), as_float(scale, node)])
        product.outputs[0].name, product.outputs[0].type = node.outputs[0].name, node.outputs[0].type
        product.outputs[0].shape = node.outputs[0].shape
        node.graph.insert_before(node, product)
        node.outputs[0].replace_all_uses_with(product.outputs[0])
        node.graph.remove(node, safe=True)
    model.opset_imports.pop(_DOMAIN, None)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
