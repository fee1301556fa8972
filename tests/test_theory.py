"""What Eq. 6 draws: formulas against our own sampler, on mixtures whose eps is exact.

Symbols as in notebooks/methods/plane.py; d = eps_c - eps_null; tau = (1 - abar) / abar, the
variance of the noise in x_t / sqrt(abar_t).
"""

from functools import partial

import pytest
import torch
from torch import Generator, Tensor

import ddim
import erase
import sample
from notebooks.methods import esd_odds, keep_empty_prompt, plane
from support import commands

exact = partial(torch.tensor, dtype=torch.float64)

# one dimension
S = 1.0  # the variance of everything
C = 0.6  # and of the concept
LINE = plane.Mixture(means=exact([[0], [0]]), variances=exact([S, C]))
LINE_NULL = exact([1, 0])
LINE_CONCEPT = exact([0, 1])

# two dimensions: five Gaussians of which the first is the concept
PLANE = plane.Mixture(
    means=exact([[0, 0], [2.5, 0], [-2, 1.5], [-1, -2.5], [4.5, 2]]),
    variances=torch.full((5,), 0.15, dtype=torch.float64),
)
CONCEPT = exact([1, 0, 0, 0, 0])
OTHERS = exact([0, 1, 1, 1, 1]) / 4
NULL = (CONCEPT + 4 * OTHERS) / 5
POINTS = 4000


def random(*shape: int, seed: int = 0) -> Tensor:
    rng = Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def tau_of(abar_t: Tensor) -> Tensor:
    return (1 - abar_t) / abar_t


# ---- one dimension


def kept_variance(tau: Tensor, eta: Tensor) -> Tensor:
    """The variance of x_t / sqrt(abar_t) that DDIM keeps to, once x_t has it."""
    return (S + tau) ** (1 + eta) / (C + tau) ** eta


def variance_drawn_by_ddim(eta: Tensor, steps: int) -> Tensor:
    """Returns the variance of x_0 for each eta, (N,).

    DDIM is linear here, so one sample, a standard deviation from the mean, is enough. What
    is left to do from t = 0, where tau isn't quite 0, follows from `kept_variance`.
    """
    predict = plane.erased_predictor(
        LINE, LINE_CONCEPT, null=LINE_NULL, eta=eta.view(-1, 1, 1, 1)
    )
    first = plane.abar(ddim.timesteps(steps)[0])
    last = plane.abar(0)
    start = first.sqrt() * kept_variance(tau_of(first), eta).sqrt()
    x_0 = plane.draw(predict, start.view(-1, 1, 1, 1), steps=steps)[:, 0]

    to_no_noise = kept_variance(exact(0), eta) / kept_variance(tau_of(last), eta)
    return x_0.square() / last * to_no_noise


def test_the_variance_that_ddim_draws():
    """S (S/C)^eta, finite even for eta 3, where Eq. 4's density doesn't exist.

    Eta -1 draws the concept, and 0 the empty prompt.
    """
    eta = exact([-1, 0, 1, 3])
    expected = S * (S / C) ** eta
    torch.testing.assert_close(expected, exact([C, S, 1.667, 4.630]), rtol=0, atol=1e-3)

    coarse = variance_drawn_by_ddim(eta, steps=250)
    fine = variance_drawn_by_ddim(eta, steps=500)
    without_steps = 2 * fine - coarse  # the error halves with the step
    torch.testing.assert_close(without_steps, expected, rtol=1e-3, atol=0)
    assert ((fine - expected).abs() < (coarse - expected).abs()).all()


def ddpm_integral(eta: Tensor) -> Tensor:
    """Returns the integral over tau of (S/(S+tau))^(2+2 eta) ((C+tau)/C)^(2 eta), (N,)."""
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1, None]
    tau = u / (1 - u)
    noise = (S / (S + tau)) ** (2 + 2 * eta) * ((C + tau) / C) ** (2 * eta)
    return torch.trapezoid(noise / (1 - u).square(), u, dim=0)


