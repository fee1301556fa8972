"""notebooks/methods/probes.py: each attack against what it says it is."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Generator

import ddim
import sample
from notebooks.methods import probes
from support.commands import pixels

PROMPT = "a star"


@pytest.fixture(scope="module")
def images(sd):
    return sample.generate(sd, ["a heart", "a moon"], num=2, steps=2)


class Unet(torch.nn.Module):
    """Predicts what a function of (x_t, t, text) says."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps
        self.conv_in = torch.nn.Conv2d(1, 1, 1)  # whose device is the model's

    def forward(self, x_t, t, text):
        return self.eps(x_t, t, text)


# ---- images, noised; and drawing


def test_noised_images_are_the_forward_process(sd, images):
    latents = sd.encode_images(images)
    abar = ddim.alphas_cumprod()
    times = []
    used = set()
    for x_t, t, eps in itertools.islice(probes.noised_images(sd, images, batch=3), 50):
        a = abar[t][:, None, None, None]
        x_0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
        distances = (x_0[:, None] - latents[None]).flatten(2).abs().amax(dim=2)  # (3, images)
        assert (distances.amin(dim=1) < 1e-3 / abar[t].sqrt()).all()
        used.update(distances.argmin(dim=1).tolist())
        times += t.tolist()
    assert used == {*range(len(images))}
    assert min(times) < 50
    assert max(times) > 950
    assert len(set(times)) > 100


def test_noised_images_depend_on_the_seed(sd, images):
    first, again = (next(probes.noised_images(sd, images, batch=3)) for _ in range(2))
    other = next(probes.noised_images(sd, images, batch=3, seed=1))
    assert torch.equal(first.x_t, again.x_t)
    assert not torch.equal(first.x_t, other.x_t)


def test_the_denoising_error_by_hand():
    """Off by 2 everywhere; the weight is 1 where the image is faint, 5 / SNR where it is clear."""
    t = torch.tensor([0, 999])
    x_t = torch.zeros(2, 4, 8, 8)
    snr = [abar / (1 - abar) for abar in ddim.alphas_cumprod()[t].tolist()]
    assert snr[0] > 5 > snr[1]

    error = probes.denoising_error(
        lambda x_t, t, text: x_t + text[:, :1, :1, None],
        text=torch.full((1, 77, 8), 3.0),
        batch=probes.NoisedImages(x_t, t, eps=torch.ones_like(x_t)),
    )
    assert error.item() == pytest.approx(2**2 * (5 / snr[0] + 1) / 2)


def test_an_image_is_drawn_as_generate_draws_it(sd):
    settings = {"steps": 3, "guidance": 4.0}
    drawn = probes.draw(sd, sd.encode([PROMPT]), probes.noise(sd, [5, 9]), **settings)
    generated = sample.generate(sd, [PROMPT] * 2, seed=[5, 9], **settings)
    assert torch.equal(pixels(drawn), pixels(generated))


def test_what_is_skipped_is_taken_as_done(sd):
    text, null = sd.encode([PROMPT]), sd.encode([""])
    noise = probes.noise(sd, [5])
    with torch.no_grad():
        predict = ddim.guided_predictor(sd.unet, text, null, guidance=5.0)
        trajectory = [x_t for _, x_t in ddim.denoise(predict, noise, 4)]

    whole = probes.draw(sd, text, noise, steps=4)
    from_third = probes.draw(sd, text, trajectory[3], steps=4, skip=3)
    from_second = probes.draw(sd, text, trajectory[2], steps=4, skip=3)
    assert torch.equal(pixels(from_third), pixels(whole))
    assert not torch.equal(pixels(from_second), pixels(whole))


def test_the_unet_gets_the_time_as_a_tensor(sd):
    """An int would make a compiled U-Net compile again at each step."""
    times = []

    def zero(x_t, t, text):
        times.append(t)
        return 0 * x_t

    probes.draw(replace(sd, unet=Unet(zero)), sd.encode([PROMPT]), probes.noise(sd, [5]), steps=2)
    assert all(isinstance(t, torch.Tensor) for t in times)
    assert [t.item() for t in times] == [501, 1]


def test_the_noise_that_is_added_is_ddims_own(sd, monkeypatch):
    """An eps of zero leaves what was added; DDIM, eq. 16 with eta = 1, is a DDPM step's variance.

    None is added in the last step, whose result is the image.
    """
    latents = []
    monkeypatch.setattr(sample.StableDiffusion, "decode", lambda sd, x: latents.append(x))
    zero = replace(sd, unet=Unet(lambda x_t, *_: 0 * x_t))
    x_t = torch.zeros(64, 4, 8, 8)
    for amount in (1.0, 2.0):
        rng = Generator().manual_seed(0)
        probes.draw(zero, sd.encode([PROMPT]), x_t, steps=4, amount=amount, rng=rng)

    after_three = Generator().manual_seed(0)
    for _ in range(3):
        torch.randn(x_t.shape, generator=after_three)
    assert torch.equal(rng.get_state(), after_three.get_state())

    abar = ddim.alphas_cumprod()
    variance = 0.0
    for t, t_prev in ((751, 501), (501, 251), (251, 1)):
        beta = 1 - abar[t] / abar[t_prev]
        posterior = beta * (1 - abar[t_prev]) / (1 - abar[t])  # DDPM, eq. 7
        variance = variance * abar[t_prev] / abar[t] + posterior
    variance = variance * abar[0] / abar[1]
    assert latents[0].std() == pytest.approx(variance.sqrt().item(), rel=0.02)
    torch.testing.assert_close(latents[1], 2 * latents[0])


