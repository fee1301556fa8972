"""The published weights, compared with numbers that others recorded with them.

    python -m pytest tests/test_official.py --weights PATH      # anything that sample.load takes

Skipped without --weights: they are 4 GB. The DDIM image is v1-4's; the other two numbers are the
same for every Stable Diffusion v1.
"""

import numpy as np
import pytest
import torch

import ddim
import sample

# diffusers, tests/pipelines/stable_diffusion/test_stable_diffusion.py, test_stable_diffusion_ddim:
# image[0, -3:, -3:, -1] after 3 steps, guidance 7.5
IMAGE = [0.38019, 0.28647, 0.27321, 0.40377, 0.38290, 0.35446, 0.39218, 0.38165, 0.42239]

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
         "gaussian_noise_s={}_shape=3_4_64_64.npy")
DECODED = {
    13: [-0.2051, -0.1803, -0.2311, -0.2114, -0.3292, -0.3574, -0.2953, -0.3323],
    37: [-0.2632, -0.2625, -0.2199, -0.2741, -0.4539, -0.4990, -0.3720, -0.4925],
}


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


def test_the_image_after_three_steps(sd):
    noise = np.random.RandomState(0).standard_normal((1, 4, 64, 64))
    x_t = torch.from_numpy(noise).float()
    text, null = sd.encode(["a photograph of an astronaut riding a horse"]), sd.encode([""])
    with torch.no_grad():
        for _, x_t in ddim.denoise(ddim.guided(sd.unet, text, null, 7.5), x_t, 3):
            pass
        image = sd.vae.decode(x_t / sd.vae.config.scaling_factor)
    pixels = (image / 2 + 0.5).clamp(0, 1)[0, -1, -3:, -3:].flatten()
    assert pixels.tolist() == pytest.approx(IMAGE, abs=1e-4)


@pytest.mark.parametrize("seed", DECODED)
def test_decoded_noise(sd, seed, request):
    """The noise was drawn on a GPU, so it must come as a file: --noise FOLDER."""
    folder = request.config.getoption("--noise")
    if folder is None:
        pytest.skip(f"needs --noise FOLDER with {NOISE.format(seed)}")
    noise = np.load(f"{folder}/gaussian_noise_s={seed}_shape=3_4_64_64.npy")
    with torch.no_grad():
        image = sd.vae.decode(torch.from_numpy(noise).float())
    assert image[-1, -2:, :2, -2:].flatten().tolist() == pytest.approx(DECODED[seed], abs=1e-3)
