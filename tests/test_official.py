"""The published weights, compared with numbers that others recorded with them.

    python -m pytest tests/test_official.py --weights PATH --noise FOLDER -rs

Skipped without --weights (4 GB, a folder in diffusers' layout) and without the arrays in FOLDER,
whose addresses -rs prints. The DDIM images are v1-4's (v1-5's differ), the U-Net's numbers v1-4's
or v1-5's; those of the text encoder and the VAE are the same for every Stable Diffusion v1.
"""

import numpy as np
import pytest
import torch

import ddim
import sample

# diffusers, tests/pipelines/stable_diffusion/test_stable_diffusion.py, test_stable_diffusion_ddim:
# image[0, -3:, -3:, -1] after 3 steps, guidance 7.5, recorded on a GPU
IMAGE = [0.38019, 0.28647, 0.27321, 0.40377, 0.38290, 0.35446, 0.39218, 0.38165, 0.42239]

# the same, the whole image after 50 steps: the maintainers allow a difference of 3e-3
FIFTY_STEPS = ("https://huggingface.co/datasets/diffusers/test-arrays/resolve/main/"
               "stable_diffusion_text2img/stable_diffusion_1_4_ddim.npy")

# printed in public notebooks that follow fast.ai's "Stable Diffusion Deep Dive": the last hidden
# state of "A picture of a puppy", token -> its first three and last three numbers
PUPPY = {
    0: [-0.3884, 0.0229, -0.0522, -0.4899, -0.3066, 0.0675],
    1: [0.0290, -1.3258, 0.3085, -0.5257, 0.9768, 0.6652],
    2: [0.6942, 0.3538, 1.0991, -1.5716, -1.2643, -0.0121],
    74: [-0.0221, -0.0053, -0.0089, -0.7303, -1.3830, -0.3011],
    75: [-0.0062, -0.0246, 0.0065, -0.7326, -1.3745, -0.2953],
    76: [-0.0536, 0.0269, 0.0444, -0.7159, -1.3634, -0.3075],
}

# diffusers, tests/models/autoencoders/test_models_autoencoder_kl.py, test_stable_diffusion_decode:
# sample[-1, -2:, :2, -2:] for the seed of a noise that is on the hub under this name
NOISE = ("https://huggingface.co/datasets/fusing/diffusers-testing/resolve/main/"
         "gaussian_noise_s={}_shape={}.npy")
DECODED = {
    13: [-0.2051, -0.1803, -0.2311, -0.2114, -0.3292, -0.3574, -0.2953, -0.3323],
    37: [-0.2632, -0.2625, -0.2199, -0.2741, -0.4539, -0.4990, -0.3720, -0.4925],
}


# diffusers, tests/models/unets/test_models_unet_2d_condition.py, test_compvis_sd_v1_4 and _v1_5:
# sample[-1, -2:, -2:, :2] for noises of these seeds as latents and as text features, at time t (it
# says 0.55 and 0.89 in two places, and makes them integers, 0)
UNET = {
    (33, 4): (
        [-0.4424, 0.1510, -0.1937, 0.2118, 0.3746, -0.3957, 0.0160, -0.0435],
        [-0.4430, 0.1570, -0.1867, 0.2376, 0.3205, -0.3681, 0.0525, -0.0722],
    ),
    (47, 0): (
        [-0.1508, 0.0379, -0.3075, 0.2540, 0.3633, -0.0821, 0.1719, -0.0207],
        [-0.1415, 0.0129, -0.3136, 0.2257, 0.3430, -0.0536, 0.2114, -0.0436],
    ),
    (21, 0): (
        [-0.6479, 0.6364, -0.3464, 0.8697, 0.4443, -0.6289, -0.0091, 0.1778],
        [-0.7091, 0.6664, -0.3643, 0.9032, 0.4499, -0.6541, 0.0139, 0.1750],
    ),
    (9, 1000): (
        [0.8888, -0.5659, 0.5834, -0.7469, 1.1912, -0.3923, 1.1241, -0.4424],
        [0.8878, -0.5659, 0.5844, -0.7442, 1.1883, -0.3927, 1.1192, -0.4423],
    ),
}

