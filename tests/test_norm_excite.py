"""The serving form's BatchNorm of a concatenation, and its squeeze-excite, at every level of SIMD."""

import pytest
import torch

from mfp import backend, layer_ops, reference
from mfp.reference import ACTIVATIONS

CL = torch.channels_last
pytestmark = [
    pytest.mark.usefixtures("three_threads"),
    pytest.mark.skipif(backend.backends()["cpu"].unusable is not None, reason="mfp._C is not built"),
]


@pytest.mark.parametrize("channels", [[1], [16], [3, 4, 0, 9], [16, 40, 7], [33]])
def test_batch_norm(isa, channels):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, count, 5, 7, generator=generator) for count in channels]
    inputs[1:] = [x.contiguous(memory_format=CL) for x in inputs[1:]]
    scale, shift = torch.randn(2, sum(channels), generator=generator)
    for activation in ACTIVATIONS:
        right = reference.batch_norm([x.double() for x in inputs], scale.double(), shift.double(), activation)
        actual = layer_ops.batch_norm(inputs, scale, shift, activation)
        assert actual.is_contiguous(memory_format=CL)
        assert (actual - right).abs().max() < 1e-6 * right.abs().max()
        each = [layer_ops.batch_norm([x[i : i + 1] for x in inputs], scale, shift, activation) for i in range(3)]
        assert torch.equal(torch.cat(each), actual)
    assert layer_ops.batch_norm([x[:0] for x in inputs], scale, shift).shape == (0, sum(channels), 5, 7)
    torch.library.opcheck(torch.ops.mfp.batch_norm.default, (inputs, scale, shift, "relu"))


@pytest.mark.parametrize(("change", "message"), [
    ({"inputs": []}, "no inputs"),
    ({"inputs": [torch.zeros(1, 2, 3)]}, "expected float32"),
    ({"inputs": [torch.zeros(1, 2, 3, 3), torch.zeros(2, 2, 3, 3)]}, "the first one"),
    ({"inputs": [torch.zeros(1, 4, 3, 3, dtype=torch.float64)]}, "expected float32"),
    ({"scale": torch.ones(3)}, "scale or shift is"),
    ({"shift": torch.ones(4, dtype=torch.float64)}, "scale or shift is"),
])  # fmt: skip
def test_wrong_arguments_of_batch_norm_are_refused(change, message):
    given = {"inputs": [torch.zeros(1, 4, 3, 3)], "scale": torch.ones(4), "shift": torch.ones(4), "activation": "none"}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mfp.batch_norm(**{**given, **change})


@pytest.mark.parametrize(("activation", "hard"), [("silu", False), ("relu", True)])
@pytest.mark.parametrize(("shape", "hidden"), [
    ((1, 5, 3, 4), 3), ((2, 70, 11, 13), 9), ((5, 16, 1, 1), 16), ((4, 33, 8, 8), 1), ((1, 129, 9, 7), 33),
])  # fmt: skip
def test_squeeze_excite(isa, shape, hidden, activation, hard):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=CL)
    layers = [
        torch.randn(size, generator=generator) for size in ((hidden, shape[1]), hidden, (hidden, shape[1]), shape[1])
    ]
    right, actual = x.double(), x.clone()
    reference.squeeze_excite_(right, *(layer.double() for layer in layers), activation, hard)
    layer_ops.squeeze_excite_(actual, *layers, activation, hard)
    assert (actual - right).abs().max() < 2e-6 * right.abs().max()
    for image in range(len(x)):  # alone an image is cut into parts for the threads
        alone = x[image : image + 1].clone()
        layer_ops.squeeze_excite_(alone, *layers, activation, hard)
        assert torch.equal(alone, actual[image : image + 1])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            again = x.clone()
            layer_ops.squeeze_excite_(again, *layers, activation, hard)
            assert torch.equal(again, actual)
    finally:
        torch.set_num_threads(before)
    layer_ops.squeeze_excite_(x[:0], *layers, activation, hard)


@pytest.mark.parametrize(("change", "message"), [
    ({"input": torch.zeros(1, 4, 3, 3)}, "expected channels_last"),
    ({"input": torch.zeros(1, 4, 3)}, "input is"),
    ({"reduce_weight": torch.ones(2, 5)}, "reduce_weight is"),
    ({"reduce_bias": torch.ones(3)}, "reduce_weight is"),
    ({"expand_weight": torch.ones(4, 2).T}, "expand_weight is"),
    ({"expand_bias": torch.ones(4).double()}, "expand_bias is"),
])  # fmt: skip
def test_wrong_arguments_of_squeeze_excite_are_refused(change, message):
    given = {
        "input": torch.zeros(1, 4, 3, 3).contiguous(memory_format=CL), "reduce_weight": torch.ones(2, 4),
        "reduce_bias": torch.ones(2), "expand_weight": torch.ones(2, 4), "expand_bias": torch.ones(4),
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        layer_ops.squeeze_excite_(**{**given, **change})
