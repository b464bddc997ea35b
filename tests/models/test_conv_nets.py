import pytest
import torch
from torch.nn import functional as F

from notebook_kit.models import VGG, ResNet


@pytest.mark.parametrize("make", [VGG, ResNet])
@pytest.mark.parametrize("widths", [(4,), (4, 6), (4, 6, 8)])
def test_conv_nets_name_ten_digits_from_64_pixels(make, widths):
    model = make(widths).eval()
    x = torch.rand(3, 64)
    assert model(x).shape == (3, 10)
    assert make(widths, n_classes=4)(x).shape == (3, 4)
    assert {m.num_features for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == set(widths)


def test_a_residual_network_is_stem_blocks_and_head():
    torch.manual_seed(0)
    model, x = ResNet((4, 6)).eval(), torch.rand(2, 64)
    h = F.relu(model.stem(x.reshape(2, 1, 8, 8)))
    same, halved = (stage[0] for stage in model.stages)
    assert same.shortcut is None
    h = F.relu(h + same.second(F.relu(same.first(h))))
    h = F.relu(halved.shortcut(h) + halved.second(F.relu(halved.first(h))))
    assert h.shape == (2, 6, 4, 4)
    torch.testing.assert_close(model(x), model.head(h.mean((2, 3))))
    assert len(ResNet((4, 6), blocks=3).stages[1]) == 3


def test_they_refuse_what_they_cannot_build():
    for make in (VGG, ResNet):
        with pytest.raises(ValueError, match="one to three stages"):
            make((4, 5, 6, 7))
        with pytest.raises(ValueError, match="one to three stages"):
            make(())
    with pytest.raises(ValueError, match="must change from stage to stage"):
        ResNet((4, 4))
