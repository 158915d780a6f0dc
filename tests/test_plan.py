"""The plan: which layers, how many filters, where they lie, who follows them; and every refusal."""

import pytest
import torch
import torchvision
from compact_cases import masked
from small_networks import NETWORKS
from torch import nn

import mfp
from mfp.modules import ExpandChannels, SelectChannels
from mfp.plan import count_pruned, matching, unwrap


def network(**kwargs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 10, 3, padding=1)
            self.bn = nn.BatchNorm2d(10)
            self.depthwise = nn.Conv2d(10, 20, 3, groups=10, bias=False)
            self.bn2 = nn.BatchNorm2d(20)
            self.last = nn.Conv2d(20, 7, 1, bias=False)
            self.head = nn.Linear(7, 3)

        def forward(self, x):
            x = self.bn2(self.depthwise(torch.relu(self.bn(self.stem(x)))))
            return self.head(self.last(x).mean((2, 3)))

    return Net()


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.29, 0.3, 0.4, 0.5, 0.999])
def test_exactly_int_n_rate_filters_of_each_layer(rate):
    plan = mfp.FilterPlan.from_model(NETWORKS["resnet"](), rate=rate)
    assert [layer.num_pruned for layer in plan.layers] == [int(layer.num_filters * rate) for layer in plan.layers]
    assert all(layer.num_pruned < layer.num_filters for layer in plan.layers)


def test_layers_lie_one_after_the_other():
    plan = mfp.FilterPlan.from_model(torchvision.models.resnet50(), skip=())
    assert len(plan.layers) == 53 and plan.num_filters == 26560
    assert sum(layer.num_filters * layer.filter_size for layer in plan.layers) == 23_454_912
    end = 0
    for layer, weight in zip(plan.layers, plan.weights(), strict=True):
        assert layer.slice == slice(end, end + layer.num_filters)
        assert weight.shape[0] == layer.num_filters and weight.numel() == layer.num_filters * layer.filter_size
        end = layer.slice.stop
    assert end == plan.num_filters


def test_shortcuts_and_output_convs_are_left_out_and_can_be_asked_for():
    plan = mfp.FilterPlan.from_model(torchvision.models.resnet50(), layer_rates={"layer1.0.downsample.0": 0.25})
    names = [layer.name for layer in plan.layers]
    assert "layer1.0.downsample.0" in names and "layer2.0.downsample.0" not in names
    assert plan["layer1.0.downsample.0"].num_pruned == 64
    squeezenet = torchvision.models.squeezenet1_1()
    assert "classifier.1" not in [layer.name for layer in mfp.FilterPlan.from_model(squeezenet).layers]
    assert mfp.FilterPlan.from_model(squeezenet, layer_rates={"classifier.1": 0.5})["classifier.1"].num_pruned == 500


def test_rates_of_single_layers():
    model = torchvision.models.resnet18()
    plan = mfp.FilterPlan.from_model(model, 0.4, layer_rates={"layer1.0.conv1": 0.0, "layer1.*": 0.5, "conv1": 0.25})
    assert plan["conv1"].num_pruned == 16
    assert plan["layer1.0.conv1"].num_pruned == 0
    assert plan["layer1.1.conv2"].num_pruned == 32
    assert plan["layer2.0.conv1"].num_pruned == 51


def test_skip_takes_names_parts_and_globs():
    model = torchvision.models.resnet18()
    plan = mfp.FilterPlan.from_model(model, skip=("downsample", "conv1", "conv2", "layer4.*"))
    names = {layer.name for layer in plan.layers}
    assert names == {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1)}
    convs = ["conv1", "layer1.conv1", "layer1.conv2"]
    assert matching("conv1", convs) == {"conv1"}  # a full name is that layer alone
    assert matching("conv2", convs) == {"layer1.conv2"}
    assert matching("conv", convs) == set()
    assert matching("*conv?", convs) == set(convs)


