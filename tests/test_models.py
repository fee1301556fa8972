"""The three models against the reference: names, layers, numbers, and faults they must not have."""

import copy
import json
import re
from functools import partial
from typing import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clip_text
import unet
import vae
from support import parity, small
from support.parity import MODELS

FUNCTIONS = {}
for part, model in MODELS.items():
    FUNCTIONS |= parity.functions(part, model)

# The sinusoids are float32 in both U-Nets: another machine's cosine may move it by 2e-8.
TOLERANCE = {"unet": 1e-7, "vae": 1e-10, "text_encoder": 1e-10}


# ---- names, shapes and settings at full size


def full_size(part: str) -> nn.Module:
    _, model = parity.CLASSES[part]
    with torch.device("meta"):
        return model()


@pytest.mark.parametrize("part", MODELS)
def test_tensors_have_the_published_names_and_shapes(part):
    stored = json.loads((small.REFERENCE / "shapes.json").read_text())
    assert small.shapes(full_size(part)) == stored[part]


@pytest.mark.parametrize("part", MODELS)
def test_layers_have_the_published_settings(part):
    stored = json.loads((small.REFERENCE / "settings.json").read_text())
    assert small.settings(full_size(part)) == stored[part]


# ---- numbers


@pytest.mark.parametrize("part", MODELS)
def test_outputs_equal_the_reference(part):
    assert parity.difference(part, MODELS[part]) < TOLERANCE[part]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_input_same_output_and_input_untouched(name):
    inputs = copy.deepcopy(small.INPUTS[name])
    function = FUNCTIONS[name]
    assert torch.equal(function(*inputs), function(*inputs))
    assert all(map(torch.equal, inputs, small.INPUTS[name]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_samples_of_a_batch_do_not_touch_each_other(name):
    function = FUNCTIONS[name]
    second = [tensor[1:2] for tensor in small.INPUTS[name]]
    of_all = function(*small.INPUTS[name])
    torch.testing.assert_close(function(*second), of_all[1:2])


def test_time_embedding_is_cosines_then_sines():
    angles = 999 * 10000 ** (-torch.arange(16, dtype=torch.float64) / 16)
    expected = torch.cat([angles.cos(), angles.sin()])
    embedding = unet.timestep_embedding(torch.tensor([999]), 32)[0].double()
    torch.testing.assert_close(embedding, expected, rtol=0, atol=1e-4)  # it is float32


def test_t_may_be_a_number():
    x_t, _, text = small.INPUTS["unet"]
    of_each = MODELS["unet"](x_t, torch.tensor([4, 4, 4]), text)
    assert torch.equal(MODELS["unet"](x_t, 4, text), of_each)
    assert torch.equal(MODELS["unet"](x_t, torch.tensor(4), text), of_each)


@pytest.mark.parametrize("size", [(8, 8), (8, 24), (24, 16)])
def test_unet_keeps_the_size_of_the_latent(size):
    x_t = small.numbers("x_t", 1, 4, *size)
    text = small.numbers("text", 1, 5, 24)
    assert MODELS["unet"](x_t, 1, text).shape == x_t.shape


@pytest.mark.robustness  # seconds, where a CPU has neither
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unet_in_half_precision_returns_the_dtype_of_the_latent(dtype):
    """The sampler keeps x_t in float32 while the weights are in half precision."""
    x_t, t, text = small.INPUTS["unet"]
    half = copy.deepcopy(MODELS["unet"]).to(dtype)

    eps = half(x_t.float(), t, text.to(dtype))
    assert eps.dtype == torch.float32
    assert (eps - parity.ANSWERS["unet"]).abs().max() < 0.03  # and eps is rounded, not wrong
    assert half(x_t.to(dtype), t, text.to(dtype)).dtype == dtype


def test_times_are_embedded_before_they_are_rounded():
    """In bfloat16, 981 would be 980."""
    half = copy.deepcopy(MODELS["unet"]).to(torch.bfloat16)
    seen = []
    half.time_embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    t = torch.tensor([981, 667, 333])
    half(torch.zeros(3, 4, 8, 8), t, torch.zeros(3, 5, 24, dtype=torch.bfloat16))
    channels = half.config.block_out_channels[0]
    assert torch.equal(seen[0], unet.timestep_embedding(t, channels).bfloat16())


@pytest.mark.parametrize("size", [(1, 1), (2, 5)])
def test_a_latent_is_eight_pixels_wide(size):
    latents = small.numbers("latents", 1, 4, *size)
    image = MODELS["vae"].decode(latents)
    assert image.shape == (1, 3, 8 * size[0], 8 * size[1])
    assert MODELS["vae"].encode(image)[0].shape == latents.shape
    assert MODELS["vae"].config.factor == 8


@pytest.mark.parametrize("bias, logvar", [(1000, 20), (-1000, -30)])
def test_logvar_is_clamped(bias, logvar):
    model = copy.deepcopy(MODELS["vae"])
    model.quant_conv.bias[4:] = bias
    assert (model.encode(*small.INPUTS["vae.encode"])[1] == logvar).all()


def test_a_token_sees_only_those_before_it():
    tokens, = small.INPUTS["text_encoder"]
    first = MODELS["text_encoder"](tokens)[:, :3]
    torch.testing.assert_close(MODELS["text_encoder"](tokens[:, :3]), first)


# ---- faults that well-known implementations have had; the numbers must show each


def sets(pattern: str, attribute: str, value) -> Callable:
    """A fault: an attribute of the layers whose name matches is another."""

    def break_it(model, monkeypatch):
        for name, layer in model.named_modules():
            if re.search(pattern, name):
                setattr(layer, attribute, value)
    return break_it


def patches(owner, name: str, value: Callable) -> Callable:
    """A fault: a function is another."""
    return lambda model, monkeypatch: monkeypatch.setattr(owner, name, value)


def sines_first(t, dim, cosines_first=unet.timestep_embedding):
    return cosines_first(t, dim).roll(dim // 2, dims=1)


def frequencies_down_to_the_last(t, dim):
    freqs = torch.logspace(0, -4, dim // 2)  # the last is 1/10000: freq_shift = 1
    angles = t[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def gate_first(self, x):
    gate, value = self.proj(x).chunk(2, dim=-1)
    return value * F.gelu(gate)


def heads_of_width_8(model, monkeypatch):
    for layer in model.modules():
        if isinstance(layer, unet.Attention):
            layer.heads = layer.to_q.in_features // 8


def pads_right_and_bottom(self, x):
    return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.conv.weight, self.conv.bias, stride=2)


def pads(*sides: int) -> Callable:
    return lambda self, x: self.conv(F.pad(x, sides))


def bilinear(x, interpolate=F.interpolate, **_):
    return interpolate(x, scale_factor=2.0, mode="bilinear")


def not_causal(q, k, v, is_causal, attention=F.scaled_dot_product_attention):
    return attention(q, k, v)


def no_final_norm(model, monkeypatch):
    model.final_layer_norm = nn.Identity()


def last_but_one_layer(model, monkeypatch):
    model.encoder.layers.pop(-1)


FAULTS = {
    "unet": {
        "resnet eps 1e-6": sets(r"resnets\.\d+\.norm", "eps", 1e-6),
        "last norm's eps 1e-6": sets("conv_norm_out", "eps", 1e-6),
        "spatial transformer eps 1e-5": sets(r"attentions\.\d+\.norm$", "eps", 1e-5),
        "layer norm eps 1e-6": sets("transformer_blocks.*norm", "eps", 1e-6),
        "sines first": patches(unet, "timestep_embedding", sines_first),
        "freq_shift 1": patches(unet, "timestep_embedding", frequencies_down_to_the_last),
        "gate first": patches(unet.GEGLU, "forward", gate_first),
        "tanh GELU": patches(F, "gelu", partial(F.gelu, approximate="tanh")),
        "quick GELU": patches(F, "gelu", clip_text.quick_gelu),
        "twice the heads": sets(r"attn\d$", "heads", 8),
        "heads of width 8": heads_of_width_8,
        "pads right and bottom": patches(unet.Downsample, "forward", pads_right_and_bottom),
        "bilinear": patches(F, "interpolate", bilinear),
    },
    "vae": {
        "encoder eps 1e-5": sets("encoder.*norm", "eps", 1e-5),
        "decoder eps 1e-5": sets("decoder.*norm", "eps", 1e-5),
        "last norms' eps 1e-5": sets("conv_norm_out", "eps", 1e-5),
        "attention eps 1e-5": sets("group_norm", "eps", 1e-5),
        "pads all round": patches(vae.Downsample, "forward", pads(1, 1, 1, 1)),
        "pads left and top": patches(vae.Downsample, "forward", pads(1, 0, 1, 0)),
        "bilinear": patches(F, "interpolate", bilinear),
    },
    "text_encoder": {
        "exact GELU": patches(clip_text, "quick_gelu", F.gelu),
        "not causal": patches(F, "scaled_dot_product_attention", not_causal),
        "no final norm": no_final_norm,
        "last but one layer": last_but_one_layer,
        "half the heads": sets("self_attn$", "heads", 2),
        "layer norm eps 1e-6": sets("norm", "eps", 1e-6),
    },
}


FAULTS_BY_PART = [(part, name) for part in FAULTS for name in FAULTS[part]]


@pytest.mark.parametrize("part, fault", FAULTS_BY_PART)
def test_a_fault_shows_in_the_numbers(part, fault, monkeypatch):
    model = copy.deepcopy(MODELS[part])
    FAULTS[part][fault](model, monkeypatch)
    assert parity.difference(part, model) > 10 * TOLERANCE[part]


# ---- published configs and names


@pytest.mark.parametrize("part", MODELS)
def test_published_config_is_the_default(part):
    config, _ = parity.CLASSES[part]
    assert parity.MODULES[part].config_from_json(small.PUBLISHED[part]) == config()


def test_scaling_factor_is_taken_where_the_config_has_one():
    config = vae.config_from_json(small.PUBLISHED["vae"] | {"scaling_factor": 0.5})
    assert config.scaling_factor == 0.5


def test_a_text_encoder_with_another_activation_is_refused():
    """Its shapes are the same, so strict loading wouldn't notice."""
    with pytest.raises(ValueError, match="hidden_act = 'gelu'"):
        clip_text.config_from_json(small.PUBLISHED["text_encoder"] | {"hidden_act": "gelu"})