# from the decoder's file above, test_stable_diffusion_mode: sample[-1, -2:, -2:, :2] of a noise
# that is treated as an image, encoded to the mean, and decoded
MODE = [-0.1609, 0.9866, -0.0487, -0.0777, -0.2716, 0.8368, -0.2055, -0.0814]


@pytest.fixture(scope="module")
def sd(request):
    weights = request.config.getoption("--weights")
    if weights is None:
        pytest.skip("needs --weights PATH, the published weights")
    return sample.load(weights, device="cpu", dtype="float32")


def test_text_features(sd):
    features = sd.encode(["A picture of a puppy"])[0]
    for token, expected in PUPPY.items():
        found = torch.cat([features[token, :3], features[token, -3:]])
        assert found.tolist() == pytest.approx(expected, abs=1e-3), token


@torch.no_grad()
def astronaut(sd, steps):
    """Returns the image that diffusers' tests draw, (1, 3, 512, 512) in 0..1."""
    noise = np.random.RandomState(0).standard_normal((1, 4, 64, 64))
    x_t = torch.from_numpy(noise).float()
    text = sd.encode(["a photograph of an astronaut riding a horse"])
    null = sd.encode([""])

    predict = ddim.guided_predictor(sd.unet, text, null, guidance=7.5)
    for _, x_t in ddim.denoise(predict, x_t, steps):
        pass  # to the end: x_t is the image now
    image = sd.vae.decode(x_t / sd.vae.config.scaling_factor)
    return (image / 2 + 0.5).clamp(0, 1)


def test_the_image_after_three_steps(sd):
    pixels = astronaut(sd, 3)[0, -1, -3:, -3:].flatten()
    assert pixels.tolist() == pytest.approx(IMAGE, abs=3e-3)


@pytest.fixture
def stored(request):
    """Reads a published array from --noise FOLDER, or skips the test."""
    folder = request.config.getoption("--noise")

    def load(url):
        if folder is None:
            pytest.skip(f"needs --noise FOLDER with {url}")
        return torch.from_numpy(np.load(f"{folder}/{url.rpartition('/')[2]}")).float()

    return load


@pytest.fixture
def noise(stored):
    """Reads a published noise by its seed and shape."""

    def load(seed, *shape):
        return stored(NOISE.format(seed, "_".join(map(str, shape))))

    return load


def test_the_image_after_fifty_steps(sd, stored):
    expected = stored(FIFTY_STEPS)  # (512, 512, 3)
    assert (astronaut(sd, 50)[0].permute(1, 2, 0) - expected).abs().max() < 3e-3


@torch.no_grad()
@pytest.mark.parametrize("seed, t", UNET)
def test_the_unet_of_v1_4_or_v1_5(sd, seed, t, noise):
    eps = sd.unet(noise(seed, 4, 4, 64, 64), t, noise(seed, 4, 77, 768))
    found = eps[-1, -2:, -2:, :2].flatten().tolist()
    assert any(found == pytest.approx(expected, abs=1e-3) for expected in UNET[seed, t]), found


@torch.no_grad()
def test_an_encoded_and_decoded_noise(sd, noise):
    mean, _ = sd.vae.encode(noise(33, 4, 3, 512, 512)[-1:])
    image = sd.vae.decode(mean)
    found = image[-1, -2:, -2:, :2].flatten()
    assert found.tolist() == pytest.approx(MODE, abs=3e-3)


@pytest.mark.parametrize("seed", DECODED)
def test_decoded_noise(sd, seed, noise):
    with torch.no_grad():
        image = sd.vae.decode(noise(seed, 3, 4, 64, 64))
    found = image[-1, -2:, :2, -2:].flatten()
    assert found.tolist() == pytest.approx(DECODED[seed], abs=1e-3)