@pytest.mark.parametrize(("multiple", "kept"), [(1, 39), (8, 40), (16, 48), (64, 64), (128, 64)])
def test_channel_multiple_rounds_the_kept_filters_up(multiple, kept):
    assert 64 - count_pruned(64, 0.4, multiple) == kept
    plan = mfp.FilterPlan.from_model(NETWORKS["resnet"](), 0.4, channel_multiple=multiple)
    assert plan["conv1"].num_filters - plan["conv1"].num_pruned == kept


def test_followers_are_biases_batchnorms_and_depthwise_convs():
    plan = mfp.FilterPlan.from_model(network())
    assert [layer.name for layer in plan.layers] == ["stem", "last"]
    followers = {(f.module, f.parameter) for f in plan["stem"].followers}
    assert followers == {
        ("stem", "bias"), ("bn", "weight"), ("bn", "bias"), ("depthwise", "weight"), ("bn2", "weight"), ("bn2", "bias"),
    }  # fmt: skip
    assert [(index, p.shape) for index, p in plan.followers(mask_bn=False)] == [(0, (20, 1, 3, 3))]


def test_linear_layers_that_are_pointwise_convs_are_planned():
    names = [layer.name for layer in mfp.FilterPlan.from_model(NETWORKS["convnext"]()).layers]
    assert "features.1.0.block.3" in names and "features.1.0.block.5" in names and "classifier.2" not in names
    assert not any("classifier" in layer.name for layer in mfp.FilterPlan.from_model(NETWORKS["vgg_bn"]()).layers)


def test_shared_weights_are_planned_once():
    conv = nn.Conv2d(4, 4, 3)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert [layer.name for layer in mfp.FilterPlan.from_model(model).layers] == ["0"]


def test_all_kinds_of_convs_and_dtypes():
    for conv, dtype in ((nn.Conv1d, torch.float16), (nn.Conv2d, torch.bfloat16), (nn.Conv3d, torch.float32)):
        model = nn.Sequential(conv(2, 10, 3), nn.ReLU(), conv(10, 5, 1)).to(dtype)
        plan = mfp.FilterPlan.from_model(model)
        mask = mfp.prune_filters_(plan, "l2_distance")
        assert mask.kept == {"0": 6}
        assert int((model[0].weight.flatten(1) == 0).all(1).sum()) == 4


def test_wrappers_are_looked_through():
    model = NETWORKS["resnet"]()
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(model)) is model
    assert mfp.FilterPlan.from_model(nn.DataParallel(model)).layers[0].name == "conv1"


def test_a_plan_finds_replaced_and_moved_weights():
    model = network()
    plan = mfp.FilterPlan.from_model(model)
    model.stem.weight = nn.Parameter(torch.ones_like(model.stem.weight))
    assert plan.weights()[0] is model.stem.weight
    model.stem = nn.Conv2d(3, 10, 3)
    assert plan.weights()[0] is model.stem.weight
    assert mfp.score_filters(plan, ("l1_norm",))["l1_norm"].shape == (17,)


def test_a_plan_notices_a_changed_shape():
    model = network()
    plan = mfp.FilterPlan.from_model(model)
    model.stem = nn.Conv2d(3, 11, 3)
    with pytest.raises(mfp.MfpError, match=r"layer 'stem' had 10 filters of 27 .* make a new plan"):
        plan.weights()
    del model.stem
    with pytest.raises(mfp.MfpError, match="no module 'stem' any more"):
        plan.weights()


