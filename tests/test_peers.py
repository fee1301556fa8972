"""Numbers that diffusers' own tests record, reproduced with this project's layers and sampler.

Those tests draw inputs and weights after torch.manual_seed(0). Layers that are built in the same
order here have the same weights, so the recorded outputs must come out too. Each test has the name
of the test in diffusers (commit 58eb52c080, August 2026) and a deliberate mistake that it catches.
"""

from typing import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddim
import unet
import vae

SMALL = unet.UNetConfig(block_out_channels=(32, 32), attention=(False, False), layers_per_block=1)


@torch.no_grad()
def last_values(layer, *inputs):
    """The lower right corner of the first sample's last channel, as diffusers' tests print it."""
    return layer(*inputs)[0, -1, -3:, -3:].flatten()


def misses(found, recorded) -> float:
    """The largest difference to the recorded digits."""
    return (found - torch.tensor(recorded)).abs().max().item()


def test_sinoid_embeddings_hardcoded():
    recorded = [0.3019, 0.2280, 0.1716, 0.3146, 0.2377, 0.1790, 0.3272, 0.2474, 0.1864]
    found = unet.timestep_embedding(torch.arange(128), 64)
    assert misses(found[23:26, 47:50].flatten(), recorded) < 1e-4

    sines_first = found.roll(32, dims=1)
    assert misses(sines_first[23:26, 47:50].flatten(), recorded) > 0.1


def test_upsample_with_conv():
    torch.manual_seed(0)
    x = torch.randn(1, 32, 32, 32)
    layer = unet.Upsample(32)

    recorded = [0.7145, 1.3773, 0.3492, 0.8448, 1.0839, -0.3341, 0.5956, 0.1250, -0.4841]
    assert misses(last_values(layer, x), recorded) < 1e-4

    bilinear = F.interpolate(x, scale_factor=2.0, mode="bilinear")
    assert misses(last_values(layer.conv, bilinear), recorded) > 0.1


def test_upsample_default():
    torch.manual_seed(0)
    x = torch.randn(1, 32, 32, 32)
    layer = unet.Upsample(32)
    layer.conv = nn.Identity()

    recorded = [-0.2173, -1.2079, -1.2079, 0.2952, 1.1254, 1.1254, 0.2952, 1.1254, 1.1254]
    assert misses(last_values(layer, x), recorded) < 1e-4

    bilinear = F.interpolate(x, scale_factor=2.0, mode="bilinear")
    assert misses(last_values(layer.conv, bilinear), recorded) > 0.1


def test_downsample_with_conv():
    torch.manual_seed(0)
    x = torch.randn(1, 32, 64, 64)
    layer = unet.Downsample(32)

    recorded = [0.9267, 0.5878, 0.3337, 1.2321, -0.1191, -0.3984, -0.7532, -0.0715, -0.3913]
    assert misses(last_values(layer, x), recorded) < 1e-4

    pads_right_and_bottom = vae.Downsample(32)  # as the VAE's does
    pads_right_and_bottom.load_state_dict(layer.state_dict())
    assert misses(last_values(pads_right_and_bottom, x), recorded) > 0.1


def test_resnet_default():
    torch.manual_seed(0)
    x = torch.randn(1, 32, 64, 64)
    emb = torch.randn(1, 128)
    layer = unet.ResnetBlock(32, 32, emb_dim=128, groups=32)

    recorded = [-1.9010, -0.2974, -0.8245, -1.3533, 0.8742, -0.9645, -2.0584, 1.3387, -0.4746]
    assert misses(last_values(layer, x, emb), recorded) < 1e-4

    layer.norm2.num_groups = 16
    assert misses(last_values(layer, x, emb), recorded) > 1e-3


def test_restnet_with_use_in_shortcut():
    torch.manual_seed(0)
    x = torch.randn(1, 32, 64, 64)
    emb = torch.randn(1, 128)
    layer = unet.ResnetBlock(32, 32, emb_dim=128, groups=32)
    layer.conv_shortcut = nn.Conv2d(32, 32, 1)  # drawn last, as where the channels change

    recorded = [0.2226, -1.0791, -0.1629, 0.3659, -0.2889, -1.2376, 0.0582, 0.9206, 0.0044]
    assert misses(last_values(layer, x, emb), recorded) < 1e-4

    layer.conv_shortcut = nn.Identity()
    assert misses(last_values(layer, x, emb), recorded) > 0.1


def test_spatial_transformer_cross_attention_dim():
    torch.manual_seed(0)
    x = torch.randn(1, 64, 64, 64)
    layer = unet.SpatialTransformer(64, context_dim=64, heads=2, groups=32)
    text = torch.randn(1, 4, 64)

    recorded = [0.0143, -0.6909, -2.1547, -1.8893, 1.4097, 0.1359, -0.2521, -1.3359, 0.2598]
    assert misses(last_values(layer, x, text), recorded) < 1e-4

    for module in layer.modules():
        if isinstance(module, unet.Attention):
            module.heads = 1
    assert misses(last_values(layer, x, text), recorded) > 1e-3


