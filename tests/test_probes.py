"""notebooks/methods/probes.py: each attack and the distance against what it says it is."""

import itertools
from dataclasses import replace

import pytest
import torch

import ddim
import sample
from notebooks.methods import probes

PROMPT = "a star"


@pytest.fixture(scope="module")
def images(sd):
    return sample.generate(sd, ["a heart", "a moon"], num=2, steps=2)


def pixels(images):
    return [image.tobytes() for image in images]


class Unet(torch.nn.Module):
    """Predicts what a function of (x_t, t, text) says."""

    def __init__(self, eps):
        super().__init__()
        self.eps, self.conv_in = eps, torch.nn.Conv2d(1, 1, 1)  # whose device is the model's

    def forward(self, x_t, t, text):
        return self.eps(x_t, t, text)


def test_noised_images_are_the_forward_process(sd, images):
    latents, abar, times = sd.encode_images(images), ddim.alphas_cumprod(), []
    for x_t, t, eps in itertools.islice(probes.noised(sd, images, batch=3), 50):
        a = abar[t][:, None, None, None]
        x_0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
        far = (x_0[:, None] - latents[None]).flatten(2).abs().amax(dim=2)  # (3, images)
        assert (far.amin(dim=1) < 1e-3 / abar[t].sqrt()).all()
        times += t.tolist()
    assert min(times) < 50 and max(times) > 950 and len(set(times)) > 100
    again = next(probes.noised(sd, images, batch=3)), next(probes.noised(sd, images, batch=3))
    other = next(probes.noised(sd, images, batch=3, seed=1))
    assert torch.equal(again[0][0], again[1][0]) and not torch.equal(again[0][0], other[0])


def test_the_denoising_error_by_hand():
    """Off by 2 everywhere; the weight is 1 where the image is faint, 5 / SNR where it is clear."""
    t, x_t = torch.tensor([0, 999]), torch.zeros(2, 4, 8, 8)
    snr = [abar / (1 - abar) for abar in ddim.alphas_cumprod()[t].tolist()]
    assert snr[0] > 5 > snr[1]
    error = probes.denoising_error(lambda x_t, t, text: x_t + text[:, :1, :1, None],
                                   torch.full((1, 77, 8), 3.0), (x_t, t, torch.ones_like(x_t)))
    assert error.item() == pytest.approx(2**2 * (5 / snr[0] + 1) / 2)


def test_an_image_is_drawn_as_generate_draws_it(sd):
    how = {"steps": 3, "guidance": 4.0}
    drawn = probes.draw(sd, sd.encode([PROMPT]), probes.noise(sd, [5, 9]), **how)
    assert pixels(drawn) == pixels(sample.generate(sd, [PROMPT] * 2, seed=[5, 9], **how))


def test_what_is_skipped_is_taken_as_done(sd):
    text, null = sd.encode([PROMPT]), sd.encode([""])
    noise = probes.noise(sd, [5])
    with torch.no_grad():
        way = list(ddim.denoise(ddim.guided(sd.unet, text, null, 5.0), noise, 4))
    whole = probes.draw(sd, text, noise, steps=4)
    assert pixels(probes.draw(sd, text, way[3][1], steps=4, skip=3)) == pixels(whole)
    assert pixels(probes.draw(sd, text, way[2][1], steps=4, skip=3)) != pixels(whole)


def test_the_noise_that_is_added_is_ddims_own(sd, monkeypatch):
    """An eps of zero leaves what was added; DDIM, eq. 16 with eta = 1, is a DDPM step's variance.

    None is added in the last step, whose result is the image.
    """
    latents = []
    monkeypatch.setattr(sample.StableDiffusion, "decode", lambda sd, x: latents.append(x))
    zero, x_t = replace(sd, unet=Unet(lambda x_t, *_: 0 * x_t)), torch.zeros(64, 4, 8, 8)
    for amount in (1.0, 2.0):
        rng = torch.Generator().manual_seed(0)
        probes.draw(zero, sd.encode([PROMPT]), x_t, steps=4, amount=amount, rng=rng)
    after_three = torch.Generator().manual_seed(0)
    for _ in range(3):
        torch.randn(x_t.shape, generator=after_three)
    assert torch.equal(rng.get_state(), after_three.get_state())
    abar, variance = ddim.alphas_cumprod(), 0.0
    for t, t_prev in ((751, 501), (501, 251), (251, 1)):
        beta = 1 - abar[t] / abar[t_prev]
        posterior = beta * (1 - abar[t_prev]) / (1 - abar[t])  # DDPM, eq. 7
        variance = variance * abar[t_prev] / abar[t] + posterior
    variance = variance * abar[0] / abar[1]
    assert latents[0].std() == pytest.approx(variance.sqrt().item(), rel=0.02)
    torch.testing.assert_close(latents[1], 2 * latents[0])