def test_scaled_rates():
    plan = mfp.FilterPlan.from_model(NETWORKS["resnet"](), 0.4)
    assert [layer.num_pruned for layer in plan.scaled(0.5).layers] == [
        int(layer.num_filters * 0.2) for layer in plan.layers
    ]
    assert plan.scaled(1.0).layers == plan.layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.0}, r"rate must be in \[0, 1\).*at least one filter"),
        ({"rate": -0.1}, r"rate must be in \[0, 1\)"),
        ({"rate": float("nan")}, r"rate must be in \[0, 1\)"),
        ({"rate": "0.4"}, r"rate must be in \[0, 1\).*'0.4'"),
        ({"layer_rates": {"stem": 1.5}}, r"layer_rates\['stem'\] must be in \[0, 1\)"),
        ({"layer_rates": {"stam": 0.5}}, r"'stam' matches no conv layer; the layers are stem, depthwise, last"),
        ({"skip": ("nothing",)}, r"'nothing' matches no conv layer"),
        ({"skip": "stem"}, r"skip must be a sequence of patterns"),
        ({"skip": ("*",)}, r"no conv layer to prune: 3 in all"),
        ({"channel_multiple": 0}, r"channel_multiple must be a whole number of at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(mfp.MfpError, match=message):
        mfp.FilterPlan.from_model(network(), **arguments)


def test_a_model_without_convs_and_an_unknown_layer():
    with pytest.raises(mfp.MfpError, match="no conv layer to prune: 0 in all"):
        mfp.FilterPlan.from_model(nn.Linear(3, 3))
    with pytest.raises(mfp.MfpError, match="layer 'x' is not in the plan; its layers are stem, last"):
        mfp.FilterPlan.from_model(network())["x"]


def test_a_weight_not_laid_out_filter_by_filter_is_refused():
    model = network()
    model.last.weight = nn.Parameter(torch.randn(20, 7, 1, 1).transpose(0, 1))
    with pytest.raises(mfp.MfpError, match=r"layer 'last'.*one dense block"):
        mfp.FilterPlan.from_model(model)


def test_coupled_layers_share_one_mask():
    model = NETWORKS["resnet"]()
    plan = mfp.FilterPlan.from_model(model, 0.4, residual="coupled")
    stream = [layer for layer in plan.layers if layer.group == plan["conv1"].group]
    assert [layer.name for layer in stream] == ["conv1", "layer1.0.conv2", "layer1.1.conv2"]
    assert plan["layer2.0.conv2"].group == plan["layer2.0.downsample.0"].group
    mask = mfp.prune_filters_(plan, "l2_norm")
    assert all(torch.equal(mask.layer(layer.name), mask.layer("conv1")) for layer in stream)
    scores = sum(plan.weight(layer).detach().flatten(1).norm(dim=1) for layer in stream)
    assert not scores[~mask.layer("conv1")].any()
    small = mfp.compact(model.eval(), torch.randn(1, 3, 64, 64))
    assert small.get_submodule("layer1.0.conv2").out_channels == small.conv1.out_channels == 39
    kinds = {type(module).__module__.split(".")[0] for module in small.modules() if not list(module.children())}
    assert kinds == {"torch"}  # plain layers, no index joins


@pytest.mark.parametrize("residual", mfp.plan.RESIDUAL)
@pytest.mark.parametrize("name", ["resnext", "regnet_x", "regnet_y"])
def test_convs_with_groups_lose_whole_groups(name, residual):
    """And so do the layers in front of them: what is left are convs with the same number of channels to a group."""
    model = masked(NETWORKS[name](), 0.4, residual=residual)
    plan = mfp.FilterPlan.from_model(model, 0.4, residual=residual)
    wide = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    if residual == "index":  # where a group is more than the rate filters go one by one
        wide = {n: m for n, m in wide.items() if int(m.out_channels * 0.4) >= m.out_channels // m.groups}
    small = mfp.compact(model, torch.randn(1, 3, 64, 64))
    assert all(m.in_channels // m.groups == small.get_submodule(n).in_channels // small.get_submodule(n).groups
               for n, m in wide.items())  # fmt: skip
    assert any(small.get_submodule(n).groups < m.groups for n, m in wide.items())
    if residual != "index":
        assert not any(isinstance(m, SelectChannels | ExpandChannels) for m in small.modules())
    for name in wide:
        layer = plan[name]
        assert layer.unit == wide[name].out_channels // wide[name].groups > 1
        assert layer.num_pruned == int(layer.num_filters * 0.4) // layer.unit * layer.unit
        assert plan.scaled(0.5)[name].num_pruned % layer.unit == 0
    live = mfp.FilterMask(plan, torch.rand(plan.num_filters) > 0.02)
    mask = mfp.select_filters(mfp.score_filters(plan, ("l2_norm",), live=live))
    assert not mask.keep[~live.keep].any()  # what was lost stays so, and takes its whole group along, in every layer
    for name in wide:
        layer, keep = plan[name], mask.layer(name)
        assert torch.equal(keep, keep.view(-1, layer.unit).all(1).repeat_interleave(layer.unit))
        alike = [mask.layer(other.name) for other in plan.layers if other.group == layer.group]
        assert len(alike) > 1 and all(torch.equal(keep, other) for other in alike)


@pytest.mark.parametrize("residual", mfp.plan.RESIDUAL)
def test_the_group_whose_filters_weigh_least_together_goes(residual):
    """[2, 2] [1, 4] [3, 0.5] in the layer in front, equal ones in the conv with groups."""
    front, behind = nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 6, 1, groups=3, bias=False)
    model = nn.Sequential(front, behind, nn.Conv2d(6, 2, 1))
    front.weight.data = torch.tensor([2, 2, 1, 4, 3, 0.5]).view(6, 1, 1, 1).repeat(1, 3, 1, 1)
    behind.weight.data.fill_(1)
    plan = mfp.FilterPlan.from_model(model, 0.4, residual=residual)
    assert [layer.num_pruned for layer in plan.layers] == [2, 2]
    keep = mfp.select_filters(mfp.score_filters(plan, ("l1_norm",))).keep
    assert keep.view(2, 3, 2)[:, 2].any() == False and keep.sum() == 8  # noqa: E712


@pytest.mark.parametrize(
    "options",
    [
        {"layer_rates": {"1": 0.5}}, {"layer_rates": {"0": 0.0}}, {"skip": ("1",)}, {"skip": ("0",)},
        {"skip": ("0",), "layer_rates": {"1": 0.5}}, {"rate": 0.2},
    ],
)  # fmt: skip
def test_joins_by_index_need_no_whole_groups(options):
    """Where one of the two has another rate or is left out, or a group is more than the rate, filters go alone."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=3), nn.Conv2d(6, 2, 1))
    plan = mfp.FilterPlan.from_model(model, **{"rate": 0.4, **options})
    alone = {"0": 0.4, "1": 0.4} | dict.fromkeys(options.get("skip", ()), 0.0) | options.get("layer_rates", {})
    for layer in plan.layers:
        assert (layer.unit, layer.group) == (1, None)
        assert layer.rate == options.get("rate", alone[layer.name])
    assert {layer.name for layer in plan.layers if layer.rate} == {name for name, rate in alone.items() if rate}


@pytest.mark.parametrize("residual", mfp.plan.RESIDUAL)
def test_groups_that_no_layer_in_front_can_lose_stay_whole(residual):
    """Behind the image, behind a shuffle, and where a group gives more channels than it reads; by index not."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.shuffled = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=4)
            self.b, self.wider = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1, groups=4)
            self.images, self.last = nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(24, 3, 1)

        def forward(self, x):
            a = self.a(x)
            shuffled = self.shuffled(torch.channel_shuffle(a, 2))
            return self.last(torch.cat([self.wider(self.b(shuffled)), self.images(x)], 1))

    plan = mfp.FilterPlan.from_model(Net(), 0.4, residual=residual, example_input=torch.zeros(1, 4, 5, 5))
    if residual == "index":
        assert {layer.name for layer in plan.layers} == {"a", "shuffled", "b", "wider", "images"}
        assert all((layer.unit, layer.group) == (1, None) for layer in plan.layers)
    else:
        assert [layer.name for layer in plan.layers] == ["a"]


