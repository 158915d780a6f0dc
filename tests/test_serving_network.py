"""The replayed serving form: the same bits as its graph, whatever is called how often, by whom, after which changes."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import torchvision
from compact_cases import difference, masked
from torch import nn

import mfp
from mfp import backend
from mfp.serving import network as serving_network

pytestmark = pytest.mark.skipif(backend.backends()["cpu"].unusable is not None, reason="mfp._C is not built")


def images(batch=2, size=32, channels=3, seed=1):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def tapes(serving):
    """How many sizes are replayed; the calls before the replay are made here."""
    found = serving_network._tapes[serving].replays.all()
    return sum(isinstance(recording, serving_network.Recording) for recording in found)


def check(serving, x, expected_tapes=1):
    """Calls with other numbers each, of which the last ones are replayed, against the graph; the result for x."""
    with torch.no_grad():
        given = [x.roll(i, 3) for i in range(6)]
        copies = [y.clone() for y in given]
        expected = [serving.forward(y) for y in given]
        results = [serving(y) for y in given]
        assert all(map(torch.equal, results, expected))
        assert all(map(torch.equal, given, copies))
    assert tapes(serving) == expected_tapes
    return expected[0]


class Mixed(nn.Module):
    """Squeeze-excite, pooling, groups, a shuffle, a table, several activations and a constant result."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.depthwise = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 24, 5, padding=2, groups=24)
        self.down, self.up = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)
        self.grouped, self.last = nn.Conv2d(24, 48, 3, groups=4, padding=1), nn.Linear(48, 5)
        self.register_buffer("shift", torch.randn(24, 1, 1))

    def forward(self, x):
        x = F.hardswish(self.stem(x)) + self.shift
        x = F.silu(self.depthwise(x))
        x = x * self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        left, right = x.chunk(2, 1)
        x = torch.cat([right, F.max_pool2d(left, 3, 1, 1)], 1)
        x = F.relu(self.grouped(x))
        return {"logits": self.last(x.mean((2, 3))), "maps": [x, x.shape[2]]}


def resnet(**plan):
    torch.manual_seed(0)
    return masked(torchvision.models.resnet18(num_classes=10), **plan)


@pytest.mark.parametrize("make", [
    resnet,
    lambda: masked(torchvision.models.mobilenet_v2(num_classes=10)),
    lambda: masked(torchvision.models.shufflenet_v2_x0_5(num_classes=10), mask_bn=False),  # borders
    lambda: masked(torchvision.models.regnet_y_400mf(num_classes=10)),
    lambda: masked(torchvision.models.densenet.DenseNet(16, (2, 2), 32, num_classes=10)),
], ids=["resnet", "mobilenet", "shufflenet", "regnet", "densenet"])  # fmt: skip
def test_replayed_networks_have_the_bits_of_the_graph(make):
    torch.manual_seed(0)
    serving = mfp.compact(make(), images(), fold_bn=True)
    results = {check(serving, images(batch, size), i + 1).shape for i, (batch, size) in enumerate([(2, 32), (1, 40)])}
    assert results == {(2, 10), (1, 10)}


def test_structures_and_operators_of_all_kinds():
    model = Mixed().eval()
    serving = mfp.compact(model, images(), fold_bn=True)
    with torch.inference_mode():
        expected = serving.forward(images())
        for _ in range(3):
            result = serving(images())
            assert result["maps"][1] == 16
            assert torch.equal(result["logits"], expected["logits"])
            assert torch.equal(result["maps"][0], expected["maps"][0])
        assert tapes(serving) == 1
        for seed in range(2, 5):
            other, right = serving(images(seed=seed)), serving.forward(images(seed=seed))
            assert torch.equal(other["logits"], right["logits"])
            assert torch.equal(other["maps"][0], right["maps"][0])
        assert difference(model(images(seed=4))["logits"], other["logits"]) < 1e-5
        assert torch.equal(result["maps"][0], expected["maps"][0]), "a result was overwritten by the next call"


