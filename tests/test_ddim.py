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
    """One value per sample: (B, 1, 1, 1)."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None]


# ---- the schedule ----

def test_fifty_steps_visit_981_to_1():
    assert ddim.timesteps(50) == list(range(981, 0, -20))


@pytest.mark.parametrize("steps", small.TIMESTEPS)
def test_timesteps_equal_the_reference(steps):
    assert ddim.timesteps(steps) == parity.ANSWERS[f"timesteps.{steps}"].tolist()


@pytest.mark.parametrize("steps", [1, 2, 500, 501, 999])
def test_timesteps_lie_in_the_schedule(steps):
    times = ddim.timesteps(steps)
    assert len(times) == steps
    assert times == sorted(times, reverse=True)
    assert times[0] < ddim.TRAIN_STEPS and times[-1] == 1


@pytest.mark.parametrize("steps", [-1, 0, 1000, 1001])
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


# ---- noise and one step; the roots of abar 0.36 and 1 - 0.36 are 0.6 and 0.8 ----

def test_add_noise_by_hand():
    x_t = ddim.add_noise(tensor(1, 2), tensor(3, -1), torch.tensor([0.36, 0.64]))
    torch.testing.assert_close(x_t, tensor(0.6 * 1 + 0.8 * 3, 0.8 * 2 - 0.6 * 1))


def test_add_noise_takes_one_time_for_all():
    x_t = ddim.add_noise(tensor(1, 2), tensor(3, -1), torch.tensor(0.36))
    torch.testing.assert_close(x_t, tensor(0.6 * 1 + 0.8 * 3, 0.6 * 2 - 0.8 * 1))


def test_add_noise_equals_the_reference():
    x_0, noise, t = small.INPUTS["add_noise"]
    x_t = ddim.add_noise(x_0, noise, parity.ANSWERS["abar"][t])
    assert (x_t - parity.ANSWERS["add_noise"]).abs().max() < TOLERANCE_ON_THE_SAME_SCHEDULE


def test_step_by_hand():
    x_prev = ddim.step(tensor(2), tensor(0.5), tensor(0.36), tensor(0.64))
    x_0 = (2 - 0.8 * 0.5) / 0.6
    torch.testing.assert_close(x_prev, tensor(0.8 * x_0 + 0.6 * 0.5))


def test_step_with_the_true_noise_leads_along_the_forward_process():
    x_0, noise, _ = small.INPUTS["add_noise"]
    late, early = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    x_prev = ddim.step(ddim.add_noise(x_0, noise, late), noise, late, early)
    torch.testing.assert_close(x_prev, ddim.add_noise(x_0, noise, early))


# ---- guidance ----

@pytest.mark.parametrize("guidance, expected", [(0, 1.0), (1, 3.0), (7.5, 16.0), (-1, -1.0)])
def test_guide_by_hand(guidance, expected):
    assert ddim.guide(tensor(1), tensor(3), guidance) == tensor(expected)


def test_guided_asks_once_for_both_and_does_not_mix_them_up():
    unet = small.FakeUNet()
    text, null = torch.full((2, 77, 8), 3.0), torch.full((2, 77, 8), 1.0)
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    eps = ddim.guided(unet, text, null, guidance=7.5)(x_t, 981)
    torch.testing.assert_close(eps, x_t + 1 + 7.5 * (3 - 1))
    assert unet.calls == [(4, 981)]


# ---- the loop ----

def trajectory(steps: int) -> Tensor:
    """x_t after every step, (steps, B, 4, H, W)."""
    pairs = list(ddim.denoise(small.toy_eps, *small.INPUTS["denoise"], steps))
    return torch.stack([x_t for _, x_t in pairs[1:]])


def difference(steps: int) -> float:
    return (trajectory(steps) - parity.ANSWERS[f"trajectory.{steps}"]).abs().max().item()


@pytest.mark.parametrize("steps", small.TRAJECTORIES)
def test_trajectories_equal_the_reference(steps):
    assert difference(steps) < TOLERANCE


@pytest.mark.parametrize("steps", small.TRAJECTORIES)
def test_trajectories_equal_the_reference_tightly_on_its_schedule(steps, monkeypatch):
    monkeypatch.setattr(ddim, "alphas_cumprod", lambda: parity.ANSWERS["abar"])
    assert difference(steps) < TOLERANCE_ON_THE_SAME_SCHEDULE


def test_denoise_yields_the_noise_first_and_the_image_last():
    noise, = small.INPUTS["denoise"]
    pairs = list(ddim.denoise(small.toy_eps, noise, steps=50))
    assert [t for t, _ in pairs] == ddim.timesteps(50) + [0]
    assert torch.equal(pairs[0][1], noise)


def test_denoise_twice_is_the_same_and_leaves_the_noise_untouched():
    noise = small.INPUTS["denoise"][0].clone()
    assert torch.equal(trajectory(7), trajectory(7))
    assert torch.equal(small.INPUTS["denoise"][0], noise)


@pytest.mark.parametrize("taken", [1, 2, 4])
def test_denoise_computes_only_the_steps_that_are_asked_for(taken):
    asked = []

    def predict(x_t, t):
        asked.append(t)
        return x_t

    pairs = ddim.denoise(predict, *small.INPUTS["denoise"], steps=50)
    assert len(list(itertools.islice(pairs, taken))) == taken
    assert asked == ddim.timesteps(50)[:taken - 1]


# ---- faults, which the trajectories must show ----

def linear_betas() -> Tensor:
    betas = torch.linspace(ddim.BETA_START, ddim.BETA_END, ddim.TRAIN_STEPS)
    return torch.cumprod(1 - betas, dim=0)


def abar_ends_at_1(alphas_cumprod=ddim.alphas_cumprod) -> Tensor:
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
