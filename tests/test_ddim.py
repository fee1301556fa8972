"""DDIM: the schedule, one step, guidance and whole trajectories, by hand and against diffusers."""

import itertools

import pytest
import torch
from torch import Tensor

import ddim
from support import parity, small

# The schedule is float32: rounded otherwise, as another machine may do, it moves x_0 by 1e-5.
TOLERANCE = 1e-4
TOLERANCE_ON_THE_SAME_SCHEDULE = 1e-12


def tensor(*values: float) -> Tensor:
    """Returns one value per sample, (B, 1, 1, 1)."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None]


# ---- the schedule


def test_fifty_steps_visit_981_to_1():
    assert ddim.timesteps(50) == list(range(981, 0, -20))


@pytest.mark.parametrize("steps", small.TIMESTEPS)
def test_timesteps_equal_the_reference(steps):
    assert ddim.timesteps(steps) == parity.ANSWERS[f"timesteps.{steps}"].tolist()


@pytest.mark.parametrize(
    "steps, times",
    [
        (3, [667, 334, 1]),
        (7, [853, 711, 569, 427, 285, 143, 1]),
        (400, list(range(799, 0, -2))),
    ],
)
def test_steps_that_do_not_divide_1000_have_the_times_of_diffusers(steps, times):
    """CompVis's code takes 4 steps for 3, 8 for 7 and 500 for 400."""
    assert ddim.timesteps(steps) == times


@pytest.mark.parametrize("steps", [1, 2, 400, 499, 500])
def test_timesteps_lie_in_the_schedule(steps):
    times = ddim.timesteps(steps)
    assert len(times) == steps
    assert times == sorted(times, reverse=True)
    assert times[0] < ddim.TRAIN_STEPS
    assert times[-1] == 1


@pytest.mark.parametrize("steps", [-1, 0, 501, 999, 1000])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match=f"{steps}"):
        ddim.timesteps(steps)


def test_abar_falls_from_almost_1_to_almost_0():
    abar = ddim.alphas_cumprod()
    assert abar.shape == (1000,)
    assert abar[0].item() == pytest.approx(0.99915)
    assert (abar.diff() < 0).all()
    assert 0 < abar[-1] < 0.005


def test_abar_equals_the_reference():
    torch.testing.assert_close(ddim.alphas_cumprod(), parity.ANSWERS["abar"], rtol=1e-5, atol=0)


def test_abar_is_on_the_device_that_is_asked_for():
    assert ddim.alphas_cumprod("meta").is_meta


# ---- noise, x_0 and one step; the roots of abar 0.36 and 1 - 0.36 are 0.6 and 0.8


def test_add_noise_by_hand():
    x_t = ddim.add_noise(tensor(1, 2), tensor(3, -1), torch.tensor([0.36, 0.64]))
    torch.testing.assert_close(x_t, tensor(0.6 * 1 + 0.8 * 3, 0.8 * 2 - 0.6 * 1))


def test_add_noise_takes_one_time_for_all():
    x_t = ddim.add_noise(tensor(1, 2), tensor(3, -1), torch.tensor(0.36))
    torch.testing.assert_close(x_t, tensor(0.6 * 1 + 0.8 * 3, 0.6 * 2 - 0.8 * 1))


def test_add_noise_equals_the_reference():
    x_0, noise, t = small.INPUTS["add_noise"]
    x_t = ddim.add_noise(x_0, noise, parity.ANSWERS["abar"].double()[t])  # as diffusers casts it
    assert (x_t - parity.ANSWERS["add_noise"]).abs().max() < TOLERANCE_ON_THE_SAME_SCHEDULE


def test_x_0_by_hand():
    x_0 = ddim.predicted_x_0(tensor(2, 3), tensor(0.5, -1), torch.tensor([0.36, 0.64]))
    torch.testing.assert_close(x_0, tensor((2 - 0.8 * 0.5) / 0.6, (3 + 0.6 * 1) / 0.8))


