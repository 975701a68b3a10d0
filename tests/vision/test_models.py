"""Networks: shapes, sizes, and blocks against the formulas that define them; transfer learning."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from learnkit import Learner
from learnkit.optim.groups import layer_groups
from learnkit.vision import ImageDataBunch, imagenet_stats, resnet9, resnet18_cifar, vision_learner, wrn_22
from learnkit.vision.models.resnet import BasicBlock
from learnkit.vision.models.wrn import WideBlock, WideResNet
from learnkit.vision.transfer import halves_and_head, replace_head


def n_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_wrn_22_has_the_layers_and_parameters_of_a_wrn_22_6():
    """Convolutions: 1 + 3 groups × 3 blocks × 2 + 3 shortcuts; 22 layers count the first, the 18 in blocks, and the
    linear one, as 6 · 3 + 4.
    """
    model, widths = wrn_22(), [16, 96, 192, 384]
    count = 3 * 9 * 16
    for n_in, n in itertools.pairwise(widths):
        count += 2 * n_in + 9 * n_in * n + 2 * n + 9 * n * n + n_in * n  # the first block, and its shortcut
        count += 2 * (2 * n + 9 * n * n + 2 * n + 9 * n * n)  # two more
    count += 2 * 384 + 384 * 10 + 10
    assert n_parameters(model) == count == 9_658_458
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 1 + 18 + 3


def test_a_wide_block_is_fastais_formula():
    torch.manual_seed(0)
    block, x = WideBlock(4, 8, stride=2).eval(), torch.randn(2, 4, 8, 8)
    after = F.relu(F.batch_norm(x, torch.zeros(4), torch.ones(4)))
    inner = F.conv2d(
        F.relu(F.batch_norm(F.conv2d(after, block.conv1.weight, stride=2, padding=1), torch.zeros(8), torch.ones(8))),
        block.conv2[2].weight,
        padding=1,
    )
    torch.testing.assert_close(block(x.clone()), F.conv2d(after, block.shortcut.weight, stride=2) + 0.2 * inner)


def test_a_wide_block_leaves_its_input_as_it_was():
    block, x = WideBlock(4, 4), torch.randn(2, 4, 8, 8)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


def test_resnet18_cifar_has_torchvisions_blocks_between_another_beginning():
    ours, theirs = resnet18_cifar(), models.resnet18(num_classes=10)
    assert n_parameters(ours) == n_parameters(theirs) - 49 * 3 * 64 + 9 * 3 * 64
    block, other = BasicBlock(64, 128, stride=2), theirs.layer2[0]
    block.load_state_dict({name.replace("downsample", "shortcut"): value for name, value in other.state_dict().items()})
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(block.eval()(x), other.eval()(x))


@pytest.mark.parametrize(
    "make", [lambda n: wrn_22(n), resnet18_cifar, lambda n: resnet9(n, width=8), lambda n: WideResNet(3, 1, n, n_in=3)]
)
def test_networks_give_a_score_a_class_and_every_parameter_gets_a_gradient(make):
    model = make(7)
    model(torch.rand(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 7)


def test_grey_pictures_go_into_networks_with_one_input_channel():
    assert (
        resnet9(n_in=1, width=4)(torch.rand(2, 1, 16, 16)).shape == (2, 10)
        and resnet18_cifar(n_in=1)[0].in_channels == 1
    )


# --- transfer ----------------------------------------------------------------
@pytest.fixture
def data(folder) -> ImageDataBunch:
    return ImageDataBunch.from_folder(folder(classes=("a", "b", "c"), n=4, size=(32, 32)), bs=4)


def weights(path, make=models.squeezenet1_1):
    torch.manual_seed(1)
    model = make(weights=None)
    torch.save(model.state_dict(), path)
    return model


def test_a_pretrained_network_gets_a_new_head_a_frozen_body_and_imagenets_statistics(data, tmp_path):
    original = weights(tmp_path / "w.pth", models.mnasnet0_5)
    learn = vision_learner(data, "mnasnet0_5", pretrained=tmp_path / "w.pth", seed=1)
    head = learn.model.classifier[1]
    assert head.out_features == 3 and data.stats == imagenet_stats
    assert [name for name, p in learn.model.named_parameters() if p.requires_grad] == [
        "classifier.1.weight",
        "classifier.1.bias",
    ]
    for name, p in learn.model.named_parameters():
        if not name.startswith("classifier.1"):
            assert torch.equal(p, original.get_parameter(name))


def test_fine_tune_trains_the_head_and_then_everything(data, tmp_path):
    weights(tmp_path / "w.pth", models.mnasnet0_5)
    learn = vision_learner(data, models.mnasnet0_5, pretrained=tmp_path / "w.pth", metrics=[], seed=1)
    before = {name: p.clone() for name, p in learn.model.named_parameters()}
    with learn.no_logging():
        learn.fit(1, 1e-3)
    assert {name for name, p in learn.model.named_parameters() if not torch.equal(p, before[name])} == {
        "classifier.1.weight",
        "classifier.1.bias",
    }
    with learn.no_logging():
        learn.fine_tune(1, 1e-2)
    assert all(not torch.equal(p, before[name]) for name, p in learn.model.named_parameters())


def test_without_pretraining_everything_trains_and_the_data_stays_as_it_is(data):
    learn = vision_learner(data, "squeezenet1_1", pretrained=False)
    assert all(p.requires_grad for p in learn.model.parameters()) and data.stats is None


def test_a_function_of_ones_own_gives_the_network(data):
    learn = vision_learner(
        data,
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000)),
        pretrained=False,
    )
    assert learn.model[3].out_features == 3


ARCHITECTURES = [
    "alexnet",
    "densenet121",
    "efficientnet_b0",
    "mobilenet_v3_small",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "swin_t",
    "vgg11",
    "vit_b_32",
    "convnext_tiny",
    "mnasnet0_5",
    "maxvit_t",
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_family_of_torchvision_is_cut_into_three_groups_that_hold_every_parameter_once(name):
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    head = replace_head(model, 5)
    groups = halves_and_head(model, head)
    held = [id(p) for group in groups for p in group]
    assert len(groups) == 3 and all(groups) and sorted(held) == sorted(id(p) for p in model.parameters())
    assert groups[2][0].shape[0] == 5 and len(layer_groups(model, lambda m: groups)) == 3
    names = {id(p): n for n, p in model.named_parameters()}
    order = {n: i for i, n in enumerate(names.values())}
    if name == "resnet18":
        assert names[id(groups[0][-1])].startswith("layer1") and names[id(groups[1][0])].startswith("layer2") and order


@pytest.mark.parametrize(
    "arch, options, error, message",
    [
        ("resnet81", {}, ValueError, r"torchvision has no model 'resnet81', but .*resnet18"),
        (lambda: nn.ReLU(), {"pretrained": False}, ValueError, "ReLU has no last linear layer"),
        (lambda: nn.ReLU(), {"pretrained": True}, ValueError, "pretrained=True is for torchvision's models"),
        (
            lambda: models.googlenet(weights=None, init_weights=False, aux_logits=True),
            {"pretrained": False},
            ValueError,
            "GoogLeNet has more than one output while training",
        ),
    ],
)
def test_what_cannot_be_a_network_says_why(data, arch, options, error, message):
    with pytest.raises(error, match=message):
        vision_learner(data, arch, **options)


def test_weights_of_another_network_and_data_without_classes_are_refused(data, tmp_path):
    weights(tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth does not fit AlexNet"):
        vision_learner(data, "alexnet", pretrained=tmp_path / "w.pth")
    data.classes = None
    with pytest.raises(ValueError, match="the data has no class names: pass"):
        vision_learner(data, "squeezenet1_1", pretrained=False)
    assert isinstance(vision_learner(data, "squeezenet1_1", pretrained=False, n_out=4), Learner)


def test_without_a_network_the_error_says_where_weights_can_come_from(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(
        OSError,
        match=r"the weights of squeezenet1_1 could not be downloaded: .* pretrained='/path/to/weights.pth'\), or "
        r"pretrained=False",
    ):
        vision_learner(data, "squeezenet1_1")
