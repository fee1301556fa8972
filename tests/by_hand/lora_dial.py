"""Draws notebooks/tools/dial.png: a LoRA's weight as a dial from nothing erased to more than all.

    python erase.py star @notebooks/toy/flags --out runs/star-0.safetensors
    python -m notebooks.tools.export runs/star-0.safetensors --as lora \\
        --model notebooks/toy/model --out runs/star-lora.safetensors
    python -m tests.by_hand.lora_dial
"""

from safetensors.torch import load_file
from torch import Tensor

import sample

LORA = "runs/star-lora.safetensors"
WEIGHTS = (0, 0.25, 0.5, 0.75, 1, 1.5)
PROMPTS = ["a star", "a star", "a red star", "a star in the style of dots", "a heart", "a moon"]


def with_lora(weights: dict[str, Tensor], lora: dict[str, Tensor], dial: float) -> dict:
    """Returns the U-Net weights that a LoRA in kohya's form changes, at a weight of `dial`."""
    changed = {}
    for name, tensor in weights.items():
        layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{layer}.alpha" in lora:
            up = lora[f"{layer}.lora_up.weight"].float()
            down = lora[f"{layer}.lora_down.weight"].float()
            scale = lora[f"{layer}.alpha"] / len(down)
            change = (up.flatten(1) @ down.flatten(1)).view_as(tensor)
            changed[name] = tensor + dial * scale * change
    return changed


def main() -> None:
    """Draws the figure: one row for each weight."""
    sd = sample.load("notebooks/toy/model")
    lora = load_file(LORA)
    rows = []
    for dial in WEIGHTS:
        weights = with_lora(sd.unet.state_dict(), lora, dial)
        seeds = [*range(len(PROMPTS))]
        images = sample.generate(
            sample.with_weights(sd, weights), PROMPTS, seed=seeds, steps=20, guidance=5.0
        )
        rows.append((f"weight {dial}", images))
    sample.contact_sheet(rows).quantize(256).save("notebooks/tools/dial.png")


if __name__ == "__main__":
    main()