def test_the_variance_that_ddpm_draws():
    """The integral; and steps of DDPM, each of which scales the variance and adds to it."""
    eta = exact([0, 1, 3])
    expected = exact([S, 1.815, 7.440])
    torch.testing.assert_close(ddpm_integral(eta), expected, rtol=0, atol=1e-3)

    predict = plane.erased_predictor(
        LINE, LINE_CONCEPT, null=LINE_NULL, eta=eta.view(-1, 1, 1, 1)
    )
    ones = torch.ones(3, 1, 1, 1, dtype=torch.float64)
    variance = torch.ones(3, dtype=torch.float64)
    for t in range(999, 0, -1):
        abar_t = plane.abar(t)
        abar_prev = plane.abar(t - 1)
        added = (1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)  # DDIM, eq. 16
        eps = predict(ones, torch.tensor(t))
        x_0 = ddim.predicted_x_0(ones, eps, abar_t)
        mean = abar_prev.sqrt() * x_0 + (1 - abar_prev - added).sqrt() * eps  # eq. 12
        variance = mean.flatten().square() * variance + added
    torch.testing.assert_close(variance, expected, rtol=0.015, atol=0)


# ---- two dimensions


def log_eq_4(x: Tensor, abar_t: Tensor, eta: float) -> Tensor:
    """Eq. 4 at each noise: log of p_t (p_t / r_t)^eta, not normalized, (N,)."""
    log_p = PLANE.log_density(x, abar_t, NULL)
    return log_p + eta * (log_p - PLANE.log_density(x, abar_t, CONCEPT))


