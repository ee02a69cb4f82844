"""The GPTQ layout, against a reader written from its description, number by number."""

import numpy as np
import pytest
import torch

from lightning_optim.functional.gptq import pack_gptq, unpack_gptq


def read(packed):
    """Decode a packed matrix as ``qlinear`` kernels do: bit by bit, with one added to the stored zero points."""
    qweight, qzeros = (packed[name].numpy().view(np.uint32) for name in ("qweight", "qzeros"))
    scales, groups = packed["scales"].float().numpy(), packed["g_idx"].numpy()
    inputs, outputs = qweight.shape[0] * 8, qweight.shape[1]
    weight = np.zeros((outputs, inputs), np.float32)
    for o in range(outputs):
        for i in range(inputs):
            q = (int(qweight[i // 8, o]) >> (4 * (i % 8))) & 15
            z = (int(qzeros[groups[i], o // 8]) >> (4 * (o % 8))) & 15
            weight[o, i] = scales[groups[i], o] * (q - (z + 1))
    return torch.from_numpy(weight)


def test_every_integer_is_read_as_it_was():
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-8, 8, (16, 64), generator=generator)
    scales = torch.rand(16, 2, generator=generator) + 0.1
    packed = pack_gptq(integers, scales)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.items()} == {
        "qweight": ((8, 16), torch.int32),
        "qzeros": ((2, 2), torch.int32),
        "scales": ((2, 16), torch.float16),
        "g_idx": ((64,), torch.int32),
    }
    expected = integers * scales.half().float().repeat_interleave(32, 1)
    assert torch.equal(read(packed), expected)
    assert torch.equal(unpack_gptq(packed), expected)


def test_zero_points_are_stored_less_one():
    """auto-gptq wrote ``zeros - 1``; vLLM and gptqmodel add one to what a "gptq" file holds."""
    packed = pack_gptq(torch.zeros(8, 8), torch.ones(8, 1))
    assert packed["qzeros"].tolist() == [[0x77777777]]
    assert packed["qweight"][0].tolist() == [0x88888888 - 2**32] * 8


def test_a_group_of_zeros_has_a_scale():
    integers, scales = torch.ones(8, 16), torch.full((8, 2), 0.5)
    integers[3, 8:] = 0
    scales[3, 1] = 1e-12
    packed = pack_gptq(integers, scales)
    assert torch.equal(unpack_gptq(packed), integers * 0.5)


@pytest.mark.parametrize(
    ("integers", "scales", "message"),
    [
        (torch.zeros(8, 12), torch.ones(8, 1), "must be multiples of 8"),
        (torch.zeros(6, 16), torch.ones(6, 1), "6 outputs and 16 inputs must be multiples of 8"),
        (torch.full((8, 8), 8), torch.ones(8, 1), "integers must be from -8 to 7"),
        (torch.ones(8, 8), torch.full((8, 1), 1e-7), "do not fit into float16"),
        (torch.zeros(8, 16), torch.ones(8, 3), "has no place in the GPTQ layout"),
    ],
)
def test_what_has_no_place_is_refused(integers, scales, message):
    with pytest.raises(ValueError, match=message):
        pack_gptq(integers, scales)
