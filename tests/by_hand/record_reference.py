"""Records the outputs of diffusers and transformers that the tests compare with.

Only needed to record again. diffusers isn't part of this project. From the repository's root:

    pip install diffusers==0.42.1
    python -m tests.by_hand.record_reference      # writes tests/reference/
"""

import json

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from tests.support import small


def build(part: str, configs: dict) -> torch.nn.Module:
    """Returns the reference's model of a published config."""
    config = configs[part]
    if part == "unet":
        return diffusers.UNet2DConditionModel.from_config(config)
    if part == "vae":
        return diffusers.AutoencoderKL.from_config(config)
    return CLIPTextModel(CLIPTextConfig(**config))


def scheduler() -> diffusers.DDIMScheduler:
    """Returns DDIM as Stable Diffusion v1 was published."""
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def write(name: str, content: dict) -> None:
    (small.REFERENCE / name).write_text(json.dumps(content, indent=0) + "\n")


def record_layers() -> None:
    """Records names and shapes of all tensors, settings of all layers, at full size."""
    with torch.device("meta"):
        models = {part: build(part, small.PUBLISHED) for part in small.PUBLISHED}
    write("shapes.json", {part: small.shapes(model) for part, model in models.items()})
    write("settings.json", {part: small.settings(model) for part, model in models.items()})


def record_compvis_names() -> None:
    """Records CompVis's name -> diffusers' name, of all tensors; the keys are sd-v1-4.ckpt's."""
    stored = json.loads((small.REFERENCE / "compvis.json").read_text())
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
    converters = {"unet": convert_ldm_unet_checkpoint, "vae": convert_ldm_vae_checkpoint}
    for part, convert in converters.items():
        theirs = [*stored[part]]
        numbered = {}
        for i, name in enumerate(theirs):
            numbered[prefixes[part] + name] = torch.full((1, 1, 1, 1), i)

        published = convert(numbered, build(part, small.PUBLISHED).config)
        stored[part] = {theirs[int(i)]: name for name, i in published.items()}
    write("compvis.json", stored)


def model_outputs() -> dict:
    """Returns the outputs of the small models, in float64."""
    unet = small.filled(build("unet", small.SMALL))
    vae = small.filled(build("vae", small.SMALL))
    posterior = vae.encode(*small.INPUTS["vae.encode"]).latent_dist
    return {
        "unet": unet(*small.INPUTS["unet"]).sample,
        "vae.encode": torch.cat([posterior.mean, posterior.logvar], dim=1),
        "vae.decode": vae.decode(*small.INPUTS["vae.decode"]).sample,
    }


def trajectory(steps: int) -> torch.Tensor:
    """Returns x_t after every step, (steps, B, 4, H, W).

    The schedule's numbers are float32, the arithmetic is float64: not every CPU rounds a float32
    root alike.
    """
    ddim = scheduler()
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()
    ddim.final_alpha_cumprod = ddim.final_alpha_cumprod.double()
    ddim.set_timesteps(steps)
    x_t, = small.INPUTS["denoise"]
    visited = []
    for t in ddim.timesteps:
        x_t = ddim.step(small.toy_eps(x_t, t), t, x_t).prev_sample
        visited.append(x_t)
    return torch.stack(visited)


def timesteps(steps: int) -> torch.Tensor:
    ddim = scheduler()
    ddim.set_timesteps(steps)
    return ddim.timesteps


def full_size_outputs() -> dict:
    """Returns the outputs of models of the published sizes, in float32."""
    outputs = {}
    for part in small.PUBLISHED:
        model = build(part, small.PUBLISHED)
        model.load_state_dict(small.full_size_weights(model), strict=False)  # no buffers

        if part == "unet":
            outputs[part] = model(*small.FULL_SIZE_INPUTS[part]).sample
        elif part == "vae":
            posterior = model.encode(*small.FULL_SIZE_INPUTS["vae.encode"]).latent_dist
            outputs["vae.encode"] = torch.cat([posterior.mean, posterior.logvar], dim=1)
            outputs["vae.decode"] = model.decode(*small.FULL_SIZE_INPUTS["vae.decode"]).sample
        else:
            outputs[part] = model(*small.FULL_SIZE_INPUTS[part]).last_hidden_state
    return outputs


def save(name: str, outputs: dict) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in outputs.items()}
    save_file(contiguous, small.REFERENCE / name)


def main() -> None:
    record_layers()
    record_compvis_names()

    outputs = model_outputs()
    for steps in small.TRAJECTORIES:
        outputs[f"trajectory.{steps}"] = trajectory(steps)
    for steps in small.TIMESTEPS:
        outputs[f"timesteps.{steps}"] = timesteps(steps)
    outputs["abar"] = scheduler().alphas_cumprod
    outputs["add_noise"] = scheduler().add_noise(*small.INPUTS["add_noise"])
    save("outputs.safetensors", outputs)

    with torch.no_grad():
        save("full_size.safetensors", full_size_outputs())


if __name__ == "__main__":
    main()