def test_memory_that_is_used_again_is_nobodys_result():
    """Results stay what they are, their network gone and others freed."""
    serving = mfp.compact(Mixed().eval(), images(size=128), fold_bn=True)
    given = [images(size=128, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [serving.forward(x)["maps"][0] for x in given]
        for _ in range(3):
            serving(given[0])
        results = [serving(x)["maps"][0] for x in given]
        serving(given[0])
    assert tapes(serving) == 1
    assert all(map(torch.equal, results, expected))
    del serving
    gc.collect()
    results[0].resize_(4, *results[0].shape[1:]).fill_(0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(results.pop).result()
    assert all(map(torch.equal, results[1:], expected[1:]))


def test_changed_parameters_modes_and_switches(monkeypatch):
    serving = mfp.compact(resnet(), images(), fold_bn=True)
    first = check(serving, images())
    with torch.no_grad():
        serving.fc.bias.add_(1)
    assert difference(check(serving, images()), first + 1) < 1e-5
    serving.fc.bias = nn.Parameter(serving.fc.bias.detach() - 1)
    assert difference(check(serving, images()), first) < 1e-5
    serving.fc = copy.deepcopy(serving.fc)
    serving.fc.weight.data = 2 * serving.fc.weight.data
    serving.fc.bias.data = 2 * serving.fc.bias.data
    assert difference(check(serving, images()), 2 * first) < 1e-5
    monkeypatch.setenv("MFP_WINOGRAD", "0")
    assert difference(check(serving, images()), 2 * first) < 1e-4
    double, x = serving.double(), images().double()
    assert difference(check(double, x), 2 * first.double()) < 1e-4


def test_trained_further_after_the_first_calls():
    serving = mfp.compact(resnet(), images(), fold_bn=True)
    before = check(serving, images())
    optimizer = torch.optim.SGD(serving.parameters(), lr=0.01)
    serving(images()).square().sum().backward()
    optimizer.step()
    after = check(serving, images())
    assert not torch.equal(before, after)
    with torch.enable_grad():
        assert difference(serving(images()).detach(), after) < 1e-5


def test_many_threads_and_sizes_at_once():
    serving = mfp.compact(resnet(), images(), fold_bn=True)
    given = [images(batch, size) for batch in (1, 2, 3) for size in (32, 33, 40, 48)]
    with torch.no_grad():
        expected = [serving.forward(x) for x in given]

    def call(number):
        with torch.no_grad():
            return torch.equal(serving(given[number % len(given)]), expected[number % len(given)])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(6 * len(given))))
        assert all(pool.map(call, 60 * [5]))
    assert len(serving_network._tapes[serving].replays.all()) == 8  # sizes of inputs, those used last


def test_weights_that_change_while_a_tape_is_made_are_not_replayed(monkeypatch):
    """As when another thread loads new ones."""
    serving = mfp.compact(resnet(), images(), fold_bn=True)
    record = serving_network.record

    def record_and_change(*arguments):
        result = record(*arguments)
        for parameter in serving.parameters():
            parameter.mul_(2)
        return result

    with torch.no_grad():
        serving(images())
        monkeypatch.setattr(serving_network, "record", record_and_change)
        serving(images())
        monkeypatch.undo()
        for _ in range(3):
            assert torch.equal(serving(images()), serving.forward(images()))
    assert tapes(serving) == 1


def test_copies_and_files_are_replayed_too(tmp_path):
    serving = mfp.compact(resnet(), images(), fold_bn=True)
    expected = check(serving, images())
    assert torch.equal(check(copy.deepcopy(serving), images()), expected)
    mfp.save(serving, tmp_path / "small.mfp")
    assert torch.equal(check(mfp.load(tmp_path / "small.mfp"), images()), expected)


class DataDecides(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return F.relu(self.conv(x)).nonzero()


class Own(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_what_must_not_be_replayed_is_not():
    serving = mfp.compact(resnet(), images(), fold_bn=True)
    serving.own, calls = Own(), []
    check(serving, images(), 0)
    del serving.own
    hook = serving.fc.register_forward_hook(lambda *call: calls.append(call))
    with torch.no_grad():
        for _ in range(4):
            serving(images())
    assert len(calls) == 4
    hook.remove()
    expected = check(serving, images())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert serving(images()).dtype == torch.bfloat16
    assert serving(images()).requires_grad
    assert difference(expected, serving(images()).detach()) < 1e-5


def test_under_vmap_plain_operators_run():
    serving = mfp.compact(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), images(), fold_bn=True)
    expected = check(serving, images())
    with torch.no_grad():
        mapped = torch.func.vmap(lambda x: serving(x[None])[0])(images())
    assert difference(mapped, expected) < 1e-5


def test_an_operator_whose_result_decides_is_not_replayed():
    serving = mfp.compact(DataDecides().eval(), images(), fold_bn=True)
    with torch.no_grad():
        for seed in range(4):
            assert torch.equal(serving(images(seed=seed)), serving.forward(images(seed=seed)))


class Passes(nn.Module):
    """Returns its input, a view of it, what lies in the middle and is added to afterwards, and the end."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))

    def forward(self, x):
        start = F.relu(self.first(x))
        middle = start + self.second(start)
        return x, x.flatten(1), middle, middle.mean((2, 3)), self.third(F.max_pool2d(middle, 2)) + 1


def test_what_is_passed_in_and_out_is_no_memory_of_the_network():
    serving = mfp.compact(Passes().eval(), images(channels=16), fold_bn=True)
    given = [images(channels=16, seed=seed) for seed in range(7)]
    with torch.inference_mode():
        expected = [serving.forward(x) for x in given]
        results = [serving(x) for x in given]
    assert tapes(serving) == 1
    for x, result, right in zip(given, results, expected, strict=True):
        assert result[0] is x and result[1].data_ptr() == x.data_ptr()
        assert all(map(torch.equal, result, right))
    addresses = {part.data_ptr() for result in results for part in result[2:]}
    assert len(addresses) == 3 * len(results)


def test_other_threads_and_instruction_sets_between_two_calls(monkeypatch):
    serving = mfp.compact(Mixed().eval(), images(), fold_bn=True)
    threads = torch.get_num_threads()
    try:
        with torch.inference_mode():
            for isa in ("", "portable", ""):
                monkeypatch.setenv("MFP_CPU_ISA", isa)
                expected = serving.forward(images())["maps"][0]
                for count in (1, 3, 2, 3):
                    torch.set_num_threads(count)
                    for _ in range(3):
                        assert torch.equal(serving(images())["maps"][0], expected)
    finally:
        torch.set_num_threads(threads)
    assert tapes(serving) == 1


def test_an_operator_that_asks_for_memory_without_a_tensor():
    """As oneDNN does, for what its convolutions need beside."""
    from mfp import _C

    x, weight = images(1, 16, 1), torch.randn(48, 1, 3, 3)
    start = x * 2
    middle = F.conv2d(start, weight, padding=1)
    tape = _C.Tape(_C.Memory(), [x])
    tape.add("aten::mul", "Tensor", (x, torch.tensor(2.0)), {}, [start])
    tape.add("aten::conv2d", "", (start, weight, None, [1, 1], [1, 1]), {}, [middle])
    tape.add("aten::mul", "Tensor", (middle, torch.tensor(3.0)), {}, [end := middle * 3])
    tape.finish([end])
    for _ in range(4):
        assert torch.equal(tape.run([x])[0], end)


def test_torchs_operators_may_choose_another_layout_later():
    """A depthwise 3d conv does without oneDNN: the next layer finds the layout that it was prepared for."""
    torch.manual_seed(0)
    layers = nn.Conv3d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv3d(8, 8, 1)
    given = [images(channels=4, seed=seed)[..., None].expand(-1, -1, -1, -1, 6)[:, :, :6, :6] for seed in range(12)]
    given = [x.contiguous(memory_format=torch.channels_last_3d) for x in given]
    serving = mfp.compact(nn.Sequential(*layers).eval(), given[0], fold_bn=True)
    layouts = set()
    with torch.no_grad():
        for i, x in enumerate(given):
            with torch.backends.mkldnn.flags(enabled=i < 6):
                assert difference(serving(x), serving.forward(x)) < 1e-5
                layouts.add(layers[2](layers[0](x)).stride())
    assert tapes(serving) == 1 and len(layouts) == 2


def test_operators_of_other_people():
    """They may call ours, and keep what they are given or made; their results are theirs."""
    from mfp import _C

    with torch.library._scoped_library("mfp_test", "DEF") as library:
        library.define("keeps(Tensor x) -> Tensor")
        kept = []

        def keeps(x):
            joined = torch.ops.mfp.join_channels(None, x, torch.arange(x.shape[1]), 2 * x.shape[1])
            kept.append((x, joined))
            return joined * 3 + 1

        library.impl("keeps", keeps, "CPU")
        x = images(1, 4, 4)
        start = x * 2
        middle = keeps(start)
        tape = _C.Tape(_C.Memory(), [x])
        tape.add("aten::mul", "Tensor", (x, torch.tensor(2.0)), {}, [start])
        tape.add("mfp_test::keeps", "", (start,), {}, [middle])
        tape.add("aten::mul", "Tensor", (middle, torch.tensor(3.0)), {}, [end := middle * 3])
        tape.finish([end])
        for i in range(1, 5):
            (result,) = tape.run([x + i])
            assert torch.equal(result[:, :4], (2 * (x + i) * 3 + 1) * 3) and (result[:, 4:] == 3).all()
        for i, (given, joined) in enumerate(kept):
            assert torch.equal(given, 2 * (x + i)) and torch.equal(joined[:, :4], given)
        assert len(tape.seconds([x])) == 3


def test_wrong_numbers_of_inputs():
    from mfp import _C

    tape = _C.Tape(_C.Memory(), [images()])
    tape.finish([])
    with pytest.raises(RuntimeError, match="a tape of 1 inputs was given 2"):
        tape.run([images(), images()])


def test_named_arguments_are_replayed_too():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 24, 3)

        def forward(self, a, b):
            return F.relu(self.conv(a)) * b.mean()

    x = {"a": images(), "b": images(seed=2)}
    serving = mfp.compact(Two().eval(), x, fold_bn=True)
    with torch.no_grad():
        expected = serving.forward(**x)
        assert not torch.equal(expected, serving.forward(x["b"], x["a"]))
        for _ in range(3):
            for result in (serving(**x), serving(b=x["b"], a=x["a"]), serving(x["a"], b=x["b"])):
                assert torch.equal(result, expected)
        assert tapes(serving) == 1
        for _ in range(4):
            assert torch.equal(serving(x["a"], x["a"]), serving.forward(x["a"], x["a"]))
            assert torch.equal(serving(**x), expected)
        for wrong in ({"a": x["a"]}, {**x, "c": x["a"]}):
            with pytest.raises(TypeError):
                serving(**wrong)