def test_down_block_2d():
    torch.manual_seed(0)
    x = torch.randn(4, 32, 32, 32)
    emb = torch.randn(4, 128)
    block = unet.DownBlock([32], 32, False, SMALL, resample=True)

    recorded = [-0.0232, -0.9869, 0.8054, -0.0637, -0.1688, -1.4264, 0.4470, -1.3394, 0.0904]
    with torch.no_grad():
        last, (resnet, downsampled) = block(x, emb, None)
    assert misses(downsampled[0, -1, -3:, -3:].flatten(), recorded) < 1e-4
    assert last is downsampled

    assert misses(resnet[0, -1, -3:, -3:].flatten(), recorded) > 0.1


def test_up_block_2d():
    torch.manual_seed(0)
    x = torch.randn(4, 32, 32, 32)
    emb = torch.randn(4, 128)
    torch.manual_seed(1)
    skip = torch.randn(4, 32, 32, 32)
    block = unet.UpBlock([64], 32, False, SMALL, resample=True)

    recorded = [-0.2041, -0.4165, -0.3022, 0.0041, -0.6628, -0.7053, 0.1928, -0.0325, 0.0523]
    assert misses(last_values(block, x, emb, None, [skip]), recorded) < 1e-4

    assert misses(last_values(block, skip, emb, None, [x]), recorded) > 0.1  # skip before x


def test_down_encoder_block_2d():
    """diffusers' test pads on all sides, as the U-Net does, not right and bottom as the VAE."""
    torch.manual_seed(0)
    x = torch.randn(4, 32, 32, 32)
    resnet = vae.ResnetBlock(32, 32, groups=32)
    downsample = unet.Downsample(32)

    recorded = [1.1102, 0.5302, 0.4872, -0.0023, -0.8042, 0.0483, -0.3489, -0.5632, 0.7626]
    assert misses(last_values(nn.Sequential(resnet, downsample), x), recorded) < 1e-4

    pads_right_and_bottom = vae.Downsample(32)
    pads_right_and_bottom.load_state_dict(downsample.state_dict())
    assert misses(last_values(nn.Sequential(resnet, pads_right_and_bottom), x), recorded) > 0.1


def test_up_decoder_block_2d():
    torch.manual_seed(0)
    x = torch.randn(4, 32, 32, 32)
    block = vae.UpBlock(32, 32, layers=1, groups=32, resample=True)

    recorded = [0.4404, 0.1998, -0.9886, -0.3320, -0.3128, -0.7034, -0.6955, -0.2338, -0.3137]
    assert misses(last_values(block, x), recorded) < 1e-4

    for module in block.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = 16
    assert misses(last_values(block, x), recorded) > 1e-3


# ---- DDIM. diffusers' tests sample 8 x 8 pixels with eps = x * t / (t + 1) in place of a model.


def ddim_sum(
    beta_start: float,
    times: list[int],
    last_abar: Tensor | None = None,
    noised_to: int | None = None,
    step: Callable = ddim.step,
) -> float:
    """Returns the sum of |x| after the given times.

    The betas are linear here, from beta_start to 0.02. last_abar: abar after the last step, if
    that isn't abar[0]. noised_to: the time to which x is noised first.
    """
    abar = torch.cumprod(1 - torch.linspace(beta_start, 0.02, 1000), dim=0)
    x = (torch.arange(4 * 3 * 8 * 8).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)
    if noised_to is not None:
        noise = torch.arange(4 * 3 * 8 * 8).flip(-1).reshape(3, 8, 8, 4) / 768
        x = ddim.add_noise(x, noise.permute(3, 0, 1, 2), abar[noised_to])

    last_abar = abar[0] if last_abar is None else last_abar
    after = [*abar[times[1:]], last_abar]
    for t, abar_prev in zip(times, after):
        x = step(x, x * t / (t + 1), abar[t], abar_prev)
    return x.abs().sum().item()


def no_roots(x_t, eps, abar_t, abar_prev):
    """The mistake of exercise 1.2: shares of the variance in place of their roots."""
    x_0 = (x_t - (1 - abar_t) * eps) / abar_t
    return abar_prev * x_0 + (1 - abar_prev) * eps


HUNDREDS = [*range(900, -1, -100)]
ONE = torch.tensor(1.0)
LOOPS = {  # recorded sum, arguments of ddim_sum
    "test_full_loop_no_noise": (
        172.0067, {"beta_start": 0.0001, "times": HUNDREDS, "last_abar": ONE},
    ),
    "test_full_loop_with_set_alpha_to_one": (
        149.8295, {"beta_start": 0.01, "times": HUNDREDS, "last_abar": ONE},
    ),
    "test_full_loop_with_no_set_alpha_to_one": (
        149.0784, {"beta_start": 0.01, "times": HUNDREDS},
    ),
    "test_full_loop_with_noise": (
        354.5418, {"beta_start": 0.0001, "times": [100, 0], "last_abar": ONE, "noised_to": 100},
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_full_loop(name):
    recorded, arguments = LOOPS[name]
    assert abs(ddim_sum(**arguments) - recorded) < 1e-2
    assert abs(ddim_sum(**arguments, step=no_roots) - recorded) > 1


def test_steps_offset():
    assert ddim.timesteps(5) == [801, 601, 401, 201, 1]