def test_x_0_undoes_the_forward_process():
    x_0, noise, t = small.INPUTS["add_noise"]
    abar_t = parity.ANSWERS["abar"][t]
    x_t = ddim.add_noise(x_0, noise, abar_t)
    torch.testing.assert_close(ddim.predicted_x_0(x_t, noise, abar_t), x_0)


def test_step_by_hand():
    x_prev = ddim.step(tensor(2), tensor(0.5), torch.tensor(0.36), torch.tensor(0.64))
    x_0 = (2 - 0.8 * 0.5) / 0.6
    torch.testing.assert_close(x_prev, tensor(0.8 * x_0 + 0.6 * 0.5))


def test_step_with_the_true_noise_leads_along_the_forward_process():
    x_0, noise, _ = small.INPUTS["add_noise"]
    late = torch.tensor(0.1, dtype=torch.float64)
    early = torch.tensor(0.7, dtype=torch.float64)
    x_prev = ddim.step(ddim.add_noise(x_0, noise, late), noise, late, early)
    torch.testing.assert_close(x_prev, ddim.add_noise(x_0, noise, early))


ABAR = {"one for all": torch.tensor(0.36), "one for each": torch.tensor([0.36, 0.64, 0.1])}


@pytest.mark.parametrize("kind", ABAR)
@pytest.mark.parametrize("width", [2, 3])
def test_abar_belongs_to_the_samples(kind, width):
    """() or (B,), also where B is W and plain broadcasting would scale columns."""
    x = small.numbers("x", 3, 4, 2, width)
    eps = small.numbers("eps", 3, 4, 2, width)
    each = ABAR[kind].expand(3)
    before = torch.tensor(0.7)

    together = (
        ddim.add_noise(x, eps, ABAR[kind]),
        ddim.predicted_x_0(x, eps, ABAR[kind]),
        ddim.step(x, eps, ABAR[kind], before),
        ddim.step(x, eps, before, ABAR[kind]),
    )
    for i in range(3):
        alone = (
            ddim.add_noise(x[i:i + 1], eps[i:i + 1], each[i]),
            ddim.predicted_x_0(x[i:i + 1], eps[i:i + 1], each[i]),
            ddim.step(x[i:i + 1], eps[i:i + 1], each[i], before),
            ddim.step(x[i:i + 1], eps[i:i + 1], before, each[i]),
        )
        for of_all, of_one in zip(together, alone):
            torch.testing.assert_close(of_all[i:i + 1], of_one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_first_time_has_noise(dtype):
    """abar_0 = 0.99915 rounds to 1 in bfloat16, which would leave no noise at t = 0."""
    abar_0 = ddim.alphas_cumprod()[0]
    x_t = ddim.add_noise(tensor(0).to(dtype), tensor(1).to(dtype), abar_0)
    assert x_t.dtype == dtype
    assert x_t.item() == pytest.approx(0.00085**0.5, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_latents_keep_their_dtype(dtype):
    x = small.numbers("x", 2, 4, 2, 3).to(dtype)
    eps = small.numbers("eps", 2, 4, 2, 3).to(dtype)
    late = torch.tensor([0.1, 0.2])
    early = torch.tensor([0.7, 0.8])
    for abar in (late, late.to(dtype)):
        assert ddim.add_noise(x, eps, abar).dtype == dtype
        assert ddim.predicted_x_0(x, eps, abar).dtype == dtype
        assert ddim.step(x, eps, abar, early).dtype == dtype

    found = ddim.step(x, eps, late, early).double()
    expected = ddim.step(x.double(), eps.double(), late, early)
    rounding = 4 * torch.finfo(dtype).eps + 1e-6  # of two results, and of a float32 abar
    assert (found - expected).abs().max() < rounding * expected.abs().max()


# ---- guidance


@pytest.mark.parametrize("guidance, expected", [(0, 1.0), (1, 3.0), (7.5, 16.0), (-1, -1.0)])
def test_guide_by_hand(guidance, expected):
    assert ddim.guide(tensor(1), tensor(3), guidance) == tensor(expected)


def test_guided_predictor_asks_once_for_both_and_does_not_mix_them_up():
    unet = small.FakeUNet()
    text = torch.full((2, 77, 8), 3.0)
    null = torch.full((2, 77, 8), 1.0)
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    predict = ddim.guided_predictor(unet, text, null, guidance=7.5)
    torch.testing.assert_close(predict(x_t, 981), x_t + 1 + 7.5 * (3 - 1))
    assert unet.calls == [(4, 981)]


# ---- the loop


def trajectory(steps: int) -> Tensor:
    """Returns x_t after every step, (steps, B, 4, H, W)."""
    pairs = list(ddim.denoise(small.toy_eps, *small.INPUTS["denoise"], steps))
    return torch.stack([x_t for _, x_t in pairs[1:]])


def difference(steps: int) -> float:
    return (trajectory(steps) - parity.ANSWERS[f"trajectory.{steps}"]).abs().max().item()


@pytest.mark.parametrize("steps", small.TRAJECTORIES)
def test_trajectories_equal_the_reference(steps):
    assert difference(steps) < TOLERANCE


@pytest.mark.parametrize("steps", small.TRAJECTORIES)
def test_trajectories_equal_the_reference_tightly_on_its_schedule(steps, monkeypatch):
    abar = parity.ANSWERS["abar"].double()  # not every CPU rounds a float32 root alike
    monkeypatch.setattr(ddim, "alphas_cumprod", lambda device: abar)
    assert difference(steps) < TOLERANCE_ON_THE_SAME_SCHEDULE


def test_denoise_yields_the_noise_first_and_the_image_last():
    noise, = small.INPUTS["denoise"]
    pairs = list(ddim.denoise(small.toy_eps, noise, steps=50))
    assert [t for t, _ in pairs] == ddim.timesteps(50) + [0]
    assert all(type(t) is int for t, _ in pairs)
    assert torch.equal(pairs[0][1], noise)


def test_denoise_twice_is_the_same_and_leaves_the_noise_untouched():
    noise = small.INPUTS["denoise"][0].clone()
    assert torch.equal(trajectory(7), trajectory(7))
    assert torch.equal(small.INPUTS["denoise"][0], noise)


@pytest.mark.parametrize("taken", [1, 2, 4])
def test_denoise_computes_a_step_when_its_pair_is_asked_for(taken):
    """So a trajectory can be left early, and a model that changes takes the next step."""
    times = []

    def predict(x_t, t):
        times.append(int(t))
        return x_t

    pairs = ddim.denoise(predict, *small.INPUTS["denoise"], steps=50)
    assert times == []
    assert len(list(itertools.islice(pairs, taken))) == taken
    assert times == ddim.timesteps(50)[:taken - 1]


def test_denoise_gives_predict_the_time_as_a_tensor():
    """A compiled U-Net would be compiled again for each int."""
    def predict(x_t, t):
        assert isinstance(t, Tensor)
        assert t.shape == ()
        assert t.device == x_t.device
        assert not t.is_floating_point()
        return x_t

    assert len(list(ddim.denoise(predict, *small.INPUTS["denoise"], steps=3))) == 4


# ---- faults, which the trajectories must show


def linear_betas(device) -> Tensor:
    betas = torch.linspace(ddim.BETA_START, ddim.BETA_END, ddim.TRAIN_STEPS)
    return torch.cumprod(1 - betas, dim=0)


def abar_ends_at_1(device, alphas_cumprod=ddim.alphas_cumprod) -> Tensor:
    abar = alphas_cumprod()
    abar[0] = 1
    return abar


def no_offset(steps: int, timesteps=ddim.timesteps) -> list[int]:
    return [t - 1 for t in timesteps(steps)]


FAULTS = {
    "betas linear": ("alphas_cumprod", linear_betas),
    "the last step ends at 1": ("alphas_cumprod", abar_ends_at_1),
    "timesteps 980 to 0": ("timesteps", no_offset),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("steps", small.TRAJECTORIES)
def test_a_fault_shows_in_the_trajectory(steps, fault, monkeypatch):
    monkeypatch.setattr(ddim, *FAULTS[fault])
    assert difference(steps) > 10 * TOLERANCE
