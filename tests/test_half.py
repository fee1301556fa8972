"""What a GPU without bfloat16 does, such as a T4: a float16 model, and a scaled loss.

    python -m pytest tests/test_half.py -m full_size    # 13 to 30 s on one core, 3 GB of memory
"""

import math

import pytest
import torch
from torch import Generator

import erase
import sample
import unet


@pytest.mark.parametrize(
    "native, dtype", [(False, torch.float16), (True, torch.bfloat16)], ids=["T4", "A100"]
)
def test_the_dtype_of_a_gpu(monkeypatch, native, dtype):
    """A T4 says that it has bfloat16, unless it is asked to leave out emulation."""

    def is_bf16_supported(including_emulation=True):
        return native or including_emulation

    def current_accelerator(check_available=False):
        return torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert sample.choose_device("auto", "auto") == ("cuda", dtype)
    assert sample.choose_device("cuda:1", "auto") == ("cuda:1", dtype)
    assert sample.choose_device("0", "float32") == ("cuda:0", torch.float32)


def random_unet(rng):
    """Returns Stable Diffusion v1's U-Net in float16, with random weights: 1.7 GB."""
    with torch.device("meta"):
        model = unet.UNet().half()
    model.requires_grad_(False).to_empty(device="cpu")

    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            inputs = parameter[0].numel()
            parameter.normal_(0, 0.5 / math.sqrt(inputs), generator=rng)
        else:
            mean = 1 if name.endswith(".weight") else 0  # the weight of a norm, or a bias
            parameter.normal_(mean, 0.1, generator=rng)
    return model


@pytest.mark.full_size
def test_a_gradient_step_in_float16_at_full_width():
    """All tensors move. With an unscaled loss, whole tensors have no gradient, and 26 % move."""
    rng = Generator().manual_seed(0)
    frozen = random_unet(rng)
    text = erase.Text(*torch.randn(3, 1, 77, 768, generator=rng).half())
    theta = erase.trainable_copies(frozen, "esd-x")
    before = {name: tensor.detach().clone() for name, tensor in theta.items()}

    edited = erase.with_theta(frozen, theta)
    data = erase.x_t_from_model(edited, [text], (1, 4, 8, 8), rng, steps=2)
    optimizer = torch.optim.Adam(theta.items(), lr=1e-5)
    loss = next(erase.gradient_steps(edited, frozen, data, optimizer))
    assert 0 < loss < math.inf

    moved = 0
    for name, tensor in theta.items():
        assert tensor.dtype == torch.float32 and tensor.isfinite().all(), name
        changed = (tensor != before[name]).sum().item()
        assert changed > 0.8 * tensor.numel(), name
        moved += changed
    total = sum(tensor.numel() for tensor in theta.values())
    assert len(theta) == 80 and moved > 0.98 * total