# ---- the attacks


def test_which_noises_lead_to_the_concept(sd, monkeypatch):
    """Noise 0 never shows the concept, noise i with the i-th amount; then it isn't drawn again."""
    calls = []

    def draw(model, text, x_t, steps, guidance, amount, rng):
        assert model is sd
        assert (text, steps, guidance) == ("text", 2, 4.0)
        calls.append((x_t[:, 0].tolist(), amount, rng))
        return [amount == amounts[i - 1] and i > 0 for i in calls[-1][0]]  # "images"

    def led_there(x_t):
        return probes.with_noise(
            sd, "text", x_t, shows=lambda images: images, amounts=amounts, steps=2, guidance=4.0
        )

    amounts = sorted(probes.NOISES)
    monkeypatch.setattr(probes, "draw", draw)
    assert len(set(amounts)) == 24
    assert (amounts[0], amounts[-1]) == (1, 1.85 * 1.04)

    noise = torch.arange(4)[:, None]
    assert led_there(noise) == [False, True, True, True]
    drawn = [numbers for numbers, _, _ in calls]
    assert drawn == [[0, 1, 2, 3], [0, 2, 3], [0, 3], *[[0]] * 21]
    assert [amount for _, amount, _ in calls] == amounts
    assert len({id(rng) for _, _, rng in calls}) == 1  # goes on: fresh noise for each

    assert led_there(noise[1:2]) == [True]
    assert len(calls) == 25  # none is left to draw


def test_words_are_learned_and_the_model_stays(sd, images):
    before = {name: tensor.clone() for name, tensor in sd.text_encoder.state_dict().items()}
    batch = next(probes.noised_images(sd, images, batch=2))
    ordinary, learned = (
        probes.learned_words(sd, itertools.repeat(batch), iterations=iterations, lr=0.05)
        for iterations in (0, 5)
    )
    torch.testing.assert_close(ordinary, sd.encode(["a picture image photo figure"]))

    error_before, error_after = (
        probes.denoising_error(sd.unet, text, batch) for text in (ordinary, learned)
    )
    assert error_after < error_before
    assert not learned.requires_grad

    after = sd.text_encoder.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(learned[:, :2], ordinary[:, :2])  # the start and "a"
    assert not torch.isclose(learned[:, 2], ordinary[:, 2]).all()


def test_four_words_are_learned(sd, images, monkeypatch):
    optimized = []

    def optimizer(tensors, lr):
        optimized.extend(tensors)
        return torch.optim.SGD(tensors, lr)

    monkeypatch.setattr(probes.torch.optim, "Adam", optimizer)
    batches = probes.noised_images(sd, images, batch=2)
    probes.learned_words(sd, batches, iterations=0)
    assert [each.shape for each in optimized] == [(4, sd.text_encoder.config.hidden_size)]


def test_a_hard_prompt_is_the_best_token_and_then_the_next():
    worth = {"sea": 3, "badge": 2, "film": 2, "an": 0}
    calls = []

    def score(prompts):
        calls.append(len(prompts))
        return [sum(worth.get(word, 1) for word in {*prompt.split()}) for prompt in prompts]

    assert probes.hard_prompt(PROMPT, [*worth], score) == "badge sea a star"
    assert calls == [1, 4, 4]
    assert probes.hard_prompt(PROMPT, ["sea"], score) == "sea a star"  # once more is no better
    assert probes.hard_prompt(PROMPT, ["an"], lambda prompts: [1] * len(prompts)) == PROMPT


def test_the_vocabulary_can_be_typed(sd):
    words = probes.vocabulary(sd)
    assert {"star", "badge", "an"} <= {*words}
    assert all(len(word) > 1 and "<" not in word for word in words)
    ids = [sd.tokenizer(word).input_ids for word in words]
    assert all(len(row) == 3 for row in ids)  # start, the token, end


def test_a_head_start_begins_with_noised_images(sd, images):
    text = sd.encode([PROMPT])
    noise = probes.noise(sd, range(4))
    x_t = ddim.add_noise(sd.encode_images(images), noise, ddim.alphas_cumprod()[251])
    expected = probes.draw(sd, text, x_t, steps=4, guidance=4.0, skip=2)
    found = probes.head_start(sd, text, images, noise, skip=2, steps=4, guidance=4.0)
    assert torch.equal(pixels(found), pixels(expected))


def test_relearning_stops_where_it_is_asked_to(sd, images):
    batch = next(probes.noised_images(sd, images, batch=2))
    batches = iter([batch] * 5)
    models = list(probes.relearned(sd, PROMPT, batches, stops=(0, 1, 3), lr=1e-3))
    assert len(list(batches)) == 2  # so three were learned
    assert len(models) == 3

    text = sd.encode([PROMPT]).expand(2, -1, -1)
    errors = []
    for model in models:
        predicted = model.unet(batch.x_t, batch.t, text)
        errors.append((predicted - batch.eps).square().mean())
    assert errors[0] > errors[1] > errors[2]

    pairs = zip(sd.unet.parameters(), models[0].unet.parameters())
    assert all(torch.equal(original, start) for original, start in pairs)
    pairs = zip(sd.unet.parameters(), models[-1].unet.parameters())
    assert all((original != trained).any() for original, trained in pairs)