def test_the_24_amounts_of_noise(sd, monkeypatch):
    """Noise 0 never shows the concept, noise i with the i-th amount; then it isn't asked again."""
    asked = []

    def draw(model, text, x_t, amount, rng, steps):
        assert model is sd and text == "text" and steps == 2
        asked.append((x_t[:, 0].tolist(), amount, rng))
        return [amount == amounts[i - 1] and i > 0 for i in asked[-1][0]]  # "images"

    amounts = sorted(probes.NOISES)
    monkeypatch.setattr(probes, "draw", draw)
    monkeypatch.setattr(probes, "NOISES", amounts)
    assert len(set(amounts)) == 24 and (amounts[0], amounts[-1]) == (1, 1.85 * 1.04)
    noise = torch.arange(4)[:, None]
    assert probes.with_noise(sd, "text", noise, lambda images: images, steps=2) == 3
    assert [numbers for numbers, _, _ in asked] == [
        [0, 1, 2, 3], [0, 2, 3], [0, 3], *[[0]] * 21]
    assert [amount for _, amount, _ in asked] == amounts
    assert len({id(rng) for _, _, rng in asked}) == 1  # goes on: fresh noise for each
    assert probes.with_noise(sd, "text", noise[1:2], lambda images: images, steps=2) == 1
    assert len(asked) == 25  # none is left to ask


def test_words_are_learned_and_the_model_stays(sd, images):
    before = {name: tensor.clone() for name, tensor in sd.text_encoder.state_dict().items()}
    batch = next(probes.noised(sd, images, batch=2))
    ordinary, learned = (probes.learned_words(sd, itertools.repeat(batch), iterations, lr=0.05)
                         for iterations in (0, 5))
    torch.testing.assert_close(ordinary, sd.encode(["a picture image photo figure"]))
    errors = [probes.denoising_error(sd.unet, text, batch) for text in (ordinary, learned)]
    assert errors[1] < errors[0] and not learned.requires_grad
    after = sd.text_encoder.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(learned[:, :2], ordinary[:, :2])  # the start and "a"
    assert not torch.isclose(learned[:, 2], ordinary[:, 2]).all()


def test_a_hard_prompt_is_the_best_token_and_then_the_next():
    worth, asked = {"sea": 3, "badge": 2, "film": 2, "an": 0}, []

    def score(prompts):
        asked.append(len(prompts))
        return [sum(worth.get(word, 1) for word in {*prompt.split()}) for prompt in prompts]

    assert probes.hard_prompt(PROMPT, [*worth], score) == "badge sea a star"
    assert asked == [1, 4, 4]
    assert probes.hard_prompt(PROMPT, ["sea"], score) == "sea a star"  # once more is no better
    assert probes.hard_prompt(PROMPT, ["an"], lambda prompts: [1] * len(prompts)) == PROMPT


def test_the_vocabulary_can_be_typed(sd):
    words = probes.vocabulary(sd)
    assert {"star", "badge", "an"} <= {*words}
    assert all(len(word) > 1 and "<" not in word for word in words)
    ids = [sd.tokenizer(word).input_ids for word in words]
    assert all(len(row) == 3 for row in ids)  # start, the token, end


def test_a_head_start_begins_with_noised_images(sd, images):
    text, noise = sd.encode([PROMPT]), probes.noise(sd, range(4))
    x_t = ddim.add_noise(sd.encode_images(images), noise, ddim.alphas_cumprod()[251])
    expected = probes.draw(sd, text, x_t, steps=4, skip=2)
    found = probes.head_start(sd, text, images, noise, skip=2, steps=4)
    assert pixels(found) == pixels(expected)


def test_relearning_stops_where_it_is_asked_to(sd, images):
    batch = next(probes.noised(sd, images, batch=2))
    batches = iter([batch] * 5)
    models = list(probes.relearned(sd, PROMPT, batches, (0, 1, 3), lr=1e-3))
    assert len(list(batches)) == 2  # so three were learned
    text = sd.encode([PROMPT])
    errors = [(model.unet(*batch[:2], text.expand(2, -1, -1)) - batch[2]).square().mean()
              for model in models]
    assert errors[0] > errors[1] > errors[2] and len(models) == 3
    assert all(torch.equal(a, b) for a, b in zip(sd.unet.parameters(),
                                                 models[0].unet.parameters()))


def test_the_distance_of_two_models(sd, images):
    signs = torch.tensor([1, -1]).repeat(4)  # differences that would cancel in a mean
    one, other = (replace(sd, unet=Unet(lambda x_t, *_, shift=shift: x_t + shift * signs))
                  for shift in (1.0, -0.5))
    distances = probes.eps_distances(one, other, PROMPT, probes.noised(sd, images), count=3)
    assert distances == pytest.approx([1.5] * 3)
    assert probes.eps_distances(sd, sd, PROMPT, probes.noised(sd, images), count=2) == [0, 0]