@pytest.mark.parametrize("eta", [0.5, 1])
def test_eq_4_has_all_its_weight_on_the_farthest_component(eta):
    """It is around m_k = mu_k + eta (mu_k - mu_c), which for eta 1 is (9, 4)."""
    axis = torch.arange(-8, 14, 0.1, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    weights = log_eq_4(grid[:, :, None, None], exact(1), eta).softmax(dim=0)

    mean = weights @ grid
    variance = weights @ (grid - mean).square()
    torch.testing.assert_close(mean, (1 + eta) * PLANE.means[4], rtol=0, atol=1e-2)
    torch.testing.assert_close(variance, PLANE.variances[:2], rtol=0, atol=1e-2)


@pytest.mark.parametrize("eta", [-1, 0, 0.5, 1, 3])
def test_eq_4_at_each_noise_is_no_noised_density(eta):
    """d_tau q = 1/2 Lap q - 1/2 eta (1 + eta) |grad log p_tau(c|x)|^2 q, here divided by q.

    The last term is 0 for eta -1, the concept, and 0, the empty prompt, alone.
    """

    def scaled(y: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and abar_t of y = x_t / sqrt(abar_t)."""
        abar_t = 1 / (1 + tau)
        return (abar_t.sqrt() * y).view(1, 2, 1, 1), abar_t

    def log_q(y: Tensor, tau: Tensor) -> Tensor:
        x_t, abar_t = scaled(y, tau)
        return log_eq_4(x_t, abar_t, eta)[0] + abar_t.log()  # y's is abar_t times x_t's

    def log_posterior(y: Tensor, tau: Tensor) -> Tensor:
        x_t, abar_t = scaled(y, tau)
        log_r = PLANE.log_density(x_t, abar_t, CONCEPT)
        return (log_r - PLANE.log_density(x_t, abar_t, NULL))[0]

    tau = exact(0.7)
    for y in 2 * random(5, 2):
        gradient, slope = torch.func.grad(log_q, argnums=(0, 1))(y, tau)
        curvature = torch.func.jacrev(torch.func.grad(log_q))(y, tau).trace()
        laplacian = curvature + gradient.square().sum()  # of q, divided by q
        term = torch.func.grad(log_posterior)(y, tau).square().sum()
        torch.testing.assert_close(slope, laplacian / 2 - eta * (1 + eta) / 2 * term)
        assert term > 1e-3  # else there would be nothing to see


def shares(x_0: Tensor) -> Tensor:
    """Returns the share of points within 3 sigma of each mean, and outside of all, (K + 1,)."""
    distances = torch.cdist(x_0, PLANE.means)  # (N, K)
    nearest = distances.argmin(dim=1)
    nearest[distances.amin(dim=1) > 3 * PLANE.variances[0].sqrt()] = len(PLANE.means)
    return nearest.bincount(minlength=len(PLANE.means) + 1) / POINTS


def drawn(predict) -> Tensor:
    return plane.draw(predict, random(POINTS, 2, 1, 1), steps=200)


def assert_shares(found: Tensor, expected: list[float]) -> None:
    """Within three standard errors, and half a unit of the last digit."""
    expected = exact(expected)
    error = (expected * (1 - expected) / POINTS).sqrt()
    assert ((found - expected).abs() < 3 * error + 5e-4).all(), found


def test_the_exact_model_draws_what_the_mixture_holds():
    """Not quite .2 each: the first x_t is noise alone, as if there were no image in it."""
    found = shares(drawn(partial(PLANE, c=NULL)))
    assert_shares(found, [0.203, 0.204, 0.193, 0.218, 0.171, 0.011])


def test_eq_6_draws_between_the_components():
    found = shares(drawn(plane.erased_predictor(PLANE, CONCEPT, null=NULL, eta=1.0)))
    assert_shares(found, [0.029, 0.012, 0.012, 0.008, 0.003, 0.937])


def test_eta_as_the_posterior_odds_draws_what_a_model_without_the_concept_draws():
    odds = partial(plane.odds, model=PLANE, c=CONCEPT, null=NULL, prior=0.2)
    erased = drawn(plane.erased_predictor(PLANE, CONCEPT, null=NULL, eta=odds))
    never_saw = drawn(partial(PLANE, c=OTHERS))
    torch.testing.assert_close(shares(erased), shares(never_saw), rtol=0, atol=0.015)
    torch.testing.assert_close(erased, never_saw)  # point by point

    assert_shares(shares(erased), [0.000, 0.255, 0.248, 0.269, 0.217, 0.011])


def test_the_posterior_by_bayes():
    """Two prompts that share a Gaussian, as with wrong captions."""
    c = 0.9 * CONCEPT + 0.1 * NULL
    x_t = random(6, 2, 1, 1)
    odds = plane.odds(x_t, torch.tensor(300), PLANE, c=c, null=NULL, prior=0.2)

    variance = plane.abar(300) * 0.15 + 1 - plane.abar(300)
    offsets = x_t[:, None, :, 0, 0] - plane.abar(300).sqrt() * PLANE.means
    likelihoods = (-offsets.square().sum(dim=2) / (2 * variance)).exp()  # (N, K), scaled
    expected = 0.2 * (likelihoods @ c) / (likelihoods @ NULL)
    torch.testing.assert_close((odds / (1 + odds)).flatten(), expected)


# ---- training, and guidance


def test_the_direction_of_the_first_gradient_doesnt_depend_on_eta(sd):
    """Its length is (1 + eta) times a constant. Adam doesn't see that."""
    theta = erase.trainable_copies(sd.unet, "esd-x")
    unet = erase.with_theta(sd.unet, theta)
    (text,) = erase.texts_for(sd, ["a star"], batch=2)
    x_t = random(2, *sd.latent_shape).float()

    gradients = {}
    for eta in (0, 1, 3):
        loss = erase.esd_loss(unet, sd.unet, x_t, torch.tensor([1, 501]), text, eta).mean()
        parts = torch.autograd.grad(loss, [*theta.values()])
        gradients[eta] = torch.cat([part.flatten() for part in parts])
    assert gradients[0].norm() > 1e-6
    for eta, gradient in gradients.items():
        difference = gradient - (1 + eta) * gradients[0]
        assert difference.norm() < 1e-4 * gradient.norm()


def test_a_negative_prompt_equal_to_the_prompt_is_the_prompt(sd):
    generated = partial(sample.generate, sd, ["a star"], num=2, steps=3)
    the_prompt = generated(guidance=1)
    assert commands.difference(the_prompt, generated(negative="a star")) <= 1
    assert commands.difference(the_prompt, generated(negative="a moon")) > 1


@pytest.mark.parametrize("eta", [0.5, 1, 2])
def test_with_the_running_model_as_its_own_teacher(eta):
    """The fixed point is eps_null for every eta; eta 1 oscillates, more than 1 diverges."""
    eps_null, eps_c = random(2, 3, 4, 8, 8)
    torch.testing.assert_close(erase.esd_target(eps_null, eps_null, eta), eps_null)

    eps = eps_c
    for _ in range(9):  # an odd number: each turns the difference round
        eps = erase.esd_target(eps_null, eps, eta)
    torch.testing.assert_close(eps - eps_null, (-eta) ** 9 * (eps_c - eps_null))


def test_the_guidance_law():
    """kappa(g) = m_0 + g (1 + m_c - m_0), from what training moved along d, and across it."""
    eps_null, eps_c, across_null, across_c = random(4, 4, 8, 8)
    d = eps_c - eps_null
    m_c, m_0 = random(2, seed=1)

    def along_d(eps: Tensor) -> Tensor:
        return (eps * d).sum() / d.square().sum()

    across_null = across_null - along_d(across_null) * d
    across_c = across_c - along_d(across_c) * d
    moved_null = eps_null + m_0 * d + across_null
    moved_c = eps_c + m_c * d + across_c
    for guidance in (1, 3, 7.5):
        eps = ddim.guide(moved_null, moved_c, guidance)
        kappa = m_0 + guidance * (1 + m_c - m_0)
        torch.testing.assert_close(along_d(eps - eps_null), kappa)


def test_a_common_movement_brings_the_concept_back_with_guidance():
    """Eq. 6 is reached; from the share .58 of it that is common on, kappa(7.5) > 0 for eta 1."""
    eta = 1
    guidance = 7.5
    threshold = guidance * eta / ((1 + eta) * (guidance - 1))
    assert threshold == pytest.approx(0.58, abs=0.005)

    eps_null, eps_c = random(2, 4, 8, 8)
    d = eps_c - eps_null
    for share, comes_back in ((threshold - 0.01, False), (threshold + 0.01, True)):
        moved_null = eps_null - share * (1 + eta) * d
        moved_c = erase.esd_target(eps_null, eps_c, eta)
        kappa = ((ddim.guide(moved_null, moved_c, guidance) - eps_null) * d).sum()
        assert (kappa > 0) == comes_back


# ---- the empty prompt's prediction is kept


def features(batch: int, *values: float) -> list[Tensor]:
    """Returns text features, one tensor for each value."""
    return [torch.full((batch, 77, 8), value) for value in values]


def test_the_loss_that_keeps_the_empty_prompt_by_hand():
    """The teacher predicts 3 for the concept and 1 for null, the student 0.5 and 5 more."""
    text = erase.Text(*features(2, 3.0, 1.0, 10.0))
    calls = []

    def teacher(x_t, t, c):
        assert not torch.is_grad_enabled()
        calls.append(c.flatten()[0].item())
        return torch.ones_like(x_t) * c[:, :1, :1, None]

    def student(x_t, t, c):
        assert torch.is_grad_enabled()
        more = torch.tensor([0.5, 5.0])[:, None, None, None]
        return torch.ones_like(x_t) * c[:, :1, :1, None] + more

    loss = keep_empty_prompt.loss(
        student, teacher, torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), text,
        eta=2.0, weight=0.1,
    )
    target = 1 - 2 * (3 - 1)
    expected = [(3 + more - target) ** 2 + 0.1 * more**2 for more in (0.5, 5.0)]
    assert loss.tolist() == pytest.approx(expected)
    assert sorted(calls) == [1.0, 3.0]  # the teacher's null is used twice


def test_with_weight_0_it_is_esd_and_it_runs_by_its_name(sd):
    loss_fn = erase.find_function("--loss", "notebooks.methods.keep_empty_prompt:loss")
    erased = partial(
        erase.erase, sd, ["star"], method="esd-u", lr=1e-3, iterations=2,
        data=partial(erase.x_t_from_model, steps=2, every_step=True),
    )
    esd = erased()
    same = erased(loss_fn=partial(loss_fn, weight=0.0))
    kept = erased(loss_fn=loss_fn)
    assert all(torch.allclose(same[name], esd[name], atol=1e-5) for name in esd)
    assert any((kept[name] - esd[name]).abs().max() > 1e-4 for name in esd)


# ---- the posterior odds as eta, estimated


@pytest.mark.parametrize("t", [101, 501, 993])
def test_the_log_ratio_comes_out_of_eps_alone(t):
    """Against the exact one; the shorter the jumps, the nearer. At 993, some are empty."""
    x_t = random(200, 2, 1, 1) + 1
    times = torch.full((200,), t)
    log_r = PLANE.log_density(x_t, plane.abar(times), CONCEPT)
    expected = log_r - PLANE.log_density(x_t, plane.abar(times), NULL)

    def error(jumps: int) -> Tensor:
        found = esd_odds.log_ratio(
            PLANE, x_t, times, c=CONCEPT, null=NULL, jumps=jumps
        )
        return (found - expected).abs().median()

    of_short_jumps = error(jumps=200)
    assert of_short_jumps < 0.1 * expected.abs().median() + 0.1
    assert of_short_jumps < error(jumps=8) / 3 or t == 993


def test_a_jump_adds_the_ratio_of_ddpms_gaussians():
    """Their means by way of x_0 (DDIM, eq. 12 and 16), for predictions that are the text."""
    x_t, eps_null, eps_c = random(3, 4, 2, 1, 1).float()
    noise = torch.randn(4, 2, 1, 1, generator=Generator().manual_seed(0))
    abar_s, abar_next = ddim.alphas_cumprod()[[301, 999]]
    x_next = ddim.add_noise(x_t, noise, abar_next / abar_s)
    variance = (1 - abar_s) / (1 - abar_next) * (1 - abar_next / abar_s)

    def log_of_the_way_back(eps: Tensor) -> Tensor:
        x_0 = ddim.predicted_x_0(x_next, eps, abar_next)
        mean = abar_s.sqrt() * x_0 + (1 - abar_s - variance).sqrt() * eps
        normal = torch.distributions.Normal(mean, variance.sqrt())
        return normal.log_prob(x_t).sum(dim=(1, 2, 3))

    found = esd_odds.log_ratio(
        lambda x_t, t, c: c, x_t, torch.full((4,), 301), c=eps_c, null=eps_null, jumps=1
    )
    expected = log_of_the_way_back(eps_c) - log_of_the_way_back(eps_null)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_with_the_odds_eq_6_asks_for_the_model_that_never_saw_the_concept():
    """Its loss is near 0, that of the empty prompt isn't, and eta 1 asks for neither."""
    text = erase.Text(CONCEPT, NULL, anchor=CONCEPT)
    batch = erase.Batch(random(200, 2, 1, 1), torch.full((200,), 301), text)
    never_saw = partial(PLANE, c=OTHERS)

    def median_loss(student, loss_fn=erase.esd_loss) -> float:
        return loss_fn(lambda x_t, t, c: student(x_t, t), PLANE, *batch).median().item()

    loss_fn = partial(esd_odds.loss, prior=0.2, largest=1e6, jumps=300)
    assert median_loss(never_saw, loss_fn) < 0.03
    assert median_loss(partial(PLANE, c=NULL), loss_fn) > 0.3
    assert median_loss(never_saw) > 0.3


def test_the_odds_have_a_limit(monkeypatch):
    """Whatever the ratio is; and eta is a factor of them."""
    ratios = torch.tensor([-200.0, 0.0, 200.0])
    monkeypatch.setattr(esd_odds, "log_ratio", lambda *_, **__: ratios)
    text = erase.Text(*features(3, 3.0, 1.0, 3.0))

    def predicts_the_text(x_t, t, c):
        return torch.ones_like(x_t) * c[:, :1, :1, None]

    found = esd_odds.loss(
        predicts_the_text, predicts_the_text, torch.zeros(3, 4, 8, 8), torch.ones(3), text,
        eta=2.0, prior=0.2, largest=3.0,
    )
    odds = [0, 0.25, 3]
    expected = [(3 - (1 - 2 * each * (3 - 1))) ** 2 for each in odds]
    assert found.tolist() == pytest.approx(expected)