def test_spatial_attention_couples_nothing():
    """One map for all channels, from a conv of one filter and from what is known of all channels."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.map, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(2, 1, 7, padding=3), nn.Conv2d(16, 8, 1)
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            a = self.a(x)
            a = a * self.map(torch.cat([a.mean(1, keepdim=True), a.amax(1, keepdim=True)], 1)).sigmoid()
            return self.last(self.b(a * a.abs().amax(1, keepdim=True)).mean((2, 3)))

    plan = mfp.FilterPlan.from_model(Net(), 0.5, residual="coupled")
    assert {layer.name: layer.num_pruned for layer in plan.layers} == {"a": 8, "map": 0, "b": 4}
    assert plan["map"].group != plan["a"].group

    class Added(Net):
        def forward(self, x):
            a = self.a(x)
            return self.last(self.b(a + a.amax(1, keepdim=True)).mean((2, 3)))

    plan = mfp.FilterPlan.from_model(Added(), 0.5, residual="coupled")  # what is added to a channel of zeros stays
    assert "a" not in {layer.name for layer in plan.layers}


def test_coupled_groups_are_left_out_as_a_whole():
    model = torchvision.models.resnet18()
    plan = mfp.FilterPlan.from_model(model, residual="coupled", skip=("downsample",))
    names = {layer.name for layer in plan.layers}
    assert "layer2.0.conv1" in names and "layer2.0.conv2" not in names and "layer1.0.conv2" in names
    with pytest.raises(
        mfp.MfpError, match="layers that lose filters together must lose equally many: 'conv1' loses 25 of 64"
    ):
        mfp.FilterPlan.from_model(model, residual="coupled", layer_rates={"layer1.0.conv2": 0.1})
    with pytest.raises(mfp.MfpError, match="layers that lose filters together"):
        mfp.select_mix(plan, 0.1, 0.1)


@pytest.mark.parametrize(("name", "whole", "pruned"), [
    ("resnet", ["conv1", "layer1.1.conv2", "layer3.0.downsample.0"], ["layer1.0.conv1", "layer3.0.conv1"]),
    ("resnet bottleneck", ["layer1.0.conv3", "layer1.0.downsample.0"], ["conv1", "layer1.0.conv1", "layer1.0.conv2"]),
    # the projections at the end of a branch, and the gates of squeeze-excite; not the projection that no sum reads
    ("efficientnet", ["features.2.1.block.3.0", "features.2.1.block.2.fc2"],
     ["features.1.0.block.2.0", "features.2.1.block.0.0", "features.2.1.block.2.fc1"]),
])  # fmt: skip
def test_layers_that_end_in_an_addition_are_kept(name, whole, pruned):
    model = NETWORKS[name]()
    plan = mfp.FilterPlan.from_model(model, 0.4, residual="keep")
    names = {layer.name for layer in plan.layers}
    assert names.isdisjoint(whole) and names.issuperset(pruned)
    everything = mfp.FilterPlan.from_model(model, 0.4, skip=())
    assert names.issuperset(set(pruned)) and {layer.name for layer in everything.layers}.issuperset(whole)
    mfp.prune_filters_(plan, "l2_norm")
    small = mfp.compact(model.eval(), torch.randn(1, 3, 64, 64))
    kinds = {type(module).__module__.split(".")[0] for module in small.modules() if not list(module.children())}
    assert kinds == {"torch"}  # plain layers, no index joins
    asked = mfp.FilterPlan.from_model(model, 0.4, residual="keep", layer_rates={whole[0]: 0.2})
    assert asked[whole[0]].num_pruned > 0  # a layer that is named is pruned all the same


def test_an_unknown_treatment_of_residual_streams():
    message = "residual must be one of 'index', 'keep', 'coupled', not 'wide'"
    with pytest.raises(mfp.MfpError, match=message):
        mfp.FilterPlan.from_model(network(), residual="wide")
    with pytest.raises(mfp.MfpError, match=message):
        mfp.FilterPruner(network(), residual="wide")
