"""A file called like the module it was made from."""

import pytest
import torch
from torch import nn

from lightning_optim import export_onnx
from lightning_optim.export.session import ExportedModel


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, left, right):
        return self.layer(left), left - right


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("files") / "two.onnx"
    net = Two().eval()
    export_onnx(net, path, (torch.randn(2, 3), torch.randn(2, 3)))
    return net, path


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_arguments_by_place_and_by_name(pair, runtime):
    pytest.importorskip(runtime)
    net, path = pair
    file = ExportedModel(path, runtime)
    left, right = torch.randn(5, 3), torch.randn(5, 3)
    with torch.no_grad():
        expected = net(left, right)
    for got in (file(left, right), file(right=right, left=left), file(left.double(), right=right)):
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(expected, got, strict=True))


def test_a_call_with_other_inputs_raises_with_the_names_of_the_inputs(pair):
    file = ExportedModel(pair[1])
    x = torch.zeros(1, 3)
    for args, words in (((x,), {}), ((x, x, x), {}), ((x,), {"third": x})):
        with pytest.raises(TypeError, match="the file's inputs are left, right, and the call passes"):
            file(*args, **words)
    with pytest.raises(ValueError, match="unknown runtime 'tensorrt'"):
        ExportedModel(pair[1], "tensorrt")
